"""Bring trackers up to date with the records:

    python -m dash_exp.mirror <folders> [tracking=mlflow,wandb,tensorboard] [tracking.uri=...]

    python -m dash_exp.mirror outputs/sweeps/<name> report=<folder>      attach a report that was made of it

Folders of cells, of sweeps, or of outputs; MLflow unless others are named. What a tracker holds already is
not sent again, so a second call changes nothing. Without tracking.uri: the variable MLFLOW_TRACKING_URI, else
a database in the outputs folder, mlflow.db. docs/tracking.md says more. (`--follow` is for the process beside
a run.)
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from dash_exp.config.environment import is_installed
from dash_exp.config.schema import TrackingConfig, changed
from dash_exp.config.tracking import TRACKERS, URI, VARIABLE, MirrorPlace, places_of, tracking_faults
from dash_exp.errors import ExitCode, Fault, UserError, nearest, run_command
from dash_exp.mirror.follow import follow
from dash_exp.mirror.mlflow import MLflowStore
from dash_exp.mirror.store import StoreError, open_store
from dash_exp.mirror.sync import (
    BusyError,
    CellSync,
    cell_lock,
    record_damage,
    sweep_run,
    sweeps_below,
    sync_sweep,
)
from dash_exp.record.manifest import NAME as MANIFEST
from dash_exp.record.manifest import Manifest, read_all
from dash_exp.record.reading import summary
from dash_exp.text import printable

NAME_WIDTH = 52
TO_LOOK = {
    "mlflow": "mlflow ui --backend-store-uri {}",
    "tensorboard": "tensorboard --logdir {}",
    "wandb": "wandb sync {}/*/wandb/offline-run-*",
}
KEYS = ("tracking", *(f"tracking.{one.name}" for one in fields(TrackingConfig) if one.name not in TRACKERS))
KINDS = "name folders of cells, of sweeps, or of outputs"


def parse(arguments: Sequence[str]) -> tuple[list[Path], TrackingConfig]:
    """Folders, and settings of tracking. Raises UserError with every argument that is neither."""
    folders, faults = [], []
    tracking = TrackingConfig(mlflow=True)
    for text in arguments:
        key, equals, value = text.partition("=")
        if not equals or Path(text).exists():
            folders.append(Path(text))
        elif key not in KEYS:
            faults.append(Fault(key, "is not a setting of the mirror", nearest(key, KEYS)))
        elif key == "tracking":
            named = value.strip("[]").split(",")
            faults += [Fault(key, f"got {one!r}", nearest(one, TRACKERS)) for one in {*named} - {*TRACKERS}]
            tracking = changed(tracking, {name: name in named for name in TRACKERS})
        else:
            typed = float(value) if key.endswith("every_s") else value
            tracking = changed(tracking, {key.partition(".")[2]: typed})
    if not folders:
        faults.append(Fault("usage", "python -m dash_exp.mirror <folders> [tracking.uri=...]", KINDS))
    faults += tracking_faults(tracking, is_installed)
    if faults:
        raise UserError(faults, "nothing was mirrored")
    return folders, tracking


def find_records(folders: Sequence[Path]) -> dict[Path, tuple[dict[Path, None], dict[str, Manifest]]]:
    """The cells and sweeps that these folders stand for, by outputs folder. Raises UserError with every
    folder that holds neither."""
    found: dict[Path, tuple[dict[Path, None], dict[str, Manifest]]] = {}
    faults = []
    for folder in folders:
        root, sweeps, cells = _contents(folder.resolve())
        if not cells and not sweeps:
            what = "holds no cell" if folder.is_dir() else "is no folder"
            faults.append(Fault(str(folder), what, KINDS))
        known = found.setdefault(root, ({}, {}))
        known[0].update(dict.fromkeys(cells))
        known[1].update({one.name: one for one in sweeps})
    if faults:
        raise UserError(faults, "nothing was mirrored")
    return found


def _contents(folder: Path) -> tuple[Path, list[Manifest], list[Path]]:
    """The outputs folder, sweeps and cells that a folder stands for."""
    if os.path.lexists(folder / "config.yaml"):
        return folder.parent.parent, [], [folder]
    if (folder / MANIFEST).exists():
        root = folder.parent.parent
        sweeps = [one for one in sweeps_below(root) if one.folder == folder]
    else:
        root = folder.parent if folder.name in ("cells", "sweeps") else folder
        sweeps = [] if folder.name == "cells" else sweeps_below(root)
        if folder.name != "sweeps":
            return (
                root,
                sweeps,
                [
                    cell
                    for cell in sorted((root / "cells").glob("*"))
                    if os.path.lexists(cell / "config.yaml")
                ],
            )
    cells = sorted({one.cell(entry) for one in sweeps for entry in one.entries})
    return root, sweeps, [cell for cell in cells if cell.is_dir()]


def rebuild(
    root: Path, cells: Sequence[Path], sweeps: dict[str, Manifest], place: MirrorPlace, report: Path | None
) -> Iterator[Fault]:
    """Sync all cells and sweeps, and print what was done. Yields faults of cells. Raises StoreError."""
    store, known = open_store(place), sweeps_below(root)
    yield from read_all(root)[1]
    print(f"mirror: {place.shown}, experiment {place.experiment}")
    counts: Counter[str] = Counter()
    values = 0
    for folder in cells:
        cell = CellSync(folder, store, known)
        try:
            with cell_lock(folder, place):
                sent = cell.sync()
        except BusyError:
            counts["followed by their runs"] += 1
            continue
        except UserError as error:
            yield from error.faults
            continue
        except StoreError as error:
            store.check()  # raises if the server does not answer at all
            yield Fault(str(folder), f"was refused by {TRACKERS[place.tracker]}: {error}")
            continue
        if damage := record_damage(folder):
            yield Fault(str(folder), f"is damaged: {summary(damage)}", "the rest of it was mirrored")
        if sent is None or cell.run is None:
            counts["unchanged" if cell.run else "not started"] += 1
            continue
        counts["brought up to date"] += 1
        values += sent
        sweeps |= {one.name: one for one in cell.sweeps}
        name = folder.name
        name = name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 10]}.{name[-9:]}"
        print(f"  {printable(name):<{NAME_WIDTH}} {cell.run.status:<9} {sent:>8,} values", flush=True)
    for sweep in sweeps.values():
        sync_sweep(store, sweep)
        if report and isinstance(store, MLflowStore):
            store.log_folder(sweep_run(store, sweep.name, sweep.created), report, "report")
            print(f"  {printable(sweep.name):<{NAME_WIDTH}} report attached")
    sums = (f"{n} {what}" + (f" ({values:,} values)" if "date" in what else "") for what, n in counts.items())
    print(f"{len(cells)} cells: {', '.join(sums) or 'none could be mirrored'}")


def run(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--follow"]:  # <cell folder> --attempt=<n> [tracking...], as a run starts it
        _, folder, attempt, *settings = arguments
        return follow(Path(folder), parse([folder, *settings])[1], int(attempt.partition("=")[2]))
    folders, tracking = parse([text for text in arguments if not text.startswith("report=")])
    report = next((Path(text[7:]) for text in arguments if text.startswith("report=")), None)
    if report and not (report / "report.html").is_file():
        what = f"{report} holds no report.html"
        raise UserError(
            Fault("report", what, "make it: dash-exp report <folder> --out <it>"), "nothing was mirrored"
        )
    faults: list[Fault] = []
    for root, (cells, sweeps) in find_records(folders).items():
        for place in places_of(tracking, root):
            try:
                faults += rebuild(root, list(cells), dict(sweeps), place, report)
            except StoreError as error:
                where = URI if tracking.uri or not os.environ.get(VARIABLE) else VARIABLE
                hint = "the same command sends what is missing once it can be used"
                fault = Fault(where, f"{place.shown} cannot be used: {error}", hint)
                raise UserError(fault, "the mirror is incomplete") from error
            if place.tracker != "mlflow" or place.file:
                print(f"to look at it: {TO_LOOK[place.tracker].format(place.shown)}")
    if faults:
        raise UserError(faults, "the others were mirrored")
    return ExitCode.OK


def main(arguments: Sequence[str]) -> int:
    return run_command(run, arguments, usage=str(__doc__))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
