"""Filters: which completions of a batch are learned from. Pure functions of the outcomes.

A filter gets the verdicts' rewards, before any shaping, and a seed if it draws. Dropped completions are never
forwarded, unless `filter.kl=keep` forwards them for their KL term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from dash_exp import plugins
from dash_exp.learning.advantages import group_advantages
from dash_exp.plugins import is_reference
from dash_exp.seeding import permutation, uniforms

Rewards = Sequence[Sequence[float]]
Kept = list[tuple[bool, ...]]


@dataclass(frozen=True, slots=True)
class Filter:
    """`keep`: from the rewards of groups and a seed to what is kept of each. `batch_wide`: it compares the
    groups of a batch, so it must see all at once; else it sees each as it arrives, with its own seed."""

    keep: Callable[[Rewards, int], Kept]
    batch_wide: bool = False


def make_filter(name: str, threshold: float = 0.0, share: float | None = None) -> Filter:
    """The filter that config names. `share` None: of `random`, as many as `advantage` keeps."""
    if is_reference(name):
        own = plugins.load(name, "filter", "filter.name")
        call = partial(own.groups, flags=True, threshold=threshold, share=share)
        return Filter(lambda batch, seed: call(batch, seed=seed), own.batch_wide)
    if name == "random" and share is None:
        return Filter(partial(keep_as_many, threshold=threshold), batch_wide=True)
    part = 1.0 if share is None else share
    of_batches: dict[str, Filter] = {
        "random": Filter(partial(keep_random, share=part)),
        "top_k": Filter(partial(keep_top, share=part), batch_wide=True),
        "variance_top_p": Filter(partial(keep_nucleus, share=part), batch_wide=True),
    }
    if name in of_batches:
        return of_batches[name]
    of_groups: dict[str, Callable[[Sequence[float]], tuple[bool, ...]]] = {
        "none": keep_all,
        "advantage": partial(keep_large, threshold=threshold),
        "zero_variance": keep_varied,
        "dynamic": keep_varied,  # with `filter.refill`
        "positive": keep_positive,
        "max_variance": partial(keep_spread, share=part),
    }
    keep_group = of_groups[name]
    return Filter(lambda rewards_PG, seed: [keep_group(rewards_G) for rewards_G in rewards_PG])


def keep_all(rewards_G: Sequence[float]) -> tuple[bool, ...]:
    """No filter."""
    return (True,) * len(rewards_G)


def keep_large(rewards_G: Sequence[float], threshold: float) -> tuple[bool, ...]:
    """The paper's gradient filter: |A| > threshold, in standard deviations of the group (DASH, section 3)."""
    return tuple(abs(a) > threshold for a in group_advantages(rewards_G))


def keep_varied(rewards_G: Sequence[float]) -> tuple[bool, ...]:
    """All of a group whose rewards differ."""
    return (any(a != 0.0 for a in group_advantages(rewards_G)),) * len(rewards_G)


def keep_positive(rewards_G: Sequence[float]) -> tuple[bool, ...]:
    """What is better than the mean of its group (RAFT++ and Reinforce-Rej, Xiong et al. 2025)."""
    return tuple(a > 0.0 for a in group_advantages(rewards_G))


def keep_spread(rewards_G: Sequence[float], share: float) -> tuple[bool, ...]:
    """The subset of `share` of a group, rounded up, with the largest variance of rewards: some of the best
    and some of the worst (PODS, Xu et al. 2025, algorithm 2). Nothing of a group whose rewards are equal;
    of equal subsets, the one with more of the best."""
    order = sorted((i for i, r in enumerate(rewards_G) if math.isfinite(r)), key=lambda i: -rewards_G[i])
    if not any(keep_varied(rewards_G)):
        return (False,) * len(rewards_G)
    size = min(len(order), max(2, math.ceil(share * len(rewards_G))))

    def spread(best: int) -> float:
        values = [rewards_G[i] for i in chosen(best)]
        mean = math.fsum(values) / size
        return round(math.fsum((v - mean) ** 2 for v in values), 12)

    def chosen(best: int) -> list[int]:
        return order[:best] + order[len(order) - (size - best) :]

    taken = set(chosen(max(range(size, -1, -1), key=spread)))
    return tuple(i in taken for i in range(len(rewards_G)))


def keep_random(rewards_PG: Rewards, seed: int, share: float) -> Kept:
    """Each completion with probability `share`, whatever its reward."""
    drawn = uniforms(seed, sum(map(len, rewards_PG)))
    return _by_group([bool(u < share) for u in drawn], rewards_PG)


def keep_as_many(rewards_PG: Rewards, seed: int, threshold: float) -> Kept:
    """As many of the batch as the advantage filter keeps, drawn at random: what dropping costs by itself."""
    count = sum(sum(keep_large(g, threshold)) for g in rewards_PG)
    total = sum(map(len, rewards_PG))
    return _chosen(permutation(seed, total)[:count].tolist(), rewards_PG)


def keep_top(rewards_PG: Rewards, seed: int, share: float) -> Kept:
    """The `share` of the batch, rounded up, with the largest |A|, never one of 0; ties are drawn."""
    sizes = [abs(a) for g in rewards_PG for a in group_advantages(g)]
    order = sorted(permutation(seed, len(sizes)).tolist(), key=lambda i: -round(sizes[i], 9))
    count = math.ceil(share * len(sizes))
    return _chosen([i for i in order[:count] if sizes[i] > 0], rewards_PG)


def keep_nucleus(rewards_PG: Rewards, seed: int, share: float) -> Kept:
    """The fewest groups that hold `share` of the sum of all groups' reward variances (RAGEN-2 and VAGEN,
    `reward_variance_top_p`); ties are drawn."""
    variances = [_variance(g) for g in rewards_PG]
    order = sorted(permutation(seed, len(variances)).tolist(), key=lambda i: -round(variances[i], 9))
    wanted, held, taken = share * math.fsum(variances), 0.0, set[int]()
    for i in order:
        if variances[i] == 0 or held >= wanted * (1 - 1e-9):
            break
        taken.add(i)
        held += variances[i]
    return [(i in taken,) * len(g) for i, g in enumerate(rewards_PG)]


def _variance(rewards_G: Sequence[float]) -> float:
    """Of the finite rewards; exactly 0 where they are equal."""
    if not any(keep_varied(rewards_G)):
        return 0.0
    finite = [r for r in rewards_G if math.isfinite(r)]
    mean = math.fsum(finite) / len(finite)
    return math.fsum((r - mean) ** 2 for r in finite) / len(finite)


def _chosen(indices: Sequence[int], rewards_PG: Rewards) -> Kept:
    taken = set(indices)
    return _by_group([i in taken for i in range(sum(map(len, rewards_PG)))], rewards_PG)


def _by_group(flat_N: Sequence[bool], rewards_PG: Rewards) -> Kept:
    values = iter(flat_N)
    return [tuple(next(values) for _ in g) for g in rewards_PG]
