"""The process that mirrors a running cell: how a run starts and ends it, and what it does.

Training never waits for a server. Whatever is slow or fails happens in that process and is reported in the
cell's log.txt, in detail in its mirror.log.
"""

from __future__ import annotations

import io
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dash_exp.config.overrides import quoted
from dash_exp.config.schema import Config, TrackingConfig
from dash_exp.config.tracking import VARIABLE, MirrorPlace, place_of
from dash_exp.errors import UserError
from dash_exp.record.folder import append_line, read_json
from dash_exp.signals import STOPPING, Interrupted, block_signals
from dash_exp.text import format_command

if TYPE_CHECKING:
    from dash_exp.mirror.sync import CellSync

LOG = "mirror.log"
END_S = 20.0
"""How long a run that has ended waits for its last sync."""
FIRST_S, POLL_S = 1.0, 1.0
"""Seconds between two syncs until the run is found, and between two checks whether the run has ended."""
LAST_S, RETRY_S, HANGING_S = 120.0, 2.0, 480.0
"""The last sync is tried for LAST_S, every RETRY_S; the process is killed HANGING_S later."""
IGNORED = (*STOPPING, signal.SIGUSR1)
"""A scheduler sends these to every process of a job. This one ends when its run has ended."""


class Follower:
    """The run's side: a context manager that ends the process, if one was started."""

    def __init__(self, folder: Path, config: Config, note: Callable[[str], None]):
        self.folder, self.tracking, self.note = folder, config.tracking, note
        self.place = place_of(config.tracking, Path(config.run.dir))
        self.process: subprocess.Popen[bytes] | None = None
        self.attempt = 0

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process is not None:
            self._end(self.process)

    def start(self, attempt: int) -> None:
        """Start the process if `tracking=mlflow`. A failure to start is reported and does not raise."""
        if self.tracking.name != "mlflow":
            return
        self.attempt = attempt
        command = [sys.executable, "-m", "dash_exp.mirror", "--follow", str(self.folder.resolve())]
        command += [f"--attempt={attempt}", f"tracking.experiment={self.tracking.experiment}"]
        command += [f"tracking.every_s={self.tracking.every_s}"]
        environment = {**os.environ, VARIABLE: self.place.uri, "OMP_NUM_THREADS": "1"}  # may hold a password
        try:
            with (self.folder / LOG).open("ab") as output, block_signals(*IGNORED):
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    env=environment,
                )
        except OSError as error:
            self._report(f"could not be started: {error}")

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Ask for the last sync and wait for it, at most END_S. A signal ends the waiting only."""
        assert process.stdin is not None
        try:
            with suppress(OSError):
                process.stdin.write(b"end\n")  # closing is not enough: a forked child may hold the pipe open
                process.stdin.close()
            code = process.wait(END_S)
        except (subprocess.TimeoutExpired, Interrupted):
            self._report(f"{self.place.shown} has not got everything yet; {LOG} will say whether it does")
            return
        if code != 0:
            self._report(f"{self.place.shown} has not got everything ({LOG} says why); later:")
            self.note(f"    {format_command('dash_exp.mirror', str(self.folder), *self._settings())}")

    def _settings(self) -> list[str]:
        """Where the mirror is, as overrides."""
        uri, experiment = self.tracking.uri, self.tracking.experiment
        return [
            *([f"tracking.uri={quoted(uri)}"] if uri else []),
            f"tracking.experiment={quoted(experiment)}",
        ]

    def _report(self, text: str) -> None:
        self.note(f"mirror: {text}")
        log(self.folder, self.attempt, f"mirror: {text}")


def log(folder: Path, attempt: int, text: str) -> None:
    """Append a line to the cell's log.txt, to which the run may be writing too."""
    with suppress(OSError):
        append_line(folder / "log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} [{attempt}] {text}")


def follow(folder: Path, tracking: TrackingConfig, attempt: int) -> int:
    """Mirror a running cell until it has ended. 0: everything was sent; 1: not."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    with suppress(OSError):
        os.nice(19)
    place = place_of(tracking, folder.parent.parent)
    sys.stdout = sys.stderr = _CleanStream(sys.stderr, place)
    with ExitStack() as stack:
        timer = SyncTimer(folder, place, attempt, stack)
        try:
            return timer.run(tracking.every_s)
        except Exception as error:
            timer.report(f"{type(error).__name__}: {error}")
            raise


class _CleanStream(io.TextIOBase):
    """A stream that hides the secrets of an address, in whatever is written."""

    def __init__(self, stream: TextIO, place: MirrorPlace):
        super().__init__()
        self._stream, self._place = stream, place

    def write(self, text: str) -> int:
        self._stream.write(self._place.clean(text))
        self._stream.flush()
        return len(text)


class SyncTimer:
    """The process's side: syncs every so often while the run goes on, and once when it has ended. The cell's
    mirror lock, once taken, is kept in `stack`."""

    def __init__(self, folder: Path, place: MirrorPlace, attempt: int, stack: ExitStack):
        self.folder, self.place, self.attempt, self._stack = folder, place, attempt, stack
        self._cell: CellSync | None = None
        self._problem = ""
        self._parent, self._inode = os.getppid(), folder.stat().st_ino

    def run(self, every_s: float) -> int:
        self._print(f"following attempt {self.attempt} to {self.place.shown}, {self.place.experiment}")
        due = 0.0
        while not self._run_ended(due):
            found = not self._try_sync() or (self._cell is not None and self._cell.run is not None)
            due = time.monotonic() + (every_s if found else min(FIRST_S, every_s))
        guard = threading.Timer(LAST_S + HANGING_S, os._exit, [1])  # a call may hang
        guard.daemon = True
        guard.start()
        try:
            return self._last_sync()
        finally:
            guard.cancel()

    def _run_ended(self, due: float) -> bool:
        """Wait until the next sync is due; True as soon as the run has ended, in whatever way."""
        while True:
            left = due - time.monotonic()
            readable, _, _ = select.select([0], [], [], max(0.0, min(left, POLL_S)))
            if readable or os.getppid() != self._parent:
                return True
            if left <= 0:
                return False

    def _last_sync(self) -> int:
        deadline = time.monotonic() + LAST_S
        while not self._superseded():
            if self._try_sync(self.attempt):
                self._print("complete")
                return 0
            if time.monotonic() > deadline:
                self._print(
                    f"given up; {format_command('dash_exp.mirror', str(self.folder))} sends what is missing"
                )
                return 1
            time.sleep(RETRY_S)
        self._print("left to a later run")
        return 0

    def _superseded(self) -> bool:
        """Whether the cell runs again, with a mirror process of its own, or its record was archived."""
        try:
            moved = self.folder.stat().st_ino != self._inode
        except OSError:
            return True
        return moved or int(read_json(self.folder / "status.json").get("attempt", 0)) > self.attempt

    def _try_sync(self, ended: int | None = None) -> bool:
        """One sync; False if it failed, which is reported."""
        from dash_exp.mirror.mlflow import Store, StoreError
        from dash_exp.mirror.sync import BusyError, CellSync, cell_lock

        try:
            if self._cell is None:
                with ExitStack() as taken:
                    taken.enter_context(cell_lock(self.folder, self.place))
                    self._cell = CellSync(self.folder, Store(self.place))
                    self._stack.push(taken.pop_all())
            known = self._cell.run is not None
            self._cell.sync(ended)
            if ended is not None or (self._cell.run is not None and not known):
                self._cell.sync_sweeps()
        except (StoreError, BusyError, UserError, OSError) as error:
            self.report(str(error))
            return False
        if self._problem:
            self.report("")
        return True

    def report(self, problem: str) -> None:
        """Print a problem ("": solved); in the cell's log it is reported once, and when it is solved."""
        self._print(problem or "it works again")
        if bool(problem) != bool(self._problem):
            text = f"{self.place.shown}: {problem}; training goes on" if problem else "it works again"
            log(self.folder, self.attempt, f"mirror: {text}")
        self._problem = problem

    def _print(self, text: str) -> None:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} [{self.attempt}] {text}")
