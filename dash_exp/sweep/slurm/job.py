"""What a job of SLURM runs: a cell, or several that share a GPU, from wherever their folders say they are.

submitit pickles a `SlurmJob` and calls it, anew after every requeue, whoever asked for that: this job itself
before its time limit, a preemption, a lost node, a person. All that it knows of a cell's progress comes from
the cell's folder. It has the signals to itself while cells run; submitit's handlers would requeue by the
pickle, count every early warning as a timeout, and let SIGTERM pass. Torch-free.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dash_exp.record import journal
from dash_exp.record.endings import is_cancelled, say_state
from dash_exp.record.failures import may_retry
from dash_exp.record.folder import Row, read_json
from dash_exp.signals import handling, run_forwarding
from dash_exp.sweep.pool import Relay, Terms, run_pool
from dash_exp.sweep.slurm import queue
from dash_exp.sweep.tails import last_lines
from dash_exp.sweep.worker import OUTPUT, Job, cell_actions

FAILED, BLOCKED, SIGNALLED = 1, 3, 128
WARNING = int(signal.SIGUSR2)
SETTLED = ("finished", "failed", "blocked", "cancelled")
"""States that a signal to the job did not cause."""
ATTEMPTS, PAUSE_S = 3, 5.0
"""To reach the controller when a job asks to be queued anew."""
BY_STATE = {"PREEMPTED": "preemption", "NODE_FAIL": "node", "TIMEOUT": "timeout"}
"""Why SLURM queued a job anew, from what accounting says of its last run; else `requeued`, by a person."""
SHOWN_LINES = 20


@dataclass(frozen=True, slots=True)
class Place:
    """This process's place in SLURM. `job`: its id as squeue has it; `restarts`: how often SLURM has started
    the job anew; `cpus`: that were given to this task."""

    job: str
    rank: int = 0
    tasks: int = 1
    restarts: int = 0
    cpus: int | None = None

    @classmethod
    def here(cls, environ: Mapping[str, str]) -> Place:
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
    """`cells`: names of folders below `root`/cells; `needs`: of each, ids of cells to be finished before it;
    `gpus`: of each; `slots`: cells at once; `requeues`, `retries`: as in `cluster`."""

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
        """Run the cells; their states, all `finished`. Anything else ends this process with a code that
        SLURM takes for a failure, 1; 3 where a cell still waits for another; 128 + n after signal n."""
        relay = Relay()
        with handling(relay):
            place = Place.here(os.environ)
            if place.rank > 0:
                return self._follow(place, relay)
            states = self._lead(place, relay)
            code = self._ended(states, place, relay)
        if code:
            raise SystemExit(code)
        return states

    def folder(self, name: str) -> Path:
        return Path(self.root) / "cells" / name

    def _follow(self, place: Place, relay: Relay) -> dict[str, str]:
        """As a rank of the learner beside rank 0, which decides everything; or nothing, where it does."""
        (name,) = self.cells
        if self._unable(name, place) is not None or relay.first is not None:
            return {}
        actions = cell_actions(self.actions, threads(place.cpus, 1))
        code, _ = run_forwarding([sys.executable, "-m", "dash_exp.cell", str(self.folder(name)), *actions])
        if code:
            raise SystemExit(code if code > 0 else SIGNALLED - code)
        return {}

    def _lead(self, place: Place, relay: Relay) -> dict[str, str]:
        """Run what can be run: the states in which the cells are left."""
        states, able = {}, []
        for name in self.cells:
            unable = self._unable(name, place)
            note_restarts(self.folder(name), place)
            if unable is None:
                able.append(name)
                continue
            states[name], reason = unable
            if reason:
                say(f"{name}: {reason}")
                more = {"reason": reason} if states[name] == "blocked" else {"failure": reason}
                say_state(self.folder(name), states[name], **more)
        # the ranks of a cell must start together, so rank 0 does not try again alone
        retries = self.retries if place.tasks == 1 else {}
        actions = tuple(cell_actions(self.actions, threads(place.cpus, self.slots)))
        terms = Terms(self.slots, actions, retries, self.slots, False, self.sweep, place.job)
        states |= run_pool([Job(self.folder(name), (), self.gpus) for name in able], terms, say, relay)
        for name in able:
            if states[name] == "failed":
                print(*last_lines(self.folder(name) / OUTPUT, SHOWN_LINES), sep="\n", flush=True)
        return states

    def _unable(self, name: str, place: Place) -> tuple[str, str] | None:
        """The state of a cell that is not to be run now, and why not (nothing to say of a finished one)."""
        folder = self.folder(name)
        if state_in(folder) == "finished":
            return "finished", ""
        waits = [reason for need in self.needs.get(name, ()) if (reason := unmet(folder.parent, need))]
        if waits:
            return "blocked", f"waits for {', '.join(waits)}"
        if used_requeues(journal.read(folder), place) > self.requeues:
            return "interrupted", f"was queued anew more often than cluster.requeues={self.requeues} allows"
        return None

    def _ended(self, states: Mapping[str, str], place: Place, relay: Relay) -> int:
        """What becomes of the job: the code it ends with, after it was queued anew where that makes sense."""
        failed = [name for name, state in states.items() if state == "failed"]
        again = [name for name in failed if self._may_start_again(name)]
        cut_short = [name for name, state in states.items() if state not in SETTLED]
        if relay.first is not None and out_of_time(relay, place.job):
            self._requeue([*cut_short, *again], "timeout", place)
        elif relay.first is None and place.tasks > 1 and again:
            self._requeue(again, last_failure(self.folder(again[0])) or "unknown", place)
        if relay.first is not None and cut_short:
            return SIGNALLED + relay.first
        left = set(states.values()) - {"finished"}
        return 0 if not left else BLOCKED if left == {"blocked"} else FAILED

    def _may_start_again(self, name: str) -> bool:
        """Whether the budget of its last failure's class allows a cell another start."""
        kind = last_failure(self.folder(name))
        return kind is not None and may_retry(kind, journal.read(self.folder(name)), self.retries)

    def _requeue(self, names: Sequence[str], reason: str, place: Place) -> None:
        """Queue this job anew for those of the cells that may still be, if nobody asked for their end."""
        rows = {name: journal.read(self.folder(name)) for name in names}
        wanted = [name for name in names if not is_cancelled(rows[name])]
        able = [name for name in wanted if used_requeues(rows[name], place) < self.requeues]
        for name in set(wanted) - set(able):
            why = f"{reason}; was queued anew as often as cluster.requeues={self.requeues} allows"
            say_state(self.folder(name), "interrupted", failure=why)
            say(f"{name}: {why}")
        if able and queue_anew(place.job):
            for name in able:
                journal.note(self.folder(name), "requeue", reason=reason, job=place.job)


def say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def state_in(folder: Path) -> str:
    return str(read_json(folder / "status.json").get("state", "pending"))


def unmet(pool: Path, need: str) -> str | None:
    """Why a cell that another one needs does not let it start; None if it is finished."""
    folder = next(iter(pool.glob(f"*-{need}")), None)
    if folder is None:
        return f"{need}, which has not been started"
    state = state_in(folder)
    return None if state == "finished" else f"{folder.name}, which is {state}"


def out_of_time(relay: Relay, job: str) -> bool:
    """Whether the signals are those of a time limit: its warning alone, or an end that SLURM says is one. A
    preemption is SLURM's to make good, and who cancels a job does not want it back."""
    if all(number == WARNING for number in relay.numbers):
        return True
    return queue.jobs([job])[job].reason == "TimeLimit"


def last_failure(folder: Path) -> str | None:
    """The class of a cell's last failure."""
    ends = [row for row in journal.read(folder) if row["kind"] == "end"]
    return ends[-1].get("failure_class") if ends else None


def threads(cpus: int | None, slots: int) -> int | None:
    """How many threads each cell may use where a cluster gives CPUs but does not confine jobs to them."""
    usable = len(os.sched_getaffinity(0))
    return max(1, cpus // slots) if cpus and cpus < usable else None


def used_requeues(rows: Sequence[Row], place: Place) -> int:
    """How often a cell was queued anew by itself since a person last asked for a start of it. Restarts of
    this job count before anything has been written of them, so that all its ranks find the same number."""
    asked = [n for n, row in enumerate(rows) if row["kind"] in ("queued", "retry")]
    written = [row for row in rows[max(asked, default=0) :] if row["kind"] == "requeue"]
    return len(written) + max(0, place.restarts - requeues_of(rows, place.job))


def requeues_of(rows: Sequence[Row], job: str) -> int:
    return len([row for row in rows if row["kind"] == "requeue" and row.get("job") == job])


def note_restarts(folder: Path, place: Place) -> None:
    """Write down that SLURM queued this job anew by itself, or at a person's request."""
    for _ in range(place.restarts - requeues_of(journal.read(folder), place.job)):
        journal.note(folder, "requeue", reason=restart_reason(place.job), job=place.job)


def restart_reason(job: str) -> str:
    """What ended the job's run before this one."""
    text = (
        queue.run(
            [
                "sacct",
                "--noheader",
                "--parsable2",
                "--allocations",
                "--duplicates",
                f"--jobs={job}",
                "--format=State",
            ]
        )
        or ""
    )
    runs = text.split("\n")[:-1]
    return BY_STATE.get(runs[-2].split(" ")[0], "requeued") if len(runs) > 1 else "requeued"


def queue_anew(job: str) -> bool:
    """Ask SLURM to end this job and start it again later. Whether it agreed."""
    for attempt in range(ATTEMPTS):
        time.sleep(PAUSE_S if attempt else 0.0)
        try:
            done = subprocess.run(
                ["scontrol", "requeue", job],
                capture_output=True,
                text=True,
                timeout=queue.TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            say(f"scontrol requeue {job}: {error}")
            continue
        if done.returncode == 0:
            say(f"job {job} is queued anew and goes on from the last checkpoint")
            return True
        say(f"scontrol requeue {job}: {' '.join(done.stderr.split())}")
    say("not queued anew: launch the sweep again, and it goes on from the last checkpoint")
    return False
