"""Learning rate and KL coefficient over the planned updates, against hand-worked values."""

from __future__ import annotations

from dash_exp.learning.schedules import kl_coefficient, learning_rate


def test_learning_rate() -> None:
    linear = {"lr": 1.0, "schedule": "linear", "warmup_share": 0.3, "total": 6}  # 2 of 6 warm up
    assert [learning_rate(u, **linear) for u in range(7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    constant = {"lr": 0.3, "schedule": "constant", "warmup_share": 0.0, "total": 10}
    assert {learning_rate(u, **constant) for u in range(20)} == {0.3}
    assert learning_rate(0, **{**constant, "warmup_share": 0.35, "total": 10}) == 0.3 / 4


def test_kl_coefficient() -> None:
    linear = [kl_coefficient(u, beta=0.04, schedule="linear", total=4) for u in range(6)]
    assert linear == [0.04, 0.03, 0.02, 0.01, 0.0, 0.0]
    assert {kl_coefficient(u, beta=0.04, schedule="constant", total=4) for u in range(9)} == {0.04}
