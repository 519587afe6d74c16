"""Submit a sweep's cells to SLURM through submitit, in job arrays.

Cells that SLURM has already, or that run on this machine, are left out, so the same launch twice, or twice at
once, queues every cell once. Job ids are written to the cells' journals array by array: if a launch dies in
between, the next one continues.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from submitit import SlurmExecutor
from submitit.core.utils import UncompletedJobError

from dash_exp.config.schema import ClusterConfig
from dash_exp.errors import Fault, UserError
from dash_exp.record import journal
from dash_exp.record.locks import Locks
from dash_exp.record.manifest import Entry, Manifest, Plan, Resources, Waiting, held, sweep_folder
from dash_exp.sweep.resources import resources_of
from dash_exp.sweep.slurm import queue
from dash_exp.sweep.slurm.arrays import Array, parameters, plan_arrays
from dash_exp.sweep.slurm.job import SlurmJob, TeacherJob
from dash_exp.sweep.states import names_by_id, recorded_state
from dash_exp.traces.settings import parse

JOBS = "jobs"
"""Folder of scripts, pickles and logs, below the sweep's."""
NO_ANSWER = Fault("cluster", "SLURM does not answer", "squeue says more; try again later")


class Executor(SlurmExecutor):
    """submitit's, also usable for a dry run without SLURM; `find_faults` checks whether SLURM is there."""

    @classmethod
    def affinity(cls) -> int:
        return 2


@dataclass(frozen=True, slots=True)
class Queue:
    """Cells to submit (`todo`), and the jobs of cells that SLURM has already."""

    todo: tuple[Entry, ...]
    jobs: Mapping[str, str]

    def arrays(self, sweep: str, cluster: ClusterConfig) -> list[Array]:
        waited_for = [*self.jobs, *(entry.id for entry in self.todo)]
        return plan_arrays(sweep, self.todo, cluster, queue.largest_array(), waited_for)


def submit(manifest: Manifest, entries: Sequence[Entry], cluster: ClusterConfig) -> list[str]:
    """Submit those of the cells that have to run; returns the ids of the jobs. A cell whose need is neither
    finished nor queued nor running is left out: it stays blocked.

    Raises UserError if SLURM does not answer or refuses; what it accepted before that stays queued.
    """
    with held(manifest.folder.parent, ".submit"):  # sweeps share cells
        found = find_queue(manifest, entries)
        if found is None:
            raise UserError(NO_ANSWER)
        arrays, job_of = found.arrays(manifest.name, cluster), dict(found.jobs)
        submitted: list[str] = []
        parents: list[str] = []
        for array in arrays:
            after = [*(job_of[need] for need in array.needs), *(parents[place] for place in array.behind)]
            jobs = [_job(manifest, task, array, cluster) for task in array.tasks]
            before = round(time.time(), 3)  # a job may start before its id is written below
            done = f"{len(submitted)} of {sum(len(a.tasks) for a in arrays)} jobs were queued; "
            ids = _submit_array(
                executor_of(manifest.folder, array, cluster, after),
                jobs,
                f"{done}the same command queues the rest" if submitted else "nothing was started",
            )
            parents.append(ids[0].partition("_")[0])
            for task, job_id in zip(array.tasks, ids, strict=True):
                for entry in task:
                    row = {"job": job_id, "sweep": manifest.name, "time": before}
                    journal.note(manifest.cell(entry), "queued", **row)
                    job_of[entry.id] = job_id
            submitted += ids
        return submitted


def _submit_array(executor: Executor, jobs: Sequence[object], consequence: str) -> list[str]:
    try:
        with outside_a_job():
            return [str(job.job_id) for job in executor.submit_array(jobs)]
    except (UncompletedJobError, RuntimeError, OSError) as error:
        text = " ".join(str(error).replace("sbatch: error:", "").split()) or type(error).__name__
        name = executor.parameters["job_name"]
        raise UserError(Fault("cluster", f"SLURM refused {name}: {text}"), consequence) from error


def _job(manifest: Manifest, task: Sequence[Entry], array: Array, cluster: ClusterConfig) -> SlurmJob:
    return SlurmJob(
        root=str(manifest.root.resolve()),
        sweep=manifest.name,
        cells=tuple(entry.folder for entry in task),
        needs={entry.folder: entry.needs for entry in task},
        actions=manifest.actions,
        gpus=task[0].resources.gpus,
        slots=array.demand.slots,
        requeues=cluster.requeues,
        retries=dict(cluster.retries),
    )


def executor_of(folder: Path, array: Array, cluster: ClusterConfig, after: Sequence[str]) -> Executor:
    executor = Executor(folder.resolve() / JOBS)
    executor.update_parameters(**parameters(array, cluster, list(dict.fromkeys(after))))
    return executor


@contextmanager
def outside_a_job() -> Iterator[None]:
    """Hide this job's variables while submitting from within a job: they would contradict what the new job
    asks for. How to reach SLURM, and a user's defaults for sbatch, stay."""
    inside = "SLURM_JOB_ID" in os.environ
    own = [n for n in os.environ if n.startswith(("SLURM_", "SLURMD_")) and n != "SLURM_CONF"]
    taken = {name: os.environ.pop(name) for name in own if inside}
    try:
        yield
    finally:
        os.environ.update(taken)


def find_queue(manifest: Manifest, entries: Iterable[Entry]) -> Queue | None:
    """What has to be submitted of these cells; None if SLURM does not answer."""
    wanted = {entry.id: entry for entry in entries}
    folders = _cell_folders(manifest, [*wanted, *(need for e in wanted.values() for need in e.needs)])
    finished = {one for one, folder in folders.items() if recorded_state(folder) == "finished"}
    jobs = {one: job_ids(folder) for one, folder in folders.items() if one not in finished}
    active = queue.active(job for many in jobs.values() for job in many)
    if active is None:
        return None
    job_of = {one: last for one, many in jobs.items() for last in [j for j in many if j in active][-1:]}
    locks, settled = Locks.now(), {*finished, *job_of}
    free = [e for e in wanted.values() if e.id not in settled]
    todo = [e for e in free if locks.holder(manifest.cell(e) / ".lock") is None]
    while True:  # leave out cells with a need that is neither settled nor submitted with them
        able = settled | {entry.id for entry in todo}
        kept = [entry for entry in todo if able.issuperset(entry.needs)]
        if len(kept) == len(todo):
            return Queue(tuple(todo), job_of)
        todo = kept


def _cell_folders(manifest: Manifest, ids: Iterable[str]) -> dict[str, Path]:
    """The folders of cells, of this sweep or others, that exist."""
    known = {entry.id: manifest.cell(entry) for entry in manifest.entries}
    wanted = list(dict.fromkeys(ids))
    if any(one not in known for one in wanted):
        cells = manifest.root / "cells"
        known = {one: cells / name for one, name in names_by_id(cells).items()} | known
    return {one: known[one] for one in wanted if one in known}


def job_ids(folder: Path) -> list[str]:
    """The jobs that a cell was given to, oldest first."""
    rows = [row for row in journal.read(folder) if row["kind"] in ("queued", "start", "requeue")]
    return list(dict.fromkeys(str(row["job"]) for row in rows if row.get("job")))


def entries_of(plan: Plan) -> tuple[Entry, ...]:
    """The cells of a plan as its manifest would list them."""
    return tuple(Entry(c.id, c.folder_name, c.overrides, c.resources, c.needs) for c in plan.cells)


def open_entries(plan: Plan, root: Path) -> tuple[Entry, ...]:
    """The cells of a plan that are not finished."""
    cells = root / "cells"
    return tuple(e for e in entries_of(plan) if recorded_state(cells / e.folder) != "finished")


def sbatch_text(plan: Plan, root: Path, cluster: ClusterConfig) -> list[str]:
    """For a dry run: the script of every array that launching this plan would submit. Jobs without an id yet
    are named after their cell; if SLURM does not answer, no cell counts as queued."""
    folder, entries = sweep_folder(root, plan.name), entries_of(plan)
    manifest = Manifest(plan.name, folder, root, entries, plan.waiting, plan.actions, {}, 0.0)
    found = find_queue(manifest, entries) or Queue(open_entries(plan, root), {})
    names = {entry.id: f"<{entry.folder}>" for entry in entries} | dict(found.jobs)
    arrays = found.arrays(plan.name, cluster)
    texts = []
    for array in arrays:
        after = [*(names[need] for need in array.needs), *(f"<{arrays[n].name}>" for n in array.behind)]
        executor = executor_of(folder, array, cluster, after)
        if len(array.tasks) > 1:
            executor.parameters["map_count"] = len(array.tasks)  # as submitit does for an array
        texts.append(executor._make_submission_file_text(executor._submitit_command_str, ""))
    return texts


# Traces that cells wait for -----------------------------------------------------------------------


def teacher_entries(waiting: Sequence[Waiting]) -> list[Entry]:
    """What the job that makes these traces asks for, as a cell would; empty if no cell waits. Raises
    UserError if the arguments of a teacher are wrong."""
    teachers = [parse(traces.arguments).config for traces in dict.fromkeys(one.traces for one in waiting)]
    if not teachers:
        return []
    each = [resources_of(config) for config in teachers]
    most = Resources(**{f.name: max(getattr(one, f.name) for one in each) for f in fields(Resources)})
    return [Entry("traces", f"traces-{teachers[0].model.name}", (), most, ())]


def submit_teachers(manifest: Manifest, cluster: ClusterConfig) -> str | None:
    """Queue the job that makes the traces that cells of this sweep wait for; None if it is queued or running
    already, or no cell waits. Raises UserError if SLURM does not answer or refuses."""
    entries = teacher_entries(manifest.waiting)
    if not entries:
        return None
    folder = manifest.folder
    with held(folder.parent, ".submit"):
        active = queue.active(job_ids(folder))
        if active is None:
            raise UserError(NO_ANSWER)
        if active:
            return None
        (array,) = plan_arrays(manifest.name, entries, cluster, 1)
        executor = executor_of(folder, array, cluster, ())
        (job,) = _submit_array(executor, [TeacherJob(str(folder.resolve()))], "nothing was started")
        journal.note(folder, "queued", job=job, sweep=manifest.name)
    return job


def teachers_active(manifest: Manifest) -> bool:
    """Whether a job makes, or will make, traces that cells of this sweep wait for."""
    return bool(manifest.waiting and queue.active(job_ids(manifest.folder)))
