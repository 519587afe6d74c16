"""The store between samplers and learner: groups wait in CPU memory until they are asked for. Torch-free.

One for each batch: it knows which groups are to come, so none is delivered twice and none is forgotten, and
never holds more than them. The next batch is asked for when this one is learned.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable

from dash_exp.types import Group


class Delivery:
    """Filled by the threads that sample, emptied by the one that learns."""

    def __init__(self, positions: Iterable[int]):
        """`positions`: the groups of the batch."""
        self._expected = set(positions)
        self._waiting: deque[Group] = deque()
        self._failure: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, group: Group) -> bool:
        """Take a finished group. False for one that came already (a server thought dead may answer after
        another one has): it is dropped."""
        with self._changed:
            if group.position not in self._expected:
                return False
            self._expected.remove(group.position)
            self._waiting.append(group)
            self._changed.notify()
            return True

    def fail(self, failure: BaseException) -> None:
        """Nothing more will come, and why."""
        with self._changed:
            self._failure = failure
            self._changed.notify()

    def take(self, wait_s: float) -> Group | None:
        """The next group; None if none came within this time. Raises what `fail` was given, once the
        groups before it are taken."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._failure, wait_s)
            if self._waiting:
                return self._waiting.popleft()
            if self._failure is not None:
                raise self._failure
            return None

    @property
    def held(self) -> int:
        """Groups that wait to be taken."""
        return len(self._waiting)

    @property
    def missing(self) -> frozenset[int]:
        """Positions that have not come."""
        with self._changed:
            return frozenset(self._expected)
