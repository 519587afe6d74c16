r"""An advantage and a surrogate loss:

python -m dash_exp debug=fast algorithm.baseline=own_advantage:from_median \
    algorithm.surrogate=own_advantage:soft_clip
"""

from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor


def from_median(group: Sequence[float]) -> list[float]:
    """How much better than the median; `algorithm.scale` divides it."""
    middle = median(group)
    return [reward - middle for reward in group]


def soft_clip(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_high: float) -> Tensor:
    """-A f(ratio), where f is the identity at 1 and levels off at 1 + clip_high."""
    ratio = torch.exp(logprobs - old_logprobs)
    return -advantages * (1 + clip_high * torch.tanh((ratio - 1) / clip_high))
