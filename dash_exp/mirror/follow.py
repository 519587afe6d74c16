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
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dash_exp.config.overrides import quoted
from dash_exp.config.schema import Config, TrackingConfig
from dash_exp.config.tracking import VARIABLE, MirrorPlace, places_of
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
        self.places = places_of(config.tracking, Path(config.run.dir))
        self.process: subprocess.Popen[bytes] | None = None
        self.attempt = 0

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process is not None:
            self._end(self.process)

    def start(self, attempt: int) -> None:
        """Start the process. A failure to start is reported and does not raise."""
        if not self.places:
            return
        self.attempt = attempt
        command = [sys.executable, "-m", "dash_exp.mirror", "--follow", str(self.folder.resolve())]
        command += [f"--attempt={attempt}", f"tracking.experiment={self.tracking.experiment}"]
        command += [f"tracking.every_s={self.tracking.every_s}", self._named()]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        for place in self.places:
            if place.tracker == "mlflow":
                environment[VARIABLE] = place.uri  # it may hold a password
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
            self._report(f"{self._shown()} has not got everything yet; {LOG} will say whether it does")
            return
        if code != 0:
            self._report(f"{self._shown()} has not got everything ({LOG} says why); later:")
            self.note(f"    {format_command('dash_exp.mirror', str(self.folder), *self._settings())}")

    def _settings(self) -> list[str]:
        """Where the mirror is, as overrides."""
        uri, experiment = self.tracking.uri, self.tracking.experiment
        return [
            self._named(),
            *([f"tracking.uri={quoted(uri)}"] if uri else []),
            f"tracking.experiment={quoted(experiment)}",
        ]

    def _named(self) -> str:
        return f"tracking={','.join(place.tracker for place in self.places)}"

    def _shown(self) -> str:
        return ", ".join(place.shown for place in self.places)

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
    places = places_of(tracking, folder.parent.parent)
    for place in places:
        sys.stdout = sys.stderr = _CleanStream(sys.stderr, place)
    with ExitStack() as stack:
        timer = SyncTimer(folder, places, attempt, stack)
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
    """The process's side: syncs every so often while the run goes on, and once when it has ended."""

    def __init__(self, folder: Path, places: Sequence[MirrorPlace], attempt: int, stack: ExitStack):
        self.folder, self.attempt = folder, attempt
        self.targets = [Target(folder, place, attempt, stack) for place in places]
        self._parent, self._inode = os.getppid(), folder.stat().st_ino

    def run(self, every_s: float) -> int:
        for target in self.targets:
            say(self.attempt, f"following to {target.place.shown}, {target.place.experiment}")
        due = 0.0
        while not self._run_ended(due):
            tried = [(target.sync(), target.has_run) for target in self.targets]
            found = all(has_run or not sent for sent, has_run in tried)
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
        deadline, left = time.monotonic() + LAST_S, list(self.targets)
        while not self._superseded():
            left = [target for target in left if not target.sync(self.attempt)]
            if not left:
                say(self.attempt, "complete")
                return 0
            if time.monotonic() > deadline:
                command = format_command("dash_exp.mirror", str(self.folder))
                say(self.attempt, f"given up; {command} sends what is missing")
                return 1
            time.sleep(RETRY_S)
        say(self.attempt, "left to a later run")
        return 0

    def _superseded(self) -> bool:
        """Whether the cell runs again, with a mirror process of its own, or its record was archived."""
        try:
            moved = self.folder.stat().st_ino != self._inode
        except OSError:
            return True
        return moved or int(read_json(self.folder / "status.json").get("attempt", 0)) > self.attempt

    def report(self, problem: str) -> None:
        for target in self.targets:
            target.report(problem)


class Target:
    """One tracker of the cell. The cell's lock for it, once taken, is kept in `stack`."""

    def __init__(self, folder: Path, place: MirrorPlace, attempt: int, stack: ExitStack):
        self.folder, self.place, self.attempt, self._stack = folder, place, attempt, stack
        self._cell: CellSync | None = None
        self._problem = ""

    @property
    def has_run(self) -> bool:
        return self._cell is not None and self._cell.run is not None

    def sync(self, ended: int | None = None) -> bool:
        """One sync; False if it failed, which is reported."""
        from dash_exp.mirror.store import StoreError, open_store
        from dash_exp.mirror.sync import BusyError, CellSync, cell_lock

        try:
            if self._cell is None:
                with ExitStack() as taken:
                    taken.enter_context(cell_lock(self.folder, self.place))
                    self._cell = CellSync(self.folder, open_store(self.place))
                    self._stack.push(taken.pop_all())
            known = self.has_run
            self._cell.sync(ended)
            if ended is not None or (self.has_run and not known):
                self._cell.sync_sweeps()
        except (StoreError, BusyError, UserError, OSError) as error:
            self.report(str(error))
            return False
        if self._problem:
            self.report("")
        return True

    def report(self, problem: str) -> None:
        """Print a problem ("": solved); in the cell's log it is reported once, and when it is solved."""
        say(self.attempt, problem or "it works again")
        if bool(problem) != bool(self._problem):
            text = f"{self.place.shown}: {problem}; training goes on" if problem else "it works again"
            log(self.folder, self.attempt, f"mirror: {text}")
        self._problem = problem


def say(attempt: int, text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} [{attempt}] {text}")
