"""How a run starts and ends the process that mirrors it (mirror/beside.py). Torch-free, imports no MLflow.

Training never waits for a server: what is slow or goes wrong happens in that process, and is said in the
cell's log.txt, in full in its mirror.log.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from dash_exp.config.schema import Config
from dash_exp.config.tracking import VARIABLE, place_of
from dash_exp.signals import Interrupted, sheltered

LOG = "mirror.log"
END_S = 20.0
"""How long a run that has ended waits for its last batch."""
SHIELDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""A scheduler sends these to every process of a job. This one has an end of its own."""


class Follower:
    """The run's side, a context manager around it. Nothing is started where nothing is tracked."""

    def __init__(self, folder: Path, config: Config, note: Callable[[str], None]):
        self.folder, self.tracking, self.note = folder, config.tracking, note
        self.place = place_of(config.tracking, Path(config.run.dir))
        self.process: subprocess.Popen[bytes] | None = None
        self.attempt = 0

    def __enter__(self) -> Follower:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None:
            self.end(self.process)

    def start(self, attempt: int) -> None:
        """Start the process, if `tracking` asks for one; that it cannot be started is said and no more."""
        if self.tracking.name != "mlflow":
            return
        self.attempt = attempt
        command = [
            sys.executable,
            "-m",
            "dash_exp.mirror",
            "--follow",
            str(self.folder.resolve()),
            f"--attempt={attempt}",
            f"tracking.experiment={self.tracking.experiment}",
            f"tracking.every_s={self.tracking.every_s}",
        ]
        environment = {**os.environ, VARIABLE: self.place.uri, "OMP_NUM_THREADS": "1"}  # may hold a password
        try:
            with (self.folder / LOG).open("ab") as output, sheltered(*SHIELDED):
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    env=environment,
                )
        except OSError as error:
            self.say(f"could not be started: {error}")

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Let it send its last batch, and wait for that a little. A signal ends the waiting only."""
        assert process.stdin is not None
        try:
            with suppress(OSError):
                process.stdin.write(b"end\n")  # a forked child may hold the pipe open beyond this process
                process.stdin.close()
            code = process.wait(END_S)
        except (subprocess.TimeoutExpired, Interrupted):
            self.say(f"{self.place.shown} has not got everything yet; {LOG} will say whether it does")
            return
        if code != 0:
            self.say(f"{self.place.shown} has not got everything ({LOG} says why); later:")
            self.say(f"    python -m dash_exp.mirror {self.folder}", quietly=True)

    def say(self, text: str, quietly: bool = False) -> None:
        self.note(text if quietly else f"mirror: {text}")
        log(self.folder, self.attempt, f"mirror: {text.strip()}")


def log(folder: Path, attempt: int, text: str) -> None:
    """A line in the cell's log.txt, which the run may be writing to: one append, whole."""
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} [{attempt}] {text}\n"
    with suppress(OSError):
        descriptor = os.open(folder / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
