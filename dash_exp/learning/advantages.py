"""Advantages: how much better a completion is than others. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dash_exp import plugins
from dash_exp.config.schema import BASELINES, SCALES, STD_EPSILON
from dash_exp.plugins import is_reference

BASELINE = "algorithm.baseline"


def compares_batch(baseline: str, scale: str) -> bool:
    """Whether these advantages need the rewards of the complete batch."""
    own = is_reference(baseline) and plugins.load(baseline, "advantage", BASELINE).batch_wide
    return own or baseline == "batch_mean" or scale == "batch_std"


def batch_advantages(
    rewards_PG: Sequence[Sequence[float]], *, baseline: str, scale: str, pass_k: int = 2
) -> list[tuple[float, ...]]:
    """The advantages of each group; see `group_advantages`."""
    batch = [r for rewards_G in rewards_PG for r in rewards_G]
    own: list[tuple[float, ...] | None] = [None] * len(rewards_PG)
    if is_reference(baseline):
        finite = [list(filter(math.isfinite, rewards_G)) for rewards_G in rewards_PG]
        own = plugins.load(baseline, "advantage", BASELINE).groups(finite)
    options = {"baseline": baseline, "scale": scale}
    return [
        group_advantages(g, **options, pass_k=pass_k, batch_N=batch, own=made)
        for g, made in zip(rewards_PG, own, strict=True)
    ]


def group_advantages(
    rewards_G: Sequence[float],
    *,
    baseline: str = "group_mean",
    scale: str = "std",
    pass_k: int = 2,
    batch_N: Sequence[float] = (),
    own: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """One advantage per completion of a group, the same for all its tokens.

    `group_mean`: A_i = r_i - mean(r). `leave_one_out`: A_i = r_i - mean of the others (RLOO, Ahmadian
    et al. 2024, eq. 8), equal to G/(G-1) times the former. `batch_mean`: A_i = r_i - mean of the batch's
    rewards `batch_N` (REINFORCE++, Hu et al. 2025, section 3). `best_of_others`: see `best_of_others`.

    `std` divides by std(r) + 1e-4, with std unbiased (n - 1), as GRPO does (Shao et al. 2024, section
    4.1.2; DASH, section 3); `batch_std` by that of the batch; `mean` by mean(r), which makes the expected
    gradient that of the log-likelihood of a right answer (MaxRL, Tajwar et al. 2026).

    `own`: what a function of the user's own made of the finite rewards, in place of a baseline; it is 0 for
    equal rewards only if it is scaled.

    A completion whose reward is not finite (it could not be judged) gets 0 and never moves the
    baseline of the others. A group (for `batch_mean`: a batch) whose finite rewards are all equal gets
    exactly 0, decided by max - min and not by a std that rounding can make tiny but positive.

    Raises ValueError for fewer than two rewards, an unknown option, or a mean that cannot be divided by.
    """
    if (own is None and baseline not in BASELINES) or scale not in SCALES:
        raise ValueError(f"unknown baseline {baseline!r} or scale {scale!r}")
    if len(rewards_G) < 2:
        raise ValueError(f"a group needs at least two completions, got {len(rewards_G)}")
    finite = [r for r in rewards_G if math.isfinite(r)]
    batch = [r for r in batch_N if math.isfinite(r)]
    compared = batch if baseline == "batch_mean" else finite
    equal = len(compared) < 2 or max(compared) == min(compared)
    if equal and (own is None or scale != "none"):
        return (0.0,) * len(rewards_G)
    n, mean = len(compared), math.fsum(compared) / max(1, len(compared))
    if own is not None or baseline == "best_of_others":
        above = iter(best_of_others(finite, pass_k) if own is None else own)
        raw = [next(above) if math.isfinite(r) else 0.0 for r in rewards_G]
    else:
        raw = [r - mean if math.isfinite(r) else 0.0 for r in rewards_G]
    factor = n / (n - 1) if baseline == "leave_one_out" else 1.0
    if scale in ("std", "batch_std"):
        factor /= _std(compared if scale == "std" else batch) + STD_EPSILON
    elif scale == "mean":
        if mean <= 0:
            raise ValueError(f"scale=mean divides by the mean reward, which is {mean:g}")
        factor /= mean
    return tuple(a * factor for a in raw)


def _std(values: Sequence[float]) -> float:
    """Unbiased (n - 1)."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def best_of_others(rewards_G: Sequence[float], k: int) -> list[float]:
    """k E[max(0, r_i - max of k - 1 others)], over all ways to choose the others: what completion i adds to
    the best of k. Their mean over the group, each times grad log pi, is an unbiased gradient of max@k, for
    rewards of 0 and 1 of pass@k (PKPO, Walder and Karkhanis 2025, eq. 33, times G)."""
    n, k = len(rewards_G), min(k, len(rewards_G))
    ways = math.comb(n - 1, k - 1)
    added = []
    for i, reward in enumerate(rewards_G):
        others = sorted([*rewards_G[:i], *rewards_G[i + 1 :]])
        below = [(j, other) for j, other in enumerate(others) if other < reward]
        # the j-th smallest is the largest of k - 1 in comb(j, k - 2) ways
        added.append(k * math.fsum(math.comb(j, k - 2) * (reward - other) for j, other in below) / ways)
    return added


def overlong_penalty(length: int, limit: int, share: float) -> float:
    """What is added to the reward of a completion of `length` tokens (DAPO, Yu et al. 2025, eq. 13): 0 up to
    `share` of the limit before it, then falling linearly to -1 at the limit. `share` 0: never."""
    room = share * limit
    return max(-1.0, min(0.0, (limit - room - length) / room)) if room > 0 else 0.0
