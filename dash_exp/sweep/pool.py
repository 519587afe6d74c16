"""Cells on this machine, up to `slots` at once, each in a fresh process. Torch-free.

Nothing is kept in memory that matters: a pool that is killed leaves its cells running, and the next one
waits for those, skips what is finished and goes on with the rest. So does a second one beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dash_exp.cell.run import BLOCKED, BUSY, OK
from dash_exp.record import journal
from dash_exp.record.endings import is_cancelled, is_done, note_end, say_state
from dash_exp.record.failures import classify, may_retry, signal_of
from dash_exp.record.folder import read_json
from dash_exp.record.locks import HERE, Locks
from dash_exp.signals import handling
from dash_exp.sweep.shares import Gpus, Lease, threads_each, visible_gpus
from dash_exp.sweep.states import ACTIVE, state_of
from dash_exp.sweep.verdict import LOST
from dash_exp.sweep.worker import Job, Worker, cell_actions
from dash_exp.text import format_seconds

POLL_S, LOOK_S, BUSY_S = 0.05, 1.0, 10.0
"""Seconds between two looks at the pool's own processes, at what others do, and at a cell that was busy."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Terms:
    """How a pool runs its cells. `actions`: as key=value for each. `live`: their output goes where this
    process's goes, else to output.txt in their folders. `sweep`, `job`: for the journal."""

    slots: int = 1
    actions: tuple[str, ...] = ()
    retries: Mapping[str, int] = field(default_factory=dict)
    cells_per_gpu: int = 1
    live: bool = False
    sweep: str | None = None
    job: str | None = None


class Relay:
    """Signals on their way to the cells. Once one has come, no cell is started any more."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __call__(self, number: int, frame: object) -> None:
        self.numbers.append(number)

    @property
    def first(self) -> int | None:
        return self.numbers[0] if self.numbers else None


def run_pool(
    jobs: Sequence[Job], terms: Terms, say: Say = print, relay: Relay | None = None
) -> dict[str, str]:
    """Run the cells until each is finished, has failed for good, is blocked or was cancelled, or until a
    signal has come (`relay.first`) and those that ran have ended. Returns the state of each, by the name of
    its folder."""
    pool = Pool(jobs, terms, say, relay or Relay())
    with handling(pool.relay):
        return pool.run()


class Pool:
    """What `run_pool` works with. `states`: of the cells that it is through with."""

    def __init__(self, jobs: Sequence[Job], terms: Terms, say: Say, relay: Relay):
        self.terms, self.say, self.relay = terms, say, relay
        self.waiting = list(jobs)
        self.running: list[Worker] = []
        self.states: dict[str, str] = {}
        self._folders = {job.name.rpartition("-")[2]: job.folder for job in jobs}
        # By slots, not by how many cells are left: a time can be compared only with equal threads.
        self._threads = threads_each(terms.slots) if terms.slots > 1 else None
        self._gpus = Gpus(visible_gpus() if terms.slots > 1 else (), terms.cells_per_gpu)
        self._told: set[str] = set()
        self._not_before: dict[str, float] = {}

    def run(self) -> dict[str, str]:
        look_at = 0.0
        while self.running or (self.waiting and self.relay.first is None):
            if self._collect() or time.monotonic() >= look_at:
                look_at = time.monotonic() + LOOK_S
                self._end_cancelled()
                self._start_ready()
            for worker in self.running:
                worker.hand_on(self.relay.numbers)
            time.sleep(POLL_S)
        for job in list(self.waiting):
            self._leave(job)
        return self.states

    def _start_ready(self) -> None:
        """Fill the free slots, in order: a cell that waits for GPUs is not overtaken by smaller ones."""
        locks = Locks.now()
        slots = self.terms.slots - self._left_running(locks)
        for job in list(self.waiting):
            if len(self.running) >= slots or self.relay.first is not None:
                return
            if self._is_ready(job, locks):
                lease = self._gpus.take(job.gpus)
                if lease is None:
                    return
                self._start(job, lease)

    def _left_running(self, locks: Locks) -> int:
        """Cells of this sweep that a controller which was killed has left running: they have slots too."""
        held = [job for job in self.waiting if locks.holder(job.folder / ".lock") is not None]
        starts = [[row for row in journal.read(job.folder) if row["kind"] == "start"][-1:] for job in held]
        return sum(row["sweep"] == self.terms.sweep for rows in starts for row in rows)

    def _is_ready(self, job: Job, locks: Locks) -> bool:
        """Whether a cell can be started now. One that never will is settled."""
        if time.monotonic() < self._not_before.get(job.name, 0.0) or not self._needs_met(job):
            return False
        holder = locks.holder(job.folder / ".lock")
        if holder is not None:
            self._say_busy(job, f"process {holder}")
        elif is_done(job.folder):
            self._settle(job, "finished", "was finished elsewhere")
        elif is_cancelled(journal.read(job.folder)):
            say_state(job.folder, "cancelled")
            self._settle(job, "cancelled", "is cancelled")
        else:
            return True
        return False

    def _needs_met(self, job: Job) -> bool:
        """Whether all that a cell needs is finished. Where that cannot come any more, it is blocked."""
        for need in job.needs:
            folder = self._folders.get(need) or next(iter(job.folder.parent.glob(f"*-{need}")), None)
            state = "missing" if folder is None else self._state(need, folder)
            if state == "finished":
                continue
            if state not in ACTIVE:
                reason = f"waits for {folder.name if folder else need} ({state})"
                say_state(job.folder, "blocked", reason=reason)
                self._settle(job, "blocked", f"is blocked: it {reason}")
            return False
        return True

    def _state(self, need: str, folder: Path) -> str:
        """Of a cell that another one needs; `queued`: its turn in this pool is still to come."""
        if need in self._folders:
            return self.states.get(folder.name, "queued")
        return state_of(folder, {}, time.time()).state

    def _start(self, job: Job, lease: Lease) -> None:
        actions = cell_actions(self.terms.actions, self._threads)
        try:
            worker = Worker(job, lease, actions, self._gpus.environment(lease), self.terms.live)
        except OSError as error:
            self._gpus.give_back(lease)
            self._settle(job, "failed", f"could not be started: {error}")
            return
        self.waiting.remove(job)
        self.running.append(worker)
        with suppress(OSError):  # a full disk is told by the cell
            pid, sweep = worker.process.pid, self.terms.sweep
            journal.note(job.folder, "start", host=HERE, pid=pid, job=self.terms.job, sweep=sweep)
        if not self.terms.live:
            self.say(f"{job.name} started")

    def _end_cancelled(self) -> None:
        for worker in self.running:
            if is_cancelled(journal.read(worker.job.folder)):
                worker.ask_to_end()

    def _collect(self) -> bool:
        """Take in the workers that have ended. Whether there were any."""
        ended = [(worker, code) for worker in self.running if (code := worker.process.poll()) is not None]
        for worker, code in ended:
            self.running.remove(worker)
            self._gpus.give_back(worker.lease)
            self._ended(worker, code)
        return bool(ended)

    def _ended(self, worker: Worker, code: int) -> None:
        job, folder = worker.job, worker.job.folder
        cancelled = worker.asked_to_end or is_cancelled(journal.read(folder))
        by_request = signal_of(code) is not None and (cancelled or self.relay.first is not None)
        failure = None
        done = is_done(folder)  # killed while it ended, at the latest
        if code not in (OK, BLOCKED, BUSY) and not by_request and not done:
            failure = classify(code, worker.status(), worker.tail(code))
        with suppress(OSError):
            note_end(folder, code, failure)
        if failure:
            self._failed(worker, code, failure)
        elif code == BUSY:
            self._not_before[job.name] = time.monotonic() + BUSY_S
            self._say_busy(job, "another process")
            self.waiting.append(job)
        elif code == OK or done:
            step = read_json(folder / "status.json").get("step", 0)
            self._settle(job, "finished", f"finished after step {step}, {format_seconds(worker.age_s)}")
        elif code == BLOCKED:
            reason = read_json(folder / "status.json").get("reason", "its partner is not finished")
            self._settle(job, "blocked", f"is blocked: it {reason}")
        elif cancelled:
            say_state(folder, "cancelled")
            self._settle(job, "cancelled", "was cancelled")
        else:
            self._settle(job, "interrupted", "was interrupted")

    def _failed(self, worker: Worker, code: int, failure: str) -> None:
        """Start it again where that makes sense; else let its status say how it ended."""
        job, reason = worker.job, worker.reason(code)
        told = f"failed ({failure}): {reason}"
        again = may_retry(failure, journal.read(job.folder), self.terms.retries)
        if again and self.relay.first is None:
            self.waiting.append(job)
            self.say(f"{job.name} {told}; it will be started again")
            return
        state = str(worker.status().get("state"))
        if state not in ("failed", "interrupted", "finished"):  # it died without a word
            state = "interrupted" if failure in LOST else "failed"
            say_state(job.folder, state, failure=reason)
        self._settle(job, state, told)

    def _say_busy(self, job: Job, who: str) -> None:
        if job.name not in self._told:
            self._told.add(job.name)
            self.say(f"{job.name} is being run by {who}; waiting for it")

    def _settle(self, job: Job, state: str, told: str) -> None:
        """This pool is through with a cell."""
        self.states[job.name] = state
        if job in self.waiting:
            self.waiting.remove(job)
        self.say(f"[{len(self.states)}/{len(self._folders)}] {job.name} {told}")

    def _leave(self, job: Job) -> None:
        """A cell whose turn did not come."""
        if is_cancelled(journal.read(job.folder)):
            say_state(job.folder, "cancelled")
        self.states[job.name] = str(read_json(job.folder / "status.json").get("state", "pending"))
