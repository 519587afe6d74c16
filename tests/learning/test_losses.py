"""Losses and KL estimators, against hand-worked numbers and exact gradients of a toy policy."""

from __future__ import annotations

import math

import pytest
import torch

from dash_exp.learning import losses


def test_policy_gradient_by_hand() -> None:
    loss = losses.policy_gradient(torch.tensor([-1.0, -2.0]), torch.tensor([0.5, -1.0]))
    assert loss.tolist() == [0.5, -2.0]


def test_clipped_ratio_by_hand() -> None:
    # ratios 1.5, 1.5, 0.5, 0.5 with A = 1, -1, 1, -1 and eps .2:
    # min(1.5, 1.2) = 1.2; min(-1.5, -1.2) = -1.5; min(.5, .8) = .5; min(-.5, -.8) = -.8
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    old = torch.full((4,), -1.0)
    loss = losses.clipped_ratio(old + ratio.log(), old, advantages, 0.2, 0.2)
    assert loss.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8])
    share = losses.clip_share(old + ratio.log(), old, advantages, 0.2, 0.2)
    assert share.tolist() == [1.0, 0.0, 0.0, 1.0]


def test_clip_removes_the_gradient_exactly_where_the_share_says() -> None:
    old = torch.zeros(200)
    logprobs = torch.linspace(-1, 1, 200, requires_grad=True)
    advantages = torch.where(torch.arange(200) % 2 == 0, 1.0, -1.0)
    losses.clipped_ratio(logprobs, old, advantages, 0.2, 0.3).sum().backward()
    assert logprobs.grad is not None
    share = losses.clip_share(logprobs.detach(), old, advantages, 0.2, 0.3)
    assert torch.equal(logprobs.grad == 0, share.bool())


def test_at_the_sampling_weights_the_clipped_gradient_is_the_policy_gradient() -> None:
    """DASH is vanilla policy gradient: with one update the ratio is 1 (DASH, section 3)."""
    logprobs = torch.tensor([-0.3, -2.0, -5.0], requires_grad=True)
    advantages = torch.tensor([1.0, -0.5, 2.0])
    (ratio_gradient,) = torch.autograd.grad(
        losses.clipped_ratio(logprobs, logprobs.detach(), advantages, 0.2, 0.2).sum(), logprobs
    )
    assert ratio_gradient.tolist() == pytest.approx((-advantages).tolist())


LOGITS = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64)
REFERENCE = torch.log_softmax(torch.tensor([-0.2, 0.4, 0.1], dtype=torch.float64), 0)


def test_k3_has_the_value_of_the_divergence() -> None:
    logprobs = torch.log_softmax(LOGITS, 0)
    exact = (logprobs.exp() * (logprobs - REFERENCE)).sum()
    estimate = (logprobs.exp() * losses.kl_penalty(logprobs, REFERENCE, "k3")).sum()
    assert estimate.item() == pytest.approx(exact.item(), rel=1e-12)


@pytest.mark.parametrize(("estimator", "direction"), [("k3", "reference"), ("k2", "policy")])
def test_gradient_of_the_estimator_as_a_loss(estimator: str, direction: str) -> None:
    """Samples are fixed in the loss: k3's expected gradient is that of KL(reference, pi), k2's that of
    KL(pi, reference)."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = torch.log_softmax(logits, 0)
    weights = logprobs.detach().exp()
    loss = (weights * losses.kl_penalty(logprobs, REFERENCE, estimator)).sum()
    (actual,) = torch.autograd.grad(loss, logits, retain_graph=True)
    if direction == "reference":
        exact = (REFERENCE.exp() * (REFERENCE - logprobs)).sum()
    else:
        exact = (logprobs.exp() * (logprobs - REFERENCE)).sum()
    (expected,) = torch.autograd.grad(exact, logits)
    assert torch.allclose(actual, expected, atol=1e-12)


def test_k3_by_hand_and_never_clamped() -> None:
    # d = 12: exp(12) - 13
    value = losses.kl_penalty(torch.tensor([-14.0]), torch.tensor([-2.0]), "k3")
    assert value.item() == pytest.approx(math.exp(12) - 13, rel=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k4"])
def test_k1_is_refused(estimator: str) -> None:
    with pytest.raises(ValueError, match="k2, k3"):
        losses.kl_penalty(torch.zeros(1), torch.zeros(1), estimator)


def test_aggregations_of_a_loss_by_hand() -> None:
    """Completions of 2 and 3 tokens with losses (1, 2) and (3, 4, 5), at most 10 tokens."""
    per_token = [[1.0, 2.0], [3.0, 4.0, 5.0]]
    expected = {"sequence_mean": (1.5 + 4) / 2, "token_mean": 15 / 5, "constant": 15 / 20}
    for name, value in expected.items():
        total = sum(losses.token_weight(len(row), name) * x for row in per_token for x in row)
        assert total / losses.denominator([2, 3], 10, name) == pytest.approx(value)


def test_unknown_aggregation() -> None:
    with pytest.raises(ValueError, match="sequence_mean"):
        losses.token_weight(3, "mean")
