"""Judges of programs in each confinement that works here, the processes they leave, and a fake pool."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future

import psutil
import pytest

from dash_exp.types import Score
from dash_exp.verifiers.code.sandbox import confinement
from dash_exp.verifiers.judges import PooledJudge, Wanted, code_judge
from dash_exp.verifiers.pool import VerifierPool
from dash_exp.verifiers.types import VerifyTask

CONFINEMENTS: tuple[Wanted, ...] = ("bwrap", "limits")
BEST_AND_LIMITS = ("auto", pytest.param("limits", marks=pytest.mark.long))
"""For what does not depend on the confinement: the best one here, and the other with the long tests."""
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


class HandPool(VerifierPool):
    """A pool whose verdicts are given by hand: records tasks, starts no process."""

    def __init__(self) -> None:
        self.asked: list[tuple[VerifyTask, Future[Score]]] = []

    def submit(self, task: VerifyTask) -> Future[Score]:
        self.asked.append((task, Future()))
        return self.asked[-1][1]

    def close(self) -> None:
        for _, future in self.asked:
            future.cancel()
