"""Advantages and filters, against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dash_exp.learning.advantages import group_advantages, keep_all, keep_large, keep_varied


def test_group_of_four_with_one_right() -> None:
    # mean .25, deviations (.75, -.25 x 3), unbiased variance (.5625 + 3 x .0625) / 3 = .25, std .5
    expected = [0.75 / 0.5001, *[-0.25 / 0.5001] * 3]
    assert group_advantages([1, 0, 0, 0]) == pytest.approx(expected, rel=1e-12)


def test_group_of_four_with_two_right() -> None:
    # deviations +-.5, unbiased variance 1/3, std .57735: |A| = .866 (DASH, section 3: 0, .5, .866, 1.5)
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert group_advantages([1, 1, 0, 0]) == pytest.approx([expected, expected, -expected, -expected])


def test_unscaled_is_reward_minus_mean() -> None:
    assert group_advantages([1, 0, 0, 0], scale="none") == (0.75, -0.25, -0.25, -0.25)


def test_leave_one_out_is_reward_minus_mean_of_the_others() -> None:
    rewards = [1.0, 0.5, 0.0]
    expected = [1 - 0.25, 0.5 - 0.5, 0 - 0.75]
    actual = group_advantages(rewards, baseline="leave_one_out", scale="none")
    assert actual == pytest.approx(expected)


@pytest.mark.parametrize("size", [2, 3, 4, 7, 8, 16, 64])
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.95, 1.0, 1 / 3])
@pytest.mark.parametrize("scale", ["std", "none"])
def test_equal_rewards_give_exactly_zero(size: int, reward: float, scale: str) -> None:
    """Summing 0.95 in floating point leaves a tiny std; dividing by it would make a spike."""
    assert group_advantages([reward] * size, scale=scale) == (0.0,) * size


def test_a_reward_that_is_not_a_number_gets_zero_and_moves_nobody() -> None:
    with_nan = group_advantages([1.0, 0.0, math.nan, 0.0, 0.0])
    without = group_advantages([1.0, 0.0, 0.0, 0.0])
    assert with_nan[2] == 0.0
    assert (*with_nan[:2], *with_nan[3:]) == pytest.approx(without)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=16))
def test_advantages_sum_to_zero_and_favour_the_better(rewards: list[float]) -> None:
    advantages = group_advantages(rewards)
    assert sum(advantages) == pytest.approx(0.0, abs=1e-9)
    for r, a in zip(rewards, advantages, strict=True):
        assert a == 0.0 or (a > 0) == (r > sum(rewards) / len(rewards))


@pytest.mark.parametrize("rewards", [[], [1.0]])
def test_a_group_of_one_is_refused(rewards: list[float]) -> None:
    with pytest.raises(ValueError, match="at least two"):
        group_advantages(rewards)


def test_filters() -> None:
    advantages = (0.5, -0.5, 0.1, -0.1001, 0.0)
    assert keep_all(advantages) == (True,) * 5
    assert keep_large(0.1)(advantages) == (True, True, False, True, False)  # strict, and absolute
    assert keep_varied(advantages) == (True,) * 5
    assert keep_varied((0.0, 0.0)) == (False, False)


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.1, 0.3, 0.4998])
@pytest.mark.parametrize("right", range(5))
def test_every_threshold_below_half_is_the_same_filter_for_groups_of_four(
    threshold: float, right: int
) -> None:
    advantages = group_advantages([1.0] * right + [0.0] * (4 - right))
    assert keep_large(threshold)(advantages) == (right not in (0, 4),) * 4
