"""The gradient of an objective by plain autograd: what the learner is compared with.

Shares no code with the learner: transformers' own attention, one completion at a time, log-softmax over
everything, one division at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dash_exp.learning.settings import Objective
from dash_exp.types import AdvantagedGroup

MAX_NEW = 8
VOCABULARY = 100
Old = dict[tuple[int, int], Tensor]


def reference_logprobs(model: Any, group: AdvantagedGroup, index: int, temperature: float) -> Tensor:
    """Log-probabilities of one completion, alone, by transformers and log-softmax."""
    prompt = group.group.prompt.token_ids
    own = group.group.completions[index].token_ids
    logits = model(input_ids=torch.tensor([[*prompt, *own]])).logits[0, len(prompt) - 1 : -1]
    rows = torch.log_softmax(logits[:, :VOCABULARY] / temperature, dim=-1)
    return rows.gather(1, torch.tensor(own)[:, None]).squeeze(1)


def entropies(model: Any, group: AdvantagedGroup, index: int, temperature: float) -> Tensor:
    """Entropy at each token of a completion, with its gradient."""
    prompt = group.group.prompt.token_ids
    own = group.group.completions[index].token_ids
    logits = model(input_ids=torch.tensor([[*prompt, *own]])).logits[0, len(prompt) - 1 : -1]
    return torch.distributions.Categorical(logits=logits[:, :VOCABULARY] / temperature).entropy()


def correction_weight(goal: Objective, before: Tensor, sampled: Tensor) -> Tensor | float:
    """What a completion's surrogate is multiplied by."""
    if goal.correction == "none":
        return 1.0
    ratio = torch.exp(before - sampled)
    if goal.correction.startswith("sequence"):
        ratio = ratio.prod().expand(len(ratio))
    if goal.correction.endswith("truncate"):
        return ratio.clamp(goal.correction_floor, goal.correction_cap)
    return ratio * ((ratio >= goal.correction_floor) & (ratio <= goal.correction_cap))


def old_logprobs(model: Any, groups: list[AdvantagedGroup], temperature: float = 1.0) -> Old:
    """Those of every completion, detached, by position of its group and index."""
    return {
        (g.group.position, i): reference_logprobs(model, g, i, temperature).detach()
        for g in groups
        for i in range(len(g.kept))
    }


def reference_gradient(
    model: Any,
    frozen: Any,
    groups: list[AdvantagedGroup],
    goal: Objective,
    aggregation: str,
    old: Old | None = None,
) -> dict[str, Tensor]:
    """Gradient of the whole objective, all completions counted in the denominator."""
    total, lengths = torch.zeros(()), []
    for group in groups:
        for i, completion in enumerate(group.group.completions):
            lengths.append(len(completion.token_ids))
            if not group.kept[i]:
                continue
            logprobs = reference_logprobs(model, group, i, goal.temperature)
            before = logprobs.detach() if old is None else old[group.group.position, i]
            ratio = torch.exp(logprobs - before)
            a = group.advantages[i]
            if goal.surrogate == "clipped_sequence":
                ratio = (logprobs - before).mean().exp().expand(len(logprobs))
            if goal.surrogate == "clipped_weight":
                loss = -ratio.detach().clamp(1 - goal.clip_low, 1 + goal.clip_high) * a * logprobs
            elif goal.surrogate != "policy_gradient":
                loss = -torch.minimum(ratio * a, ratio.clamp(1 - goal.clip_low, 1 + goal.clip_high) * a)
            else:
                loss = -a * logprobs
            loss = loss * correction_weight(goal, before, torch.tensor(completion.logprobs))
            if goal.entropy:
                loss = loss - goal.entropy * entropies(model, group, i, goal.temperature)
            if goal.beta:
                with torch.no_grad():
                    other = reference_logprobs(frozen, group, i, goal.temperature)
                d = other - logprobs
                loss = loss + goal.beta * (d.exp() - d - 1)
            total = total + (loss.mean() if aggregation == "sequence_mean" else loss.sum())
    divisor = {"sequence_mean": len(lengths), "token_mean": sum(lengths), "constant": len(lengths) * MAX_NEW}[
        aggregation
    ]
    model.zero_grad()
    if total.requires_grad:
        (total / divisor).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
