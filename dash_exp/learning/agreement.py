"""What keeps the ranks of a learner equal: sums in buckets, state handed on, checksums compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dash_exp.checksums import checksum

if TYPE_CHECKING:
    from dash_exp.learning.learner import Learner

BUCKET = 1 << 24
"""Numbers that travel at once: large enough to use the wire, small beside the gradients themselves."""
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def in_buckets(tensors: Sequence[Tensor], apply: Callable[[Tensor], None], size: int = BUCKET) -> None:
    """Let `apply` change the tensors in place, several at a time, laid end to end in flat copies of up to
    `size` numbers (a larger one goes alone, uncopied)."""
    waiting: list[Tensor] = []
    for tensor in tensors:
        if waiting and sum(t.numel() for t in waiting) + tensor.numel() > size:
            _as_one(waiting, apply)
            waiting = []
        waiting.append(tensor)
    if waiting:
        _as_one(waiting, apply)


def _as_one(tensors: Sequence[Tensor], apply: Callable[[Tensor], None]) -> None:
    if len(tensors) == 1 and tensors[0].is_contiguous():
        apply(tensors[0].view(-1))
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    apply(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def state_facts(learner: Learner) -> dict[str, Any]:
    """What another rank must know before it takes this one's state: counters, and whose moments exist."""
    moved = [name for name, master in learner.masters.items() if master in learner.optimizer.state]
    return {"updates": learner.updates, "moved": moved}


@torch.no_grad()
def share_state(learner: Learner, facts: dict[str, Any], hand_on: Callable[[Tensor], None]) -> None:
    """Take over weights, masters, moments and counters of the rank that `facts` come from: called on every
    rank at the same time, `hand_on` fills a tensor with that rank's."""
    for name in facts["moved"]:
        master = learner.masters[name]
        if master not in learner.optimizer.state:
            learner.optimizer.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master.data),
                "exp_avg_sq": torch.zeros_like(master.data),
            }
    for tensor in _state_tensors(learner, facts["moved"]):
        hand_on(tensor)
    learner.updates = facts["updates"]


def _state_tensors(learner: Learner, moved: Sequence[str]) -> Iterator[Tensor]:
    """Weights, masters and moments, in an order that is the same on every rank."""
    parameters = list(learner.model.parameters())
    own = {id(p) for p in parameters}
    yield from (p.data for p in parameters)
    yield from (m.data for m in learner.masters.values() if id(m) not in own)
    for name in moved:
        state = learner.optimizer.state[learner.masters[name]]
        yield from (state[key] for key in MOMENTS)


def fingerprint(learner: Learner) -> dict[str, str]:
    """Checksums of everything that updates move, by name."""
    return {name: checksum(master) for name, master in learner.masters.items()}
