"""The process beside a run: it reads the record as it grows and sends what is new every so often, with the
lowest priority. It ends by itself when the run has, or is no more, after a last batch. Torch-free.
"""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TextIO

from dash_exp.config.schema import TrackingConfig
from dash_exp.config.tracking import Place, place_of
from dash_exp.errors import UserError
from dash_exp.mirror.cell import BusyError, CellMirror, alone
from dash_exp.mirror.follow import SHIELDED, log
from dash_exp.mirror.mlflow import Store, StoreError
from dash_exp.record.folder import read_json

FIRST_S = 1.0
"""How often to look whether the run has begun to record."""
LOOK_S = 1.0
LAST_S, AGAIN_S, HANGING_S = 120.0, 2.0, 480.0
"""For how long and how often to try to send the last batch; how much longer the last try may take, which has
the lowest priority on a machine that may be busy."""


def follow(folder: Path, tracking: TrackingConfig, attempt: int) -> int:
    """Mirror a running cell until it has ended. 0: the mirror is whole; 1: it is not."""
    for number in SHIELDED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SHIELDED)
    with suppress(OSError):
        os.nice(19)
    place = place_of(tracking, folder.parent.parent)
    sys.stdout = sys.stderr = Clean(sys.stderr, place)
    with ExitStack() as held:
        following = Following(folder, place, attempt, held)
        try:
            return following.run(tracking.every_s)
        except Exception as error:
            following.tell(f"{type(error).__name__}: {error}")
            raise


class Clean(io.TextIOBase):
    """A stream that keeps the secrets of an address to itself, whoever writes."""

    def __init__(self, stream: TextIO, place: Place):
        super().__init__()
        self._stream, self._place = stream, place

    def write(self, text: str) -> int:
        self._stream.write(self._place.clean(text))
        self._stream.flush()
        return len(text)


class Following:
    """What the process knows: its cell's mirror, once there is one, and what was last said to be wrong."""

    def __init__(self, folder: Path, place: Place, attempt: int, held: ExitStack):
        self.folder, self.place, self.attempt, self._held = folder, place, attempt, held
        self._locked = False
        self._mirror: CellMirror | None = None
        self._wrong = ""
        self._parent, self._inode = os.getppid(), folder.stat().st_ino

    def run(self, every_s: float) -> int:
        self._note(f"following attempt {self.attempt} to {self.place.shown}, {self.place.experiment}")
        due = 0.0
        while not self._ended(due):
            sound = self._try(CellMirror.beat)
            begun = self._mirror is not None and self._mirror.attached
            due = time.monotonic() + (every_s if begun or not sound else min(FIRST_S, every_s))
        return self._end()

    def _ended(self, due: float) -> bool:
        """Wait until it is time for a batch; True as soon as the run has ended, however it did."""
        while True:
            left = due - time.monotonic()
            readable, _, _ = select.select([0], [], [], max(0.0, min(left, LOOK_S)))
            if readable or os.getppid() != self._parent:
                return True
            if left <= 0:
                return False

    def _end(self) -> int:
        """The last batch, within bounds: a call that hangs is not waited for."""
        guard = threading.Timer(LAST_S + HANGING_S, os._exit, [1])
        guard.daemon = True
        guard.start()
        try:
            return self._last()
        finally:
            guard.cancel()

    def _last(self) -> int:
        """Try until it is through, the time is up, or the cell runs again."""
        deadline = time.monotonic() + LAST_S
        while not self._superseded():
            if self._try(self._finish):
                self._note("whole")
                return 0
            if time.monotonic() > deadline:
                self._note("given up; python -m dash_exp.mirror sends what is lacking")
                return 1
            time.sleep(AGAIN_S)
        self._note("left to a later run")
        return 0

    def _superseded(self) -> bool:
        """Whether the cell runs again, with a process of its own beside it, or its record was archived."""
        try:
            moved = self.folder.stat().st_ino != self._inode
        except OSError:
            return True
        return moved or int(read_json(self.folder / "status.json").get("attempt", 0)) > self.attempt

    def _finish(self, mirror: CellMirror) -> None:
        mirror.whole(self.attempt)
        mirror.tell_sweeps()

    def _try(self, work: Callable[[CellMirror], object]) -> bool:
        try:
            if not self._locked:
                self._held.enter_context(alone(self.folder, self.place))
                self._locked = True
            if self._mirror is None:
                self._mirror = CellMirror(self.folder, Store(self.place))
            work(self._mirror)
        except (StoreError, BusyError, UserError, OSError) as error:
            self.tell(str(error))
            return False
        if self._wrong:
            self.tell("")
        return True

    def tell(self, wrong: str) -> None:
        """Say in the cell's log what is wrong, once, and when it is no more."""
        self._note(wrong or "it works again")
        if bool(wrong) != bool(self._wrong):
            text = f"{self.place.shown}: {wrong}; training goes on" if wrong else "it works again"
            log(self.folder, self.attempt, f"mirror: {text}")
        self._wrong = wrong

    def _note(self, text: str) -> None:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} [{self.attempt}] {text}")
