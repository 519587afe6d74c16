"""Filters, against numbers worked by hand and by brute force."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dash_exp.config.schema import FILTERS
from dash_exp.learning.filters import keep_large, make_filter

RIGHT, HALF, WRONG = [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0] * 4
BATCH = [RIGHT, HALF, WRONG, [1.0] * 4]
"""|A| of 1.5 and 0.5, of 0.866, and of 0."""
T, F = True, False


@pytest.mark.parametrize(
    ("name", "threshold", "share", "expected"),
    [
        ("none", 0.1, None, [(T,) * 4] * 4),
        ("advantage", 0.6, None, [(T, F, F, F), (T,) * 4, (F,) * 4, (F,) * 4]),
        ("zero_variance", 0.0, None, [(T,) * 4, (T,) * 4, (F,) * 4, (F,) * 4]),
        ("positive", 0.0, None, [(T, F, F, F), (T, T, F, F), (F,) * 4, (F,) * 4]),
        ("top_k", 0.0, 5 / 16, [(T, F, F, F), (T,) * 4, (F,) * 4, (F,) * 4]),
        ("top_k", 0.0, 1.0, [(T,) * 4, (T,) * 4, (F,) * 4, (F,) * 4]),  # never one of 0
        ("max_variance", 0.0, 0.5, [(T, T, F, F), (T, F, F, T), (F,) * 4, (F,) * 4]),
        ("variance_top_p", 0.0, 0.5, [(F,) * 4, (T,) * 4, (F,) * 4, (F,) * 4]),  # 1/4 of 7/16
        ("variance_top_p", 0.0, 0.9, [(T,) * 4, (T,) * 4, (F,) * 4, (F,) * 4]),
    ],
)
def test_kept_by_hand(
    name: str, threshold: float, share: float | None, expected: list[tuple[bool, ...]]
) -> None:
    assert make_filter(name, threshold, share).keep(BATCH, 7) == expected


def test_a_threshold_is_strict_and_absolute() -> None:
    edge = 0.75 / 0.5001  # of one right among four
    assert keep_large(RIGHT, edge) == (F,) * 4
    assert keep_large(RIGHT, edge - 1e-9) == (T, F, F, F)
    assert keep_large([0.0, 1.0, 1.0, 1.0], edge - 1e-9) == (T, F, F, F)


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.1, 0.3, 0.4998])
@pytest.mark.parametrize("right", range(5))
def test_every_threshold_below_half_is_the_same_filter_for_groups_of_four(
    threshold: float, right: int
) -> None:
    rewards = [1.0] * right + [0.0] * (4 - right)
    assert keep_large(rewards, threshold) == (right not in (0, 4),) * 4


@given(st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0]), min_size=3, max_size=7), st.integers(2, 7))
def test_no_subset_has_a_larger_variance(rewards: list[float], size: int) -> None:
    (kept,) = make_filter("max_variance", share=min(1.0, size / len(rewards))).keep([rewards], 0)
    if max(rewards) == min(rewards):
        assert not any(kept)
        return
    chosen = [r for r, k in zip(rewards, kept, strict=True) if k]
    assert len(chosen) == min(size, len(rewards))
    best = max(map(statistics.pvariance, itertools.combinations(rewards, len(chosen))))
    assert statistics.pvariance(chosen) == pytest.approx(best, abs=1e-12)


def test_random_keeps_as_many_as_the_advantage_filter_but_others() -> None:
    """Exactly as many; over many seeds each completion equally often; the same seed repeats."""
    matched = make_filter("random", 0.1)
    counts = [0] * 16
    for seed in range(600):
        kept = [k for group in matched.keep(BATCH, seed) for k in group]
        assert sum(kept) == 8
        counts = [c + k for c, k in zip(counts, kept, strict=True)]
    assert all(abs(c / 600 - 0.5) < 0.1 for c in counts)  # five standard errors
    assert matched.keep(BATCH, 3) == matched.keep(BATCH, 3)
    fixed = make_filter("random", share=0.25)
    share = sum(sum(fixed.keep([WRONG], seed)[0]) for seed in range(1000)) / 4000
    assert share == pytest.approx(0.25, abs=0.04)


def test_only_filters_that_compare_groups_wait_for_the_batch() -> None:
    waits = {name for name in FILTERS if make_filter(name, share=0.5).batch_wide}
    assert waits == {"top_k", "variance_top_p"}
    assert make_filter("random").batch_wide  # matched


@pytest.mark.parametrize("name", FILTERS)
def test_a_reward_that_is_not_a_number(name: str) -> None:
    """It has no advantage, and no filter that looks at rewards keeps it."""
    (kept,) = make_filter(name, 0.1, 0.75).keep([[1.0, math.nan, 0.0, 0.0]], 5)
    assert len(kept) == 4
    if name not in ("none", "random", "zero_variance", "dynamic", "variance_top_p"):
        assert not kept[1] and any(kept)
