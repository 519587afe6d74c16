"""The process of one cell, and its share of the machine's threads and GPUs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from dash_exp.record.folder import Row, read_json
from dash_exp.record.journal import KERNEL_KILLED, signal_of

OUTPUT, VISIBLE_GPUS = "output.txt", "CUDA_VISIBLE_DEVICES"
TAIL_BYTES, NVIDIA_SMI_S = 16_000, 20.0
FOR_CELLS = ("threads", "server_urls", "transfer", "weights_dir")
"""Keys of `cluster` that a cell reads. The others are for launchers."""


@dataclass(frozen=True, slots=True)
class Job:
    """A frozen cell to run. `needs`: ids of cells that must be finished first; `gpus`: how many it asks
    for."""

    folder: Path
    needs: tuple[str, ...] = ()
    gpus: int = 0

    @property
    def name(self) -> str:
        return self.folder.name


def threads_each(slots: int, cores: int | None = None) -> int:
    """Threads of each of `slots` cells; `cores`: None for those that this process may use. Two programs with
    as many threads as there are cores wait for each other at every matrix product, ten times slower than one
    after the other."""
    return max(1, (cores or len(os.sched_getaffinity(0))) // slots)


def cell_actions(actions: Sequence[str], threads: int | None) -> list[str]:
    """The actions that a cell gets. `threads`: its share, unless the user has set `cluster.threads`."""
    kept = [text for text in actions if not text.endswith("=null") and _is_for_cells(text)]
    is_set = any(text.startswith("cluster.threads=") for text in kept)
    return kept if is_set or threads is None else [*kept, f"cluster.threads={threads}"]


def _is_for_cells(action: str) -> bool:
    group, _, key = action.partition("=")[0].partition(".")
    return group != "cluster" or key in FOR_CELLS


def visible_gpus(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA names them; from nvidia-smi if CUDA_VISIBLE_DEVICES is not
    set."""
    given = (os.environ if environ is None else environ).get(VISIBLE_GPUS)
    if given is not None:
        return tuple(name.strip() for name in given.split(",") if name.strip() not in ("", "-1"))
    return nvidia_smi("index")


def nvidia_smi(field: str) -> tuple[str, ...]:
    """A field of every GPU of this machine; nothing where nvidia-smi is missing or fails."""
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip())


@dataclass(frozen=True, slots=True)
class Lease:
    """GPUs leased to a cell, `places` of each."""

    gpus: tuple[str, ...] = ()
    places: int = 0


class Gpus:
    """Leases GPUs to cells. A cell on one GPU takes one of its `each` places; a cell on several GPUs takes
    all places of each of them. On a machine without GPUs, leases are empty."""

    def __init__(self, names: tuple[str, ...], each: int = 1):
        self.names, self.each = names, each
        self._free = dict.fromkeys(names, each)

    def lease(self, count: int) -> Lease | None:
        """`count` GPUs, those with most free places first; None while too few are free. A cell that asks for
        more than there are gets all of them, and reports the error itself."""
        count = min(count, len(self.names))
        places = 1 if count == 1 else self.each
        free = [name for name in self.names if self._free[name] >= places]
        if count > len(free):
            return None
        chosen = tuple(sorted(free, key=lambda name: -self._free[name])[:count])
        for name in chosen:
            self._free[name] -= places
        return Lease(chosen, places)

    def release(self, lease: Lease) -> None:
        for name in lease.gpus:
            self._free[name] += lease.places

    def environment(self, lease: Lease) -> dict[str, str]:
        """The variables of a cell with this lease."""
        return {VISIBLE_GPUS: ",".join(lease.gpus)} if self.names else {}


class CellProcess:
    """The process of a job, in its own session: signals of a terminal reach it through the pool only. Raises
    OSError if it cannot be started."""

    def __init__(
        self, job: Job, lease: Lease, actions: Sequence[str], variables: Mapping[str, str], live: bool
    ):
        self.job, self.lease = job, lease
        self.asked_to_end = False
        self._forwarded = 0
        self._kernel_kills = kernel_kills()
        self._output = None if live else job.folder / OUTPUT
        self._output_start = self._output.stat().st_size if self._output and self._output.exists() else 0
        self.started = time.time()
        command = [sys.executable, "-m", "dash_exp.cell", str(job.folder.resolve()), *actions]
        environment = {**os.environ, **variables, **({} if live else {"PYTHONUNBUFFERED": "1"})}
        stdin = None if live else subprocess.DEVNULL
        with self._output.open("ab") if self._output else nullcontext() as out:
            self.process = subprocess.Popen(
                command, stdin=stdin, stdout=out, stderr=out, start_new_session=True, env=environment
            )

    @property
    def age_s(self) -> float:
        return time.time() - self.started

    def forward(self, numbers: Sequence[int]) -> None:
        """Send those of the relay's signals that were not sent yet."""
        for number in numbers[self._forwarded :]:
            self.process.send_signal(number)
        self._forwarded = len(numbers)

    def ask_to_end(self) -> None:
        """Send SIGTERM once, unless a signal was forwarded: a second one would end the cell within its
        step."""
        if not self.asked_to_end and not self._forwarded:
            self.process.send_signal(signal.SIGTERM)
        self.asked_to_end = True

    def status(self) -> Row:
        """What this process recorded last; {} if status.json is older than it."""
        found = read_json(self.job.folder / "status.json")
        return found if float(found.get("heartbeat", 0.0)) >= self.started else {}

    def tail(self, exit_code: int) -> str:
        """The end of its output; empty if that went to a terminal."""
        text = ""
        with suppress(OSError):
            if self._output is not None:
                with self._output.open("rb") as output:
                    output.seek(max(self._output_start, self._output.stat().st_size - TAIL_BYTES))
                    text = output.read().decode("utf-8", errors="replace")
        killed = signal_of(exit_code) == signal.SIGKILL and kernel_kills() > self._kernel_kills
        return f"{text}\n{KERNEL_KILLED}" if killed else text

    def reason(self, exit_code: int) -> str:
        """Why it failed, in one line."""
        recorded = error_line(str(self.status().get("failure") or ""), last=False)
        if recorded:
            return recorded
        number = signal_of(exit_code)
        if number:
            return f"killed by {number.name}"
        printed = error_line(self.tail(exit_code), last=True)
        return f"ended with exit code {exit_code}" + (f": {printed}" if printed else "")


def kernel_kills() -> int:
    """How often the kernel has killed a process of this machine for its memory; 0 where it does not count."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def error_line(text: str, last: bool) -> str:
    """The line that states the error: the first fault of a UserError, else the last line (of an output) or
    the first (of a recorded failure)."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    heads = [place for place, line in enumerate(lines[:-1]) if line.startswith("dash_exp:")]
    if heads:
        return lines[heads[-1] + 1]
    return lines[-1 if last else 0] if lines else ""
