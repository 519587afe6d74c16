"""Bring MLflow up to date with the records:

    python -m dash_exp.mirror <folders> [tracking.uri=...] [tracking.experiment=...]

Folders of cells, of sweeps, or of outputs. What MLflow holds already is not sent again, so a second call
changes nothing. Without tracking.uri: the variable MLFLOW_TRACKING_URI, else a database in the outputs
folder, mlflow.db. docs/tracking.md says more. (`--follow` is for the process beside a run.)
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from dash_exp.config.environment import is_installed
from dash_exp.config.schema import TrackingConfig
from dash_exp.config.tracking import URI, VARIABLE, Place, place_of, tracking_faults
from dash_exp.errors import ExitCode, Fault, UserError, nearest, print_error, run_command
from dash_exp.mirror.cell import BusyError, CellMirror, alone, sweep_run, tell_sweep
from dash_exp.mirror.mlflow import Store, StoreError
from dash_exp.mirror.points import milliseconds
from dash_exp.mirror.sweeps import Sweep, sweep_in, sweeps_below
from dash_exp.record.manifest import NAME as MANIFEST

NAME_WIDTH = 52
SENT = "brought up to date"
EVERY = "tracking.every_s"
KEYS = tuple(f"tracking.{one.name}" for one in fields(TrackingConfig) if one.name != "name")


@dataclass(frozen=True, slots=True)
class Work:
    """What was asked for below one outputs folder: cells, and sweeps that are told how they stand."""

    root: Path
    cells: tuple[Path, ...]
    sweeps: tuple[Sweep, ...]


def prepare(uri: str, experiment: str, sweep_name: str) -> None:
    """Before a sweep's cells start: create the schema, the experiment and the sweep's run, once. A server
    that does not answer is said on stderr and stops nobody: every cell's own process tries again."""
    place = Place(uri, experiment)
    try:
        sweep_run(Store(place), sweep_name, milliseconds(time.time()))
    except StoreError as error:
        print_error(f"mirror: {place.shown} is left for later: {error}")


def rebuild(work: Work, place: Place) -> list[Fault]:
    """Bring every cell's run up to date, and say so. Returns faults of single cells. Raises StoreError."""
    store, known = Store(place), sweeps_below(work.root)
    print(f"mirror: {place.shown}, experiment {place.experiment}")
    counts: Counter[str] = Counter()
    faults: list[Fault] = []
    sweeps = {one.name: one for one in work.sweeps}
    for folder in work.cells:
        mirror = CellMirror(folder, store, known)
        try:
            told, sent = mirror_one(mirror)
        except UserError as error:
            faults += error.faults
            continue
        counts[told] += 1
        counts["values"] += sent
        sweeps |= {one.name: one for one in mirror.sweeps} if told == SENT else {}
    for sweep in sweeps.values():
        tell_sweep(store, sweep)
    values = f" ({counts.pop('values', 0):,} values)"
    told = ", ".join(f"{n} {what}{values if what == SENT else ''}" for what, n in counts.items())
    print(f"{len(work.cells)} cells: {told or 'none could be mirrored'}")
    return faults


def mirror_one(mirror: CellMirror) -> tuple[str, int]:
    """What became of a cell, and how many values were sent. Raises StoreError where nobody answers, UserError
    where this cell is damaged or refused."""
    folder = mirror.folder
    try:
        with alone(folder, mirror.store.place):
            sent = mirror.whole()
    except BusyError:
        return "followed by their runs", 0
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(Fault(str(folder), f"is damaged: {type(error).__name__}: {error}")) from error
    except StoreError as error:
        mirror.store.check()
        raise UserError(Fault(str(folder), f"was refused by MLflow: {error}")) from error
    if sent is None:
        return ("unchanged" if mirror.attached else "not started"), 0
    name = folder.name
    name = name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 10]}.{name[-9:]}"
    print(f"  {name:<{NAME_WIDTH}} {mirror.status:<9} {sent:>8,} values", flush=True)
    return SENT, sent


def works_of(folders: Sequence[str]) -> list[Work]:
    """What these folders hold, by outputs folder. Raises UserError with every folder that holds nothing."""
    found: dict[Path, tuple[dict[Path, None], dict[str, Sweep]]] = {}
    faults = []
    for text in folders:
        folder = Path(text).resolve()
        root, cells, sweeps = contents(folder)
        if not cells and not sweeps:
            what = "holds no cell" if folder.is_dir() else "is no folder"
            faults.append(Fault(text, what, "name folders of cells, of sweeps, or of outputs"))
            continue
        known = found.setdefault(root, ({}, {}))
        known[0].update(dict.fromkeys(cells))
        known[1].update({one.name: one for one in sweeps})
    if faults:
        raise UserError(faults, "nothing was mirrored")
    return [Work(root, tuple(cells), tuple(sweeps.values())) for root, (cells, sweeps) in found.items()]


def contents(folder: Path) -> tuple[Path, list[Path], list[Sweep]]:
    """The outputs folder, cells and sweeps that a folder stands for."""
    if (folder / "config.yaml").exists():
        return folder.parent.parent, [folder], []
    if (folder / MANIFEST).exists():
        sweep, root = sweep_in(folder), folder.parent.parent
        cells = [root / "cells" / name for name in sorted(sweep.cells)] if sweep else []
        return root, [one for one in cells if one.is_dir()], [sweep] if sweep else []
    root = folder.parent if folder.name in ("cells", "sweeps") else folder
    sweeps = [] if folder.name == "cells" else sweeps_below(root)
    if folder.name == "sweeps":
        names = sorted({name for one in sweeps for name in one.cells})
        return root, [path for path in (root / "cells" / name for name in names) if path.is_dir()], sweeps
    return root, sorted(path.parent for path in (root / "cells").glob("*/config.yaml")), sweeps


def parse(arguments: Sequence[str]) -> tuple[list[str], TrackingConfig]:
    """Folders, and settings of tracking. Raises UserError with every argument that is neither."""
    folders, faults = [], []
    tracking = TrackingConfig(name="mlflow")
    for text in arguments:
        key, equals, value = text.partition("=")
        if not equals or Path(text).exists():
            folders.append(text)
        elif key not in KEYS:
            faults.append(Fault(key, "is not a setting of the mirror", nearest(key, KEYS)))
        elif key == EVERY:
            tracking.every_s = float(value)
        else:
            setattr(tracking, key.partition(".")[2], value)
    if not folders:
        faults.append(
            Fault(
                "usage",
                "python -m dash_exp.mirror <folders> [tracking.uri=...]",
                "name folders of cells, of sweeps, or of outputs",
            )
        )
    faults += tracking_faults(tracking, is_installed)
    if faults:
        raise UserError(faults, "nothing was mirrored")
    return folders, tracking


def run(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--follow"]:
        return run_beside(arguments[1:])
    folders, tracking = parse(arguments)
    faults: list[Fault] = []
    for work in works_of(folders):
        place = place_of(tracking, work.root)
        try:
            faults += rebuild(work, place)
        except StoreError as error:
            where = URI if tracking.uri or not os.environ.get(VARIABLE) else VARIABLE
            raise UserError(
                Fault(
                    where,
                    f"{place.shown} cannot be used: {error}",
                    "when it can be, the same command sends what is lacking",
                ),
                "the mirror is not whole",
            ) from error
        if place.file:
            print(f"to look at it: mlflow ui --backend-store-uri {place.shown}")
    if faults:
        raise UserError(faults, "the others were mirrored")
    return ExitCode.OK


def run_beside(arguments: Sequence[str]) -> int:
    """`--follow <cell folder> --attempt=<n> [tracking...]`, as a run starts it."""
    from dash_exp.mirror.beside import follow

    folder, attempt, *settings = arguments
    (folder,), tracking = parse([folder, *settings])
    return follow(Path(folder), tracking, int(attempt.partition("=")[2]))


def main(arguments: Sequence[str]) -> int:
    return run_command(run, arguments, usage=str(__doc__))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
