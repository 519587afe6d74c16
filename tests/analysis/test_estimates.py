"""Estimates against scipy, brute force and hand-worked cases."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from analysis import estimates as est


def test_the_interval_of_a_share_stays_a_share() -> None:
    assert est.over_seeds([0.0, 0.0, 0.1]).low < 0
    found = est.share_over_seeds([0.0, 0.0, 0.1])
    assert (found.low, found.value) == (0.0, pytest.approx(0.1 / 3)) and found.high < 1
    assert est.share_over_seeds([1.0, 1.0, 0.9]).high == 1.0
    assert math.isnan(est.share_over_seeds([0.5, 0.6]).low)


def test_mean_over_seeds_has_students_interval() -> None:
    values = [0.60, 0.66, 0.72]
    found = est.over_seeds(values)
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert found.value == pytest.approx(0.66)
    assert (found.low, found.high) == pytest.approx((low, high))
    # by hand: s = 0.06, s / sqrt(3) = 0.034641, t(0.975, 2) = 4.302653, half = 0.149048
    assert found.high - found.value == pytest.approx(0.149048, abs=1e-6)


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.7]])
def test_too_few_seeds_have_no_interval_and_say_so(values: list[float]) -> None:
    found = est.over_seeds(values)
    assert not found.has_interval and f"{len(values)} seed" in found.note


def test_a_value_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="must be numbers"):
        est.over_seeds([0.5, math.nan, 0.7])


def test_students_interval_covers_what_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = sum(
        (found := est.over_seeds(rng.normal(1.0, 0.3, 3))).low <= 1.0 <= found.high for _ in range(4000)
    )
    assert 0.93 < hits / 4000 < 0.97  # 0.95, standard error 0.0034


def test_time_to_accuracy() -> None:
    values, times = np.array([0.1, 0.2, 0.6, 0.7, 0.8]), np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    # means of two: .15 .4 .65 .75 -> 0.64 is reached at time 4
    assert est.time_to(values, times, 0.64, window=2) == 4.0
    assert math.isnan(est.time_to(values, times, 0.9, window=2))
    assert math.isnan(est.time_to(values[:1], times[:1], 0.0, window=2))


def test_pass_at_k_curve_against_brute_force() -> None:
    outcomes = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    counts = np.repeat(np.array([[sum(o) for o in outcomes]]), 1, axis=0)
    counts = np.tile(counts, (1, 10))  # thirty prompts
    curve = est.pass_at_k_curve(counts, 4, [1, 2, 4, 8])
    for k, found in zip((1, 2, 4), curve, strict=False):
        brute = np.mean([np.mean([any(c) for c in itertools.combinations(o, k)]) for o in outcomes])
        assert found.value == pytest.approx(brute)
        assert found.low < found.value < found.high
    assert math.isnan(curve[3].value) and "k = 8 > n = 4" in curve[3].note


def test_crossing_is_linear_in_log_k() -> None:
    assert est.crossing([1, 4], [0.6, 0.8], [0.4, 1.0]) == pytest.approx([2.0])
    assert est.crossing([1, 2, 4], [0.5, 0.6, 0.7], [0.4, 0.5, 0.6]) == []


def test_instability_ignores_the_trend() -> None:
    place = np.linspace(0, 1, 40)
    trend = 0.2 + 0.5 * place - 0.3 * place**2  # what a local quadratic follows exactly
    assert est.instability(trend) == pytest.approx(0.0, abs=1e-12)
    swings = np.array(
        [est.instability(trend + np.random.default_rng(i).normal(0, 0.05, 40)) for i in range(300)]
    )
    assert math.sqrt((swings**2).mean()) == pytest.approx(0.05, rel=0.05)  # unbiased in the square
    assert math.isnan(est.instability(trend[:7]))
