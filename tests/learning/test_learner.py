"""The learner against a plain autograd reference: every surrogate, aggregation, cut and packing."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dash_exp.config.schema import AGGREGATIONS, CORRECTIONS
from dash_exp.learning import losses
from dash_exp.learning.learner import Learner
from dash_exp.learning.packing import MicroBatch, Packer, Piece
from dash_exp.learning.settings import Forward, Objective, Optimization
from dash_exp.types import AdvantagedGroup
from tests.conftest import make_groups
from tests.learning.reference import MAX_NEW, VOCABULARY, old_logprobs, reference_gradient, reference_logprobs

LENGTHS = [[3, 5, 1, 4], [2, 2, 6, 1], [4, 1, 1, 3], [1, 7, 2, 2]]
PROMPTS = [6, 3, 9, 4]
OBJECTIVES = [
    *itertools.product(("policy_gradient", "clipped"), AGGREGATIONS, [0.0, 0.04]),
    ("clipped_sequence", "sequence_mean", 0.0),
    ("clipped_weight", "token_mean", 0.04),
]


def objective(surrogate: str = "policy_gradient", beta: float = 0.0, temperature: float = 1.0) -> Objective:
    return Objective(surrogate, 0.2, 0.2, beta, "constant", "k3", temperature)


def setting(**changes: Any) -> Optimization:
    values: dict[str, Any] = {
        "lr": 1e-3,
        "schedule": "constant",
        "warmup_share": 0.0,
        "total_updates": 10,
        "weight_decay": 0.0,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "max_grad_norm": 1e9,
        "precision": "fp32",
        "freeze_embeddings": False,
    }
    return Optimization(**{**values, **changes})


def learner_of(model: Any, goal: Objective, chunk: int = 512, **changes: Any) -> Learner:
    return Learner(model, goal, setting(**changes), Forward(VOCABULARY, chunk))


def perturbed(model: Any, scale: float = 0.02) -> Any:
    """Another policy near this one, so that KL and ratios are not trivial."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def learner_gradient(
    learner: Learner, batches: list[MicroBatch], groups: list[AdvantagedGroup], aggregation: str
) -> dict[str, Tensor]:
    for batch in batches:
        learner.accumulate(batch, learner.reference_logprobs(batch))
    lengths = [len(c.token_ids) for g in groups for c in g.group.completions]
    divisor = losses.denominator(lengths, MAX_NEW, aggregation)
    return {
        name: g / divisor for name, g in learner.gradients.items() if name in learner.weights.has_gradient
    }


def batches_of(groups: list[AdvantagedGroup], max_tokens: int, aggregation: str) -> list[MicroBatch]:
    packer = Packer(max_tokens, aggregation, keep_for_kl=False)
    return [b for g in groups for b in packer.add(g)] + list(packer.flush())


def whole_groups(groups: list[AdvantagedGroup], rows: str) -> MicroBatch:
    """All four completions of each, in a layout of attention."""
    return MicroBatch(tuple(Piece(g, (0, 1, 2, 3)) for g in groups), "constant", rows)


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    """Relative to the largest entry of each tensor, fp32 sums in another order."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max()) + 1e-8
        assert float((actual[name] - value).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize(("surrogate", "aggregation", "beta"), OBJECTIVES)
def test_gradient_equals_the_reference_however_the_batch_is_cut(
    tiny: Any, plain: Any, surrogate: str, aggregation: str, beta: float
) -> None:
    goal = objective(surrogate, beta, temperature=0.8)
    groups = make_groups(LENGTHS, PROMPTS, kept=0.7)
    expected = reference_gradient(perturbed(copy.deepcopy(plain)), plain, groups, goal, aggregation)
    learner = learner_of(tiny, goal, chunk=7)
    perturbed(learner.model)  # after the reference was frozen
    for max_tokens, order in [(1000, 1), (40, -1), (20, 1), (1, -1)]:
        learner.weights.has_gradient.clear()
        batches = batches_of(groups[::order], max_tokens, aggregation)
        assert_close(learner_gradient(learner, batches, groups, aggregation), expected)
    assert len(batches_of(groups, 1, aggregation)) > len(batches_of(groups, 1000, aggregation)) == 1


@pytest.mark.parametrize("rows", ["group", "completion"])
def test_packed_logprobs_equal_one_by_one(tiny: Any, plain: Any, rows: str) -> None:
    """Nothing leaks between completions or groups, in either layout of attention."""
    groups = make_groups(LENGTHS, PROMPTS)
    learner = learner_of(tiny, objective())
    actual = learner.logprobs(whole_groups(groups, rows))
    expected = torch.cat([reference_logprobs(plain, g, i, 1.0) for g in groups for i in range(4)])
    assert torch.allclose(actual, expected, atol=2e-5)


@pytest.mark.parametrize("rows", ["group", "completion"])
def test_changing_one_completion_leaves_the_others_alone(tiny: Any, rows: str) -> None:
    learner = learner_of(tiny, objective())
    first = make_groups(LENGTHS, PROMPTS)
    other = make_groups(LENGTHS, PROMPTS, seed=1)
    mixed_group = AdvantagedGroup(
        first[0].scored.__class__(
            first[0].group.__class__(
                0, first[0].group.prompt, (other[0].group.completions[0], *first[0].group.completions[1:])
            ),
            first[0].scored.scores,
        ),
        first[0].advantages,
        first[0].kept,
    )
    before = learner.logprobs(whole_groups(first, rows))
    after = learner.logprobs(whole_groups([mixed_group, *first[1:]], rows))
    assert not torch.allclose(before[:3], after[:3])
    assert torch.allclose(before[3:], after[3:], atol=1e-6)


@pytest.mark.parametrize("rows", ["group", "completion"])
def test_gradients_of_both_layouts(tiny: Any, plain: Any, rows: str) -> None:
    groups = make_groups(LENGTHS, PROMPTS)
    learner = learner_of(tiny, objective())
    batch = whole_groups(groups, rows)
    expected = reference_gradient(plain, plain, groups, objective(), "constant")
    assert_close(learner_gradient(learner, [batch], groups, "constant"), expected)


@pytest.mark.parametrize(("surrogate", "aggregation", "beta"), OBJECTIVES)
def test_filter_at_threshold_zero_changes_nothing(
    tiny: Any, surrogate: str, aggregation: str, beta: float
) -> None:
    """`denominator: all`, and either beta = 0 or `filter.kl=keep`: dropping what has advantage 0 is
    dropping nothing."""
    groups = make_groups(LENGTHS, PROMPTS)
    zeroed = [
        AdvantagedGroup(g.scored, tuple(a * (i % 2) for i, a in enumerate(g.advantages)), g.kept)
        for g in groups
    ]
    filtered = [
        AdvantagedGroup(g.scored, g.advantages, tuple(abs(a) > 0 for a in g.advantages)) for g in zeroed
    ]
    learner = learner_of(tiny, objective(surrogate, beta))
    perturbed(learner.model)
    whole = learner_gradient(learner, batches_of(zeroed, 1000, aggregation), groups, aggregation)
    learner.weights.has_gradient.clear()
    packer = Packer(1000, aggregation, keep_for_kl=beta > 0)
    batches = [b for g in filtered for b in packer.add(g)] + list(packer.flush())
    assert sum(len(b.lengths) for b in batches) == (16 if beta else 8)
    assert_close(learner_gradient(learner, batches, groups, aggregation), whole)


def test_dropped_completions_owe_no_kl_by_default(tiny: Any) -> None:
    """`filter.kl=drop` leaves their KL term out: another gradient, and fewer tokens forwarded."""
    groups = make_groups(LENGTHS, PROMPTS, kept=0.5)
    learner = learner_of(tiny, objective(beta=0.04))
    perturbed(learner.model)
    drop = learner_gradient(learner, batches_of(groups, 1000, "constant"), groups, "constant")
    dropped_tokens = learner.take_sums()["first/tokens"]
    learner.weights.has_gradient.clear()
    packer = Packer(1000, "constant", keep_for_kl=True)
    batches = [b for g in groups for b in packer.add(g)] + list(packer.flush())
    keep = learner_gradient(learner, batches, groups, "constant")
    assert learner.take_sums()["first/tokens"] > dropped_tokens
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(drop[name], keep[name], rtol=1e-3)


OFF_POLICY = [
    ("clipped", "token_mean", {"clip_high": 2.0}),
    ("clipped_sequence", "sequence_mean", {"clip_low": 3e-4, "clip_high": 4e-4}),
    ("clipped_sequence", "constant", {"clip_low": 0.05, "clip_high": 0.05, "beta": 0.04}),
    ("clipped_weight", "token_mean", {"clip_low": 1.0, "clip_high": 0.1}),
    ("policy_gradient", "sequence_mean", {"entropy": 0.1}),
    ("clipped", "token_mean", {"entropy": 0.05, "beta": 0.04}),
    *(
        ("clipped", "constant", {"correction": c, "correction_floor": 0.02, "correction_cap": 0.3})
        for c in CORRECTIONS[1:]
    ),
    ("clipped_sequence", "sequence_mean", {"correction": "token_truncate", "entropy": 0.1}),
]


@pytest.mark.parametrize(("surrogate", "aggregation", "more"), OFF_POLICY)
def test_gradient_off_policy_equals_the_reference(
    tiny: Any, plain: Any, surrogate: str, aggregation: str, more: dict[str, Any]
) -> None:
    """At weights that have moved since sampling, some ratios clipped and some not, in pieces and in one; the
    output layer trained or, with frozen embeddings, not."""
    goal = replace(objective(surrogate, temperature=0.8), **more)
    groups = make_groups(LENGTHS, PROMPTS, kept=0.8)
    old = old_logprobs(plain, groups, 0.8)
    expected = reference_gradient(perturbed(copy.deepcopy(plain)), plain, groups, goal, aggregation, old)
    for frozen, max_tokens in ((False, 1000), (True, 20)):
        learner = learner_of(copy.deepcopy(tiny), goal, chunk=7, freeze_embeddings=frozen)
        perturbed(learner.model)
        for batch in batches_of(groups, max_tokens, aggregation):
            before = [old[p.source.group.position, i] for p in batch.pieces for i in p.indices]
            learner.accumulate(batch, learner.reference_logprobs(batch), torch.cat(before))
        lengths = [len(c.token_ids) for g in groups for c in g.group.completions]
        divisor = losses.denominator(lengths, MAX_NEW, aggregation)
        actual = {name: g / divisor for name, g in learner.gradients.items()}
        assert_close(actual, {name: expected[name] for name in actual})
        sums = learner.take_sums()
        share = sums["later/clipped"] / sums["later/tokens"]
        assert surrogate == "policy_gradient" or goal.clip_high > 1 or 0 < share < 1


def test_later_passes_have_a_ratio_and_a_clip(tiny: Any, plain: Any) -> None:
    """PPO-Multi: old log-probabilities come from the first pass; at lr 0 the ratio stays 1."""
    groups = make_groups(LENGTHS, PROMPTS)
    (batch,) = batches_of(groups, 1000, "constant")
    for lr, moved in [(0.0, False), (3e-3, True)]:
        learner = learner_of(copy.deepcopy(tiny), objective("clipped"), lr=lr)
        old = learner.accumulate(batch)
        learner.update(100.0)
        first = learner.take_sums()
        assert first["first/ratio"] / first["first/tokens"] == pytest.approx(1.0, abs=1e-9)
        assert first["first/clipped"] == 0
        learner.accumulate(batch, old=old)
        second = learner.take_sums()
        change = abs(second["later/ratio"] / second["later/tokens"] - 1.0)
        assert (change > 1e-3) == moved
        assert (second["later/clipped"] > 0) == moved


def test_second_pass_gradient_equals_the_reference(tiny: Any, plain: Any) -> None:
    groups = make_groups(LENGTHS, PROMPTS)
    goal = objective("clipped")
    old = old_logprobs(plain, groups)
    learner = learner_of(tiny, goal)
    batches = batches_of(groups, 25, "constant")
    stored = [learner.logprobs(b) for b in batches]
    perturbed(learner.model)
    expected = reference_gradient(perturbed(copy.deepcopy(plain)), plain, groups, goal, "constant", old)
    for batch, before in zip(batches, stored, strict=True):
        learner.accumulate(batch, old=before)
    divisor = 16 * MAX_NEW
    assert_close({n: g / divisor for n, g in learner.gradients.items()}, expected, 1e-4)


def test_completions_forwarded_for_their_kl_have_no_policy_term(tiny: Any) -> None:
    """`filter.kl=keep`: a dropped completion's own, small but not zero, advantage is not used."""
    groups = make_groups(LENGTHS, PROMPTS, kept=0.5)
    zeroed = [
        AdvantagedGroup(
            g.scored, tuple(a if k else 0.0 for a, k in zip(g.advantages, g.kept, strict=True)), (True,) * 4
        )
        for g in groups
    ]
    learner = learner_of(tiny, objective(beta=0.04))
    perturbed(learner.model)
    packer = Packer(1000, "constant", keep_for_kl=True)
    batches = [b for g in groups for b in packer.add(g)] + list(packer.flush())
    actual = {k: v.clone() for k, v in learner_gradient(learner, batches, groups, "constant").items()}
    learner.weights.has_gradient.clear()
    expected = learner_gradient(learner, batches_of(zeroed, 1000, "constant"), groups, "constant")
    assert_close(actual, expected)
