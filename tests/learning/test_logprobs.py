"""Chunked log-probabilities against a plain log-softmax."""

from __future__ import annotations

import math

import pytest
import torch

from dash_exp.learning.logprobs import token_logprobs

T, H, V = 23, 16, 70


def tensors(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=generator, dtype=dtype)
    weight = torch.randn(V, H, generator=generator, dtype=dtype)
    return hidden, weight, torch.randint(0, 60, (T,), generator=generator)


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.log_softmax(hidden @ weight[:size].t() / temperature, dim=1)
    return rows.gather(1, targets[:, None]).squeeze(1), -(rows.exp() * rows).sum(1)


@pytest.mark.parametrize("chunk", [1, 5, 23, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("vocabulary", [V, 61])
def test_value_and_gradient(chunk: int, temperature: float, trainable: bool, vocabulary: int) -> None:
    hidden, weight, targets = tensors()
    upstream = torch.linspace(-1, 1, T, dtype=torch.float64)
    hidden.requires_grad_()
    weight.requires_grad_(trainable)
    logprobs, entropy = token_logprobs(
        hidden, weight, targets, temperature=temperature, vocabulary=vocabulary, chunk=chunk
    )
    expected, expected_entropy = reference(hidden, weight, targets, temperature, vocabulary)
    assert torch.allclose(logprobs.double(), expected, atol=1e-5)
    assert torch.allclose(entropy.double(), expected_entropy, atol=1e-5)
    assert not entropy.requires_grad
    wanted = [hidden, weight] if trainable else [hidden]
    actual = torch.autograd.grad((logprobs * upstream).sum(), wanted)
    exact = torch.autograd.grad((expected * upstream).sum(), wanted)
    for a, e in zip(actual, exact, strict=True):
        assert torch.allclose(a, e, atol=2e-5)


@pytest.mark.parametrize("trainable", [True, False])
def test_gradient_of_the_entropy(trainable: bool) -> None:
    """In chunks, beside that of the log-probabilities, with a temperature and a padded vocabulary."""
    hidden, weight, targets = tensors()
    upstream = torch.linspace(-1, 1, T, dtype=torch.float64)
    hidden.requires_grad_()
    weight.requires_grad_(trainable)
    logprobs, entropy = token_logprobs(
        hidden, weight, targets, temperature=0.6, vocabulary=61, chunk=5, entropy_gradient=True
    )
    expected, expected_entropy = reference(hidden, weight, targets, 0.6, 61)
    wanted = [hidden, weight] if trainable else [hidden]
    actual = torch.autograd.grad((logprobs * upstream + entropy * upstream.flip(0)).sum(), wanted)
    exact = torch.autograd.grad((expected * upstream + expected_entropy * upstream.flip(0)).sum(), wanted)
    for a, e in zip(actual, exact, strict=True):
        assert torch.allclose(a, e, atol=2e-5)


def test_entropy_of_a_uniform_distribution_is_log_v() -> None:
    hidden, weight, targets = tensors()
    _, entropy = token_logprobs(hidden * 0, weight, targets, vocabulary=61)
    assert entropy.tolist() == pytest.approx([math.log(61)] * T)


def test_temperature_divides_logits_not_logprobs() -> None:
    hidden, weight, targets = tensors()
    cold, _ = token_logprobs(hidden, weight, targets, temperature=0.6)
    assert not torch.allclose(cold, token_logprobs(hidden, weight, targets)[0] / 0.6, atol=0.01)
    total = torch.zeros(T)
    for token in range(V):
        every = torch.full((T,), token)
        total += token_logprobs(hidden, weight, every, temperature=0.6)[0].exp()
    assert total.tolist() == pytest.approx([1.0] * T, abs=1e-4)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = tensors(torch.float32)
    logprobs, entropy = token_logprobs(hidden * 1e4, weight, targets)
    assert torch.isfinite(logprobs).all() and torch.isfinite(entropy).all()


def test_wrong_shapes_are_refused() -> None:
    hidden, weight, targets = tensors()
    with pytest.raises(ValueError, match="does not fit"):
        token_logprobs(hidden[:, :-1], weight, targets)
    with pytest.raises(ValueError, match="targets"):
        token_logprobs(hidden, weight, targets[:-1])
    with pytest.raises(ValueError, match="positive"):
        token_logprobs(hidden, weight, targets, temperature=0.0)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("share", [0.9, 0.99, 0.998, 0.9995])
def test_confident_tokens_keep_their_small_gradient_in_bf16(share: float, trainable: bool) -> None:
    """1 - p is formed before rounding to bf16, whose spacing below 1 is 0.004."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, H, generator=generator).bfloat16()
    hidden = torch.randn(1, H, generator=generator).double()
    y = torch.tensor([7])
    axis = weight[7].double() - weight.double().mean(0)
    low, high = 0.0, 50.0
    for _ in range(60):  # how far along the target's own direction its probability is `share`
        middle = (low + high) / 2
        p = torch.softmax((hidden + middle * axis) @ weight.double().t(), 1)[0, 7]
        low, high = (middle, high) if p < share else (low, middle)
    hidden = (hidden + low * axis).bfloat16()
    exact = hidden.double().requires_grad_()
    (expected,) = torch.autograd.grad(torch.log_softmax(exact @ weight.double().t(), 1)[0, 7], exact)
    ours = hidden.clone().requires_grad_()
    logprobs, _ = token_logprobs(ours, weight.clone().requires_grad_(trainable), y)
    (actual,) = torch.autograd.grad(logprobs.sum(), ours)
    # the logits themselves are rounded to bf16: 1 - p is uncertain by the error of the largest logit
    assert (actual.double() - expected).norm() < 0.15 * expected.norm()
