"""Learning rate and KL coefficient over the planned updates, against hand-worked values."""

from __future__ import annotations

from dash_exp.learning.settings import coefficient, learning_rate
from tests.learning.test_learner import setting


def test_learning_rate() -> None:
    linear = setting(lr=1.0, schedule="linear", warmup_share=0.3, total_updates=6)  # 2 of 6 warm up
    assert [learning_rate(u, linear) for u in range(7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert {learning_rate(u, setting(lr=0.3)) for u in range(20)} == {0.3}
    assert learning_rate(0, setting(lr=0.3, warmup_share=0.35, total_updates=10)) == 0.3 / 4


def test_coefficients_of_kl_and_entropy() -> None:
    assert [coefficient(u, 0.04, "linear", 4) for u in range(6)] == [0.04, 0.03, 0.02, 0.01, 0.0, 0.0]
    assert {coefficient(u, 0.04, "constant", 4) for u in range(9)} == {0.04}
