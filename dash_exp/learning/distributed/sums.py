"""Sums and copies between the ranks of a learner, by gloo (CPU) or NCCL (a GPU each).

The process group is made here rather than by `init_process_group`, whose single default group an engine in
the same process may want for itself; but FSDP insists on that one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class BrokenSumError(RuntimeError):
    """A sum over the ranks failed: one of them is gone, or silent."""


class Sums(Protocol):
    """What each of `width` ranks has of the others. Called on every rank at the same time: `total` sums a
    tensor over the ranks in place, `hand_on` gives rank 0's to all. `join` meets the others (`default`: as
    torch's default group too); within `guarded` a collective of that group may break."""

    rank: int
    width: int

    def join(self, device: torch.device, backend: str, default: bool = False) -> None: ...
    def total(self, tensor: Tensor) -> None: ...
    def hand_on(self, tensor: Tensor) -> None: ...
    def guarded(self) -> AbstractContextManager[None]: ...


class Group:
    """The process group of all ranks, once they have joined."""

    def __init__(self, store: Any, rank: int, size: int, timeout_s: float):
        self.store, self.rank, self.width, self.timeout_s = store, rank, size, timeout_s
        self._group: Any = None
        self._default = False

    def join(self, device: torch.device, backend: str, default: bool = False) -> None:
        """Meet the others, once; every rank calls it at the same time."""
        if self._group is not None:
            assert default <= self._default, "they have met already, without torch's default group"
            return
        wait = timedelta(seconds=self.timeout_s)
        store = dist.PrefixStore("dash/group", self.store)
        if backend == "nccl":
            # a failure becomes an error here, not the end of the process
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
            torch.cuda.set_device(device)
        with self.guarded(surely=True):
            if default:
                given = {"store": store, "rank": self.rank, "world_size": self.width, "timeout": wait}
                dist.init_process_group(backend, **given)
                self._group, self._default = dist.group.WORLD, True
            elif backend == "nccl":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = wait
                self._group = dist.ProcessGroupNCCL(store, self.rank, self.width, options)
            else:
                self._group = dist.ProcessGroupGloo(store, self.rank, self.width, wait)
        self._device = device if backend == "nccl" else torch.device("cpu")

    def part(self) -> None:
        """Let go of torch's default group, so that another one can be made in this process."""
        if self._default:
            self._group, self._default = None, False
            dist.destroy_process_group()

    def total(self, tensor: Tensor) -> None:
        self._apply(tensor, lambda t: self._group.allreduce([t]).wait())

    def hand_on(self, tensor: Tensor) -> None:
        self._apply(tensor, lambda t: self._group.broadcast(t, 0).wait())

    def _apply(self, tensor: Tensor, collective: Callable[[Tensor], object]) -> None:
        """Where the wire is: gloo moves CPU tensors, NCCL those of its GPU."""
        there = tensor.to(self._device).contiguous()
        with self.guarded(surely=True):
            collective(there)
        if there is not tensor:
            tensor.copy_(there)

    @contextmanager
    def guarded(self, surely: bool = False) -> Iterator[None]:
        """`surely`: nothing but a collective can fail within."""
        try:
            yield
        except RuntimeError as error:
            if not surely and not _of_the_wire(error):
                raise
            raise BrokenSumError(" ".join(str(error).split())[:500]) from error


def _of_the_wire(error: RuntimeError) -> bool:
    """Whether another rank is to blame: gloo's errors have no type of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
