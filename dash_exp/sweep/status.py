"""The state of a sweep (its manifest, the states of its cells and its controller, joined), and which sweep
and which of its cells a name or a pattern on the command line means."""

from __future__ import annotations

import fnmatch
import os
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dash_exp.config.compose import conf_dir
from dash_exp.errors import Fault, UserError, nearest
from dash_exp.record import manifest as manifests
from dash_exp.record import provenance
from dash_exp.record.folder import Row, read_json
from dash_exp.record.journal import classify, set_state
from dash_exp.record.locks import HERE, runs
from dash_exp.record.manifest import Entry, Manifest, Waiting
from dash_exp.sweep import spec as specs
from dash_exp.sweep.spec import Spec, key_of
from dash_exp.sweep.states import ACTIVE, SHOWN, CellState, open_need, recorded_state, states_of
from dash_exp.text import format_command, last_lines

LIST_HINT = "python -m dash_exp.sweep list names them"
UNCHANGED = "nothing was changed"
WILD = set("*?[")
SPEAKING = ("algorithm", "model", "dataset", "experiment", "evaluation", "recipe")
"""Keys whose options need no key beside them."""
CONTROLLER, RACE = "controller.json", "race.json"
OPEN = ("running", "queued", "pending", "blocked", "interrupted")
"""States of cells that may still finish."""


# The state of a sweep -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SweepCell:
    """A cell of a sweep and its state. `label`: its overrides that other cells of the sweep do not share."""

    entry: Entry
    label: str
    cell: CellState

    def as_json(self) -> dict[str, Any]:
        return {"id": self.entry.id, "overrides": list(self.entry.overrides), **self.cell.as_json()}


@dataclass(frozen=True, slots=True)
class SweepState:
    """A sweep as it is now. `controller`: facts about the process that starts its cells on a machine, if
    there is one; `eta_s`: seconds until its open cells have trained; None: not known."""

    manifest: Manifest
    cells: tuple[SweepCell, ...]
    waiting: tuple[Waiting, ...]
    controller: Row | None
    eta_s: float | None

    @property
    def counts(self) -> dict[str, int]:
        """How many cells are in each state. Those that wait for traces count as blocked."""
        return counts_of(self.cells, len(self.waiting))

    @property
    def has_controller(self) -> bool:
        """Whether a process starts the sweep's cells, as far as can be known."""
        return bool(self.controller and self.controller.get("alive") is not False)

    @property
    def is_moving(self) -> bool:
        """Whether anything will happen to the sweep without a command."""
        return self.has_controller or any(one.cell.state in ACTIVE for one in self.cells)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.manifest.name,
            "folder": str(self.manifest.folder),
            "counts": self.counts,
            "eta_s": self.eta_s,
            "controller": self.controller,
            "race": read_json(self.manifest.folder / RACE) or None,
            "cells": [one.as_json() for one in self.cells],
            "waiting": [{"overrides": list(w.overrides), "traces": str(w.traces.path)} for w in self.waiting],
        }


def counts_of(cells: Sequence[SweepCell], waiting: int = 0) -> dict[str, int]:
    found = Counter(one.cell.state for one in cells)
    found["blocked"] += waiting
    return {state: found[state] for state in SHOWN if found[state]}


def read_sweep(manifest: Manifest, now: float | None = None) -> SweepState:
    return read_sweeps([manifest], now)[0]


def read_sweeps(manifests: Sequence[Manifest], now: float | None = None) -> list[SweepState]:
    """The states of several sweeps. SLURM and this machine's processes are queried once, and each cell is
    read once, however many sweeps it belongs to."""
    now = time.time() if now is None else now
    folders = list(dict.fromkeys(m.cell(entry) for m in manifests for entry in m.entries))
    states = dict(zip(folders, states_of(folders, now, code=provenance.code_hash()), strict=True))
    for folder, cell in states.items():  # scancel: the job itself cannot know that it was not preempted
        if cell.state == "cancelled" and cell.job and recorded_state(folder) != "cancelled":
            set_state(folder, "cancelled")
    return [_joined(manifest, states) for manifest in manifests]


def _joined(manifest: Manifest, states: Mapping[Path, CellState]) -> SweepState:
    entries = manifest.entries
    by_id = {entry.id: states[manifest.cell(entry)] for entry in entries}
    names = labels([entry.overrides for entry in entries], [entry.folder for entry in entries])
    cells = tuple(
        SweepCell(entry, name, _classified(_with_needs(by_id[entry.id], entry, by_id, manifest)))
        for entry, name in zip(entries, names, strict=True)
    )
    return SweepState(manifest, cells, manifest.waiting, controller_of(manifest.folder), sweep_eta_s(cells))


def _with_needs(
    state: CellState, entry: Entry, known: Mapping[str, CellState], manifest: Manifest
) -> CellState:
    """Whether a cell that has not begun waits for others depends on their states now, not when its status was
    written."""
    if state.state not in ("pending", "blocked", "queued") or not entry.needs:
        return state
    open_needs = [text for need in entry.needs if (text := _open_need(need, known, manifest))]
    if open_needs:
        return replace(state, state="blocked", note=f"waits for {', '.join(open_needs)}")
    return replace(state, state="pending", note="") if state.state == "blocked" else state


def _open_need(need: str, known: Mapping[str, CellState], manifest: Manifest) -> str | None:
    """The name and state of a needed cell, of this sweep or another; None if it is finished."""
    if need not in known:
        return open_need(manifest.root / "cells", need)
    state = known[need].state
    return None if state == "finished" else f"{known[need].folder.name} ({state})"


def _classified(state: CellState) -> CellState:
    """Add a class to a failure that no launcher recorded, from its status and output."""
    if state.state != "failed" or state.failure_class is not None:
        return state
    status = read_json(state.folder / "status.json")
    return replace(state, failure_class=classify(1, status, "\n".join(end_of_output(state.folder, 40))))


def output_path(folder: Path) -> Path:
    """What a cell's process printed, else its log."""
    output = folder / "output.txt"
    return output if output.exists() and output.stat().st_size else folder / "log.txt"


def end_of_output(folder: Path, count: int) -> list[str]:
    return last_lines(output_path(folder), count)


def controller_of(folder: Path) -> Row | None:
    """The process that starts a sweep's cells on a machine, with `alive`: true, false, or null if it is on
    another machine. None without one."""
    facts = read_json(folder / CONTROLLER)
    if not isinstance(facts.get("pid"), int):
        return None
    is_here = facts.get("host", HERE) == HERE
    return {**facts, "alive": runs(facts["pid"], "dash_exp") if is_here else None}


def sweep_eta_s(cells: Sequence[SweepCell]) -> float | None:
    """Seconds until all open cells have trained: the rest of each, at the pace of the running ones, divided
    by how many run now. None if nothing runs, or a cell's length is not known."""
    still_open = [one.cell for one in cells if one.cell.state in OPEN]
    running = [state for state in still_open if state.state == "running"]
    paces = [state.step_s for state in running if state.step_s is not None]
    if not paces:
        return None
    rest = [_rest_s(state, statistics.median(paces)) for state in still_open]
    known = [seconds for seconds in rest if seconds is not None]
    return max(sum(known) / len(running), *known) if len(known) == len(rest) else None


def _rest_s(state: CellState, usual_step_s: float) -> float | None:
    if state.eta_s is not None or state.steps is None:
        return state.eta_s
    return (state.step_s or usual_step_s) * max(0, state.steps - state.step)


# Names and patterns -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """A sweep that was named: its file, where there is one, and its folder, whether launched or not."""

    name: str
    folder: Path
    root: Path
    spec: Spec | None

    def manifest(self) -> Manifest:
        """What was launched. Raises UserError where nothing was."""
        if not os.path.lexists(self.folder / manifests.NAME):
            what = f"has not been launched: there is no {self.folder / manifests.NAME}"
            hint = (
                f"{format_command('dash_exp.sweep', 'launch', self.name)}; run.dir=<folder> looks elsewhere"
            )
            raise UserError(Fault(self.name, what, hint), UNCHANGED)
        return manifests.read(self.folder)


def default_root() -> Path:
    """Where outputs lie when `run.dir` is not given, as conf/config.yaml says."""
    config = yaml.safe_load((conf_dir() / "config.yaml").read_text(encoding="utf-8"))
    return Path(config["run"]["dir"])


def find(text: str, root: Path, name: str | None = None) -> Target:
    """The sweep meant by a yaml, a name or a folder. `name`: another name to run it under (`run.sweep`)."""
    folder = Path(text)
    if os.path.lexists(folder / manifests.NAME):
        folder = folder.resolve()
        return Target(folder.name, folder, folder.parent.parent, None)
    known = specs.names()
    if text in known or text.endswith((".yaml", ".yml")):
        spec = specs.load(text)
        chosen = name or spec.name
        return Target(chosen, manifests.sweep_folder(root, chosen), root, spec)
    folder = manifests.sweep_folder(root, text)
    if os.path.lexists(folder / manifests.NAME):
        return Target(text, folder, root, None)
    there = [path.name for path in manifests.folders_below(root)]
    what = f"is no sweep: neither a file in sweeps/, nor one launched in {root}, nor a folder"
    hint = nearest(text, {*known, *there}) if known or there else LIST_HINT
    raise UserError(Fault(text, what, hint), UNCHANGED)


def matches(entry: Entry, pattern: str) -> bool:
    """Whether a pattern selects a cell: with wildcards over the folder's name or one override, without
    as an override, or as a part of the folder's name."""
    if WILD & set(pattern):
        return any(fnmatch.fnmatchcase(text, pattern) for text in (entry.folder, *entry.overrides))
    return pattern in entry.overrides or pattern in entry.folder


def select(entries: Sequence[Entry], patterns: Sequence[str]) -> list[Entry]:
    """The cells that every one of these patterns selects; all without a pattern.

    Raises UserError where a pattern, or all of them together, select nothing.
    """
    faults = [
        Fault(pattern, f"selects none of the {len(entries)} cells", _nearest_pattern(pattern, entries))
        for pattern in patterns
        if not any(matches(entry, pattern) for entry in entries)
    ]
    if faults:
        raise UserError(faults, UNCHANGED)
    chosen = [entry for entry in entries if all(matches(entry, pattern) for pattern in patterns)]
    if patterns and not chosen:
        hint = "each pattern narrows the choice"
        raise UserError(Fault(" ".join(patterns), "no cell is selected by all of these", hint), UNCHANGED)
    return chosen


def _nearest_pattern(pattern: str, entries: Sequence[Entry]) -> str:
    known = sorted({text for entry in entries for text in entry.overrides})
    if 0 < len(known) <= 40:
        return nearest(pattern, known)
    return "a part of a cell's folder's name, one of its overrides (algorithm=dash), or wildcards (*-s0-*)"


def labels(entries: Sequence[tuple[str, ...]], folders: Sequence[str]) -> list[str]:
    """Short names of a sweep's cells, from the overrides that tell them apart: the arm and the like first,
    without their keys unless two cells would get the same name."""
    own = _distinguishing([tuple(text.lstrip("+~") for text in overrides) for overrides in entries])
    for shorten in (_short, str):
        texts = [" ".join(map(shorten, parts)) for parts in own]
        if len(set(texts)) == len(texts) and all(texts):
            return texts
    return [folder.rpartition("-")[0] for folder in folders]


def _distinguishing(entries: Sequence[tuple[str, ...]]) -> list[list[str]]:
    """The entries without what all share, then without each key that is not needed to tell them apart (the
    longest first; an arm or a seed always stays). What speaks for itself comes first."""
    common = set(entries[0]).intersection(*entries[1:]) if len(entries) > 1 else set()
    own = [[text for text in overrides if text not in common] for overrides in entries]
    own = [sorted(parts, key=lambda text: key_of(text) not in SPEAKING) for parts in own]
    widths = {key_of(text): len(text) for parts in own for text in sorted(parts, key=len)}
    for key in sorted(widths.keys() - {"seed", *SPEAKING}, key=lambda key: (-widths[key], key)):
        fewer = [[text for text in parts if key_of(text) != key] for parts in own]
        if all(fewer) and len(set(map(tuple, fewer))) == len(set(map(tuple, own))):
            own = fewer
    return own


def _short(override: str) -> str:
    key, _, value = override.partition("=")
    return value.rpartition("/")[2] if key in SPEAKING else f"{key.rpartition('.')[2]}={value}"
