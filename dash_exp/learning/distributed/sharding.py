"""Weights of which every rank holds only a part (`learner.sharding=fsdp`), by torch's FSDP2.

The rows of a tensor are split over the ranks, the first to rank 0. While a layer computes, its tensors are
complete: gathered before, in the type that computes, and freed after. Its gradients are summed over the
ranks, in fp32 and undivided, at the end of its backward, each rank keeping its own rows. So an update has
nothing left to reduce: it moves the rows that it has. Every rank must take part in every gathering, also one
that has nothing to compute in a round (`Worker._run_dummy_forward`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from dash_exp.learning.logprobs import Scorer
from dash_exp.learning.weights import Weights
from dash_exp.modeling.source import computing_type


@dataclass(frozen=True, slots=True)
class Across:
    """The ranks that share the weights, and this one's place and device."""

    mesh: DeviceMesh
    rank: int
    width: int
    device: torch.device

    @classmethod
    def all_ranks(cls, device: torch.device) -> Across:
        """The ranks of torch's default process group."""
        mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
        return cls(mesh, dist.get_rank(), dist.get_world_size(), device)


def shard(scorer: Scorer, across: Across, dtype: torch.dtype | None) -> None:
    """Keep this rank's rows of every tensor of a model; gather each layer, in `dtype`, when it computes."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*scorer.model.get_decoder().layers, scorer):
        fully_shard(module, mesh=across.mesh, reshard_after_forward=True, mp_policy=policy)
    for module in scorer.modules():
        if isinstance(module, FSDPModule):  # its default is the mean over ranks
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


class Shards(Weights):
    """This rank's rows of every tensor. What the optimizer moves is fp32, and FSDP gathers from it: there is
    no other copy."""

    sharded = True

    def __init__(self, policy: Scorer, precision: str, across: Across):
        assert precision != "bf16", "sums would be rounded"
        self.model, self.across = policy.model, across
        self.device = across.device
        self.dtype = computing_type(precision)
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(self.dtype)
        shard(policy, across, self.dtype)
        self.held: dict[str, Any] = dict(self.model.named_parameters())
        self.masters = {name: p.to_local().detach() for name, p in self.held.items() if p.requires_grad}
        self._reference: Any = None
        self._register_hooks()

    def _local(self, tensor: Any) -> Tensor:
        local: Tensor = tensor.to_local()
        return local

    def attach_reference(self, reference: Scorer) -> None:
        shard(reference, self.across, None)
        self._reference = reference

    def all_reduce_gradients(self, all_reduce: Callable[[Tensor], None]) -> None:
        """Nothing to do: each backward has done it."""

    def norm(self) -> float:
        square = torch.tensor(super().norm() ** 2, dtype=torch.float64).to(self.device)
        dist.all_reduce(square)
        return float(square.sqrt())

    def copy_masters(self) -> None:
        """Nothing to copy: they are gathered again. FSDP forgets its notes of forwards without a backward."""
        if self._reference is not None and hasattr(self._reference, "reset_iter_state"):
            self._reference.reset_iter_state()

    def shape(self, name: str) -> torch.Size:
        shape: torch.Size = self.held[name].shape
        return shape

    def exact(self, name: str) -> Tensor:
        return self._local(self.held[name]).detach()

    def gather(self, name: str, local: Tensor) -> Tensor:
        """On rank 0, on the CPU; others get nothing. Every rank calls it at the same time."""
        return self._gathered(name, local).cpu()

    def _gathered(self, name: str, local: Tensor) -> Tensor:
        shape, width = self.shape(name), self.across.width
        padded = local.new_zeros((-(-shape[0] // width), *shape[1:]))
        padded[: len(local)] = local
        if self.across.rank > 0:
            dist.gather(padded, dst=0)
            return local.new_empty(0)
        parts = [torch.empty_like(padded) for _ in range(width)]
        dist.gather(padded, parts, dst=0)
        return torch.cat(parts)[: shape[0]]

    def part(self, name: str, full: Tensor) -> Tensor:
        rows = -(-len(full) // self.across.width)
        return full[rows * self.across.rank :][:rows]

    def load(self, name: str, full: Tensor) -> None:
        self.exact(name).copy_(self.part(name, full))

    def names(self) -> list[str]:
        return list(self.held)

    def iter_weights(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Complete on rank 0, on its device; others get nothing. Every rank asks for the same at the same
        time."""
        for name in self.held if names is None else names:
            yield name, self._gathered(name, self.exact(name).to(self.dtype))
