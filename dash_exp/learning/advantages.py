"""Advantages (how much better a completion is than its group), and filters on them. Pure functions.

A filter gets the advantages of one group and says which completions to keep. Dropped ones are never
forwarded, unless `filter.kl=keep` forwards them for their KL term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from dash_exp.config.schema import BASELINES, SCALES, STD_EPSILON


def group_advantages(
    rewards_G: Sequence[float], *, baseline: str = "group_mean", scale: str = "std"
) -> tuple[float, ...]:
    """One advantage per completion of a group, the same for all its tokens.

    `group_mean`: A_i = r_i - mean(r). `leave_one_out`: A_i = r_i - mean of the others (RLOO, Ahmadian
    et al. 2024, eq. 8), equal to G/(G-1) times the former. `std` divides by std(r) + 1e-4, with std
    unbiased (n - 1), as GRPO does (Shao et al. 2024, section 4.1.2; DASH, section 3).

    A completion whose reward is not finite (it could not be judged) gets 0 and never moves the
    baseline of the others. A group whose finite rewards are all equal gets exactly 0, decided by
    max - min and not by a std that rounding can make tiny but positive.

    Raises ValueError for fewer than two rewards or an unknown option.
    """
    if baseline not in BASELINES or scale not in SCALES:
        raise ValueError(f"unknown baseline {baseline!r} or scale {scale!r}")
    if len(rewards_G) < 2:
        raise ValueError(f"a group needs at least two completions, got {len(rewards_G)}")
    finite = [r for r in rewards_G if math.isfinite(r)]
    n = len(finite)
    if n < 2 or max(finite) == min(finite):
        return (0.0,) * len(rewards_G)
    mean = math.fsum(finite) / n
    factor = n / (n - 1) if baseline == "leave_one_out" else 1.0
    if scale == "std":
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in finite) / (n - 1))
        factor /= std + STD_EPSILON
    return tuple((r - mean) * factor if math.isfinite(r) else 0.0 for r in rewards_G)


Filter = Callable[[Sequence[float]], tuple[bool, ...]]


def keep_all(advantages_G: Sequence[float]) -> tuple[bool, ...]:
    """No filter."""
    return (True,) * len(advantages_G)


def keep_varied(advantages_G: Sequence[float]) -> tuple[bool, ...]:
    """Drop a group whose advantages are all 0, that is, whose rewards are all equal."""
    return (any(a != 0.0 for a in advantages_G),) * len(advantages_G)


def keep_large(threshold: float) -> Filter:
    """The paper's gradient filter: keep |A| > threshold (DASH, section 3)."""

    def keep(advantages_G: Sequence[float]) -> tuple[bool, ...]:
        return tuple(abs(a) > threshold for a in advantages_G)

    return keep


def make_filter(name: str, threshold: float) -> Filter:
    """The filter an option names: `none`, `zero_variance` or `advantage`."""
    if name == "advantage":
        return keep_large(threshold)
    return {"none": keep_all, "zero_variance": keep_varied}[name]
