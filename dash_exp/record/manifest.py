"""A sweep's folder, `outputs/sweeps/<name>`: which cells it consists of. Torch-free.

The cells lie in the one pool, `outputs/cells`, frozen before the manifest names them; so a manifest never
names a cell that cannot be run, and a kill in between costs nothing.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dash_exp.errors import Fault, UserError
from dash_exp.record.folder import read_json, write_json
from dash_exp.record.identity import freeze
from dash_exp.record.jobs import Plan, PlannedCell, Resources, Traces, Waiting

FORMAT = 1
NAME = "manifest.json"
SWEEP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")


@dataclass(frozen=True, slots=True)
class Entry:
    """A cell of a sweep. `folder` is its name in the pool."""

    id: str
    folder: str
    overrides: tuple[str, ...]
    resources: Resources
    needs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """A sweep as written. `folder`: its own; `root`: of all outputs."""

    name: str
    folder: Path
    root: Path
    entries: tuple[Entry, ...]
    waiting: tuple[Waiting, ...]
    actions: tuple[str, ...]
    about: dict[str, Any]
    created: float

    def cell(self, entry: Entry) -> Path:
        return self.root / "cells" / entry.folder


def sweep_folder(root: Path, name: str) -> Path:
    return root / "sweeps" / name


def write(plan: Plan, root: Path) -> Manifest:
    """Freeze every cell, then write (or extend) the manifest. Raises UserError where another sweep has the
    name; OSError is the caller's to turn into a fault."""
    folder = sweep_folder(root, plan.name)
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        known = read_json(folder / NAME)
        _refuse_other(known, plan, folder)
        finished = {c.id for c in plan.cells if _state(root, c) == "finished"}
        for cell in plan.cells:
            path = cell.cell.folder(root)
            freeze(cell.cell.frozen, path)
            first_status(path, [need for need in cell.needs if need not in finished])
        value = {
            "format": FORMAT,
            "name": plan.name,
            "created": known.get("created", time.time()),
            "about": dict(plan.about or {}),
            "actions": list(plan.actions),
            "cells": [_row(cell) for cell in plan.cells],
            "waiting": [
                {
                    "overrides": list(w.overrides),
                    "traces": str(w.traces.path),
                    "arguments": list(w.traces.arguments),
                }
                for w in plan.waiting
            ],
        }
        write_json(folder / NAME, value)
    return read(folder)


def _state(root: Path, cell: PlannedCell) -> str:
    return str(read_json(cell.cell.folder(root) / "status.json").get("state", "pending"))


def _row(cell: PlannedCell) -> dict[str, Any]:
    return {
        "id": cell.id,
        "folder": cell.folder_name,
        "overrides": list(cell.overrides),
        "resources": asdict(cell.resources),
        "needs": list(cell.needs),
    }


def _refuse_other(known: dict[str, Any], plan: Plan, folder: Path) -> None:
    """A sweep may grow (more seeds, cells whose traces have been made); it does not change."""
    before = {row["id"] for row in known.get("cells", ())}
    lost = before - {cell.id for cell in plan.cells}
    if lost:
        raise UserError(
            Fault(
                "run.sweep",
                f"{folder} is another sweep: {len(lost)} of its {len(before)} cells are not in this one",
                f"choose another name (run.sweep=...): a sweep can only grow; {folder} as a name goes on "
                "with its own cells, as they are frozen",
            )
        )


def first_status(folder: Path, needs: Sequence[str]) -> None:
    """Say `pending` or `blocked` where nothing has been said yet; what a run says is never replaced."""
    path = folder / "status.json"
    if path.exists():
        return
    state, more = ("blocked", {"reason": f"waits for {', '.join(needs)}"}) if needs else ("pending", {})
    temporary = folder / f".status.json.first.{os.getpid()}"
    write_json(
        temporary,
        {"state": state, "attempt": 0, "step": 0, "heartbeat": time.time(), "failure": None, **more},
    )
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def read(folder: Path) -> Manifest:
    """Raises UserError where there is no manifest or it cannot be read."""
    value = read_json(folder / NAME)
    if not value:
        raise UserError(
            Fault(
                str(folder),
                "holds no manifest.json, so it is not a sweep's folder",
                "python -m dash_exp.sweep list names them",
            )
        )
    if value["format"] > FORMAT:
        raise UserError(Fault(str(folder / NAME), f"has format {value['format']}, known here: {FORMAT}"))
    entries = tuple(
        Entry(
            row["id"],
            row["folder"],
            tuple(row["overrides"]),
            Resources(**row["resources"]),
            tuple(row["needs"]),
        )
        for row in value["cells"]
    )
    waiting = tuple(
        Waiting(tuple(row["overrides"]), Traces(Path(row["traces"]), tuple(row["arguments"])))
        for row in value["waiting"]
    )
    return Manifest(
        value["name"],
        folder,
        folder.parent.parent,
        entries,
        waiting,
        tuple(value["actions"]),
        value["about"],
        value["created"],
    )


@contextmanager
def held(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Hold a sweep's lock: one writer at a time, here and (where the file system can) on other machines."""
    descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
