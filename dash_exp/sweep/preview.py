"""What `python -m dash_exp.sweep plan` shows: cells, states, resources, hours. Nothing is written."""

from __future__ import annotations

import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from dash_exp.capacity.memory import demand, described
from dash_exp.record import journal, provenance
from dash_exp.record.folder import read_json
from dash_exp.record.identity import model_name
from dash_exp.record.manifest import Plan, PlannedCell, Resources, cell_row, folders_below, waiting_row
from dash_exp.record.reading import read_config
from dash_exp.record.state import median_of, recent_steps
from dash_exp.sweep.detectable import power_of, power_text
from dash_exp.sweep.report import SHOWN_CELLS, STYLES, add, counts_text, more_cells, plain, table
from dash_exp.sweep.resources import card_of_cluster, cluster_of
from dash_exp.sweep.states import CellState, folder_of, states_of
from dash_exp.sweep.status import labels
from dash_exp.text import format_command, format_path

NEW = "new"
"""The state of a cell that has no folder yet."""
CELL_NAME = re.compile(r"(.+)-s-?\d+-[0-9a-f]{8}")
READ_CELLS = 50
"""Finished cells of one arm, model and dataset that are read for hours; the newest ones."""
Profile = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """A planned cell. `hours`: of a complete run, from finished cells like it; None: there are none. `rest`:
    the share that is still to be done. `shared`: other sweeps here that include it."""

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
            **cell_row(self.planned),
            "state": self.state,
            "note": self.note,
            "stale": self.stale,
            "shared": list(self.shared),
            "hours_left": self.hours_left,
            "gpu_hours_left": self.gpu_hours,
        }


@dataclass(frozen=True, slots=True)
class Preview:
    """A plan with what is known of its cells. `sbatch`: the scripts that SLURM would get, if any.
    `power`: what its seeds and prompts can detect (detectable.py). `memory`: by model and sizes, what a cell
    needs of its GPU."""

    plan: Plan
    root: Path
    lines: tuple[Line, ...]
    sbatch: tuple[str, ...]
    power: dict[str, Any] | None = None
    memory: dict[str, str] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        return dict(Counter(line.state for line in self.lines))

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.plan.name,
            **dict(self.plan.about or {}),
            "root": str(self.root),
            "actions": list(self.plan.actions),
            "duplicates": self.plan.duplicates,
            "counts": self.counts(),
            "cells": [line.as_json() for line in self.lines],
            "waiting": [waiting_row(one) for one in self.plan.waiting],
            "power": self.power,
            "memory": self.memory,
            "sbatch": list(self.sbatch),
        }


def preview(plan: Plan, root: Path, sbatch: Sequence[str] = ()) -> Preview:
    """Look up everything that a plan would find below `root`."""
    states, shared, hours = _states(plan, root), _shared(plan, root), _hours(plan, root)
    names = labels([c.overrides for c in plan.cells], [c.folder_name for c in plan.cells])
    label_of = dict(zip((cell.id for cell in plan.cells), names, strict=True))
    lines = []
    for cell, name in zip(plan.cells, names, strict=True):
        state = states.get(cell.id)
        open_needs = [need for need in cell.needs if need not in states or states[need].state != "finished"]
        after = "after " + ", ".join(label_of.get(need, need) for need in open_needs) if open_needs else ""
        line = Line(
            planned=cell,
            label=name,
            state=state.state if state else NEW,
            note=after or (state.note if state else ""),
            stale=state is not None and state.stale,
            hours=hours.get(cell.id),
            rest=_rest(state),
            shared=shared.get(cell.id, ()),
        )
        lines.append(line)
    return Preview(plan, root, tuple(lines), tuple(sbatch), power_of(plan, root), _memory(plan, root))


def _memory(plan: Plan, root: Path) -> dict[str, str]:
    """What cells on GPUs need of their memory, in words, by model and arm where that differs."""
    card = card_of_cluster(cluster_of(plan.actions))
    if card is None:
        return {}
    by_model: dict[str, dict[str, list[str]]] = {}
    for cell in plan.cells:
        frozen = cell.cell.frozen or read_config(cell.cell.folder(root)).value
        if cell.resources.gpus and frozen and (needed := demand(frozen)) is not None:
            own = by_model.setdefault(model_name(frozen["model"]), {})
            own.setdefault(described(needed, card), []).append(frozen["algorithm"]["name"])
    return {
        model if len(found) == 1 else f"{model} {'/'.join(dict.fromkeys(arms))}": text
        for model, found in by_model.items()
        for text, arms in found.items()
    }


def _rest(state: CellState | None) -> float:
    """The share of a cell's steps that is still to be done."""
    if state is None:
        return 1.0
    if state.state == "finished":
        return 0.0
    return 1.0 - min(1.0, state.step / state.steps) if state.steps else 1.0


def _states(plan: Plan, root: Path) -> dict[str, CellState]:
    """States by id, of the cells and of cells of other sweeps that they need, as far as they have folders."""
    own = {cell.id: cell.cell.folder(root) for cell in plan.cells}
    others = {need for cell in plan.cells for need in cell.needs} - set(own)
    theirs = {one: path for one in others if (path := folder_of(root / "cells", one))}
    known = {one: path for one, path in {**own, **theirs}.items() if path.is_dir()}
    states = states_of(known.values(), time.time(), code=provenance.code_hash())
    return dict(zip(known, states, strict=True))


def _shared(plan: Plan, root: Path) -> dict[str, tuple[str, ...]]:
    """Names of other sweeps launched here, by the ids of their cells."""
    found: dict[str, list[str]] = defaultdict(list)
    for folder in folders_below(root):
        if folder.name != plan.name:
            for row in read_json(folder / "manifest.json").get("cells", ()):
                found[row["id"]].append(folder.name)
    return {one: tuple(names) for one, names in found.items()}


# Hours, from finished cells of the same profile ---------------------------------------------------


def _hours(plan: Plan, root: Path) -> dict[str, float]:
    """Hours of a complete run, by id, where finished cells show them."""
    found: dict[str, float] = {}
    for gpus in (False, True):
        cells = [cell for cell in plan.cells if (cell.resources.gpus > 0) == gpus]
        known = hours_by_profile(root, (c.folder_name for c in cells), gpus) if cells else {}
        if known:
            profiles = (
                (cell.id, profile(cell.cell.frozen or read_config(cell.cell.folder(root)).value))
                for cell in cells
            )
            found.update({one: known[kind] for one, kind in profiles if kind in known})
    return found


def profile(frozen: Mapping[str, Any]) -> Profile:
    """What mainly decides how long a cell takes: arm, model, data, sizes, engine, evaluation."""
    keys = {
        "algorithm": ("name", "steps", "epochs", "prompts_per_step", "group_size"),
        "model": ("name",),
        "sampler": ("name", "max_new_tokens", "streaming", "servers", "colocated"),
        "learner": ("ranks", "device", "precision", "preflight"),
        "evaluation": ("name", "before", "after", "every", "samples", "limit"),
    }
    groups = {name: value for name, value in frozen.items() if isinstance(value, dict)}
    facts = [groups.get(group, {}).get(key) for group, names in keys.items() for key in names]
    data, budget = groups.get("dataset", {}), groups.get("budget", {})
    facts += [data.get("name"), *sorted(data.get("mix") or ()), data.get("limit")]
    return tuple(map(str, (*facts, budget.get("seconds"), bool(budget.get("match")))))


def hours_by_profile(root: Path, names: Iterable[str], gpus: bool) -> dict[Profile, float]:
    """Median hours of finished cells in the pool of `root`, by profile, for the profiles that cells with
    these folder names may have. `gpus`: of cells that ran with GPUs, or of those without."""
    wanted = {found.group(1) for name in names if (found := CELL_NAME.fullmatch(name))}
    read: Counter[str] = Counter()
    hours: dict[Profile, list[float]] = defaultdict(list)
    for folder in sorted((root / "cells").glob("*"), key=_changed, reverse=True):
        found = CELL_NAME.fullmatch(folder.name)
        prefix = found.group(1) if found else ""
        if prefix not in wanted or read[prefix] >= READ_CELLS:
            continue
        took = _hours_of(folder, gpus)
        if took is not None:
            read[prefix] += 1
            hours[profile(read_config(folder).value)].append(took)
    return {one: statistics.median(many) for one, many in hours.items()}


def _changed(folder: Path) -> float:
    try:
        return (folder / "status.json").stat().st_mtime
    except OSError:
        return 0.0


def _hours_of(folder: Path, gpus: bool) -> float | None:
    """The hours of a finished cell, if it ran on the kind of machine asked for."""
    status = read_json(folder / "status.json")
    facts = read_json(folder / "provenance.json")
    heartbeat = float(status.get("heartbeat", 0.0))
    if status.get("state") != "finished" or bool(facts.get("hardware", {}).get("gpus")) != gpus:
        return None
    took = _launched_s(folder, heartbeat)
    attempts = facts.get("attempts", ())
    if took is None and len(attempts) == 1:
        took = heartbeat - float(attempts[0]["started"])
    if took is None:  # several attempts, whose ends are not recorded
        step_s = median_of(recent_steps(folder)[0], "time/step_s")
        took = None if step_s is None else step_s * int(status.get("step", 0))
    return None if took is None else took / 3600


def _launched_s(folder: Path, heartbeat: float) -> float | None:
    """Seconds between all starts and ends in the journal."""
    spans, since = [], None
    for row in journal.read(folder):
        if row["kind"] == "start":
            since = float(row["time"])
        elif row["kind"] == "end" and since is not None:
            spans.append(float(row["time"]) - since)
            since = None
    if since is not None:  # the launcher died before the cell
        spans.append(max(0.0, heartbeat - since))
    return sum(spans) if spans else None


# What is printed ----------------------------------------------------------------------------------


def plan_view(made: Preview) -> RenderableType:
    """A dry run: the sweep, its cells, what they ask for, what is known of their cost."""
    plan = made.plan
    parts: list[RenderableType] = [plain("\n".join(_head(made))), plain("")]
    rows = table("cell", "id", "state", "hours", "GPU-h", "")
    for line in made.lines[:SHOWN_CELLS]:
        hours = (_hours_text(line.hours_left), _hours_text(line.gpu_hours))
        style = STYLES.get(line.state, "")
        add(rows, line.label, line.planned.id, line.state, *hours, _remark(line), style=style)
    parts += [rows] if made.lines else []
    parts += more_cells(len(made.lines), "--json has them all")
    for traces in dict.fromkeys(one.traces for one in plan.waiting):
        many = sum(one.traces == traces for one in plan.waiting)
        command = format_command("dash_exp.traces", *traces.arguments)
        parts.append(plain(f"{many} more once there are traces; made first, by\n  {command}"))
    unknown = sum(line.hours_left is None for line in made.lines)
    many_text = "any of them" if unknown == len(made.lines) else f"{unknown} of them"
    note = f"no cell with the arm, model, data and sizes of {many_text} has finished here"
    notes = [note] if unknown else []
    notes += [f"{name}: {text}" for name, text in made.memory.items()]
    notes += [power_text(made.power)] if made.power else []
    return Group(*parts, plain(""), _resource_table(made), *map(plain, notes))


def _head(made: Preview) -> list[str]:
    """The sweep's claim, what it feeds, its file and its counts, a line each."""
    about: Mapping[str, Any] = made.plan.about or {}
    lines = [f"{made.plan.name}: {about['claim']}" if about.get("claim") else made.plan.name]
    lines += [f"feeds {', '.join(about['feeds'])}"] if about.get("feeds") else []
    lines += [f"from {format_path(Path(about['source']))}"] if about.get("source") else []
    duplicates, shared = made.plan.duplicates, sum(bool(line.shared) for line in made.lines)
    counts = [counts_text(made.counts())]
    counts += [f"{duplicates} duplicates left out"] if duplicates else []
    counts += [f"{shared} shared with other sweeps"] if shared else []
    return [*lines, "; ".join(counts)]


def _remark(line: Line) -> str:
    texts = [line.note if line.note != "planned" else "", "stale" if line.stale else ""]
    texts += [f"also in {', '.join(line.shared)}"] if line.shared else []
    return ", ".join(text for text in texts if text)


def _resource_table(made: Preview) -> Table:
    """What cells ask for, and how many hours are left, by profile, the largest first."""
    profiles: dict[Resources, list[Line]] = defaultdict(list)
    for line in made.lines:
        profiles[line.planned.resources].append(line)
    rows = table("each cell asks for", "cells", "to run", "hours", "GPU-hours")
    for resources, lines in sorted(profiles.items(), reverse=True):
        left = [line for line in lines if line.rest > 0]
        hours = (_sum_text([one.hours_left for one in left]), _sum_text([one.gpu_hours for one in left]))
        add(rows, str(resources), str(len(lines)), str(len(left)), *hours)
    return rows


def _sum_text(values: Sequence[float | None]) -> str:
    """A sum of hours, with a + where some are not known; a dash where none is."""
    known = [value for value in values if value is not None]
    if len(known) == len(values):
        return _hours_text(sum(known))
    return f"{_hours_text(sum(known))}+" if known else "-"


def _hours_text(hours: float | None) -> str:
    return "-" if hours is None else f"{hours:.2f}" if hours < 10 else f"{hours:.0f}"
