"""Start a plan's cells, on this machine or on SLURM, and cancel them.

A launch that would be refused is refused before anything is written; whatever is written is written before a
cell starts. A cancellation is a `cancel` row in the cell's journal, which every launcher reads before it
starts a cell.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dash_exp.config.schema import ClusterConfig
from dash_exp.errors import ExitCode, Fault, UserError, disk_errors_below
from dash_exp.record import journal, provenance
from dash_exp.record import manifest as manifests
from dash_exp.record.folder import CellBusy, archive
from dash_exp.record.journal import is_cancelled, set_state
from dash_exp.record.locks import Locks, ask_to_end
from dash_exp.record.manifest import SWEEP_NAME, Entry, Manifest, Plan, held
from dash_exp.record.reading import unusable
from dash_exp.sweep import local
from dash_exp.sweep.pool import Log, Relay
from dash_exp.sweep.report import by_state, closing_lines, closing_table, count_of, print_parts, sweep_command
from dash_exp.sweep.resources import tracking_of
from dash_exp.sweep.slurm import queue
from dash_exp.sweep.slurm import submit as slurm
from dash_exp.sweep.slurm.arrays import find_faults
from dash_exp.sweep.states import ACTIVE, is_stale, recorded_state
from dash_exp.sweep.status import OPEN, SweepCell, SweepState, counts_of, read_sweep
from dash_exp.text import format_path, printable

FOLLOW_S, CANCEL_S, CHECK_S = 2.0, 10.0, 0.3
"""Seconds between two checks of a launched sweep; that `cancel` waits for cells, and between its checks."""
NOTHING_CANCELLED = "nothing was cancelled"


def print_line(text: str) -> None:
    """Print a line at once; the reader may be gone."""
    with suppress(OSError):
        print(printable(text), flush=True)


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """What to launch: the unfinished cells of a plan, or only `cells` (names of folders), with outputs in
    `root`. `n_jobs`: cells at once on this machine. `force`: archive what is recorded and start anew."""

    plan: Plan
    root: Path
    cluster: ClusterConfig
    n_jobs: int = 1
    force: bool = False
    cells: Sequence[str] | None = None

    def includes(self, entry: Entry) -> bool:
        return self.cells is None or entry.folder in self.cells

    def chosen(self, manifest: Manifest) -> list[Entry]:
        return [entry for entry in manifest.entries if self.includes(entry)]


def launch(
    request: LaunchRequest, *, wait: bool = True, detached: bool = False, log: Log = print_line
) -> int:
    """Write a plan down and run its cells. `detached`: by a controller in a process of its own. `wait`: until
    all cells have ended, then print a table (a sweep on this machine that is not detached always waits).

    Returns 0; 1 if a cell that was waited for is not finished; 128 + n after signal n. Raises UserError, with
    nothing started, for what the user has to change.
    """
    manifest = _prepare(request, log)
    cluster, entries, relay = request.cluster, request.chosen(manifest), Relay()
    renew_budgets(manifest, entries)
    here = cluster.name != "slurm" and not detached
    if cluster.name == "slurm":
        _submit(manifest, entries, cluster, log)
    elif here:
        local.launch(manifest, request.n_jobs, request.cells, log, relay)
    elif local.unfinished(manifest, entries) or manifest.waiting:
        local.detach(manifest, request.n_jobs, request.cells, log)
    else:
        log("nothing is left to run")
    if not (wait or here):
        log(sweep_command("status", manifest))
        return ExitCode.OK
    if not here:
        _follow(manifest, cluster, log)
    return _conclude(request, manifest, relay, log)


def _prepare(request: LaunchRequest, log: Log) -> Manifest:
    """Check and write everything before the first cell starts."""
    if request.n_jobs < 1:
        raise UserError(Fault("hydra.launcher.n_jobs", f"got {request.n_jobs}, must be at least 1"))
    plan, root = request.plan, request.root
    if not SWEEP_NAME.fullmatch(plan.name):
        hint = "up to 100 letters, digits and _.+-, a letter or digit first"
        raise UserError(Fault("run.sweep", f"got {plan.name!r}, which cannot name a folder", hint))
    if faults := refusals(request):
        raise UserError(faults)
    with disk_errors_below(root):
        manifest = manifests.write(plan, root)
        if request.force:
            _archive([manifest.cell(entry) for entry in request.chosen(manifest)])
            manifest = manifests.write(plan, root)  # freezes them anew
    log(_headline(manifest, plan))
    tracking = tracking_of(manifest.actions)
    if tracking.mlflow:  # create its schema, experiment and parent run before many cells need them
        from dash_exp.config.tracking import place_of
        from dash_exp.mirror.sync import prepare_sweep

        prepare_sweep(place_of(tracking, manifest.root), manifest.name)
    return manifest


def refusals(request: LaunchRequest) -> list[Fault]:
    """What SLURM would refuse. Finished cells count only if they are run again."""
    if request.cluster.name != "slurm":
        return []
    plan = request.plan
    entries = slurm.entries_of(plan) if request.force else slurm.open_entries(plan, request.root)
    return find_faults((*entries, *slurm.teacher_entries(plan.waiting)), request.cluster)


def _archive(folders: Sequence[Path]) -> None:
    """Move records aside. Raises UserError, before the first is moved, if any of these cells is running."""
    locks, hint = Locks.now(), "wait for them, or cancel them first"
    busy = [folder for folder in folders if locks.holder(folder / ".lock") is not None]
    if busy:
        what = "is being run by another process"
        raise UserError([Fault("run.force", f"{format_path(folder)} {what}", hint) for folder in busy])
    for folder in folders:
        try:
            archive(folder)
        except CellBusy as error:
            fault = Fault("run.force", str(error), hint)
            raise UserError(fault, "the cells before it were archived") from error


def _headline(manifest: Manifest, plan: Plan) -> str:
    """How many cells the sweep has, and how many of them are done."""
    folders = [manifest.cell(entry) for entry in manifest.entries]
    finished = [folder for folder in folders if recorded_state(folder) == "finished"]
    code = provenance.code_hash() if finished else ""
    stale = sum(is_stale(folder, code) for folder in finished)
    counts = [
        (len(finished), "finished already"),
        (stale, "of these stale (recorded by other code; run.force=true starts anew)"),
        (len(manifest.waiting), "waiting for traces"),
        (plan.duplicates, "named twice"),
    ]
    facts = [count_of(len(folders), "cell"), *(f"{number} {text}" for number, text in counts if number)]
    return f"sweep {manifest.name}: {', '.join(facts)}"


def renew_budgets(manifest: Manifest, entries: Sequence[Entry]) -> None:
    """A launch gives cells that failed or were cancelled their full budget of retries again, unless they are
    running or queued."""
    active = {one.entry.id for one in read_sweep(manifest).cells if one.cell.state in ACTIVE}
    for entry in local.unfinished(manifest, entries):
        folder = manifest.cell(entry)
        rows = journal.since_retry(journal.read(folder))
        failed = any(row["kind"] == "end" and row.get("failure_class") for row in rows)
        if (failed or is_cancelled(rows)) and entry.id not in active:
            journal.note(folder, "retry")


def _submit(manifest: Manifest, entries: Sequence[Entry], cluster: ClusterConfig, log: Log) -> None:
    jobs = slurm.submit(manifest, entries, cluster)
    log(f"{count_of(len(jobs), 'job')} queued" + (f": {jobs[0]} to {jobs[-1]}" if len(jobs) > 1 else ""))
    teacher = slurm.submit_teachers(manifest, cluster)
    if manifest.waiting:
        job = f"job {teacher}" if teacher else "a job that is queued already"
        log(f"traces are made by {job}, which then queues the cells that wait for them")


def _follow(manifest: Manifest, cluster: ClusterConfig, log: Log) -> None:
    """Wait until nothing of a sweep is running or queued; log changes of the counts. Ctrl-C ends the waiting,
    not the sweep."""
    before: dict[str, int] = {}
    while True:
        manifest = manifests.read(manifest.folder)
        state = read_sweep(manifest)
        if state.counts != before:
            before = state.counts
            log(f"{time.strftime('%H:%M:%S')} {by_state(before)}")
        if not state.is_moving and not (cluster.name == "slurm" and slurm.teachers_active(manifest)):
            return
        time.sleep(FOLLOW_S)


def _conclude(request: LaunchRequest, manifest: Manifest, relay: Relay, log: Log) -> int:
    """Print how a sweep has ended. Returns its exit code."""
    state = read_sweep(manifests.read(manifest.folder))
    cells = [one for one in state.cells if request.includes(one.entry)]
    counts = counts_of(cells, len(state.waiting))
    print_parts("", closing_table(cells))
    for line in closing_lines(state.manifest, cells, counts):
        log(line)
    if relay.first is not None:
        return ExitCode.SIGNALLED + relay.first
    return ExitCode.OK if set(counts) <= {"finished"} else ExitCode.FAILED


# Cancelling ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class Cancelled:
    """Cells by what happened to them: `ended`; `ending` (asked, still in their step); `skipped`, and why."""

    ended: list[SweepCell] = field(default_factory=list)
    ending: list[SweepCell] = field(default_factory=list)
    skipped: list[tuple[SweepCell, str]] = field(default_factory=list)


def cancel(
    manifest: Manifest, ids: set[str], *, entire: bool, again: bool = False, wait_s: float = CANCEL_S
) -> Cancelled:
    """Cancel the open cells among `ids`: queued jobs are taken back, and running cells get SIGTERM, once;
    they end after their step, with a checkpoint. `entire`: the sweep itself, so that its controller ends too,
    but no cell that another sweep runs. `again`: signal those again that were asked before, which ends them
    within their step. Raises UserError, with nothing done, if a job also runs cells that were not named, or
    SLURM does not answer."""
    done = Cancelled()
    with held(manifest.folder, ".cancel"):  # of two at once, the second finds everything asked already
        state = read_sweep(manifest)
        chosen = [one for one in state.cells if one.entry.id in ids and one.cell.state in OPEN]
        if entire:
            others = [(one, name) for one in chosen if (name := _run_by_other(one, manifest))]
            done.skipped = [
                (one, f"run by the sweep {name}; name it to cancel it as well") for one, name in others
            ]
            chosen = [one for one in chosen if one not in [other for other, _ in others]]
        jobs = _jobs_of(chosen, state)
        unwritable = [one for one in chosen if unusable(one.cell.folder / journal.NAME)]
        done.skipped += [(one, f"its record is damaged: {one.cell.damage}") for one in unwritable]
        chosen = [one for one in chosen if one not in unwritable]
        fresh = [one for one in chosen if not is_cancelled(journal.read(one.cell.folder))]
        for one in fresh:
            journal.note(one.cell.folder, "cancel")
        asked = [one for one in chosen if again or one in fresh or one.cell.state == "queued"]
        own = sorted({one.cell.job for one in asked if one.cell.job in jobs and one.cell.job})
        if own and not queue.cancel(own, now=again):
            fault = Fault("scancel", f"SLURM did not take back {len(own)} jobs", "add --now")
            raise UserError(fault, "cells that wait will not be started")
        if entire and state.controller and state.controller.get("alive"):
            ask_to_end(int(state.controller["pid"]), "dash_exp")
        for one in chosen if again else fresh:
            if one.cell.pid is not None:
                ask_to_end(one.cell.pid, "dash_exp")
        _await_ends(manifest, chosen, done, wait_s)
    return done


def _run_by_other(one: SweepCell, manifest: Manifest) -> str | None:
    """The other sweep that runs a cell or has queued it."""
    if one.cell.state not in ACTIVE:
        return None
    rows = [row for row in journal.read(one.cell.folder) if row["kind"] in ("queued", "start")]
    name = rows[-1].get("sweep") if rows else None
    return str(name) if name and name != manifest.name else None


def _jobs_of(chosen: Sequence[SweepCell], state: SweepState) -> set[str]:
    """The SLURM jobs of these cells. Raises UserError if one of them runs other cells too, or SLURM does not
    answer."""
    jobs = {one.cell.job for one in chosen if one.cell.job and one.cell.state != "interrupted"}
    sharing = [one for one in state.cells if one.cell.job in jobs and one.cell.state in ACTIVE]
    what, hint = "is run by the same job as what you named", "name both, or none of them"
    faults = [Fault(o.label, f"{what} ({o.cell.job})", hint) for o in sharing if o not in chosen]
    if faults:
        raise UserError(faults, NOTHING_CANCELLED)
    if jobs and queue.active(jobs) is None:
        raise UserError(Fault("scancel", "SLURM does not answer", "try again later"), NOTHING_CANCELLED)
    return jobs


def _await_ends(manifest: Manifest, chosen: Sequence[SweepCell], done: Cancelled, wait_s: float) -> None:
    """Record `cancelled` for each cell as soon as nobody runs it."""
    left = {one.entry.id: one for one in chosen}
    deadline = time.monotonic() + wait_s
    while left:
        for one in read_sweep(manifest).cells:
            if one.entry.id in left and one.cell.state not in ACTIVE:
                set_state(one.cell.folder, "cancelled")
                done.ended.append(left.pop(one.entry.id))
        if time.monotonic() >= deadline:
            break
        time.sleep(min(CHECK_S, wait_s))
    done.ending = list(left.values())
