"""A sweep as it is planned, and its folder, `outputs/sweeps/<name>`: which cells it consists of.

The cells lie in the one pool, `outputs/cells`, frozen before the manifest names them; so a manifest never
names a cell that cannot be run, and a kill in between costs nothing.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dash_exp.errors import Fault, UserError
from dash_exp.record.folder import read_json, write_json
from dash_exp.record.identity import Cell, freeze
from dash_exp.record.locks import take_lock
from dash_exp.record.reading import Row, read_record

FORMAT = 1
NAME = "manifest.json"
SWEEP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")


@dataclass(frozen=True, slots=True, order=True)
class Resources:
    """What one cell asks a machine or a cluster for; equal ones share a job array. `gpus`, `cpus`: of the
    whole cell; `memory_gb`: of each of its `nodes`; `tasks`: processes that srun starts (ranks on several
    nodes), else 1."""

    gpus: int
    cpus: int
    memory_gb: int
    minutes: int
    nodes: int = 1
    tasks: int = 1

    def __str__(self) -> str:
        nodes = f"{self.nodes} nodes, " if self.nodes > 1 else ""
        hours, minutes = divmod(self.minutes, 60)
        return f"{nodes}{self.gpus} GPU, {self.cpus} CPU, {self.memory_gb} GB, {hours}h{minutes:02d}m"


@dataclass(frozen=True, slots=True)
class Traces:
    """A file of a teacher's traces that cells wait for, and the arguments of `python -m dash_exp.traces`
    that make it."""

    path: Path
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PlannedCell:
    """A cell that can be frozen. `needs`: ids of cells that must be finished before it starts."""

    cell: Cell
    overrides: tuple[str, ...]
    resources: Resources
    needs: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return self.cell.id

    @property
    def folder_name(self) -> str:
        return f"{self.cell.name}-{self.cell.id}"


@dataclass(frozen=True, slots=True)
class Waiting:
    """Overrides whose cell has no id yet: what it learns from, `traces`, has not been made."""

    overrides: tuple[str, ...]
    traces: Traces


@dataclass(frozen=True, slots=True)
class Plan:
    """A sweep before anything is written. `duplicates`: combinations that named a cell another one
    had named already. `actions`: settings of `run`, `tracking`, `cluster` and `paths`, as key=value, that
    every cell is started with."""

    name: str
    cells: tuple[PlannedCell, ...]
    waiting: tuple[Waiting, ...] = ()
    duplicates: int = 0
    actions: tuple[str, ...] = ()
    about: Mapping[str, object] | None = None
    """Of a sweep file: `claim`, `feeds`, `source`."""


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
        known = read_intact(folder)
        _refuse_other(known, plan, folder)
        finished = {c.id for c in plan.cells if _state(root, c) == "finished"}
        for cell in plan.cells:
            path = cell.cell.folder(root)
            freeze(cell.cell.frozen, path, cell.cell.sources)
            first_status(path, [need for need in cell.needs if need not in finished])
        value = {
            "format": FORMAT,
            "name": plan.name,
            "created": known.get("created", time.time()),
            "about": dict(plan.about or {}),
            "actions": list(plan.actions),
            "cells": [cell_row(cell) for cell in plan.cells],
            "waiting": [waiting_row(one) for one in plan.waiting],
        }
        write_json(folder / NAME, value)
    return read(folder)


def _state(root: Path, cell: PlannedCell) -> str:
    return str(read_json(cell.cell.folder(root) / "status.json").get("state", "pending"))


def cell_row(cell: PlannedCell) -> dict[str, Any]:
    """A planned cell as the manifest lists it."""
    return {
        "id": cell.id,
        "folder": cell.folder_name,
        "overrides": list(cell.overrides),
        "resources": asdict(cell.resources),
        "needs": list(cell.needs),
    }


def waiting_row(waiting: Waiting) -> dict[str, Any]:
    """Overrides that wait for traces, as the manifest lists them."""
    traces = waiting.traces
    return {
        "overrides": list(waiting.overrides),
        "traces": str(traces.path),
        "arguments": list(traces.arguments),
    }


def _refuse_other(known: dict[str, Any], plan: Plan, folder: Path) -> None:
    """A sweep may grow (more seeds, cells whose traces have been made); it does not change."""
    before = {row["id"] for row in known.get("cells", ())}
    lost = before - {cell.id for cell in plan.cells}
    if lost:
        what = f"{folder} is another sweep: {len(lost)} of its {len(before)} cells are not in this one"
        hint = "choose another name (run.sweep=...), since a sweep can only grow; launching"
        raise UserError(Fault("run.sweep", what, f"{hint} {folder} itself continues its own frozen cells"))


def read_intact(folder: Path) -> Row:
    """A sweep's manifest as it is written; {} where there is none. Raises UserError where it is damaged."""
    read = read_record(folder / NAME)
    if read.damage:
        hint = f"restore it, or move {folder} away and launch the sweep again: finished cells are kept"
        raise UserError([one.fault(hint) for one in read.damage], "nothing was changed")
    return read.value


def first_status(folder: Path, needs: Sequence[str]) -> None:
    """Record `pending` or `blocked` if there is no status yet; the status of a run is never replaced."""
    path = folder / "status.json"
    if path.exists():
        return
    state, more = ("blocked", {"reason": f"waits for {', '.join(needs)}"}) if needs else ("pending", {})
    temporary = folder / f".status.json.first.{os.getpid()}"
    facts = {"attempt": 0, "step": 0, "heartbeat": time.time(), "failure": None}
    write_json(temporary, {"state": state, **facts, **more})
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def read(folder: Path) -> Manifest:
    """Raises UserError where there is no manifest or it is damaged."""
    value = read_intact(folder)
    if not value:
        what = "holds no manifest.json, so it is not a sweep's folder"
        raise UserError(Fault(str(folder), what, "python -m dash_exp.sweep list names them"))
    if value["format"] > FORMAT:
        raise UserError(Fault(str(folder / NAME), f"has format {value['format']}, known here: {FORMAT}"))
    entries = []
    for row in value["cells"]:
        overrides, resources = tuple(row["overrides"]), Resources(**row["resources"])
        entries.append(Entry(row["id"], row["folder"], overrides, resources, tuple(row["needs"])))
    waiting = tuple(
        Waiting(tuple(row["overrides"]), Traces(Path(row["traces"]), tuple(row["arguments"])))
        for row in value["waiting"]
    )
    name, about, created = (value[key] for key in ("name", "about", "created"))
    renamed = {"tracking.name=mlflow": "tracking.mlflow=true", "tracking.name=none": "tracking.mlflow=false"}
    root, actions = folder.parent.parent, tuple(renamed.get(text, text) for text in value["actions"])
    return Manifest(name, folder, root, tuple(entries), waiting, actions, about, created)


def folders_below(root: Path) -> list[Path]:
    """Folders of all sweeps launched below this root, by name."""
    return sorted(path for path in (root / "sweeps").glob("*") if os.path.lexists(path / NAME))


def read_all(root: Path) -> tuple[list[Manifest], list[Fault]]:
    """All sweeps launched below this root, and what is wrong with those that cannot be read."""
    found: list[Manifest] = []
    faults: list[Fault] = []
    for folder in folders_below(root):
        try:
            found.append(read(folder))
        except UserError as error:
            faults += error.faults
    return found, faults


@contextmanager
def held(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Hold a sweep's lock: one writer at a time, on this machine and, if the file system can, on others."""
    descriptor = take_lock(folder / name, wait=True)
    try:
        yield
    finally:
        os.close(descriptor)
