"""One cell in a fresh process: started, watched, handed signals. Torch-free."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dash_exp.record.failures import KERNEL_KILLED, signal_of
from dash_exp.record.folder import Row, read_json
from dash_exp.sweep.shares import Lease

OUTPUT = "output.txt"
TAIL_BYTES = 16_000
FOR_LAUNCHERS = (
    "name",
    "gpus",
    "gpus_per_node",
    "cpus",
    "cpus_per_gpu",
    "memory_gb",
    "hours",
    "cells_per_gpu",
    "max_parallel",
    "account",
    "partition",
    "qos",
    "constraint",
    "setup",
    "warning_s",
    "requeues",
    "retries",
)
"""Keys of `cluster` that are for those who start cells; the others are told to the cells."""


@dataclass(frozen=True, slots=True)
class Job:
    """A frozen cell that is to be run. `needs`: ids of cells that have to be finished before it starts.
    `gpus`: how many it asks for."""

    folder: Path
    needs: tuple[str, ...] = ()
    gpus: int = 0

    @property
    def name(self) -> str:
        return self.folder.name


def cell_actions(actions: Sequence[str], threads: int | None) -> list[str]:
    """The actions of a cell. `threads`: its part of the machine, where the user has set nothing."""
    kept = [text for text in actions if not text.endswith("=null") and not _is_for_launchers(text)]
    given = any(text.startswith("cluster.threads=") for text in kept)
    return kept if given or threads is None else [*kept, f"cluster.threads={threads}"]


def _is_for_launchers(action: str) -> bool:
    group, _, rest = action.partition("=")[0].partition(".")
    return group == "cluster" and rest.partition(".")[0] in FOR_LAUNCHERS


def kernel_kills() -> int:
    """How often the kernel has killed a process of this machine for its memory; 0 where it does not tell."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


class Worker:
    """The process of a job, in a session of its own: what a terminal sends reaches it by way of its parent.
    Raises OSError where it cannot be started. `live`: its output goes where ours goes."""

    def __init__(
        self, job: Job, lease: Lease, actions: Sequence[str], variables: Mapping[str, str], live: bool
    ):
        self.job, self.lease = job, lease
        self.asked_to_end = False
        self._handed = 0
        self._kills = kernel_kills()
        self._output = None if live else job.folder / OUTPUT
        self._begun = self._output.stat().st_size if self._output and self._output.exists() else 0
        self.started = time.time()
        command = [sys.executable, "-m", "dash_exp.cell", str(job.folder.resolve()), *actions]
        if self._output is None:
            self.process = subprocess.Popen(command, start_new_session=True, env={**os.environ, **variables})
            return
        with self._output.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, **variables, "PYTHONUNBUFFERED": "1"},
            )

    @property
    def age_s(self) -> float:
        return time.time() - self.started

    def hand_on(self, numbers: Sequence[int]) -> None:
        """Send the signals that have come since the last call."""
        for number in numbers[self._handed :]:
            self.process.send_signal(number)
        self._handed = len(numbers)

    def ask_to_end(self) -> None:
        """Once, and only where no signal has been handed on: again would mean at once."""
        if not self.asked_to_end and not self._handed:
            self.process.send_signal(signal.SIGTERM)
        self.asked_to_end = True

    def status(self) -> Row:
        """What this process recorded last; {} where what there is, is older."""
        found = read_json(self.job.folder / "status.json")
        return found if float(found.get("heartbeat", 0.0)) >= self.started else {}

    def tail(self, exit_code: int) -> str:
        """The end of what it has said; nothing where that went to a terminal."""
        text = ""
        with suppress(OSError):
            if self._output is not None:
                with self._output.open("rb") as output:
                    size = output.seek(0, os.SEEK_END)
                    output.seek(max(self._begun, size - TAIL_BYTES))
                    text = output.read().decode("utf-8", errors="replace")
        killed = signal_of(exit_code) == signal.SIGKILL and kernel_kills() > self._kills
        return f"{text}\n{KERNEL_KILLED}" if killed else text

    def reason(self, exit_code: int) -> str:
        """Why it failed, in a line."""
        said = gist(str(self.status().get("failure") or ""), last=False)
        if said:
            return said
        number = signal_of(exit_code)
        if number:
            return f"killed by {number.name}"
        spoken = gist(self.tail(exit_code), last=True)
        return f"ended with exit code {exit_code}" + (f": {spoken}" if spoken else "")


def gist(text: str, last: bool) -> str:
    """The line of an error that says what happened: the first fault of a user's error, else the last line
    (of an output), or the first one (of a failure)."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    heads = [place for place, line in enumerate(lines[:-1]) if line.startswith("dash_exp:")]
    if heads:
        return lines[heads[-1] + 1]
    return lines[-1 if last else 0] if lines else ""
