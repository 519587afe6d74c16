"""Run a race: launch a round's cells, wait for them, decide what the next round needs, until nothing is open.

What a round needs follows from the manifest and the cells' records, so a race that was killed continues when
it is started again. `race.json` in the sweep's folder holds when it began, and for `status` what it found.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from dash_exp.errors import ExitCode, Fault, UserError, disk_errors_below
from dash_exp.record import journal
from dash_exp.record import manifest as manifests
from dash_exp.record.folder import read_json, write_json
from dash_exp.record.locks import HERE, take_lock
from dash_exp.record.manifest import Manifest, sweep_folder
from dash_exp.sweep.dispatch import LaunchRequest, cancel, launch
from dash_exp.sweep.pool import Log
from dash_exp.sweep.race.grid import UNTIL_STEP, Grid, Settings, grid_of, refuse_faults
from dash_exp.sweep.race.progress import Round, States, next_look, next_rung
from dash_exp.sweep.report import by_state, race_lines
from dash_exp.sweep.states import CellState
from dash_exp.sweep.status import RACE, SweepState, read_sweep
from dash_exp.text import format_path

LOCK = ".race"
FOLLOW_S, AGAIN = 2.0, 5
"""Seconds between two looks at the cells; launches in a row of a cell that makes no progress."""


def settings_of(args: Namespace) -> Settings:
    """The flags of the command. Raises UserError with all that is wrong with them."""
    faults, rungs, words = [], tuple[int, ...](), (args.rungs or "").split(",")
    if args.rungs is not None and all(word.strip().isdecimal() for word in words):
        rungs = tuple(int(word) for word in words)
    if args.rungs is not None and (not rungs or rungs[0] < 1 or any(a >= b for a, b in pairwise(rungs))):
        faults.append(
            Fault("--rungs", f"got {args.rungs}", "growing numbers of steps, e.g. --rungs 10,30,90")
        )
    if (args.until is None) == (args.rungs is None):
        faults.append(
            Fault("race", "needs either --until decided or --rungs", "python -m dash_exp.sweep race --help")
        )
    if args.halve is not None and args.rungs is None:
        faults.append(
            Fault("--halve", "needs --rungs", "the steps at which to compare, e.g. --rungs 10,30,90")
        )
    if args.halve is not None and args.metric not in (None, args.halve):
        faults.append(
            Fault("--metric", f"got {args.metric}, but --halve names {args.halve}", "leave one out")
        )
    budget = args.budget_hours
    if budget is not None and not 0 < budget < math.inf:
        faults.append(Fault("--budget-hours", f"got {budget:g}", "a number of hours above 0"))
    if faults:
        raise UserError(faults)
    metric = args.halve or args.metric or ("reward" if rungs else "accuracy")
    return Settings(metric, rungs, args.halve is not None, budget)


@contextmanager
def raced_by_us(folder: Path) -> Iterator[None]:
    """One race of a sweep at a time. Raises UserError while another process races it."""
    with disk_errors_below(folder.parent.parent):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = take_lock(folder / LOCK)
    except BlockingIOError:
        pid = read_json(folder / RACE).get("pid")
        fault = Fault(format_path(folder), f"is being raced by process {pid}", "wait for it, or end it first")
        raise UserError(fault) from None
    try:
        yield
    finally:
        os.close(lock)


def race(request: LaunchRequest, settings: Settings, log: Log) -> int:
    """Run the rounds of a race until it has ended or its budget is spent. Returns 0 if it ended by its rule,
    else 1. Raises UserError, with nothing started, for what the user has to change."""
    grid = grid_of(request)
    refuse_faults(grid, settings, request.force)
    folder = sweep_folder(request.root, grid.plan.name)
    with raced_by_us(folder):
        record = Record(folder, settings)
        stuck: set[str] = set()
        tries: Counter[tuple[object, ...]] = Counter()
        while True:
            over = follow(folder, record, log)
            states = states_by_place(grid, folder)
            made = (next_rung if settings.rungs else next_look)(grid, states, settings, stuck)
            if not over and made.cells and record.exceeds(expected_hours(states, made, settings)):
                over = True
            made = replace(made, state="budget spent") if over and made.cells else made
            record.write(made, states)
            if over or not made.cells:
                break
            if newly := _failed(states, made, tries):
                stuck |= newly
                continue
            grid = grid.grown(made.cells)
            start(request, grid, made, settings, log)
            time.sleep(FOLLOW_S)  # SLURM takes a moment to forget a job that has ended
    for line in record.lines():
        log(line)
    return ExitCode.OK if made.state == "ended" else ExitCode.FAILED


def _failed(states: States, made: Round, tries: Counter[tuple[object, ...]]) -> set[str]:
    """The recipes of cells that this process has launched for this round already, and that failed, or keep
    ending without progress. `tries`: counts launches."""
    found, launches = set(), []
    for place in made.cells:
        cell = states.get(place)
        launch, here = (place, made.until), (place, made.until, cell.step if cell else 0)
        ended = cell is not None and cell.state in ("failed", "cancelled", "blocked", "finished")
        if (tries[launch] and ended) or tries[here] >= AGAIN:
            found.add(place[0])
        launches += [launch, here]
    tries.update([] if found else launches)
    return found


def start(request: LaunchRequest, grid: Grid, made: Round, settings: Settings, log: Log) -> None:
    """Launch a round's cells."""
    until = () if made.until is None else (f"{UNTIL_STEP}{made.until}",)
    plan = replace(grid.plan, actions=(*grid.plan.actions, *until))
    wanted = [grid.cells[place] for place in made.cells]
    ids = {cell.id: cell for cell in plan.cells}
    chosen = [cell.id for cell in wanted]
    for one in chosen:  # grows meanwhile
        chosen += [need for need in ids[one].needs if need in ids and need not in chosen]
    for line in made.lines:
        log(f"  {line}")
    if not settings.rungs:
        log(f"{len(wanted)} runs for the next look")
    cells = tuple(ids[one].folder_name for one in dict.fromkeys(chosen))
    launch(replace(request, plan=plan, cells=cells), wait=False, detached=True, log=log)


def states_by_place(grid: Grid, folder: Path) -> dict[tuple[str, int], CellState]:
    """The states of the cells of a grid; none before its first launch."""
    if not (folder / manifests.NAME).is_file():
        return {
            place: CellState(cell.cell.folder(grid.root), "pending") for place, cell in grid.cells.items()
        }
    by_id = {one.entry.id: one.cell for one in read_sweep(manifests.read(folder)).cells}
    new = {c.id: CellState(c.cell.folder(grid.root), "pending") for c in grid.cells.values()}
    return {place: by_id.get(cell.id, new[cell.id]) for place, cell in grid.cells.items()}


def follow(folder: Path, record: Record, log: Log) -> bool:
    """Wait until nothing of the sweep moves. Returns whether the budget is spent; then its cells were asked
    to stop after their step."""
    before: dict[str, int] = {}
    while (folder / manifests.NAME).is_file():
        manifest = manifests.read(folder)
        state = read_sweep(manifest)
        record.spent_s = seconds_spent(state, record.started)
        if state.counts != before:
            before = state.counts
            log(f"{time.strftime('%H:%M:%S')} {by_state(before)}")
        if not state.is_moving:
            break
        if record.exceeds(0.0):
            stop(manifest, log)
            return True
        time.sleep(FOLLOW_S)
    return record.exceeds(0.0)


def stop(manifest: Manifest, log: Log) -> None:
    log("the budget is spent: running cells stop after their step")
    cancel(manifest, {entry.id for entry in manifest.entries}, entire=True)


def seconds_spent(state: SweepState, since: float) -> float:
    """Seconds that cells of a sweep have run since then, all added up, by their journals."""
    now = time.time()
    total = 0.0
    for one in state.cells:
        begun: float | None = None
        for row in journal.read(one.cell.folder):
            if row["kind"] in ("start", "end") and begun is not None:
                total += max(0.0, float(row["time"]) - max(begun, since))
                begun = None
            if row["kind"] == "start":
                begun = float(row["time"])
        if begun is not None and one.cell.state == "running":
            total += now - max(begun, since)
    return total


def expected_hours(states: States, made: Round, settings: Settings) -> float:
    """About how long the cells of the next look will run, by finished cells of the same recipes; 0 where
    there are none, and by rungs, between which cells pause anyway."""
    if settings.rungs:
        return 0.0
    known: dict[str, list[float]] = {}
    for (recipe, _), cell in states.items():
        if cell.state == "finished" and cell.step_s is not None:
            known.setdefault(recipe, []).append(cell.step_s * cell.step / 3600)
    return sum(statistics.median(known[recipe]) for recipe, _ in made.cells if recipe in known)


class Record:
    """`race.json`: settings, when the race began, hours spent, and what was found. A race with other rungs or
    another metric begins anew."""

    def __init__(self, folder: Path, settings: Settings):
        self.path, self.settings, self.spent_s = folder / RACE, settings, 0.0
        known = read_json(self.path)
        same = (known.get("metric"), known.get("rungs"), known.get("halve")) == (
            settings.metric,
            list(settings.rungs),
            settings.halve,
        )
        self.started = float(known["started"]) if same else time.time()

    def exceeds(self, more_hours: float) -> bool:
        """Whether so many hours more are above the budget."""
        budget = self.settings.budget_hours
        return budget is not None and self.spent_s / 3600 + more_hours >= budget

    def write(self, made: Round, states: States) -> None:
        settings = self.settings
        value = {
            "pid": os.getpid(),
            "host": HERE,
            "started": self.started,
            "metric": settings.metric,
            "rungs": list(settings.rungs),
            "halve": settings.halve,
            "budget_hours": settings.budget_hours,
            "spent_hours": self.spent_s / 3600,
            "state": made.state,
            "lines": list(made.lines),
            "found": list(made.facts),
        }
        write_json(self.path, value)

    def lines(self) -> list[str]:
        return race_lines(read_json(self.path))
