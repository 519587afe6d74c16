"""The state of a whole sweep: its manifest, its cells' folders and the queue, joined. Torch-free."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dash_exp.record import provenance
from dash_exp.record.failures import classify
from dash_exp.record.folder import Row, read_json
from dash_exp.record.jobs import Waiting
from dash_exp.record.locks import HERE, runs
from dash_exp.record.manifest import Entry, Manifest
from dash_exp.sweep.lookup import labels
from dash_exp.sweep.slurm import queue
from dash_exp.sweep.states import ACTIVE, SHOWN, CellState, Reading, asked_about, states_from
from dash_exp.sweep.tails import last_lines

CONTROLLER = "controller.json"
OPEN = ("running", "queued", "pending", "blocked", "interrupted")
"""States of cells that are expected to finish yet."""


@dataclass(frozen=True, slots=True)
class Watched:
    """A cell of a sweep and its state. `label`: what tells it from the others."""

    entry: Entry
    label: str
    cell: CellState

    def as_json(self) -> dict[str, Any]:
        facts = self.cell.as_json()
        return {"id": self.entry.id, "overrides": list(self.entry.overrides), **facts}


@dataclass(frozen=True, slots=True)
class SweepState:
    """A sweep as it is now. `controller`: the process that starts its cells on this machine, or what is
    known of one elsewhere; `eta_s`: seconds until its open cells have trained, None: not known."""

    manifest: Manifest
    cells: tuple[Watched, ...]
    waiting: tuple[Waiting, ...]
    controller: Row | None
    eta_s: float | None

    @property
    def counts(self) -> dict[str, int]:
        """How many cells are in each state, in the order of SHOWN; those without an id yet are blocked."""
        found = Counter(one.cell.state for one in self.cells)
        found["blocked"] += len(self.waiting)
        return {state: found[state] for state in SHOWN if found[state]}

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.manifest.name,
            "folder": str(self.manifest.folder),
            "counts": self.counts,
            "eta_s": self.eta_s,
            "controller": self.controller,
            "cells": [one.as_json() for one in self.cells],
            "waiting": [{"overrides": list(w.overrides), "traces": str(w.traces.path)} for w in self.waiting],
        }


def watch(manifest: Manifest, now: float | None = None) -> SweepState:
    """Everything there is to know of a sweep at this moment."""
    return watch_all([manifest], now)[0]


def watch_all(manifests: Sequence[Manifest], now: float | None = None) -> list[SweepState]:
    """Several sweeps, with one look at the queue and at this machine's processes. A cell of two sweeps is
    read once."""
    now = time.time() if now is None else now
    folders = list(dict.fromkeys(m.cell(entry) for m in manifests for entry in m.entries))
    readings = [Reading.of(folder) for folder in folders]
    jobs = queue.jobs(job for reading in readings if (job := asked_about(reading)))
    states = states_from(readings, jobs, now, provenance.code_hash())
    found = dict(zip(folders, states, strict=True))
    return [_joined(manifest, found) for manifest in manifests]


def _joined(manifest: Manifest, found: Mapping[Path, CellState]) -> SweepState:
    states = [found[manifest.cell(entry)] for entry in manifest.entries]
    by_id = {entry.id: state for entry, state in zip(manifest.entries, states, strict=True)}
    names = labels([e.overrides for e in manifest.entries], [e.folder for e in manifest.entries])
    cells = tuple(
        Watched(entry, name, with_class(with_needs(state, entry, by_id, manifest)))
        for entry, name, state in zip(manifest.entries, names, states, strict=True)
    )
    controller = controller_of(manifest.folder)
    return SweepState(manifest, cells, manifest.waiting, controller, sweep_eta_s(cells))


def with_needs(
    state: CellState, entry: Entry, known: Mapping[str, CellState], manifest: Manifest
) -> CellState:
    """Whether a cell that has not begun waits for others is read from these, not from what was said when
    it was written."""
    if state.state not in ("pending", "blocked", "queued") or not entry.needs:
        return state
    open_needs = [text for need in entry.needs if (text := _open_need(need, known, manifest))]
    if open_needs:
        return replace(state, state="blocked", note=f"waits for {', '.join(open_needs)}")
    return replace(state, state="pending", note="") if state.state == "blocked" else state


def _open_need(need: str, known: Mapping[str, CellState], manifest: Manifest) -> str | None:
    """A cell that has to be finished first and is not, in words; it may be another sweep's."""
    here = known.get(need)
    if here is not None:
        state, name = here.state, here.folder.name
    else:
        found = sorted((manifest.root / "cells").glob(f"*-{need}"))
        status = read_json(found[0] / "status.json") if found else {}
        state, name = str(status.get("state", "missing")), found[0].name if found else need
    return None if state == "finished" else f"{name} ({state})"


def with_class(state: CellState) -> CellState:
    """A failure without a class (of a run that no launcher watched) gets one from what it left."""
    if state.state != "failed" or state.failure_class is not None:
        return state
    status = read_json(state.folder / "status.json")
    kind = classify(1, status, "\n".join(end_of_output(state.folder, 40)))
    return replace(state, failure_class=kind)


def end_of_output(folder: Path, count: int) -> list[str]:
    """The last lines of what a cell's process printed, else of its log."""
    return last_lines(folder / "output.txt", count) or last_lines(folder / "log.txt", count)


def controller_of(folder: Path) -> Row | None:
    """The process that starts a sweep's cells on a machine, with `alive`: true, false, or null where it
    is another machine's; None where there is none."""
    facts = read_json(folder / CONTROLLER)
    if not isinstance(facts.get("pid"), int):
        return None
    here = facts.get("host", HERE) == HERE
    return {**facts, "alive": runs(facts["pid"], "dash_exp") if here else None}


def sweep_eta_s(cells: Iterable[Watched]) -> float | None:
    """Seconds until all open cells have trained: what is left of each, at the pace of the running ones,
    shared by as many as run now. None where nothing runs, or where a cell's length is not known."""
    cells = [one for one in cells if one.cell.state in OPEN]
    running = [one.cell for one in cells if one.cell.state == "running"]
    paces = [state.step_s for state in running if state.step_s is not None]
    if not running or not paces:
        return None
    usual = statistics.median(paces)
    left = [_rest_s(one.cell, usual) for one in cells]
    known = [seconds for seconds in left if seconds is not None]
    return max(sum(known) / len(running), *known) if len(known) == len(left) else None


def _rest_s(state: CellState, usual_step_s: float) -> float | None:
    if state.eta_s is not None or state.steps is None:
        return state.eta_s
    return (state.step_s or usual_step_s) * max(0, state.steps - state.step)


def has_controller(state: SweepState) -> bool:
    """Whether a process starts the sweep's cells, as far as can be known."""
    return bool(state.controller and state.controller.get("alive") is not False)


def is_moving(state: SweepState) -> bool:
    """Whether anything is about to happen to a sweep by itself."""
    return has_controller(state) or any(one.cell.state in ACTIVE for one in state.cells)
