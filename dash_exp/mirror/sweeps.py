"""Which sweeps a cell belongs to, and how a sweep is doing as a whole. Torch-free, imports no MLflow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dash_exp.mirror.facts import STATUS, state_of
from dash_exp.mirror.points import milliseconds
from dash_exp.record import journal, manifest
from dash_exp.record.folder import read_json


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep as its manifest has it. `cells`: names of folders in the pool; `created_ms`: since 1970."""

    name: str
    folder: Path
    created_ms: int
    claim: str
    cells: frozenset[str]


def sweep_in(folder: Path) -> Sweep | None:
    """The sweep of a folder; None where there is none, or its manifest cannot be read."""
    value = read_json(folder / manifest.NAME)
    try:
        claim = str(value.get("about", {}).get("claim") or "")
        cells = frozenset(str(row["folder"]) for row in value["cells"])
        return Sweep(str(value["name"]), folder, milliseconds(float(value["created"])), claim, cells)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def sweeps_below(root: Path) -> list[Sweep]:
    """All sweeps of an outputs folder, oldest first."""
    found = [sweep_in(path.parent) for path in (root / "sweeps").glob(f"*/{manifest.NAME}")]
    return sorted((one for one in found if one), key=lambda one: (one.created_ms, one.name))


def sweeps_of(folder: Path, sweeps: Sequence[Sweep]) -> list[Sweep]:
    """Those that a cell belongs to: first the one that started it first, then by age. A sweep may get an
    older cell later, so its age alone does not say who was first."""
    order: dict[str, int] = {}
    for place, row in enumerate(journal.read(folder)):
        if row.get("sweep"):
            order.setdefault(str(row["sweep"]), place)
    mine = [one for one in sweeps if folder.name in one.cells]
    return sorted(mine, key=lambda one: order.get(one.name, math.inf))


def status_of(states: Sequence[str]) -> str:
    """Of a whole sweep, in MLflow's words: what goes on, else what is still to come, else the worst end."""
    order = ("running", "pending", "failed", "interrupted", "cancelled", "blocked", "finished")
    return STATUS[next((state for state in order if state in states), "pending")]


def standing(sweep: Sweep) -> tuple[str, int]:
    """The status of a sweep now, and when its last cell said something (ms since the epoch)."""
    states, last = [], 0
    for name in sorted(sweep.cells):
        folder = sweep.folder.parent.parent / "cells" / name
        status = read_json(folder / "status.json")
        running = status.get("state") == "running"
        provenance = read_json(folder / "provenance.json") if running else {}
        states.append(state_of(folder, status, provenance))
        last = max(last, milliseconds(float(status.get("heartbeat", 0.0))))
    return status_of(states), last
