"""Losses per token, KL estimators, and how tokens are weighted. Tensors in, tensors out.

The loss of a batch is sum over tokens of weight x (surrogate + beta x KL - entropy bonus), divided once by a
denominator that counts completions or tokens. Nothing here divides, so sums over micro-batches add.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dash_exp import plugins
from dash_exp.config.schema import AGGREGATIONS, KL_ESTIMATORS
from dash_exp.plugins import is_reference
from dash_exp.text import shorten

if TYPE_CHECKING:
    from dash_exp.learning.packing import Packed


def policy_gradient(logprobs_T: Tensor, advantages_T: Tensor) -> Tensor:
    """-A log pi(y_t), per token [T]."""
    return -advantages_T * logprobs_T


def clipped_ratio(
    logprobs_T: Tensor, old_logprobs_T: Tensor, advantages_T: Tensor, low: float, high: float
) -> Tensor:
    """-min(c A, clip(c, 1 - low, 1 + high) A) with c = pi / pi_old, per token [T] (PPO, eq. 7)."""
    ratio = torch.exp(logprobs_T - old_logprobs_T)
    clipped = ratio.clamp(1.0 - low, 1.0 + high)
    return -torch.minimum(ratio * advantages_T, clipped * advantages_T)


def clip_share(
    logprobs_T: Tensor, old_logprobs_T: Tensor, advantages_T: Tensor, low: float, high: float
) -> Tensor:
    """1 where the clip removes the gradient of a token, else 0, fp32 [T]."""
    ratio = torch.exp(logprobs_T - old_logprobs_T)
    over = (ratio > 1.0 + high) & (advantages_T > 0)
    under = (ratio < 1.0 - low) & (advantages_T < 0)
    return (over | under).float()


def clipped_weight(
    logprobs_T: Tensor, old_logprobs_T: Tensor, advantages_T: Tensor, low: float, high: float
) -> Tensor:
    """-stop_gradient(clip(c, 1 - low, 1 + high)) A log pi with c = pi / pi_old, per token [T] (CISPO, MiniMax
    2025, eq. 4): every token keeps a gradient, with a bounded weight."""
    ratio = torch.exp(logprobs_T - old_logprobs_T).detach()
    return -ratio.clamp(1.0 - low, 1.0 + high) * advantages_T * logprobs_T


def per_completion(values_T: Tensor, lengths_N: Tensor, mean: bool = False) -> Tensor:
    """At each token the sum (or mean) over its completion [T]; differentiable."""
    numbers = torch.arange(len(lengths_N), device=values_T.device)
    owner = numbers.repeat_interleave(lengths_N, output_size=len(values_T))  # a known size waits for no GPU
    sums = values_T.new_zeros(len(lengths_N)).index_add(0, owner, values_T)
    return (sums / lengths_N if mean else sums)[owner]


def surrogate(
    name: str, logprobs_T: Tensor, old_logprobs_T: Tensor, packed: Packed, bounds: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """The loss of each token [T], and 1 where the clip acts on it, else 0.

    `clipped_sequence` (GSPO, Zheng et al. 2025, eq. 5 and 7) is PPO's clip of one ratio per completion, the
    geometric mean of its tokens': the same for all of them, so that `sequence_mean` makes it one term.
    """
    advantages, (low, high) = packed.advantages, bounds
    if name == "clipped_sequence":
        logprobs_T = per_completion(logprobs_T - old_logprobs_T, packed.lengths, mean=True)
        old_logprobs_T = torch.zeros_like(logprobs_T)
    if name == "clipped_weight":
        ratio = torch.exp(logprobs_T - old_logprobs_T).detach()
        bounded = ((ratio > 1.0 + high) | (ratio < 1.0 - low)).float()
        return clipped_weight(logprobs_T, old_logprobs_T, advantages, low, high), bounded
    cut = clip_share(logprobs_T.detach(), old_logprobs_T, advantages, low, high)
    if is_reference(name):
        return own_surrogate(name, logprobs_T, old_logprobs_T, packed, bounds), cut
    if name == "policy_gradient":
        return policy_gradient(logprobs_T, advantages), cut
    return clipped_ratio(logprobs_T, old_logprobs_T, advantages, low, high), cut


def own_surrogate(
    name: str, logprobs_T: Tensor, old_logprobs_T: Tensor, packed: Packed, bounds: tuple[float, float]
) -> Tensor:
    """The loss of each token [T] by a function of the user's own. Raises UserError for anything else."""
    own = plugins.load(name, "surrogate", "algorithm.surrogate")
    returned = own(
        logprobs=logprobs_T,
        old_logprobs=old_logprobs_T,
        advantages=packed.advantages,
        lengths=packed.lengths,
        clip_low=bounds[0],
        clip_high=bounds[1],
    )
    if not isinstance(returned, Tensor) or returned.shape != logprobs_T.shape:
        got = f"a tensor {list(returned.shape)}" if isinstance(returned, Tensor) else shorten(repr(returned))
        raise own.failed(f"returned {got}, expected the loss of each token: {list(logprobs_T.shape)}")
    if not bool(returned.isfinite().all()):
        raise own.failed("returned a loss that is infinite or not a number")
    if not returned.requires_grad:
        raise own.failed("returned a loss that does not depend on logprobs")
    return returned


def kl_penalty(logprobs_T: Tensor, reference_logprobs_T: Tensor, estimator: str) -> Tensor:
    """An estimate of KL(pi, reference) per token [T] (Schulman 2020, "Approximating KL Divergence").

    `k3` = exp(d) - d - 1 with d = log reference - log pi: unbiased in value, never negative. As a loss
    its gradient is that of KL(reference, pi), to first order the same; `k2` = d^2 / 2 has the gradient
    of KL(pi, reference) in expectation. k1 = -d is refused: as a loss its expected gradient is 0.
    """
    difference = reference_logprobs_T - logprobs_T
    if estimator == "k3":
        return torch.exp(difference) - difference - 1.0
    if estimator == "k2":
        return 0.5 * difference.square()
    raise ValueError(f"unknown KL estimator {estimator!r}; allowed: {', '.join(KL_ESTIMATORS)}")


def token_weight(length: int, aggregation: str) -> float:
    """Weight of each token of a completion of this length, before the one division."""
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {aggregation!r}; allowed: {', '.join(AGGREGATIONS)}")
    return 1.0 / length if aggregation == "sequence_mean" else 1.0


def denominator(lengths_N: Sequence[int], max_new_tokens: int, aggregation: str) -> float:
    """What the weighted sum is divided by, for the completions counted.

    `sequence_mean` (GRPO): completions. `token_mean` (BNPO, DAPO): their tokens. `constant` (Dr. GRPO,
    the paper's): completions x max_new_tokens.
    """
    if aggregation == "token_mean":
        return float(sum(lengths_N))
    return float(len(lengths_N) * (max_new_tokens if aggregation == "constant" else 1))
