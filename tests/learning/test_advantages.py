"""Advantages and filters, against numbers worked by hand."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dash_exp.learning.advantages import batch_advantages, best_of_others, group_advantages, overlong_penalty


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


BATCH = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
"""Mean 5/8, unbiased variance (5 (3/8)^2 + 3 (5/8)^2) / 7 = 15/56."""
BATCH_STD = math.sqrt(15 / 56) + 1e-4


@pytest.mark.parametrize(
    ("baseline", "scale", "expected"),
    [
        ("batch_mean", "batch_std", [[0.375, *[-0.625] * 3], [0.375] * 4]),  # REINFORCE++
        ("group_mean", "batch_std", [[0.75, *[-0.25] * 3], [0.0] * 4]),  # TRL's scale_rewards="batch"
        ("group_mean", "mean", [[0.75 / 0.25, *[-1.0] * 3], [0.0] * 4]),  # MaxRL
        ("batch_mean", "none", [[0.375, *[-0.625] * 3], [0.375] * 4]),
    ],
)
def test_batch_and_mean_by_hand(baseline: str, scale: str, expected: list[list[float]]) -> None:
    divisor = BATCH_STD if scale == "batch_std" else 1.0
    actual = batch_advantages(BATCH, baseline=baseline, scale=scale)
    for a, e in zip(actual, expected, strict=True):
        assert a == pytest.approx([x / divisor for x in e], rel=1e-12)
    assert batch_advantages([[0.95] * 3] * 5, baseline=baseline, scale=scale) == [(0.0,) * 3] * 5


def test_maxrl_averages_the_right_answers_only() -> None:
    """Without its baseline, sum_i A_i S_i / G is the mean score of the right ones (MaxRL's estimator)."""
    advantages = group_advantages([1.0, 1.0, 0.0, 0.0, 0.0], scale="mean")
    assert [(a + 1) / 5 for a in advantages] == pytest.approx([1 / 2, 1 / 2, 0, 0, 0])
    with pytest.raises(ValueError, match="divides by the mean reward"):
        group_advantages([-1.0, 0.0], scale="mean")


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=7), st.integers(2, 7))
def test_best_of_others_is_the_sum_over_all_subsets(rewards: list[float], k: int) -> None:
    """PKPO's s^(loo-1): over the k-subsets with i, the maximum less that without i; times G."""
    n, k = len(rewards), min(k, len(rewards))
    expected = []
    for i in range(n):
        with_i = [s for s in itertools.combinations(range(n), k) if i in s]
        gains = [max(rewards[j] for j in s) - max(rewards[j] for j in s if j != i) for s in with_i]
        expected.append(n * sum(gains) / math.comb(n, k))
    assert best_of_others(rewards, k) == pytest.approx(expected, abs=1e-12)
    given_k = group_advantages(rewards, baseline="best_of_others", scale="none", pass_k=k)
    assert given_k == pytest.approx(expected, abs=1e-12)


def test_best_of_others_is_an_unbiased_gradient_of_pass_at_k() -> None:
    """One right with probability p = sigmoid(w): d pass@k / dw = k (1 - p)^(k - 1) p (1 - p), and the
    score of a sample is 1 - p where it is right, else -p. The expectation is exact, over all outcomes."""
    p, n, k = 0.3, 5, 3
    expected = 0.0
    for outcome in itertools.product([0.0, 1.0], repeat=n):
        chance = math.prod(p if r else 1 - p for r in outcome)
        scores = [1 - p if r else -p for r in outcome]
        expected += chance * sum(a * s for a, s in zip(best_of_others(outcome, k), scores, strict=True)) / n
    assert expected == pytest.approx(k * (1 - p) ** (k - 1) * p * (1 - p), rel=1e-12)


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0)]
)
def test_overlong_penalty_by_hand(length: int, penalty: float) -> None:
    assert overlong_penalty(length, 100, 0.2) == pytest.approx(penalty)
    assert overlong_penalty(length, 100, 0.0) == 0.0
