"""What keeps the ranks of a learner equal: sums in buckets, state handed on, checksums compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dash_exp.record.checkpoint import Snapshot, checksum

if TYPE_CHECKING:
    from dash_exp.learning.learner import Learner

BUCKET = 1 << 24
"""Numbers that travel at once: large enough to use the wire, small beside the gradients themselves."""
MOMENTS = ("exp_avg", "exp_avg_sq")


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


@dataclass(frozen=True, slots=True)
class StateFacts:
    """What a rank must know of a snapshot before it takes its tensors. `stored`: where each weight lies in
    the snapshot, by its name; `steps`: how often each weight that has moments was moved."""

    updates: int
    stored: Mapping[str, str]
    steps: Mapping[str, float]


def facts_of(snapshot: Snapshot) -> StateFacts:
    kept = snapshot.optimizer
    stored = {name: f"weights/{name}" for name in snapshot.weights}
    stored |= {key.removeprefix("master/"): key for key in kept if key.startswith("master/")}
    steps = {key.removeprefix("step/"): float(kept[key]) for key in kept if key.startswith("step/")}
    return StateFacts(int(snapshot.state["updates"]), stored, steps)


@torch.no_grad()
def take_state(
    learner: Learner, facts: StateFacts, snapshot: Snapshot | None, hand_on: Callable[[Tensor], None]
) -> None:
    """Go on from a snapshot that rank 0 has (the others: None): called on every rank at the same time,
    `hand_on` fills a tensor with rank 0's. One whole tensor at a time is held beside the learner's own."""
    held = learner.weights

    def whole(name: str, key: str) -> Tensor:
        made = torch.empty(held.shape(name), dtype=torch.float32, device=held.device)
        if snapshot is not None:
            kind, _, rest = key.partition("/")
            made.copy_(snapshot.weights[rest] if kind == "weights" else snapshot.optimizer[key])
        hand_on(made)
        return made

    for name in held.names():
        if name in facts.stored:  # else frozen beneath an adapter, so as it was loaded
            held.take(name, whole(name, facts.stored[name]))
    for name, master in learner.masters.items():
        if name in facts.steps:
            moments = {key: held.part(name, whole(name, f"{key}/{name}")) for key in MOMENTS}
            learner.optimizer.state[master] = {
                "step": torch.tensor(facts.steps[name], dtype=torch.float32, device=master.device),
                **{key: value.to(master, copy=True) for key, value in moments.items()},
            }
    learner.updates = facts.updates


def fingerprint(learner: Learner) -> dict[str, str]:
    """Checksums of everything that updates move, by name."""
    return {name: checksum(master) for name, master in learner.masters.items()}
