"""A pool of killable worker processes, one thread for each: a hang costs one task, never a run."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import dash_exp
from dash_exp.signals import SCHEDULERS, block_signals
from dash_exp.types import Score
from dash_exp.verifiers.types import VerifyTask, score, wall_limit

if TYPE_CHECKING:
    from dash_exp.verifiers.code.sandbox import Confinement

_TASKS_PER_WORKER = 10_000
_JOIN_S = 10.0
_WATCHDOG_GRACE_S = 5.0
_SANDBOX_GRACE_S = 5.0
_EXIT_S = 1.0
_LONGEST_S = 2_000_000.0
"""What the kernel's call can wait for."""
_MAX_VERDICT_BYTES = 65_536
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR")
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""In the sandbox, where threads of numpy's library would count as the program's."""

_Item = tuple[VerifyTask, "Future[Score]"]


@dataclass(frozen=True, slots=True)
class Program:
    """What a worker process runs: `python -m module arguments`, inside `sandbox` where one is given.
    `trusted`: code of the user's own, which gets this process's environment and current folder."""

    module: str = "dash_exp.verifiers.worker"
    arguments: tuple[str, ...] = ()
    sandbox: Confinement | None = None
    trusted: bool = False

    def command(self, timeout_s: float, memory_mb: int) -> list[str]:
        # -P: nothing in the working directory can stand in for a library
        python = [sys.executable, "-P", "-m", self.module, f"--memory-mb={memory_mb}", *self.arguments]
        if self.sandbox is None:
            return [*python, f"--deadline-s={timeout_s + _WATCHDOG_GRACE_S}", f"--parent={os.getpid()}"]
        # in a namespace of processes the parent has no number; bubblewrap watches it there
        parent = 0 if self.sandbox.prefix else os.getpid()
        own = [f"--deadline-s={timeout_s}", f"--parent={parent}", *self.sandbox.worker_arguments()]
        return [*self.sandbox.prefix, *python, *own]

    def environment(self) -> dict[str, str]:
        """Only what Python needs, unless it is `trusted`: no tokens or keys reach a worker. Hash order is
        fixed."""
        root = str(Path(dash_exp.__file__).resolve().parent.parent)
        path = [root, *(entry for entry in sys.path if entry and os.path.isdir(entry))]
        names = os.environ if self.trusted else _KEPT_VARIABLES
        kept = {name: os.environ[name] for name in names if name in os.environ}
        kept |= {"PYTHONHASHSEED": "0", "PYTHONNOUSERSITE": "1", "LANG": "C.UTF-8"}
        kept["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path))
        if self.sandbox is not None:
            kept |= {"PYTHONDONTWRITEBYTECODE": "1", **dict.fromkeys(_ONE_THREAD, "1")}
        return kept


MATH_WORKER = Program()


class VerifierPool:
    """Judges tasks in `workers` processes, each verdict within `timeout_s` of its own work.

    The timer of a task starts when a ready worker is given it. A task that runs out of time gets
    `timeout`, one whose worker dies `crashed`; the worker is killed with its process group and
    replaced. Workers start in the background; `submit` never waits. When no worker can be started
    (`max_starts` failures in a row, in every slot), tasks get `verifier_error` with the reason.
    """

    def __init__(
        self,
        workers: int,
        timeout_s: float = 5.0,
        memory_mb: int = 2048,
        program: Program = MATH_WORKER,
        *,
        start_timeout_s: float = 120.0,
        max_starts: int = 3,
    ):
        if workers < 1 or timeout_s <= 0 or memory_mb < 1 or max_starts < 1:
            raise ValueError("workers, timeout_s, memory_mb and max_starts have to be positive")
        self._program, self._timeout_s, self._memory_mb = program, timeout_s, memory_mb
        self._start_timeout_s, self._max_starts = start_timeout_s, max_starts
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
        """The future verdict. Raises RuntimeError after `close`."""
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
            first, self._closing = not self._closing, True
            live = list(self._live)
        if first:
            self._cancel_pending()
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

    def __exit__(self, *error: object) -> None:
        self.close()

    def _cancel_pending(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._queue.get_nowait()
                if item is not None and item[1].cancel():
                    item[1].set_running_or_notify_cancel()  # wakes those that wait for it

    # What follows runs in a slot's own thread.

    def _serve(self) -> None:
        """Keep one worker alive and give it tasks until the pool closes."""
        while True:
            worker, reason = self._start()
            if worker is None:
                break
            closed = self._work(worker)
            self._discard(worker)
            if closed:
                return
        with self._lock:
            self._healthy -= 1
            last = self._healthy == 0
        if last:  # while there are other slots, they can do better than an error
            self._fail_pending(reason)

    def _start(self) -> tuple[WorkerProcess | None, str]:
        """A ready worker, or None and why there is none."""
        reason = "the pool is closed"
        for _ in range(self._max_starts):
            if self._closing:
                break
            try:
                worker = WorkerProcess(self._program, self._timeout_s, self._memory_mb)
            except OSError as error:
                reason = f"the worker could not be started: {error}"
                continue
            with self._lock:
                self._live.add(worker)
                closing = self._closing
            if closing:
                self._discard(worker)
                return None, reason
            try:
                worker.wait_ready(self._start_timeout_s)
                return worker, ""
            except WorkerTimeoutError:
                reason = f"the worker was not ready within {self._start_timeout_s:g} s"
            except WorkerDiedError:
                reason = f"the worker could not be started: {worker.exit_reason()}"
            self._discard(worker)
        return None, reason

    def _discard(self, worker: WorkerProcess) -> None:
        worker.release()
        with self._lock:
            self._live.discard(worker)

    def _work(self, worker: WorkerProcess) -> bool:
        """Judge tasks until the worker has to be replaced (False) or the pool closes (True)."""
        for _ in range(_TASKS_PER_WORKER):
            item = self._queue.get()
            if item is None:
                return True
            task, future = item
            if not future.set_running_or_notify_cancel():
                continue
            verdict, healthy = self._judge(worker, task)
            future.set_result(verdict)
            if not healthy:
                return False
        return False

    def _judge(self, worker: WorkerProcess, task: VerifyTask) -> tuple[Score, bool]:
        """The verdict, and whether the worker can reach another. A sandboxed worker keeps the time itself,
        so it gets a little more before it is killed."""
        limit = max(self._timeout_s, task.timeout_s or 0.0)
        if self._program.sandbox:
            limit = wall_limit(limit) + _SANDBOX_GRACE_S
        try:
            verdict, retire = worker.judge(task, limit)
            return verdict, not retire
        except WorkerTimeoutError:
            worker.kill()
            return score("timeout", f"no verdict within {limit:g} s"), False
        except WorkerDiedError as error:
            return score("crashed", f"the worker failed, {error} ({worker.exit_reason()})"), False

    def _fail_pending(self, reason: str) -> None:
        while (item := self._queue.get()) is not None:
            if item[1].set_running_or_notify_cancel():
                item[1].set_result(score("verifier_error", reason))


class WorkerTimeoutError(Exception):
    """No verdict within the time limit."""


class WorkerDiedError(Exception):
    """The process ended, or sent something that is no verdict; the message says how."""


class WorkerProcess:
    """A running worker. Only its owner thread asks for verdicts; any thread may kill."""

    def __init__(self, program: Program, timeout_s: float, memory_mb: int):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        with block_signals(*SCHEDULERS):
            self._process = subprocess.Popen(
                program.command(timeout_s, memory_mb),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=program.environment(),
                cwd=None if program.trusted else "/",
                bufsize=0,
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._lock = threading.Lock()
        self._reaped = False
        self._buffer = bytearray()
        self._serial = 0
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        for pipe in (self._stdin, self._stdout):
            os.set_blocking(pipe.fileno(), False)

    def wait_ready(self, timeout_s: float) -> None:
        """Return once the worker has imported everything. Raises like `judge`."""
        message = self._receive(time.monotonic() + timeout_s)
        if message.get("ready") is not True:
            raise WorkerDiedError("its first message was not `ready`")

    def judge(self, task: VerifyTask, timeout_s: float) -> tuple[Score, bool]:
        """The verdict on `task`, and whether the worker asks to be replaced.

        Raises WorkerTimeoutError or WorkerDiedError; the worker is of no use after either.
        """
        deadline = time.monotonic() + timeout_s
        self._serial += 1
        request = {"serial": self._serial, "task": asdict(task)}
        self._send(json.dumps(request).encode() + b"\n", deadline)
        message: dict[str, Any] = {}
        while "retire" not in message:  # a host says when its examiner, which sends the score, is done
            message |= self._receive(deadline)
            if message.get("serial") != self._serial:
                raise WorkerDiedError("its verdict was for another task")
        try:
            return Score(**message["score"]), bool(message["retire"])
        except (KeyError, TypeError) as error:
            raise WorkerDiedError("its verdict was malformed") from error

    def kill(self) -> None:
        """Kill the process group and reap the worker. Harmless when done before."""
        with self._lock:
            if self._reaped:
                return
            # until it is reaped, the worker's pid cannot belong to anybody else
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            self._reaped = True

    def release(self) -> None:
        """Kill, and close the pipes. For the owner thread only."""
        self.kill()
        for stream in (self._stdin, self._stdout, self._errors):
            with contextlib.suppress(OSError):
                stream.close()

    def exit_reason(self) -> str:
        """How the worker ended, with the last line it wrote before it was ready."""
        self._wait_exit()
        self.kill()
        code = self._process.returncode
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - 4096))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"{how}: {lines[-1][:300]}" if lines else how

    def _wait_exit(self) -> None:
        """Wait a moment for a worker that is exiting by itself, so that its own exit status is seen.
        It is not reaped here: `kill` still needs its process id."""
        deadline = time.monotonic() + _EXIT_S
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while not self._reaped and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                if os.waitid(os.P_PID, self.pid, flags) is None:
                    time.sleep(0.01)
                    continue
            return

    def _send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            _poll(self._stdin.fileno(), select.POLLOUT, deadline)
            try:
                view = view[os.write(self._stdin.fileno(), view[:65_536]) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise WorkerDiedError("it had gone before the task was sent") from error

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            _poll(self._stdout.fileno(), select.POLLIN, deadline)
            chunk = os.read(self._stdout.fileno(), 65_536)
            if not chunk:
                raise WorkerDiedError("it ended before giving a verdict")
            self._buffer += chunk
            if len(self._buffer) > _MAX_VERDICT_BYTES:
                raise WorkerDiedError("its verdict was too long")
        line, _, rest = self._buffer.partition(b"\n")
        self._buffer = bytearray(rest)
        try:
            message = json.loads(line)
        except ValueError as error:
            raise WorkerDiedError("its verdict was not JSON") from error
        if not isinstance(message, dict):
            raise WorkerDiedError("its verdict was malformed")
        return message


def _poll(descriptor: int, event: int, deadline: float) -> None:
    """Wait until the descriptor is ready. Raises WorkerTimeoutError."""
    poller = select.poll()
    poller.register(descriptor, event)
    left = deadline - time.monotonic()
    if left <= 0 or not poller.poll(1000 * min(left, _LONGEST_S)):
        raise WorkerTimeoutError
