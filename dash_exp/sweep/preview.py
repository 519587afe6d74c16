"""What a plan would do, in full, with nothing written: cells, states, resources, hours. Torch-free."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from dash_exp.record import provenance
from dash_exp.record.folder import read_json
from dash_exp.record.jobs import Plan, PlannedCell, Resources
from dash_exp.sweep.estimate import LOADER, hours_by_profile, profile
from dash_exp.sweep.lookup import labels, launched_folders
from dash_exp.sweep.states import CellState, states_of

NEW = "new"
"""The state of a cell that has no folder yet."""


@dataclass(frozen=True, slots=True)
class Line:
    """A planned cell. `hours`: of a whole run, by finished cells like it; None: there are none. `rest`: the
    share of it that is still to be done. `shared`: other sweeps here that hold it."""

    planned: PlannedCell
    label: str
    state: str
    note: str
    stale: bool
    hours: float | None
    rest: float
    shared: tuple[str, ...]

    @property
    def hours_left(self) -> float | None:
        return 0.0 if self.rest == 0 else None if self.hours is None else self.hours * self.rest

    @property
    def gpu_hours(self) -> float | None:
        left = self.hours_left
        return None if left is None else left * self.planned.resources.gpus

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.planned.id,
            "folder": self.planned.folder_name,
            "overrides": list(self.planned.overrides),
            "state": self.state,
            "note": self.note,
            "stale": self.stale,
            "needs": list(self.planned.needs),
            "shared": list(self.shared),
            "resources": asdict(self.planned.resources),
            "hours_left": self.hours_left,
            "gpu_hours_left": self.gpu_hours,
        }


@dataclass(frozen=True, slots=True)
class Preview:
    plan: Plan
    root: Path
    lines: tuple[Line, ...]
    sbatch: tuple[str, ...]
    """The scripts that SLURM would be given; none where cells run on this machine."""

    def counts(self) -> dict[str, int]:
        return dict(Counter(line.state for line in self.lines))

    def profiles(self) -> dict[Resources, list[Line]]:
        """The lines by what they ask for, largest first."""
        found: dict[Resources, list[Line]] = defaultdict(list)
        for line in self.lines:
            found[line.planned.resources].append(line)
        return dict(sorted(found.items(), reverse=True))

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.plan.name,
            **dict(self.plan.about or {}),
            "root": str(self.root),
            "actions": list(self.plan.actions),
            "duplicates": self.plan.duplicates,
            "counts": self.counts(),
            "cells": [line.as_json() for line in self.lines],
            "waiting": [
                {
                    "overrides": list(w.overrides),
                    "traces": str(w.traces.path),
                    "arguments": list(w.traces.arguments),
                }
                for w in self.plan.waiting
            ],
            "sbatch": list(self.sbatch),
        }


def preview(plan: Plan, root: Path, sbatch: Sequence[str] = ()) -> Preview:
    """Look at everything a plan would meet."""
    states = _states(plan, root)
    shared = _shared(plan, root)
    hours = _hours(plan, root)
    names = labels([c.overrides for c in plan.cells], [c.folder_name for c in plan.cells])
    called = dict(zip((cell.id for cell in plan.cells), names, strict=True))
    lines = []
    for cell, name in zip(plan.cells, names, strict=True):
        state = states.get(cell.id)
        open_needs = [need for need in cell.needs if need not in states or states[need].state != "finished"]
        after = "after " + ", ".join(called.get(need, need) for need in open_needs) if open_needs else ""
        lines.append(
            Line(
                cell,
                name,
                state.state if state else NEW,
                after or (state.note if state else ""),
                state is not None and state.stale,
                hours.get(cell.id),
                _rest(state),
                shared.get(cell.id, ()),
            )
        )
    return Preview(plan, root, tuple(lines), tuple(sbatch))


def _rest(state: CellState | None) -> float:
    """The share of a cell's steps that is still to be done."""
    if state is None:
        return 1.0
    if state.state == "finished":
        return 0.0
    return 1.0 - min(1.0, state.step / state.steps) if state.steps else 1.0


def _states(plan: Plan, root: Path) -> dict[str, CellState]:
    """States of the cells, and of those of other sweeps that they need, that have a folder already, by id."""
    own = {cell.id: cell.cell.folder(root) for cell in plan.cells}
    others = {need for cell in plan.cells for need in cell.needs} - set(own)
    theirs = {one: path for one in others for path in sorted((root / "cells").glob(f"*-{one}"))[:1]}
    known = {one: path for one, path in {**own, **theirs}.items() if path.is_dir()}
    states = states_of(known.values(), time.time(), code=provenance.code_hash())
    return dict(zip(known, states, strict=True))


def _shared(plan: Plan, root: Path) -> dict[str, tuple[str, ...]]:
    """Names of other sweeps launched here, by the ids of their cells."""
    found: dict[str, list[str]] = defaultdict(list)
    for folder in launched_folders(root):
        if folder.name != plan.name:
            for row in read_json(folder / "manifest.json").get("cells", ()):
                found[row["id"]].append(folder.name)
    return {one: tuple(names) for one, names in found.items()}


def _hours(plan: Plan, root: Path) -> dict[str, float]:
    """Hours of a whole run, by id, where finished cells tell."""
    found: dict[str, float] = {}
    for gpus in (False, True):
        cells = [cell for cell in plan.cells if (cell.resources.gpus > 0) == gpus]
        known = hours_by_profile(root, (c.folder_name for c in cells), gpus) if cells else {}
        if known:
            profiles = ((cell.id, profile(_frozen(cell, root))) for cell in cells)
            found.update({one: known[kind] for one, kind in profiles if kind in known})
    return found


def _frozen(cell: PlannedCell, root: Path) -> Mapping[str, Any]:
    """A cell's config; that of a launched sweep is in its folder only."""
    if cell.cell.frozen:
        return cell.cell.frozen
    loaded: dict[str, Any] = yaml.load((cell.cell.folder(root) / "config.yaml").read_text("utf-8"), LOADER)
    return loaded
