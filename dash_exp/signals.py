"""What applies to a whole process: signals that end a step, waiting threads, freed memory."""

from __future__ import annotations

import ctypes
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType

SCHEDULERS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT)
"""What a scheduler or a terminal sends to every process of a job at once: its end, the warning before it, a
lost terminal, Ctrl-\\."""
STOPPING = (signal.SIGINT, *SCHEDULERS)
ECHO_S = 2.0
"""Such a signal reaches a process directly and again from its parent or shell: the same one within so many
seconds is the same request."""

Handler = Callable[[int, FrameType | None], None]


class Interrupted(BaseException):
    """A signal asked this process to stop. No `except Exception` of a library may swallow it."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(signal.Signals(number).name)


class Stop:
    """Remembers the first signal while `deferred`, so that the step can end and a checkpoint be written;
    otherwise, and at the second signal, raises `Interrupted`."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.deferred = False
        self._received_at = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == self.received and number in SCHEDULERS and now - self._received_at < ECHO_S:
            return
        first, self.received, self._received_at = self.received is None, number, now
        if not (first and self.deferred):
            raise Interrupted(number)
        with suppress(OSError):
            print("\nstopping after this step; again to stop at once", file=sys.stderr, flush=True)


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Handle the stopping signals by `handler` inside the block. Under nohup SIGHUP stays ignored."""

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_lost_terminal()
        handler(number, frame)

    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    before = {number: signal.signal(number, handle) for number in STOPPING if number not in ignored}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def leave_lost_terminal() -> None:
    """Write to nowhere instead of to a terminal that was closed, where every write is an error."""
    for stream in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)


@contextmanager
def block_signals(*numbers: int) -> Iterator[None]:
    """Block signals, also for children started inside and theirs: the parent receives them too, and decides
    when its helpers end. A signal that arrives here inside the block is handled right after it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_forwarding(command: list[str], output: Path | None = None) -> tuple[int, int | None]:
    """Run a command in a session of its own and forward each stopping signal exactly once. `output`: a file
    for its output. Returns its exit code and the first signal forwarded, if any."""
    forwarded: list[int] = []
    with output.open("ab") if output else nullcontext() as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)

    def forward(number: int, frame: FrameType | None) -> None:
        forwarded.append(number)
        process.send_signal(number)

    with handling(forward):
        code = process.wait()
    return code, forwarded[0] if forwarded else None


def reduce_openmp_spinning() -> None:
    """Before torch is imported: let its threads sleep soon when they wait for each other. GNU OpenMP
    spins for milliseconds by default, which is no faster on an idle machine and makes a step many times
    slower beside another busy process. OMP_WAIT_POLICY, if set, wins."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def tune_malloc() -> None:
    """Let glibc reuse freed memory instead of returning it: on CPU, fresh pages for every large
    temporary cost about a tenth of a step. Elsewhere nothing happens."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for option, value in ((-3, 32 << 20), (-1, 1 << 30), (-2, 256 << 20)):
                libc.mallopt(option, value)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
