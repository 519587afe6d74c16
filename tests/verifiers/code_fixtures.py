"""Verifiers of programs in each confinement that works here, and the processes they leave."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil
import pytest

from dash_exp.verifiers.code.sandbox import confinement
from dash_exp.verifiers.judges import PooledJudge, Wanted, code_judge

CONFINEMENTS: tuple[Wanted, ...] = ("bwrap", "limits")
WORKERS = 2


def skip_without(wanted: Wanted) -> None:
    """Skip, saying why, where this confinement does not work."""
    try:
        confinement(wanted)
    except RuntimeError as error:
        pytest.skip(f"no bubblewrap here: {error}")


@contextlib.contextmanager
def verifier_in(wanted: Wanted, timeout_s: float, memory_mb: int = 1024) -> Iterator[PooledJudge]:
    skip_without(wanted)
    verifier = code_judge(WORKERS, timeout_s, memory_mb, wanted)
    try:
        yield verifier
    finally:
        verifier.close()


def descendants() -> set[int]:
    """Processes below this one that run; one that has ended but is not yet reaped does not."""
    alive = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.add(process.pid)
    return alive
