"""The tensors of a policy on this rank: what computes, what the optimizer moves, sums of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dash_exp.learning.adapters import plain_weights
from dash_exp.learning.agreement import in_buckets
from dash_exp.learning.scorer import Scorer


class Weights:
    """All of every tensor (sharding.py has a part). With `bf16_mixed` every trainable tensor has an fp32
    master and the model holds its rounded copy; with `fp32` and `bf16` the model's own are the masters.

    `gradients`: fp32 sums; of those that are not `touched` the numbers mean nothing.
    """

    sharded = False

    def __init__(self, policy: Scorer, precision: str):
        self.model, self.precision = policy.model, precision
        self.device: torch.device = next(self.model.parameters()).device
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            full = parameter.data.float()
            if precision != "fp32":
                parameter.data = full.to(torch.bfloat16)
            if parameter.requires_grad:
                self.masters[name] = full.clone() if precision == "bf16_mixed" else parameter
        self._collect()

    def _collect(self) -> None:
        """Each backward's gradient goes to the fp32 sum at once and is freed."""
        self.gradients = {name: torch.zeros_like(m, dtype=torch.float32) for name, m in self.masters.items()}
        self.touched: set[str] = set()

        def to_sum(name: str) -> Any:
            def add(parameter: Tensor) -> None:
                assert parameter.grad is not None
                gradient = self._here(parameter.grad)
                if name in self.touched:
                    self.gradients[name] += gradient
                else:
                    self.gradients[name].copy_(gradient)
                    self.touched.add(name)
                parameter.grad = None

            return add

        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(to_sum(name))

    def _here(self, tensor: Tensor) -> Tensor:
        """What of a tensor of the model this rank holds."""
        return tensor

    def guard(self, reference: Scorer) -> None:
        """Take care of the model that the KL term refers to, as of the policy."""

    # --- an update ---

    def add_others(self, total: Callable[[Tensor], None]) -> None:
        """Add the gradient sums of other ranks to these; `total` sums a tensor over all ranks, in place.
        A tensor that no rank touched stays untouched; one that another touched counts as 0 here."""
        names = list(self.masters)
        touched = torch.tensor([name in self.touched for name in names], dtype=torch.float32)
        touched = touched.to(self.device)
        total(touched)
        wanted = [name for name, count in zip(names, touched.tolist(), strict=True) if count > 0]
        for name in wanted:
            if name not in self.touched:
                self.gradients[name].zero_()
        in_buckets([self.gradients[name] for name in wanted], total)
        self.touched = set(wanted)

    def norm(self) -> float:
        """Of all gradient sums together; what was not touched becomes 0."""
        for name, gradient in self.gradients.items():
            if name not in self.touched:
                gradient.zero_()
        return float(torch.stack([torch.linalg.vector_norm(g) for g in self.gradients.values()]).norm())

    def follow(self) -> None:
        """The masters have moved: compute with them."""
        if self.precision == "bf16_mixed":
            for name, parameter in self.model.named_parameters():
                if name in self.masters:
                    parameter.data.copy_(self.masters[name])

    # --- from and to other places ---

    def names(self) -> list[str]:
        """Of every tensor, moved or frozen (a tied one comes once)."""
        return [name for name, _ in self.model.named_parameters()]

    def shape(self, name: str) -> torch.Size:
        """Of the whole tensor."""
        return self.model.get_parameter(name).shape

    def exact(self, name: str) -> Tensor:
        """A tensor as precisely as this rank knows it."""
        return self.masters.get(name, self.model.get_parameter(name)).detach()

    def saved(self, name: str, own: Tensor) -> Tensor:
        """The whole of a tensor, of which this rank has its `own`: of the shape of this `name`."""
        return own

    def part(self, name: str, whole: Tensor) -> Tensor:
        """What of a whole tensor is this rank's own."""
        return whole

    def take(self, name: str, whole: Tensor) -> None:
        """Put a tensor in."""
        self.model.get_parameter(name).data.copy_(whole)
        if name in self.masters:
            self.masters[name].copy_(whole)

    def computed(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The weights the policy computes with, by name, adapters merged."""
        if any(".lora_" in name for name in self.masters):
            yield from plain_weights(self.model)
            return
        for name, parameter in self.model.named_parameters():
            if names is None or name in names:
                yield name, parameter.detach()
