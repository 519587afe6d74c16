"""Between the ranks of a learner: commands and answers through a key-value store, sums by a process group
(sums.py).

Rank 0 commands, the others do. Commands do not travel by collectives: a rank may wait for the next one for as
long as sampling lasts, which no timeout of a collective allows, and a store tells at once when the other
side is gone.
"""

from __future__ import annotations

import math
import pickle
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from dash_exp.errors import Fault, UserError
from dash_exp.learning.distributed.sums import BrokenSumError, Group, Sums

TICK_S, SHORTEST_S, LONGEST_S = 0.5, 2e-4, 5e-3
"""How often a rank that waits looks after the others, and between which pauses it looks for its answer."""
START_S, EXPLAIN_S, END_S = 120.0, 3.0, 3.0
"""How long, at least, ranks may take to start and to load a model, whatever `learner.timeout_s`; how long it
may take to find out who broke a sum, and to end."""
STOP = "stop"
Own = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """The answer of a rank that could not do what it was asked. `broken`: it waited for another one."""

    text: str
    faults: tuple[Fault, ...] = ()
    broken: bool = False


class Links(Sums, Protocol):
    """What rank 0 has of them besides. `call` gives every rank its own of `given` and returns all answers;
    `own` is rank 0's part."""

    def call(self, name: str, given: Sequence[Any], own: Own) -> list[Any]: ...
    def close(self) -> None: ...


class Alone:
    """One rank: nobody to talk to."""

    rank, width = 0, 1

    def call(self, name: str, given: Sequence[Any], own: Own) -> list[Any]:
        return [own()]

    def join(self, device: torch.device, backend: str, default: bool = False) -> None:
        pass

    def total(self, tensor: Tensor) -> None:
        pass

    def hand_on(self, tensor: Tensor) -> None:
        pass

    def guarded(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        pass


class Watched(Protocol):
    """Another rank as rank 0 sees it: how it ended (None while it lives), the end of its log to be shown."""

    def ending(self) -> str | None: ...
    def told(self) -> str: ...
    def end(self, wait_s: float) -> None: ...


class Leader(Group):
    """Rank 0's end. `members`: every other rank."""

    def __init__(self, store: Any, size: int, timeout_s: float, members: Mapping[int, Watched]):
        super().__init__(store, 0, size, timeout_s)
        self.members = members
        self._number = 0
        self._closed = False

    def join(self, device: torch.device, backend: str, default: bool = False) -> None:
        """Wait until all have started, then meet them."""
        deadline = time.monotonic() + max(START_S, self.timeout_s)
        for rank in range(1, self.width):
            while not _there(self.store, f"dash/here/{rank}", deadline):
                self._refuse_dead()
                if time.monotonic() > deadline:
                    raise self._lost(rank, "did not start")
        super().join(device, backend, default)

    def call(self, name: str, given: Sequence[Any], own: Own) -> list[Any]:
        self._number += 1
        for rank in range(1, self.width):
            self.store.set(self._key("do", rank), pickle.dumps((name, given[rank])))
        try:
            mine = own()
        except BrokenSumError as error:
            self._explain(error)
        wait_s = max(START_S, self.timeout_s) if name == "build" else self.timeout_s
        answers = [self._answer(name, rank, wait_s) for rank in range(1, self.width)]
        for rank, answer in enumerate(answers, 1):
            if isinstance(answer, Failure):
                self._fail(rank, answer)
        return [mine, *answers]

    def _key(self, kind: str, rank: int) -> str:
        return f"dash/{kind}/{self._number}/{rank}"

    def _answer(self, name: str, rank: int, wait_s: float) -> Any:
        """What a rank has answered. Raises UserError when it, or another one, has ended, or is silent."""
        key, deadline = self._key("did", rank), time.monotonic() + wait_s
        while not _there(self.store, key, deadline):
            self._refuse_dead()
            if time.monotonic() > deadline:
                raise self._lost(rank, f"gave no answer to {name!r} within {wait_s:g} s")
        return _take(self.store, key)

    def _refuse_dead(self) -> None:
        """Raises UserError for a rank that ended without an answer; what failed there is in the answer."""
        for rank, process in self.members.items():
            ending = process.ending()
            if ending is not None and not self.store.check([self._key("did", rank)]):
                raise self._lost(rank, ending)

    def _explain(self, error: BrokenSumError) -> NoReturn:
        """Say who broke a sum: who is dead, else who is silent, else who failed by itself."""
        end = time.monotonic() + EXPLAIN_S
        keys = {rank: self._key("did", rank) for rank in range(1, self.width)}
        while time.monotonic() < end and not all(self.store.check([key]) for key in keys.values()):
            self._refuse_dead()
            time.sleep(LONGEST_S)
        silent = [rank for rank, key in keys.items() if not self.store.check([key])]
        if silent:
            raise self._lost(silent[0], f"was silent while sums were taken ({error})")
        answers = {rank: _take(self.store, key) for rank, key in keys.items()}
        failures = {rank: one for rank, one in answers.items() if isinstance(one, Failure)}
        for rank, failure in sorted(failures.items(), key=lambda item: item[1].broken):
            self._fail(rank, failure)
        raise error

    def _fail(self, rank: int, failure: Failure) -> NoReturn:
        if failure.faults:
            raise UserError(failure.faults, "what was recorded is kept")
        end = time.monotonic() + EXPLAIN_S
        while self.members[rank].ending() is None and time.monotonic() < end:
            time.sleep(LONGEST_S)  # it is about to end, and to say more in its log
        raise self._lost(rank, f"failed: {failure.text}")

    def _lost(self, rank: int, why: str) -> UserError:
        return UserError(
            Fault(
                "learner.ranks",
                f"rank {rank} {why}{self.members[rank].told()}",
                "the same command goes on from the last checkpoint",
            ),
            "what was recorded is kept",
        )

    def close(self) -> None:
        """Let the others end; those that were started here, and do not, are killed."""
        if self._closed:
            return
        self._closed = True
        self._number += 1
        try:
            for rank in range(1, self.width):
                self.store.set(self._key("do", rank), pickle.dumps((STOP, None)))
        except RuntimeError:
            pass  # the store is gone, and they with it
        parting = threading.Thread(target=self.part, daemon=True)
        parting.start()  # as they do now: NCCL's end of a group may wait for the others', which may be dead
        parting.join(END_S)
        end = time.monotonic() + END_S
        for member in self.members.values():  # the store must not be gone before they have read it
            member.end(max(0.1, end - time.monotonic()))


class Follower(Group):
    """The end of every other rank."""

    def serve(self, perform: Callable[[str, Any], Any]) -> None:
        """Do what rank 0 says until it says stop, or is gone (RuntimeError), or something fails."""
        number = 0
        self.store.set(f"dash/here/{self.rank}", b"")
        while True:
            number += 1
            asked, told = (f"dash/{kind}/{number}/{self.rank}" for kind in ("do", "did"))
            while not _there(self.store, asked, math.inf):
                pass
            name, given = _take(self.store, asked)
            if name == STOP:
                self.part()
                return
            try:
                answer = perform(name, given)
            except BaseException as error:
                self.store.set(told, pickle.dumps(_failure(error)))
                raise
            self.store.set(told, pickle.dumps(answer))


def _failure(error: BaseException) -> Failure:
    faults = tuple(error.faults) if isinstance(error, UserError) else ()
    return Failure(f"{type(error).__name__}: {error}", faults, isinstance(error, BrokenSumError))


def _there(store: Any, key: str, deadline: float) -> bool:
    """Whether a key is set; looks again and again, ever less often, for up to a tick and not beyond the
    deadline. (`Store.wait` would print a warning whenever it waits in vain.)"""
    end, pause = min(deadline, time.monotonic() + TICK_S), SHORTEST_S
    while not store.check([key]):
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(LONGEST_S, pause * 1.1)
    return True


def _take(store: Any, key: str) -> Any:
    value = pickle.loads(store.get(key))  # noqa: S301  written by another rank of this run
    store.delete_key(key)
    return value
