"""What travels through a sweep: a spec is expanded to overrides, planned to cells, written to a manifest,
and dispatched. Frozen, torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dash_exp.record.identity import Cell


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
    """A whole sweep, before anything is written. `duplicates`: combinations that named a cell another one
    had named already. `actions`: settings of `run`, `tracking`, `cluster` and `paths`, as key=value, that
    every cell is started with."""

    name: str
    cells: tuple[PlannedCell, ...]
    waiting: tuple[Waiting, ...] = ()
    duplicates: int = 0
    actions: tuple[str, ...] = ()
    about: Mapping[str, object] | None = None
    """Of a sweep file: `claim`, `feeds`, `source`."""
