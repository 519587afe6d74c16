"""Run cells on this machine, up to `slots` at once, each in a fresh process.

The pool keeps nothing that matters in memory: if it is killed, its cells go on running, and the next pool
waits for them, skips what is finished and runs the rest. Two pools may run the same cells side by side.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from dash_exp.errors import ExitCode
from dash_exp.record import journal
from dash_exp.record.folder import read_json
from dash_exp.record.journal import classify, is_cancelled, is_done, may_retry, note_end, set_state, signal_of
from dash_exp.record.locks import HERE, Locks
from dash_exp.record.state import LOST
from dash_exp.signals import handling
from dash_exp.sweep.states import ACTIVE, folder_of, state_of
from dash_exp.sweep.worker import CellProcess, Gpus, Job, Lease, cell_actions, threads_each, visible_gpus
from dash_exp.text import format_seconds, printable

POLL_S, LOOK_S, BUSY_S = 0.05, 1.0, 10.0
"""Seconds between two checks of the pool's own processes, of other cells, and of a cell that was busy."""
PAUSED = "paused"
"""The result of a cell that stopped at `run.until_step`; its status is `interrupted`."""

Log = Callable[[str], None]


def print_log(text: str) -> None:
    """A line of a process without a terminal."""
    with suppress(OSError):
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} [{os.getpid()}] {printable(text)}", flush=True)


@dataclass(frozen=True, slots=True)
class Terms:
    """How a pool runs its cells. `actions`: key=value, for every cell. `live`: cells print to this process's
    output, else to output.txt in their folders. `sweep`, `job`: recorded in the journal."""

    slots: int = 1
    actions: tuple[str, ...] = ()
    retries: Mapping[str, int] = field(default_factory=dict)
    cells_per_gpu: int = 1
    live: bool = False
    sweep: str | None = None
    job: str | None = None


class Relay:
    """A signal handler that keeps the signals to forward to cells. After the first one, no cell is
    started."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __call__(self, number: int, frame: object) -> None:
        self.numbers.append(number)

    @property
    def first(self) -> int | None:
        return self.numbers[0] if self.numbers else None


def run_pool(
    jobs: Sequence[Job], terms: Terms, log: Log = print, relay: Relay | None = None
) -> dict[str, str]:
    """Run the cells until each is finished, cancelled, blocked or has failed for good, or until a signal came
    (`relay.first`) and the running ones have ended. Returns their states, by the names of their folders."""
    pool = Pool(jobs, terms, log, relay or Relay())
    with handling(pool.relay):
        return pool.run()


class Pool:
    """The state of `run_pool`. `states`: of the cells that this pool will not start again."""

    def __init__(self, jobs: Sequence[Job], terms: Terms, log: Log, relay: Relay):
        self.terms, self.log, self.relay = terms, log, relay
        self.waiting = list(jobs)
        self.running: list[CellProcess] = []
        self.states: dict[str, str] = {}
        self._folders = {job.name.rpartition("-")[2]: job.folder for job in jobs}
        # By slots, not by how many cells remain: times are comparable only with equal threads.
        self._threads = threads_each(terms.slots) if terms.slots > 1 else None
        self._gpus = Gpus(visible_gpus() if terms.slots > 1 else (), terms.cells_per_gpu)
        self._logged_busy: set[str] = set()
        self._not_before: dict[str, float] = {}

    def run(self) -> dict[str, str]:
        look_at = 0.0
        while self.running or (self.waiting and self.relay.first is None):
            if self._collect() or time.monotonic() >= look_at:
                look_at = time.monotonic() + LOOK_S
                for worker in self.running:
                    if is_cancelled(journal.read(worker.job.folder)):
                        worker.ask_to_end()
                self._start_ready()
            for worker in self.running:
                worker.forward(self.relay.numbers)
            time.sleep(POLL_S)
        for job in self.waiting:
            if is_cancelled(journal.read(job.folder)):
                set_state(job.folder, "cancelled")
            self.states[job.name] = str(read_json(job.folder / "status.json").get("state", "pending"))
        return self.states

    def _start_ready(self) -> None:
        """Fill the free slots, in order: smaller cells do not overtake one that waits for GPUs."""
        locks = Locks.now()
        slots = self.terms.slots - self._left_running(locks)
        for job in list(self.waiting):
            if len(self.running) >= slots or self.relay.first is not None:
                return
            if self._is_ready(job, locks):
                lease = self._gpus.lease(job.gpus)
                if lease is None:
                    return
                self._start(job, lease)

    def _left_running(self, locks: Locks) -> int:
        """How many cells of this sweep a killed controller has left running: they take slots too."""
        held = [job for job in self.waiting if locks.holder(job.folder / ".lock") is not None]
        starts = [[row for row in journal.read(job.folder) if row["kind"] == "start"][-1:] for job in held]
        return sum(row["sweep"] == self.terms.sweep for rows in starts for row in rows)

    def _is_ready(self, job: Job, locks: Locks) -> bool:
        """Whether a cell can start now. One that never will is settled."""
        if time.monotonic() < self._not_before.get(job.name, 0.0) or not self._needs_met(job):
            return False
        holder = locks.holder(job.folder / ".lock")
        if holder is not None:
            self._log_busy(job, f"process {holder}")
        elif is_done(job.folder):
            self._settle(job, "finished", "was finished elsewhere")
        elif is_cancelled(journal.read(job.folder)):
            set_state(job.folder, "cancelled")
            self._settle(job, "cancelled", "is cancelled")
        else:
            return True
        return False

    def _needs_met(self, job: Job) -> bool:
        """Whether all that a cell needs is finished. If that cannot happen any more, the cell is blocked."""
        for need in job.needs:
            folder = self._folders.get(need) or folder_of(job.folder.parent, need)
            if folder is None:
                state = "missing"
            elif need in self._folders:
                state = self.states.get(folder.name, "queued")  # while it waits in this pool
            else:
                state = state_of(folder, time.time(), jobs={}).state
            if state == "finished":
                continue
            if state not in ACTIVE:
                reason = f"waits for {folder.name if folder else need} ({state})"
                set_state(job.folder, "blocked", reason=reason)
                self._settle(job, "blocked", f"is blocked: it {reason}")
            return False
        return True

    def _start(self, job: Job, lease: Lease) -> None:
        actions = cell_actions(self.terms.actions, self._threads)
        try:
            worker = CellProcess(job, lease, actions, self._gpus.environment(lease), self.terms.live)
        except OSError as error:
            self._gpus.release(lease)
            self._settle(job, "failed", f"could not be started: {error}")
            return
        self.waiting.remove(job)
        self.running.append(worker)
        with suppress(OSError):  # the cell reports a full disk
            pid, sweep = worker.process.pid, self.terms.sweep
            journal.note(job.folder, "start", host=HERE, pid=pid, job=self.terms.job, sweep=sweep)
        if not self.terms.live:
            self.log(f"{job.name} started")

    def _collect(self) -> bool:
        """Handle the workers that have ended. Returns whether there were any."""
        ended = [(worker, code) for worker in self.running if (code := worker.process.poll()) is not None]
        for worker, code in ended:
            self.running.remove(worker)
            self._gpus.release(worker.lease)
            self._ended(worker, code)
        return bool(ended)

    def _ended(self, worker: CellProcess, code: int) -> None:
        job, folder = worker.job, worker.job.folder
        cancelled = worker.asked_to_end or is_cancelled(journal.read(folder))
        by_request = signal_of(code) is not None and (cancelled or self.relay.first is not None)
        done = is_done(folder)  # it may have been killed while it exited
        failure = None
        if code not in (ExitCode.OK, ExitCode.BLOCKED, ExitCode.BUSY) and not by_request and not done:
            failure = classify(code, worker.status(), worker.tail(code))
        with suppress(OSError):
            note_end(folder, code, failure)
        status = read_json(folder / "status.json")
        if failure:
            self._failed(worker, code, failure)
        elif code == ExitCode.BUSY:
            self._not_before[job.name] = time.monotonic() + BUSY_S
            self._log_busy(job, "another process")
            self.waiting.append(job)
        elif code == ExitCode.OK and status.get("state") == "interrupted":
            self._settle(job, PAUSED, str(status.get("reason")))
        elif code == ExitCode.OK or done:
            text = f"finished after step {status.get('step', 0)}, {format_seconds(worker.age_s)}"
            if code == ExitCode.USER_ERROR:  # its upload failed
                text += f", but {worker.reason(code)}"
            self._settle(job, "finished", text)
        elif code == ExitCode.BLOCKED:
            self._settle(job, "blocked", f"is blocked: it {status.get('reason', 'waits for another cell')}")
        elif cancelled:
            set_state(folder, "cancelled")
            self._settle(job, "cancelled", "was cancelled")
        else:
            self._settle(job, "interrupted", "was interrupted")

    def _failed(self, worker: CellProcess, code: int, failure: str) -> None:
        """Start the cell again if its budget allows, else make sure that its status records the end."""
        job, reason = worker.job, worker.reason(code)
        text = f"failed ({failure}): {reason}"
        if self.relay.first is None and may_retry(failure, journal.read(job.folder), self.terms.retries):
            self.waiting.append(job)
            self.log(f"{job.name} {text}; it will be started again")
            return
        state = str(worker.status().get("state"))
        if state not in ("failed", "interrupted", "finished"):  # its process recorded no end
            state = "interrupted" if failure in LOST else "failed"
            set_state(job.folder, state, failure=reason)
        self._settle(job, state, text)

    def _log_busy(self, job: Job, by: str) -> None:
        if job.name not in self._logged_busy:
            self._logged_busy.add(job.name)
            self.log(f"{job.name} is being run by {by}; waiting for it")

    def _settle(self, job: Job, state: str, text: str) -> None:
        """Record the state of a cell that the pool will not start again."""
        self.states[job.name] = state
        if job in self.waiting:
            self.waiting.remove(job)
        self.log(f"[{len(self.states)}/{len(self._folders)}] {job.name} {text}")
