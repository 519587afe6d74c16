"""A rank of the learner as a child process: started, watched, ended. Torch-free."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from dash_exp.signals import SCHEDULERS, sheltered

LAUNCH = (sys.executable, "-m", "dash_exp.learning.distributed")
LOG_TAIL_LINES = 20


class RankProcess:
    """A child in a process group of its own. It ends with its standard input, so it never outlives this
    process, however that ends."""

    def __init__(self, rank: int, settings: dict[str, Any], folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"rank-{rank}.log"
        with self.log.open("ab") as log, sheltered(*SCHEDULERS):
            self.process = subprocess.Popen(
                LAUNCH,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=dict(os.environ),
            )
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it died at once: seen by whoever waits for it
            self.process.stdin.write(f"{json.dumps(settings)}\n".encode())
            self.process.stdin.flush()

    def ending(self) -> str | None:
        """How it ended; None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def told(self) -> str:
        """The end of what it has said, to be shown."""
        try:
            lines = self.log.read_text(errors="replace").strip().splitlines()
        except OSError as error:
            lines = [f"({error})"]
        return "\n".join([f"\nthe end of {self.log.name}:", *(lines[-LOG_TAIL_LINES:] or ["(nothing)"])])

    def end(self, wait_s: float) -> None:
        """Let it end; kill it where it does not."""
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        try:
            self.process.wait(wait_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
