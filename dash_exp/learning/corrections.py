"""Weights that correct for the gap between the sampler's probabilities and the learner's at the same weights:
two programs, often in two precisions, never quite agree. Tensors in, tensors out, without gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from dash_exp.learning.losses import per_completion


def correction(
    logprobs_T: Tensor, sampler_logprobs_T: Tensor, lengths_N: Tensor, name: str, floor: float, cap: float
) -> Tensor:
    """The weight of each token's loss [T]: w = learner's / sampler's probability, of the token
    (`token_...`) or of its completion (`sequence_...`), within [floor, cap]. `..._truncate` moves what is
    outside to the nearer bound (TIS, Yao et al. 2025), `..._mask` sets it to 0 (IcePop, Ling team 2025; MIS,
    Liu et al. 2025). `logprobs_T` are those at the sampling weights."""
    difference = (logprobs_T - sampler_logprobs_T).detach()
    level, _, how = name.partition("_")
    if level == "sequence":
        difference = per_completion(difference, lengths_N)
    weight = torch.exp(difference)
    inside = weight.clamp(floor, cap)
    return inside if how == "truncate" else torch.where(weight == inside, weight, 0.0)
