"""What a SLURM job runs: cells, or the sampling of a sweep's teachers.

submitit pickles a job object and calls it, again after every requeue, whether it was caused by the job itself
before its time limit, a preemption, a lost node, a person. All it knows of a cell's progress comes from the
cell's folder. The job replaces submitit's signal handlers while cells run: those would requeue by the pickle,
count every early warning as a timeout, and ignore SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dash_exp.errors import ExitCode
from dash_exp.record import journal
from dash_exp.record import manifest as manifests
from dash_exp.record.folder import Row, read_json, read_rows
from dash_exp.record.journal import BY_SCHEDULER, is_cancelled, may_retry, set_state
from dash_exp.signals import handling, run_forwarding
from dash_exp.sweep.local import make_traces
from dash_exp.sweep.pool import PAUSED, Relay, Terms, print_log, run_pool
from dash_exp.sweep.resources import cluster_of
from dash_exp.sweep.slurm import queue
from dash_exp.sweep.states import open_need, recorded_state
from dash_exp.sweep.worker import OUTPUT, Job, cell_actions
from dash_exp.text import last_lines

WARNING = int(signal.SIGUSR2)
SETTLED = ("finished", PAUSED, "failed", "blocked", "cancelled")
"""States that are not caused by a signal to the job."""
ATTEMPTS, PAUSE_S = 3, 5.0
"""To reach SLURM's controller when a job asks to be requeued."""
FRUITLESS = 2
"""Requeues at a time limit without progress after which a cell fails."""
SHOWN_LINES = 20


@dataclass(frozen=True, slots=True)
class JobPlace:
    """Where this process is in SLURM. `job`: its id as in squeue; `restarts`: how often SLURM has restarted
    the job; `cpus`: of this task."""

    job: str
    rank: int = 0
    tasks: int = 1
    restarts: int = 0
    cpus: int | None = None

    @classmethod
    def here(cls, environ: Mapping[str, str]) -> JobPlace:
        array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
        cpus = environ.get("SLURM_CPUS_PER_TASK", "")
        return cls(
            f"{array}_{task}" if array and task else environ["SLURM_JOB_ID"],
            int(environ.get("SLURM_PROCID", "0")),
            int(environ.get("SLURM_STEP_NUM_TASKS", "1")),
            int(environ.get("SLURM_RESTART_COUNT", "0")),
            int(cpus) if cpus.isdigit() else None,
        )


@dataclass(frozen=True)
class SlurmJob:
    """Runs cells. `cells`: names of folders below `root`/cells; `needs`: ids of cells that each of them waits
    for; `gpus`: of each; `slots`: cells at once; `requeues`, `retries`: as in `cluster`."""

    root: str
    sweep: str
    cells: tuple[str, ...]
    needs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    actions: tuple[str, ...] = ()
    gpus: int = 0
    slots: int = 1
    requeues: int = 0
    retries: Mapping[str, int] = field(default_factory=dict)

    def __call__(self) -> dict[str, str]:
        """Run the cells. Returns their states if all are finished or paused, else exits with 1, a failure for
        SLURM; 3 if a cell still waits for another; 128 + n after signal n."""
        relay = Relay()
        with handling(relay):
            place = JobPlace.here(os.environ)
            if place.rank > 0:
                return self._run_rank(place, relay)
            states = self._run_cells(place, relay)
            code = self._end(states, place, relay)
        if code:
            raise SystemExit(code)
        return states

    def folder(self, name: str) -> Path:
        return Path(self.root) / "cells" / name

    def _run_rank(self, place: JobPlace, relay: Relay) -> dict[str, str]:
        """Run a rank of the learner other than 0. Only rank 0 records states and requeues; if it runs no
        cell, neither does this one."""
        (name,) = self.cells
        if self._obstacle(name, place) is not None or relay.first is not None:
            return {}
        actions = cell_actions(self.actions, threads(place.cpus, 1))
        code, _ = run_forwarding([sys.executable, "-m", "dash_exp.cell", str(self.folder(name)), *actions])
        if code:
            raise SystemExit(code if code > 0 else ExitCode.SIGNALLED - code)
        return {}

    def _run_cells(self, place: JobPlace, relay: Relay) -> dict[str, str]:
        """Run the cells that can run. Returns the states of all."""
        states, able = {}, []
        for name in self.cells:
            obstacle = self._obstacle(name, place)
            note_restarts(self.folder(name), place)
            if obstacle is None:
                able.append(name)
                continue
            states[name], reason = obstacle
            if reason:
                print_log(f"{name}: {reason}")
                more = {"reason": reason} if states[name] == "blocked" else {"failure": reason}
                set_state(self.folder(name), states[name], **more)
        # the ranks of a cell must start together, so rank 0 does not retry by itself
        retries = self.retries if place.tasks == 1 else {}
        actions = tuple(cell_actions(self.actions, threads(place.cpus, self.slots)))
        terms = Terms(self.slots, actions, retries, self.slots, False, self.sweep, place.job)
        states |= run_pool([Job(self.folder(name), (), self.gpus) for name in able], terms, print_log, relay)
        for name in able:
            if states[name] == "failed":
                print(*last_lines(self.folder(name) / OUTPUT, SHOWN_LINES), sep="\n", flush=True)
        return states

    def _obstacle(self, name: str, place: JobPlace) -> tuple[str, str] | None:
        """The state of a cell that must not run now, and the reason (empty for a finished one)."""
        folder = self.folder(name)
        if recorded_state(folder) == "finished":
            return "finished", ""
        waits = [text for need in self.needs.get(name, ()) if (text := open_need(folder.parent, need))]
        if waits:
            return "blocked", f"waits for {', '.join(waits)}"
        if used_requeues(journal.read(folder), place) > self.requeues:
            return "interrupted", f"was requeued more often than cluster.requeues={self.requeues} allows"
        return None

    def _end(self, states: Mapping[str, str], place: JobPlace, relay: Relay) -> int:
        """Requeue the job if cells have to go on. Returns its exit code."""
        again = [name for name, state in states.items() if state == "failed" and self._may_retry(name)]
        cut_short = [name for name, state in states.items() if state not in SETTLED]
        if relay.first is not None and out_of_time(relay, place.job):
            self._requeue([*cut_short, *again], "timeout", place)
        elif relay.first is None and place.tasks > 1 and again:
            self._requeue(again, last_failure(self.folder(again[0])) or "unknown", place)
        if relay.first is not None and cut_short:
            return ExitCode.SIGNALLED + relay.first
        left = set(states.values()) - {"finished", PAUSED}
        return ExitCode.OK if not left else ExitCode.BLOCKED if left == {"blocked"} else ExitCode.FAILED

    def _may_retry(self, name: str) -> bool:
        kind = last_failure(self.folder(name))
        return kind is not None and may_retry(kind, journal.read(self.folder(name)), self.retries)

    def _requeue(self, names: Sequence[str], reason: str, place: JobPlace) -> None:
        """Requeue this job for those of the cells that were not cancelled and may be requeued once more."""
        rows = {name: journal.read(self.folder(name)) for name in names}
        wanted = [name for name in names if not is_cancelled(rows[name])]
        stuck = [name for name in wanted if reason == "timeout" and is_stuck(rows[name], self.folder(name))]
        for name in stuck:
            text = f"made no progress in {FRUITLESS + 1} starts, each ended by the job's time limit"
            why = f"{text}: raise cluster.hours, or make a step shorter (algorithm.prompts_per_step)"
            set_state(self.folder(name), "failed", failure=why)
            print_log(f"{name}: {why}")
        wanted = [name for name in wanted if name not in stuck]
        able = [name for name in wanted if used_requeues(rows[name], place) < self.requeues]
        for name in set(wanted) - set(able):
            why = f"{reason}; was requeued as often as cluster.requeues={self.requeues} allows"
            set_state(self.folder(name), "interrupted", failure=why)
            print_log(f"{name}: {why}")
        if able and requeue(place.job):
            for name in able:
                note_requeue(self.folder(name), reason, place)


@dataclass(frozen=True)
class TeacherJob:
    """Samples the teachers of the sweep in `folder` one after the other, then queues the cells that waited
    for their traces. If it is cut short, the same job continues after a requeue."""

    folder: str

    def __call__(self) -> int:
        """Returns 0. Exits with 1, a failure for SLURM, if cells still wait; 128 + n after signal n."""
        from dash_exp.sweep.slurm.submit import submit  # which imports this module

        relay, place = Relay(), JobPlace.here(os.environ)
        with handling(relay):
            manifest = make_traces(manifests.read(Path(self.folder)), print_log, relay, live=True)
        cluster = cluster_of(manifest.actions)
        if relay.first is not None:
            if out_of_time(relay, place.job) and place.restarts < cluster.requeues:
                requeue(place.job)
            raise SystemExit(ExitCode.SIGNALLED + relay.first)
        jobs = submit(manifest, manifest.entries, cluster)
        print_log(f"{len(jobs)} jobs queued, {len(manifest.waiting)} cells still wait")
        if manifest.waiting:
            raise SystemExit(ExitCode.FAILED)
        return 0


def out_of_time(relay: Relay, job: str) -> bool:
    """Whether the signals mean a time limit: only its warning, or an end that SLURM attributes to the limit.
    SLURM itself requeues preempted jobs, and a cancelled job must not come back."""
    if all(number == WARNING for number in relay.numbers):
        return True
    return queue.jobs([job])[job].reason == "TimeLimit"


def last_failure(folder: Path) -> str | None:
    """The class of a cell's last failure."""
    ends = [row for row in journal.read(folder) if row["kind"] == "end"]
    return ends[-1].get("failure_class") if ends else None


def threads(cpus: int | None, slots: int) -> int | None:
    """How many threads each cell may use on a cluster that assigns CPUs but does not confine jobs to them."""
    usable = len(os.sched_getaffinity(0))
    return max(1, cpus // slots) if cpus and cpus < usable else None


def used_requeues(rows: Sequence[Row], place: JobPlace) -> int:
    """How often a cell was requeued since a person last asked to start it. Restarts of this job that are not
    written down yet count too, so that all its ranks find the same number."""
    asked = [n for n, row in enumerate(rows) if row["kind"] in ("queued", "retry")]
    written = [row for row in rows[max(asked, default=0) :] if row["kind"] == "requeue"]
    return len(written) + max(0, place.restarts - requeues_of(rows, place.job))


def requeues_of(rows: Sequence[Row], job: str) -> int:
    return len([row for row in rows if row["kind"] == "requeue" and row.get("job") == job])


def note_restarts(folder: Path, place: JobPlace) -> None:
    """Write down requeues of this job by SLURM (`preemption`, `node`, `timeout`) or by a person
    (`requeued`)."""
    for _ in range(place.restarts - requeues_of(journal.read(folder), place.job)):
        reason = BY_SCHEDULER.get(queue.last_run(place.job) or "", "requeued")
        note_requeue(folder, reason, place)


def note_requeue(folder: Path, reason: str, place: JobPlace) -> None:
    journal.note(folder, "requeue", reason=reason, job=place.job, progress=progress_of(folder))


def progress_of(folder: Path) -> list[int]:
    """What a cell has finished: steps, and rows of evaluations."""
    step = int(read_json(folder / "status.json").get("step", 0))
    return [step, len(read_rows(folder / "evals.jsonl").rows)]


def is_stuck(rows: Sequence[Row], folder: Path) -> bool:
    """Whether the last requeues of a cell, all at a time limit, have brought no progress."""
    asked = [n for n, row in enumerate(rows) if row["kind"] in ("queued", "retry")]
    last = [row for row in rows[max(asked, default=0) :] if row["kind"] == "requeue"][-FRUITLESS:]
    here = progress_of(folder)
    fruitless = [row for row in last if row["reason"] == "timeout" and row.get("progress") == here]
    return len(fruitless) == FRUITLESS


def requeue(job: str) -> bool:
    """Ask SLURM to end this job and start it again later. Returns whether it agreed."""
    for attempt in range(ATTEMPTS):
        time.sleep(PAUSE_S if attempt else 0.0)
        succeeded, text = queue.call(["scontrol", "requeue", job])
        if succeeded:
            print_log(f"job {job} is requeued and goes on from the last checkpoint")
            return True
        print_log(f"scontrol requeue {job}: {text}")
    print_log("not requeued: launch the sweep again, and it goes on from the last checkpoint")
    return False
