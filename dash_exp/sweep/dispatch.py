"""From a plan to running cells: what `python -m dash_exp -m` and `python -m dash_exp.sweep launch` share.

Everything that can be refused is refused before anything is written, and everything before a cell starts.
Torch-free.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from dash_exp.cell.run import SIGNALLED
from dash_exp.config.schema import ClusterConfig
from dash_exp.errors import Fault, UserError
from dash_exp.record import journal, provenance
from dash_exp.record import manifest as manifests
from dash_exp.record.endings import is_cancelled
from dash_exp.record.folder import CellBusy, archive, disk_fault, read_json
from dash_exp.record.jobs import Plan
from dash_exp.record.locks import Locks
from dash_exp.record.manifest import SWEEP_NAME, Entry, Manifest
from dash_exp.sweep import local
from dash_exp.sweep.actions import tracking_of
from dash_exp.sweep.pool import Relay, Say
from dash_exp.sweep.states import ACTIVE, is_stale
from dash_exp.sweep.status import is_moving, watch
from dash_exp.sweep.summary import closing_lines, counted, ended, status_command, table_of
from dash_exp.text import format_path

OK, FAILED = 0, 1
FOLLOW_S = 2.0


def tell(text: str) -> None:
    """Print at once; nobody may be reading any more."""
    with suppress(OSError):
        print(text, flush=True)


def launch(
    plan: Plan,
    root: Path,
    *,
    cluster: ClusterConfig,
    n_jobs: int = 1,
    wait: bool = True,
    detached: bool = False,
    force: bool = False,
    cells: Sequence[str] | None = None,
    say: Say = tell,
) -> int:
    """Write a plan down and run what of it is not finished, here or on SLURM. `cells`: only those, by the
    names of their folders. `detached`: in a process of its own. `wait`: until all is done (without it only
    a sweep on this machine that is not detached waits), then show a table.

    Returns 0; 1 where a cell that was waited for is not finished; 128 + n after signal n. Raises UserError
    for what the user can mend, with nothing started.
    """
    if n_jobs < 1:
        raise UserError(Fault("hydra.launcher.n_jobs", f"got {n_jobs}, must be at least 1"))
    if not SWEEP_NAME.fullmatch(plan.name):
        hint = "up to 100 letters, digits and _.+-, a letter or digit first"
        raise UserError(Fault("run.sweep", f"got {plan.name!r}, which cannot name a folder", hint))
    manifest = prepare(plan, root, cluster, force, cells, say)
    entries = [e for e in manifest.entries if cells is None or e.folder in cells]
    ask_again(manifest, entries)
    relay = Relay()
    waits = wait
    if cluster.name == "slurm":
        submit(manifest, entries, cluster, say)
    elif detached and not (local.unfinished(manifest, entries) or manifest.waiting):
        say("nothing is left to run")
    elif detached:
        local.detach(manifest, n_jobs, cells, say)
    else:
        waits = True
        local.launch(manifest, n_jobs, cells, say, relay)
    if not waits:
        say(status_command(manifest))
        return OK
    if cluster.name == "slurm" or detached:
        follow(manifest, cluster, say)
    return conclude(manifests.read(manifest.folder), cells, relay, say)


def prepare(
    plan: Plan, root: Path, cluster: ClusterConfig, force: bool, cells: Sequence[str] | None, say: Say
) -> Manifest:
    """Everything before the first cell starts. Raises UserError with nothing written where something is
    wrong, or where the disk does not take it."""
    if faults := refusals(plan, root, cluster, force):
        raise UserError(faults)
    try:
        manifest = manifests.write(plan, root)
        if force:
            archive_all([manifest.cell(e) for e in manifest.entries if cells is None or e.folder in cells])
            manifest = manifests.write(plan, root)  # freezes them anew
    except OSError as error:
        raise UserError(disk_fault(error, root)) from error
    say(headline(manifest, plan))
    prepare_tracking(manifest)
    return manifest


def refusals(plan: Plan, root: Path, cluster: ClusterConfig, force: bool) -> list[Fault]:
    """What SLURM would not take of a plan; of a finished cell only where it is to be run again."""
    if cluster.name != "slurm":
        return []
    from dash_exp.sweep.slurm import submit as slurm
    from dash_exp.sweep.slurm import teachers as slurm_teachers

    asking = slurm.entries_of(plan) if force else slurm.open_entries(plan, root)
    return slurm.faults((*asking, *slurm_teachers.demands(plan.waiting)), cluster)


def archive_all(folders: Sequence[Path]) -> None:
    """Move records aside. Raises UserError, before the first is moved, for those that are being run."""
    locks = Locks.now()
    hint = "wait for them, or cancel them first"
    busy = [folder for folder in folders if locks.holder(folder / ".lock") is not None]
    if busy:
        said = "is being run by another process"
        raise UserError([Fault("run.force", f"{format_path(folder)} {said}", hint) for folder in busy])
    for folder in folders:
        try:
            archive(folder)
        except CellBusy as error:
            fault = Fault("run.force", str(error), hint)
            raise UserError(fault, "the cells before it were archived") from error


def headline(manifest: Manifest, plan: Plan) -> str:
    """What the sweep consists of, and what of it is there already."""
    states = [read_json(manifest.cell(e) / "status.json").get("state") for e in manifest.entries]
    finished = [e for e, state in zip(manifest.entries, states, strict=True) if state == "finished"]
    facts = [counted(len(manifest.entries), "cell")]
    facts += [f"{len(finished)} finished already"] if finished else []
    code = provenance.code_hash() if finished else ""
    stale = sum(is_stale(manifest.cell(entry), code) for entry in finished)
    facts += [f"{stale} of these stale (recorded by other code; run.force=true starts anew)"] if stale else []
    facts += [f"{len(manifest.waiting)} waiting for traces"] if manifest.waiting else []
    facts += [f"{plan.duplicates} named twice"] if plan.duplicates else []
    return f"sweep {manifest.name}: {', '.join(facts)}"


def prepare_tracking(manifest: Manifest) -> None:
    """Let a mirror have its schema, experiment and parent run before many processes want them at once."""
    tracking = tracking_of(manifest.actions)
    if tracking.name == "mlflow":
        from dash_exp.config.tracking import place_of
        from dash_exp.mirror.__main__ import prepare

        place = place_of(tracking, manifest.root, os.environ)
        prepare(place.uri, place.experiment, manifest.name)


def ask_again(manifest: Manifest, entries: Sequence[Entry]) -> None:
    """Who launches a sweep asks for another start of what failed or was cancelled: budgets count anew. Not
    of what runs or is queued, here or elsewhere."""
    active = {one.entry.id for one in watch(manifest).cells if one.cell.state in ACTIVE}
    for entry in local.unfinished(manifest, entries):
        folder = manifest.cell(entry)
        rows = journal.since_retry(journal.read(folder))
        ended_badly = any(row["kind"] == "end" and row.get("failure_class") for row in rows)
        if (ended_badly or is_cancelled(rows)) and entry.id not in active:
            journal.note(folder, "retry")


def submit(manifest: Manifest, entries: Sequence[Entry], cluster: ClusterConfig, say: Say) -> None:
    from dash_exp.sweep.slurm import submit as slurm
    from dash_exp.sweep.slurm import teachers as slurm_teachers

    jobs = slurm.submit(manifest, entries, manifest.actions, cluster)
    say(f"{counted(len(jobs), 'job')} queued" + (f": {jobs[0]} to {jobs[-1]}" if len(jobs) > 1 else ""))
    teacher = slurm_teachers.submit(manifest, cluster)
    if manifest.waiting:
        job = f"job {teacher}" if teacher else "a job that is queued already"
        say(f"traces are made by {job}, which then queues the cells that wait for them")


def follow(manifest: Manifest, cluster: ClusterConfig, say: Say) -> None:
    """Wait until nothing of a sweep is running or queued; say when counts change. Ctrl-C ends the waiting,
    not the sweep."""
    before: dict[str, int] = {}
    while True:
        manifest = manifests.read(manifest.folder)
        state = watch(manifest)
        if state.counts != before:
            before = state.counts
            told = ", ".join(f"{count} {name}" for name, count in before.items())
            say(f"{time.strftime('%H:%M:%S')} {told}")
        if not is_moving(state) and not is_taught(manifest, cluster):
            return
        time.sleep(FOLLOW_S)


def is_taught(manifest: Manifest, cluster: ClusterConfig) -> bool:
    """Whether a job of SLURM makes, or will make, the traces that cells wait for."""
    if cluster.name != "slurm" or not manifest.waiting:
        return False
    from dash_exp.sweep.slurm import teachers as slurm_teachers

    return slurm_teachers.is_active(manifest)


def conclude(manifest: Manifest, cells: Sequence[str] | None, relay: Relay, say: Say) -> int:
    """Show how a sweep has ended. Returns its exit code."""
    seen = ended(manifest, cells, time.time())
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=80)
    console.print()
    console.print(table_of(seen))
    for line in closing_lines(seen):
        say(line)
    if relay.first is not None:
        return SIGNALLED + relay.first
    return OK if set(+seen.counts) <= {"finished"} else FAILED
