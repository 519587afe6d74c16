"""Cells handed to SLURM, through submitit: what would be submitted, and submitting it. Torch-free.

A cell that SLURM has already, or that is run on this machine, is not submitted; so the same launch twice, or
twice at once, queues every cell once. Ids of jobs are written to the cells' journals array by array: a
launch that dies in between is made good by the next one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from submitit import SlurmExecutor
from submitit.core.utils import UncompletedJobError

from dash_exp.config.schema import ClusterConfig
from dash_exp.errors import Fault, UserError
from dash_exp.record import journal
from dash_exp.record.folder import read_json
from dash_exp.record.jobs import Plan
from dash_exp.record.locks import Locks
from dash_exp.record.manifest import Entry, Manifest, held, sweep_folder
from dash_exp.sweep.slurm import queue
from dash_exp.sweep.slurm.arrays import Array, parameters, plan_arrays
from dash_exp.sweep.slurm.faults import faults, largest_array
from dash_exp.sweep.slurm.job import SlurmJob

__all__ = ["entries_of", "faults", "open_entries", "sbatch_text", "submit"]

JOBS = "jobs"
"""Folder of scripts, pickles and logs, below the sweep's."""
WITH_JOB = ("queued", "start", "requeue")


class Executor(SlurmExecutor):
    """submitit's. Whether SLURM can be reached is `faults`' to say; a dry run goes without."""

    @classmethod
    def affinity(cls) -> int:
        return 2


@dataclass(frozen=True, slots=True)
class Queue:
    """Cells to be submitted; the job of each cell that SLURM has already and that is not finished."""

    todo: tuple[Entry, ...]
    jobs: Mapping[str, str]

    def waited_for(self) -> list[str]:
        return [*self.jobs, *(entry.id for entry in self.todo)]


def submit(
    manifest: Manifest, entries: Sequence[Entry], actions: Sequence[str], cluster: ClusterConfig
) -> list[str]:
    """Submit those of the entries that are to be run; ids of the jobs. A cell whose need is neither finished
    nor on its way is left out: it stays blocked.

    Raises UserError where SLURM does not answer or refuses; what it took before that stays queued.
    """
    with held(manifest.folder.parent, ".submit"):  # cells are shared by sweeps
        found = look(manifest, entries)
        if found is None:
            raise UserError(Fault("cluster", "SLURM does not answer", "squeue says more; try again later"))
        arrays = plan_arrays(manifest.name, found.todo, cluster, largest_array(), found.waited_for())
        return _submit_all(manifest, arrays, dict(found.jobs), actions, cluster)


def _submit_all(
    manifest: Manifest,
    arrays: Sequence[Array],
    job_of: dict[str, str],
    actions: Sequence[str],
    cluster: ClusterConfig,
) -> list[str]:
    """Submit arrays in order. `job_of`: the jobs of cells, to which those submitted are added."""
    submitted: list[str] = []
    parents: list[str] = []
    for array in arrays:
        after = dict.fromkeys([*(job_of[n] for n in array.needs), *(parents[n] for n in array.behind)])
        jobs = [_job(manifest, task, array, actions, cluster) for task in array.tasks]
        executor = executor_of(manifest.folder, array, cluster, tuple(after))
        before = round(time.time(), 3)  # a job may start before its id is written below
        try:
            with outside_a_job():
                ids = [job.job_id for job in executor.submit_array(jobs)]
        except (UncompletedJobError, RuntimeError, OSError) as error:
            raise _refused(error, array, len(submitted), sum(len(a.tasks) for a in arrays)) from error
        parents.append(ids[0].partition("_")[0])
        for task, job_id in zip(array.tasks, ids, strict=True):
            for entry in task:
                row = {"job": job_id, "sweep": manifest.name, "time": before}
                journal.note(manifest.cell(entry), "queued", **row)
                job_of[entry.id] = job_id
        submitted += ids
    return submitted


def _refused(error: Exception, array: Array, done: int, wanted: int) -> UserError:
    said = " ".join(str(error).replace("sbatch: error:", "").split()) or type(error).__name__
    fault = Fault("cluster", f"SLURM refused {array.name}: {said}")
    if not done:
        return UserError(fault)
    return UserError(fault, f"{done} of {wanted} jobs were queued; the same command queues the rest")


def _job(
    manifest: Manifest, task: Sequence[Entry], array: Array, actions: Sequence[str], cluster: ClusterConfig
) -> SlurmJob:
    return SlurmJob(
        root=str(manifest.root.resolve()),
        sweep=manifest.name,
        cells=tuple(entry.folder for entry in task),
        needs={entry.folder: entry.needs for entry in task},
        actions=tuple(actions),
        gpus=task[0].resources.gpus,
        slots=array.demand.slots,
        requeues=cluster.requeues,
        retries=dict(cluster.retries),
    )


def executor_of(folder: Path, array: Array, cluster: ClusterConfig, after: Sequence[str]) -> Executor:
    executor = Executor(folder.resolve() / JOBS)
    executor.update_parameters(**parameters(array, cluster, after))
    return executor


@contextmanager
def outside_a_job() -> Iterator[None]:
    """Submit from within a job as from outside: its variables describe that job, and would contradict what
    the new one asks for. How to reach SLURM, and a user's defaults for sbatch, stay."""
    inside = "SLURM_JOB_ID" in os.environ
    own = [n for n in os.environ if n.startswith(("SLURM_", "SLURMD_")) and n != "SLURM_CONF"]
    taken = {name: os.environ.pop(name) for name in own if inside}
    try:
        yield
    finally:
        os.environ.update(taken)


def look(manifest: Manifest, entries: Iterable[Entry]) -> Queue | None:
    """What there is to submit of these entries; None where SLURM does not answer."""
    wanted = {entry.id: entry for entry in entries}
    folders = cell_folders(manifest, [*wanted, *(need for e in wanted.values() for need in e.needs)])
    finished = {one for one, folder in folders.items() if _is_finished(folder)}
    open_ones = {one: folder for one, folder in folders.items() if one not in finished}
    jobs = {one: job_ids(folder) for one, folder in open_ones.items()}
    active = queue.active(job for many in jobs.values() for job in many)
    if active is None:
        return None
    job_of = {one: last for one, many in jobs.items() for last in [j for j in many if j in active][-1:]}
    locks = Locks.now()
    free = [
        entry
        for one, entry in wanted.items()
        if one not in finished and one not in job_of and locks.holder(manifest.cell(entry) / ".lock") is None
    ]
    return Queue(tuple(startable(free, {*finished, *job_of})), job_of)


def startable(entries: Sequence[Entry], settled: set[str]) -> list[Entry]:
    """Entries whose every need is `settled` (finished, or on its way) or will be submitted with them."""
    left = list(entries)
    while True:
        able = settled | {entry.id for entry in left}
        kept = [entry for entry in left if able.issuperset(entry.needs)]
        if len(kept) == len(left):
            return kept
        left = kept


def cell_folders(manifest: Manifest, ids: Iterable[str]) -> dict[str, Path]:
    """Folders of cells, of this sweep or others, that exist."""
    known = {entry.id: manifest.cell(entry) for entry in manifest.entries}
    wanted = list(dict.fromkeys(ids))
    if any(one not in known for one in wanted):
        pool = manifest.root / "cells"
        names = [entry.name for entry in os.scandir(pool)] if pool.is_dir() else []
        known = {name.rpartition("-")[2]: pool / name for name in names} | known
    return {one: known[one] for one in wanted if one in known}


def job_ids(folder: Path) -> list[str]:
    """The jobs that a cell has been given to, oldest first."""
    rows = journal.read(folder)
    return list(dict.fromkeys(str(row["job"]) for row in rows if row["kind"] in WITH_JOB and row.get("job")))


def _is_finished(folder: Path) -> bool:
    return read_json(folder / "status.json").get("state") == "finished"


def entries_of(plan: Plan) -> tuple[Entry, ...]:
    """The cells of a plan as its manifest would have them."""
    return tuple(Entry(c.id, c.folder_name, c.overrides, c.resources, c.needs) for c in plan.cells)


def open_entries(plan: Plan, root: Path) -> tuple[Entry, ...]:
    """Those that are not finished: what a finished cell once asked for is no matter any more."""
    pool = root / "cells"
    return tuple(entry for entry in entries_of(plan) if not _is_finished(pool / entry.folder))


def sbatch_text(plan: Plan, root: Path, cluster: ClusterConfig) -> list[str]:
    """For a dry run: the script of every array that launching this plan now would submit. Jobs that have no
    id yet are called by the cell they run; where SLURM does not answer, no cell is taken to be queued."""
    folder, entries = sweep_folder(root, plan.name), entries_of(plan)
    manifest = Manifest(plan.name, folder, root, entries, plan.waiting, plan.actions, {}, 0.0)
    found = look(manifest, entries)
    if found is None:
        found = Queue(open_entries(plan, root), {})
    names = {entry.id: f"<{entry.folder}>" for entry in entries} | dict(found.jobs)
    arrays = plan_arrays(plan.name, found.todo, cluster, largest_array(), found.waited_for())
    texts = []
    for array in arrays:
        before = [f"<{arrays[place].name}>" for place in array.behind]
        after = [*(names[need] for need in array.needs), *before]
        executor = executor_of(folder, array, cluster, tuple(dict.fromkeys(after)))
        if len(array.tasks) > 1:
            executor.parameters["map_count"] = len(array.tasks)  # as submitit does for an array
        texts.append(executor._make_submission_file_text(executor._submitit_command_str, ""))
    return texts
