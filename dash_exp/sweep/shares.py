"""What cells that run at the same time on one machine get of it: threads and GPUs. Torch-free.

Two programs with as many threads as there are cores wait for each other at every matrix product and are
slower by an order of magnitude than one after the other; so each of `slots` cells gets its part.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

VISIBLE = "CUDA_VISIBLE_DEVICES"
ASK_S = 20.0


def threads_each(slots: int, cores: int | None = None) -> int:
    """Threads of each of `slots` cells. `cores`: None for those that this process may use."""
    return max(1, (cores or len(os.sched_getaffinity(0))) // slots)


def visible_gpus(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA names them; asks nvidia-smi where nothing limits them."""
    given = (os.environ if environ is None else environ).get(VISIBLE)
    if given is not None:
        return tuple(name.strip() for name in given.split(",") if name.strip() not in ("", "-1"))
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=ASK_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines()) if done.returncode == 0 else ()


@dataclass(frozen=True, slots=True)
class Lease:
    """GPUs lent to a cell, `places` of each."""

    gpus: tuple[str, ...] = ()
    places: int = 0


class Gpus:
    """GPUs lent to cells. A cell on one GPU takes one of its `each` places; a cell on several has them to
    itself. Where there are none, nothing is lent."""

    def __init__(self, names: tuple[str, ...], each: int = 1):
        self.names, self.each = names, each
        self._free = dict.fromkeys(names, each)

    def take(self, count: int) -> Lease | None:
        """GPUs for a cell that asks for `count` (all of them where it asks for more, so that it can say so
        itself); None while too few are free. The emptiest come first."""
        count = min(count, len(self.names))
        places = 1 if count == 1 else self.each
        free = [name for name in self.names if self._free[name] >= places]
        if count > len(free):
            return None
        chosen = tuple(sorted(free, key=lambda name: -self._free[name])[:count])
        for name in chosen:
            self._free[name] -= places
        return Lease(chosen, places)

    def give_back(self, lease: Lease) -> None:
        for name in lease.gpus:
            self._free[name] += lease.places

    def environment(self, lease: Lease) -> dict[str, str]:
        """What a cell with this lease sees; nothing is said where there are no GPUs."""
        return {VISIBLE: ",".join(lease.gpus)} if self.names else {}
