"""Advantages: how much better a completion is than its group. Pure functions, torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
