"""A pool of killable worker processes, one thread for each: a hang costs one task, never a run."""

from __future__ import annotations

import atexit
import os
import queue
import threading
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from dash_exp.types import Score
from dash_exp.verifiers.code.sandbox import Confinement
from dash_exp.verifiers.process import (
    WorkerDiedError,
    WorkerLimits,
    WorkerProcess,
    WorkerTimeoutError,
)
from dash_exp.verifiers.types import VerifyTask, score

_JOIN_S = 10.0

_Item = tuple[VerifyTask, "Future[Score]"]


class VerifierPool:
    """Judges tasks in `workers` processes, each verdict within `timeout_s` of its own work.

    The timer of a task starts when a ready worker is given it. A task that runs out of time gets
    `timeout`, one whose worker dies `crashed`; the worker is killed with its process group and
    replaced. Workers start in the background; `submit` never waits. When no worker can be started
    (`max_starts` failures in a row, in every slot), tasks get `verifier_error` with the reason.
    `module` is what a worker runs, with `arguments`, inside `sandbox` where one is given.
    """

    def __init__(
        self,
        workers: int,
        timeout_s: float = 5.0,
        memory_mb: int = 2048,
        *,
        start_timeout_s: float = 120.0,
        max_starts: int = 3,
        tasks_per_worker: int = 10_000,
        module: str = "dash_exp.verifiers.worker",
        sandbox: Confinement | None = None,
        arguments: tuple[str, ...] = (),
    ):
        if workers < 1 or timeout_s <= 0 or memory_mb < 1 or max_starts < 1:
            raise ValueError("workers, timeout_s, memory_mb and max_starts have to be positive")
        self._limits = WorkerLimits(timeout_s, memory_mb, start_timeout_s, module, sandbox, arguments)
        self._max_starts = max_starts
        self._tasks_per_worker = tasks_per_worker
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._live: set[WorkerProcess] = set()
        self._healthy = workers
        self._closing = False
        self._owner = os.getpid()
        self._threads = [
            threading.Thread(target=self._serve, name=f"verifier-{slot}", daemon=True)
            for slot in range(workers)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    def submit(self, task: VerifyTask) -> Future[Score]:
        """A verdict to come. Raises RuntimeError after `close`."""
        future: Future[Score] = Future()
        with self._lock:
            if self._closing:
                raise RuntimeError("the verifier pool is closed")
            self._queue.put((task, future))
        return future

    def worker_pids(self) -> list[int]:
        """Process ids of the workers alive now."""
        with self._lock:
            return sorted(worker.pid for worker in self._live)

    def close(self) -> None:
        """Kill every worker, cancel what has not begun, and wait for the threads."""
        if os.getpid() != self._owner:
            return  # a forked copy of the pool owns no worker
        with self._lock:
            first = not self._closing
            self._closing = True
            live = list(self._live)
        if first:
            self._cancel_waiting()
            for _ in self._threads:
                self._queue.put(None)
        for worker in live:
            worker.kill()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_JOIN_S)
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _cancel_waiting(self) -> None:
        while True:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return
            if item is not None and item[1].cancel():
                item[1].set_running_or_notify_cancel()  # wakes whoever waits for it

    # What follows runs in a slot's own thread.

    def _serve(self) -> None:
        """Keep one worker alive and give it tasks until the pool closes."""
        while True:
            worker, reason = self._start()
            if worker is None:
                break
            finished = self._work(worker)
            self._bury(worker)
            if finished:
                return
        with self._lock:
            self._healthy -= 1
            last = self._healthy == 0
        if last:  # other slots, while there are any, can do better than an error
            self._refuse(reason)

    def _start(self) -> tuple[WorkerProcess | None, str]:
        """A ready worker, or None and why there is none."""
        reason = "the pool is closed"
        for _ in range(self._max_starts):
            if self._closing:
                break
            try:
                worker = WorkerProcess(self._limits)
            except OSError as error:
                reason = f"the worker could not be started: {error}"
                continue
            with self._lock:
                self._live.add(worker)
                closing = self._closing
            if closing:
                self._bury(worker)
                return None, reason
            try:
                worker.wait_ready(self._limits.start_timeout_s)
                return worker, ""
            except WorkerTimeoutError:
                reason = f"the worker was not ready within {self._limits.start_timeout_s:g} s"
            except WorkerDiedError:
                reason = f"the worker could not be started: {worker.obituary()}"
            self._bury(worker)
        return None, reason

    def _bury(self, worker: WorkerProcess) -> None:
        worker.release()
        with self._lock:
            self._live.discard(worker)

    def _work(self, worker: WorkerProcess) -> bool:
        """Judge tasks until the worker is spent (False) or the pool closes (True)."""
        for _ in range(self._tasks_per_worker):
            item = self._queue.get()
            if item is None:
                return True
            task, future = item
            if not future.set_running_or_notify_cancel():
                continue
            verdict, alive = self._ask(worker, task)
            future.set_result(verdict)
            if not alive:
                return False
        return False

    def _ask(self, worker: WorkerProcess, task: VerifyTask) -> tuple[Score, bool]:
        limit = self._limits.of(task)
        try:
            verdict, retire = worker.ask(task, limit + self._limits.patience_s)
            return verdict, not retire
        except WorkerTimeoutError:
            worker.kill()
            return score("timeout", f"no verdict within {limit:g} s"), False
        except WorkerDiedError as error:
            return score("crashed", f"the worker failed, {error} ({worker.obituary()})"), False

    def _refuse(self, reason: str) -> None:
        while (item := self._queue.get()) is not None:
            if item[1].set_running_or_notify_cancel():
                item[1].set_result(score("verifier_error", reason))
