"""One worker process seen from the pool: start it, ask it under a deadline, kill its group."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dash_exp
from dash_exp.signals import SCHEDULERS, sheltered
from dash_exp.types import Score
from dash_exp.verifiers.code.sandbox import Confinement
from dash_exp.verifiers.types import VerifyTask

_MAX_VERDICT_BYTES = 65_536
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR")
_SANDBOX_VARIABLES = {
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",  # threads of numpy's library would count as the program's
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
_WATCHDOG_GRACE_S = 5.0
_ENDING_S = 1.0
_SANDBOX_PATIENCE_S = 5.0


class WorkerTimeoutError(Exception):
    """No verdict within the time limit."""


class WorkerDiedError(Exception):
    """The process ended, or sent something that is no verdict; the message says how."""


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """What one worker may use. `module` is the program that is run, in `sandbox` where one is given:
    such a worker keeps the time itself, so the pool grants it a little more before it steps in."""

    timeout_s: float
    memory_mb: int
    start_timeout_s: float
    module: str
    sandbox: Confinement | None = None
    arguments: tuple[str, ...] = ()

    def of(self, task: VerifyTask) -> float:
        """Seconds for one task."""
        return max(self.timeout_s, task.timeout_s or 0.0)

    @property
    def patience_s(self) -> float:
        return 0.0 if self.sandbox is None else _SANDBOX_PATIENCE_S


class WorkerProcess:
    """A running worker. Only its owner thread asks; any thread may kill."""

    def __init__(self, limits: WorkerLimits):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        with sheltered(*SCHEDULERS):
            self._process = subprocess.Popen(
                _command(limits),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=_environment(limits.sandbox is not None),
                cwd="/",
                bufsize=0,
                start_new_session=True,
            )
        self._lock = threading.Lock()
        self._reaped = False
        self._buffer = bytearray()
        self._serial = 0
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        for pipe in (self._stdin, self._stdout):
            os.set_blocking(pipe.fileno(), False)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self, timeout_s: float) -> None:
        """Return once the worker has imported everything. Raises like `ask`."""
        message = self._receive(time.monotonic() + timeout_s)
        if message.get("ready") is not True:
            raise WorkerDiedError("its first message was not `ready`")

    def ask(self, task: VerifyTask, timeout_s: float) -> tuple[Score, bool]:
        """The verdict on `task`, and whether the worker asks to be replaced.

        Raises WorkerTimeoutError or WorkerDiedError; the worker is of no use after either.
        """
        deadline = time.monotonic() + timeout_s
        self._serial += 1
        request = {"serial": self._serial, "task": asdict(task)}
        self._send(json.dumps(request).encode() + b"\n", deadline)
        message = self._receive(deadline)
        if message.get("serial") != self._serial:
            raise WorkerDiedError("its verdict was for another task")
        try:
            return Score(**message["score"]), bool(message.get("retire"))
        except (KeyError, TypeError) as error:
            raise WorkerDiedError("its verdict was malformed") from error

    def kill(self) -> None:
        """Kill the whole process group and reap the worker. Harmless when done before."""
        with self._lock:
            if self._reaped:
                return
            # until it is reaped, the worker's pid cannot belong to anybody else
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._reaped = True

    def release(self) -> None:
        """Kill, and close the pipes. For the owner thread only."""
        self.kill()
        for stream in (self._stdin, self._stdout, self._errors):
            with contextlib.suppress(OSError):
                stream.close()

    def obituary(self) -> str:
        """How the worker ended, with the last line it wrote before it was ready."""
        self._await_end()
        self.kill()
        code = self._process.returncode
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - 4096))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"{how}: {lines[-1][:300]}" if lines else how

    def _await_end(self) -> None:
        """Give a worker that is ending by itself a moment, so that its own exit status is seen.
        It is not reaped here: `kill` still needs its process id."""
        deadline = time.monotonic() + _ENDING_S
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while not self._reaped and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                if os.waitid(os.P_PID, self._process.pid, flags) is None:
                    time.sleep(0.01)
                    continue
            return

    def _send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            self._wait([], [self._stdin.fileno()], deadline)
            try:
                view = view[os.write(self._stdin.fileno(), view[:65_536]) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise WorkerDiedError("it had gone before the task was sent") from error

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._wait([self._stdout.fileno()], [], deadline)
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

    def _wait(self, readers: list[int], writers: list[int], deadline: float) -> None:
        poller = select.poll()
        for descriptor in readers:
            poller.register(descriptor, select.POLLIN)
        for descriptor in writers:
            poller.register(descriptor, select.POLLOUT)
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(left * 1000):
            raise WorkerTimeoutError


def _command(limits: WorkerLimits) -> list[str]:
    python = [
        sys.executable,
        "-P",  # nothing in the working directory can stand in for a library
        "-m",
        limits.module,
        f"--memory-mb={limits.memory_mb}",
        *limits.arguments,
    ]
    if limits.sandbox is None:
        deadline_s, parent = limits.timeout_s + _WATCHDOG_GRACE_S, os.getpid()
        return [*python, f"--deadline-s={deadline_s}", f"--parent={parent}"]
    # in a namespace of processes the parent has no number; bubblewrap watches it there
    parent = 0 if limits.sandbox.prefix else os.getpid()
    own = [f"--deadline-s={limits.timeout_s}", f"--parent={parent}", *limits.sandbox.worker_arguments()]
    return [*limits.sandbox.prefix, *python, *own]


def _environment(sandboxed: bool) -> dict[str, str]:
    """Only what Python needs: no tokens or keys reach a worker. Hash order is fixed."""
    root = str(Path(dash_exp.__file__).resolve().parent.parent)
    path = [root, *(entry for entry in sys.path if entry and os.path.isdir(entry))]
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return (
        kept
        | {
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
            "PYTHONHASHSEED": "0",
            "PYTHONNOUSERSITE": "1",
            "LANG": "C.UTF-8",
        }
        | (_SANDBOX_VARIABLES if sandboxed else {})
    )
