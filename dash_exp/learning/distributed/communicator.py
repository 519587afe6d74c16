"""How the ranks of a learner communicate: collectives by gloo (CPU) or NCCL (a GPU each), and commands of
rank 0.

Commands and their results go through a key-value store, not through collectives: a rank may wait for the next
command as long as sampling lasts, which no timeout of a collective allows, and a store reports at once that
the other side is gone.

The process group is made here rather than by `init_process_group`, whose single default group an engine in
the same process may want for itself; only FSDP insists on that one.
"""

from __future__ import annotations

import math
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dash_exp.errors import Fault, UserError
from dash_exp.learning.settings import START_S

POLL_S, SHORTEST_S, LONGEST_S = 0.5, 2e-4, 5e-3
"""How often a waiting rank checks that the others are alive; shortest and longest pause between looks at the
store."""
EXPLAIN_S, END_S = 3.0, 3.0
"""How long rank 0 looks for the cause of a broken collective, and waits for the others to end."""
STOP = "stop"


class CollectiveError(RuntimeError):
    """A collective failed: another rank is gone, or does not answer."""


class Communicator:
    """One rank's connection to all others. Collectives are called on every rank at the same time."""

    def __init__(self, store: Any, rank: int, size: int, timeout_s: float):
        self.store, self.rank, self.size, self.timeout_s = store, rank, size, timeout_s
        self._group: Any = None
        self._default = False

    def connect(self, device: torch.device, backend: str, default: bool = False) -> None:
        """Make the process group, once; `default`: as torch's default group too."""
        if self._group is not None:
            assert default <= self._default, "connected already, without torch's default group"
            return
        wait = timedelta(seconds=self.timeout_s)
        store = dist.PrefixStore("dash/group", self.store)
        if backend == "nccl":
            # a failure becomes an error here, not the end of the process
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
            torch.cuda.set_device(device)
        with self.collective_errors(all_errors=True):
            if default:
                dist.init_process_group(
                    backend, store=store, rank=self.rank, world_size=self.size, timeout=wait
                )
                self._group, self._default = dist.group.WORLD, True
            elif backend == "nccl":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = wait
                self._group = dist.ProcessGroupNCCL(store, self.rank, self.size, options)
            else:
                self._group = dist.ProcessGroupGloo(store, self.rank, self.size, wait)
        self._device = device if backend == "nccl" else torch.device("cpu")

    def disconnect(self) -> None:
        """Free torch's default group, so that another one can be made in this process."""
        if self._default:
            self._group, self._default = None, False
            dist.destroy_process_group()

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum a tensor over the ranks, in place."""
        self._apply(tensor, lambda t: self._group.allreduce([t]).wait())

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite a tensor with rank 0's."""
        self._apply(tensor, lambda t: self._group.broadcast(t, 0).wait())

    def _apply(self, tensor: Tensor, collective: Callable[[Tensor], object]) -> None:
        """On the device of the backend: gloo moves CPU tensors, NCCL those of its GPU."""
        there = tensor.to(self._device).contiguous()
        with self.collective_errors(all_errors=True):
            collective(there)
        if there is not tensor:
            tensor.copy_(there)

    @contextmanager
    def collective_errors(self, all_errors: bool = False) -> Iterator[None]:
        """Turn errors of collectives inside into CollectiveError; `all_errors`: nothing else can fail
        inside."""
        try:
            yield
        except RuntimeError as error:  # gloo's have no type of their own
            if not all_errors and not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
                raise
            raise CollectiveError(" ".join(str(error).split())[:500]) from error


@dataclass(frozen=True, slots=True)
class Failure:
    """The result of a rank whose command failed. `collective`: because of another rank."""

    text: str
    faults: tuple[Fault, ...] = ()
    collective: bool = False

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        faults = tuple(error.faults) if isinstance(error, UserError) else ()
        return cls(f"{type(error).__name__}: {error}", faults, isinstance(error, CollectiveError))


class WorkerHandle(Protocol):
    """Another rank as rank 0 sees it. `exit_reason` is None while it lives."""

    def exit_reason(self) -> str | None: ...
    def log_tail(self) -> str: ...
    def stop(self, wait_s: float) -> None: ...


class Coordinator(Communicator):
    """Rank 0's end: sends commands to the other ranks, and finds out which of them failed."""

    def __init__(self, store: Any, size: int, timeout_s: float, workers: Mapping[int, WorkerHandle]):
        super().__init__(store, 0, size, timeout_s)
        self.workers = workers
        self._number = 0
        self._closed = False

    def connect(self, device: torch.device, backend: str, default: bool = False) -> None:
        """Wait until all have started, then connect."""
        deadline = time.monotonic() + max(START_S, self.timeout_s)
        for rank in self.workers:
            while not _poll(self.store, f"dash/here/{rank}", deadline):
                self._check_alive()
                if time.monotonic() > deadline:
                    raise self._lost(rank, "did not start")
        super().connect(device, backend, default)

    def call(self, name: str, arguments: Sequence[Any], run_local: Callable[[], Any]) -> list[Any]:
        """Let every rank run a command with its item of `arguments`, rank 0 by `run_local`; returns all
        results."""
        self._number += 1
        for rank in self.workers:
            self.store.set(self._key("do", rank), pickle.dumps((name, arguments[rank])))
        try:
            result_0 = run_local()
        except CollectiveError as error:
            self._explain(error)
        wait_s = max(START_S, self.timeout_s) if name == "build" else self.timeout_s
        results = {rank: self._result(name, rank, wait_s) for rank in self.workers}
        for rank, result in results.items():
            if isinstance(result, Failure):
                self._fail(rank, result)
        return [result_0, *results.values()]

    def _key(self, kind: str, rank: int) -> str:
        return f"dash/{kind}/{self._number}/{rank}"

    def _result(self, name: str, rank: int, wait_s: float) -> Any:
        """Raises UserError when this rank, or another one, has ended or does not answer."""
        key, deadline = self._key("did", rank), time.monotonic() + wait_s
        while not _poll(self.store, key, deadline):
            self._check_alive()
            if time.monotonic() > deadline:
                raise self._lost(rank, f"gave no answer to {name!r} within {wait_s:g} s")
        return _take(self.store, key)

    def _check_alive(self) -> None:
        """Raises UserError for a rank that ended without a result; a failed command has one."""
        for rank, worker in self.workers.items():
            reason = worker.exit_reason()
            if reason is not None and not self.store.check([self._key("did", rank)]):
                raise self._lost(rank, reason)

    def _explain(self, error: CollectiveError) -> NoReturn:
        """Report which rank broke a collective: one that is dead, else silent, else failed by itself."""
        end = time.monotonic() + EXPLAIN_S
        keys = {rank: self._key("did", rank) for rank in self.workers}
        while time.monotonic() < end and not all(self.store.check([key]) for key in keys.values()):
            self._check_alive()
            time.sleep(LONGEST_S)
        results = {rank: _take(self.store, key) for rank, key in keys.items() if self.store.check([key])}
        for rank in keys:
            if rank not in results:
                raise self._lost(rank, f"did not answer during a collective ({error})")
        failures = {rank: result for rank, result in results.items() if isinstance(result, Failure)}
        for rank, failure in sorted(failures.items(), key=lambda item: item[1].collective):
            self._fail(rank, failure)
        raise error

    def _fail(self, rank: int, failure: Failure) -> NoReturn:
        if failure.faults:
            raise UserError(failure.faults, "what was recorded is kept")
        end = time.monotonic() + EXPLAIN_S
        while self.workers[rank].exit_reason() is None and time.monotonic() < end:
            time.sleep(LONGEST_S)  # it is about to end, and its log then says more
        raise self._lost(rank, f"failed: {failure.text}")

    def _lost(self, rank: int, why: str) -> UserError:
        what = f"rank {rank} {why}{self.workers[rank].log_tail()}"
        hint = "run the same command to continue from the last checkpoint"
        return UserError(Fault("learner.ranks", what, hint), "what was recorded is kept")

    def close(self) -> None:
        """Stop the other ranks; those started here that do not stop are killed."""
        if self._closed:
            return
        self._closed = True
        self._number += 1
        try:
            for rank in self.workers:
                self.store.set(self._key("do", rank), pickle.dumps((STOP, None)))
        except RuntimeError:
            pass  # the store is gone, and they with it
        ending = threading.Thread(target=self.disconnect, daemon=True)
        ending.start()  # as they do now: NCCL may wait for the others to end the group, and they may be dead
        ending.join(END_S)
        end = time.monotonic() + END_S
        for worker in self.workers.values():  # the store must not be gone before they have read it
            worker.stop(max(0.1, end - time.monotonic()))


class WorkerCommunicator(Communicator):
    """The end of every other rank."""

    def serve(self, run: Callable[[str, Any], Any]) -> None:
        """Run the commands of rank 0 until it stops this rank, or is gone (RuntimeError), or one fails."""
        number = 0
        self.store.set(f"dash/here/{self.rank}", b"")
        while True:
            number += 1
            command, result = (f"dash/{kind}/{number}/{self.rank}" for kind in ("do", "did"))
            while not _poll(self.store, command, math.inf):
                pass
            name, argument = _take(self.store, command)
            if name == STOP:
                self.disconnect()
                return
            try:
                answer = run(name, argument)
            except BaseException as error:
                self.store.set(result, pickle.dumps(Failure.of(error)))
                raise
            self.store.set(result, pickle.dumps(answer))


def _poll(store: Any, key: str, deadline: float) -> bool:
    """Whether a key is set: polls with growing pauses for up to POLL_S, and not beyond the deadline.
    (`Store.wait` would print a warning whenever it times out.)"""
    end, pause = min(deadline, time.monotonic() + POLL_S), SHORTEST_S
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
