"""Traces that a sweep's cells wait for, made by a job of SLURM, which then queues these cells. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from submitit.core.utils import UncompletedJobError

from dash_exp.config.schema import ClusterConfig
from dash_exp.errors import Fault, UserError
from dash_exp.record import journal
from dash_exp.record import manifest as manifests
from dash_exp.record.jobs import Resources, Waiting
from dash_exp.record.manifest import Entry, Manifest, held
from dash_exp.signals import handling
from dash_exp.sweep.actions import cluster_of
from dash_exp.sweep.pool import Relay
from dash_exp.sweep.resources import resources_of
from dash_exp.sweep.slurm import queue
from dash_exp.sweep.slurm import submit as slurm
from dash_exp.sweep.slurm.arrays import plan_arrays
from dash_exp.sweep.slurm.job import SIGNALLED, Place, out_of_time, queue_anew, say
from dash_exp.sweep.teachers import make_traces
from dash_exp.traces.settings import parse


@dataclass(frozen=True)
class TeacherJob:
    """Samples the teachers of a sweep, one after the other, and queues the cells that waited. A run that is
    cut short goes on where it was, in the same job."""

    folder: str

    def __call__(self) -> int:
        """How many cells still wait: 0, or this process ends with a code that SLURM takes for a failure."""
        relay, place = Relay(), Place.here(os.environ)
        with handling(relay):
            manifest = make_traces(manifests.read(Path(self.folder)), say, relay, live=True)
        cluster = cluster_of(manifest.actions)
        if relay.first is not None:
            if out_of_time(relay, place.job) and place.restarts < cluster.requeues:
                queue_anew(place.job)
            raise SystemExit(SIGNALLED + relay.first)
        jobs = slurm.submit(manifest, manifest.entries, manifest.actions, cluster)
        say(f"{len(jobs)} jobs queued, {len(manifest.waiting)} cells still wait")
        if manifest.waiting:
            raise SystemExit(1)
        return 0


def demands(waiting: Sequence[Waiting]) -> list[Entry]:
    """What the job that makes these traces asks for, as a cell would; nothing where none wait. Raises
    UserError where a teacher cannot be asked."""
    teachers = [parse(traces.arguments).config for traces in dict.fromkeys(one.traces for one in waiting)]
    if not teachers:
        return []
    each = [resources_of(config) for config in teachers]
    most = Resources(**{f.name: max(getattr(one, f.name) for one in each) for f in fields(Resources)})
    return [Entry("traces", f"traces-{teachers[0].model.name}", (), most, ())]


def submit(manifest: Manifest, cluster: ClusterConfig) -> str | None:
    """Queue the job that makes what cells of this sweep wait for; None where that is queued or running
    already, or nothing waits. Raises UserError where SLURM does not answer or refuses."""
    entries = demands(manifest.waiting)
    if not entries:
        return None
    folder = manifest.folder
    with held(folder.parent, ".submit"):
        active = queue.active(slurm.job_ids(folder))
        if active is None:
            raise UserError(Fault("cluster", "SLURM does not answer", "squeue says more; try again later"))
        if active:
            return None
        (array,) = plan_arrays(manifest.name, entries, cluster, 1)
        executor = slurm.executor_of(folder, array, cluster, ())
        try:
            with slurm.outside_a_job():
                job = executor.submit(TeacherJob(str(folder.resolve()))).job_id
        except (UncompletedJobError, RuntimeError, OSError) as error:
            raise UserError(Fault("cluster", f"SLURM refused {array.name}: {error}")) from error
        journal.note(folder, "queued", job=job, sweep=manifest.name)
    return str(job)


def is_active(manifest: Manifest) -> bool:
    """Whether a job is at work, or will be, on what cells of this sweep wait for."""
    return bool(manifest.waiting and queue.active(slurm.job_ids(manifest.folder)))
