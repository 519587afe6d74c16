"""Losses per token, KL estimators, and how tokens are weighted. Tensors in, tensors out.

The loss of a batch is sum over tokens of weight x (surrogate + beta x KL), divided once by a
denominator that counts completions or tokens. Nothing here divides, so sums over micro-batches add.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dash_exp.config.schema import AGGREGATIONS, KL_ESTIMATORS


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
