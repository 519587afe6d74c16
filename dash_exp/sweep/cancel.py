"""Asking cells to end, wherever they run, so that they can go on later. Torch-free.

A `cancel` row in a cell's journal comes first: whoever would start the cell, or start it again, reads it.
Then SLURM is asked to end its jobs, and processes on this machine get SIGTERM, once: a cell ends after its
step, with a checkpoint. What nobody runs is cancelled at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dash_exp.errors import Fault, UserError
from dash_exp.record import journal
from dash_exp.record.endings import is_cancelled, say_state
from dash_exp.record.locks import ask_to_end
from dash_exp.record.manifest import Manifest, held
from dash_exp.sweep.slurm import queue
from dash_exp.sweep.states import ACTIVE
from dash_exp.sweep.status import OPEN, SweepState, Watched, watch

NOTHING = "nothing was cancelled"
PATIENCE_S = 10.0
"""How long the command stays to see cells end; they end by themselves."""


@dataclass(slots=True)
class Cancelled:
    """What became of the cells: `ended`, `ending` (asked, still at their step), `left` alone and why."""

    ended: list[Watched] = field(default_factory=list)
    ending: list[Watched] = field(default_factory=list)
    left: list[tuple[Watched, str]] = field(default_factory=list)


def cancel(
    manifest: Manifest, ids: set[str], *, whole: bool, again: bool = False, patience_s: float = PATIENCE_S
) -> Cancelled:
    """Cancel the unfinished cells among `ids`. `whole`: the sweep itself, so that its controller is to end
    too, but no cell that another sweep runs. `again`: ask those too that were asked before, so that they
    stop in the middle of a step. Raises UserError where a job also runs cells that were not meant (nothing
    is done then), or SLURM does not answer."""
    done = Cancelled()
    with held(manifest.folder, ".cancel"):  # twice at once: the second finds everything asked already
        state = watch(manifest)
        chosen = [one for one in state.cells if one.entry.id in ids and one.cell.state in OPEN]
        if whole:
            others = [(one, name) for one in chosen if (name := _run_by_another(one, manifest))]
            done.left = [(one, f"run by the sweep {name}") for one, name in others]
            chosen = [one for one in chosen if one not in [other for other, _ in others]]
        jobs = _jobs(chosen, state)
        if jobs and queue.active(jobs) is None:
            raise UserError(Fault("scancel", "SLURM does not answer", "try again later"), NOTHING)
        fresh = [one for one in chosen if not is_cancelled(journal.read(one.cell.folder))]
        for one in fresh:
            journal.note(one.cell.folder, "cancel")
        asked = [one for one in chosen if again or one in fresh or one.cell.state == "queued"]
        mine = sorted({one.cell.job for one in asked if one.cell.job in jobs and one.cell.job})
        if mine and not queue.cancel(mine, now=again):
            raise UserError(
                Fault("scancel", f"SLURM did not take back {len(mine)} jobs", "add --now"),
                "cells that wait will not be started",
            )
        if whole:
            _end_controller(state)
        for one in chosen if again else fresh:
            if one.cell.pid is not None:
                ask_to_end(one.cell.pid, "dash_exp")
        _settle(manifest, chosen, done, patience_s)
    return done


def _run_by_another(one: Watched, manifest: Manifest) -> str | None:
    """The sweep that runs a cell or has queued it, if it is not this one."""
    if one.cell.state not in ACTIVE:
        return None
    rows = journal.read(one.cell.folder)
    last = next((row for row in reversed(rows) if row["kind"] in ("queued", "start")), {})
    name = last.get("sweep")
    return str(name) if name and name != manifest.name else None


def _jobs(chosen: Sequence[Watched], state: SweepState) -> set[str]:
    """The jobs of these cells. Raises UserError where one of them runs other cells too."""
    jobs = {one.cell.job for one in chosen if one.cell.job and one.cell.state != "interrupted"}
    meant = {one.entry.id for one in chosen}
    faults = [
        Fault(
            one.label,
            f"is run by the same job as what you named ({one.cell.job})",
            "name both, or none of them",
        )
        for one in state.cells
        if one.cell.job in jobs and one.entry.id not in meant and one.cell.state in ACTIVE
    ]
    if faults:
        raise UserError(faults, NOTHING)
    return jobs


def _end_controller(state: SweepState) -> None:
    facts = state.controller
    if facts and facts.get("alive"):
        ask_to_end(int(facts["pid"]), "dash_exp")


def _settle(manifest: Manifest, chosen: Iterable[Watched], done: Cancelled, patience_s: float) -> None:
    """Say `cancelled` of each cell that nobody runs (any more)."""
    left = {one.entry.id: one for one in chosen}
    until = time.monotonic() + patience_s
    while left:
        for one in watch(manifest).cells:
            if one.entry.id in left and one.cell.state not in ACTIVE:
                say_state(one.cell.folder, "cancelled")
                done.ended.append(left.pop(one.entry.id))
        if time.monotonic() >= until:
            break
        time.sleep(min(0.3, patience_s))
    done.ending = list(left.values())
