"""LoRA: starts as the base model, trains only adapters, and leaves plain weights behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from dash_exp.errors import UserError
from dash_exp.learning.learner import Learner
from dash_exp.learning.settings import Adapters, Forward, Objective
from dash_exp.learning.weights import merged_weights
from tests.conftest import make_groups
from tests.learning.reference import MAX_NEW, VOCABULARY, reference_logprobs
from tests.learning.test_learner import batches_of, setting

LENGTHS, PROMPTS = [[3, 5, 1, 4], [2, 2, 6, 1]], [6, 3]


def adapted(model: Any, beta: float = 0.04, precision: str = "fp32", **changes: Any) -> Learner:
    own = Adapters(**{"rank": 4, "alpha": 8.0, "targets": (), "seed": 7, **changes})
    goal = Objective("policy_gradient", 0.2, 0.2, beta, "constant", "k3", 1.0)
    chosen = setting(precision=precision, adapters=own, lr=1e-2)
    return Learner(model, goal, chosen, Forward(VOCABULARY, 16))


def advance(learner: Learner, updates: int = 2) -> None:
    groups = make_groups(LENGTHS, PROMPTS)
    for _ in range(updates):
        for batch in batches_of(groups, 1000, "constant"):
            learner.accumulate(batch, learner.reference_logprobs(batch))
        learner.update(8.0 * MAX_NEW)


def test_it_starts_as_the_base_model_and_the_reference_stays_it(tiny: Any, plain: Any) -> None:
    learner = adapted(tiny)
    (batch,) = batches_of(make_groups(LENGTHS, PROMPTS), 1000, "constant")
    groups = make_groups(LENGTHS, PROMPTS)
    expected = torch.cat([reference_logprobs(plain, g, i, 1.0) for g in groups for i in range(4)])
    assert torch.allclose(learner.logprobs(batch), expected, atol=1e-5)
    advance(learner)
    assert (learner.logprobs(batch) - expected).abs().max() > 1e-3
    reference = learner.reference_logprobs(batch)
    assert reference is not None and torch.allclose(reference, expected, atol=1e-5)
    assert learner.reference is None  # no second copy of the model


def test_only_adapters_move_and_every_linear_layer_but_the_output_has_them(tiny: Any) -> None:
    before = {n: p.clone() for n, p in tiny.named_parameters()}
    learner = adapted(tiny)
    assert len(learner.masters) == 2 * 7 * 2  # A and B of seven projections in two layers
    assert all(".lora_" in name for name in learner.masters)
    advance(learner)
    for name, parameter in learner.model.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer.", ".")]), name


def test_plain_weights_are_an_equal_model(tiny: Any, plain: Any) -> None:
    learner = adapted(tiny)
    advance(learner)
    merged = dict(merged_weights(learner.model))
    assert merged.keys() == {name for name, _ in plain.named_parameters()}
    other = copy.deepcopy(plain)
    other.load_state_dict(merged, strict=False)
    (batch,) = batches_of(make_groups(LENGTHS, PROMPTS), 1000, "constant")
    groups = make_groups(LENGTHS, PROMPTS)
    expected = torch.cat([reference_logprobs(other, g, i, 1.0) for g in groups for i in range(4)])
    assert torch.allclose(learner.logprobs(batch), expected, atol=1e-5)
    layer = learner.model.model.layers[1].mlp.up_proj
    by_hand = layer.base_layer.weight + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(merged["model.layers.1.mlp.up_proj.weight"], by_hand, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed"])
def test_snapshot_restores_bit_by_bit(tiny: Any, precision: str) -> None:
    whole = adapted(copy.deepcopy(tiny), precision=precision)
    advance(whole, 4)
    half = adapted(copy.deepcopy(tiny), precision=precision)
    advance(half, 2)
    snapshot = copy.deepcopy(half.snapshot(2))
    fresh = adapted(tiny, precision=precision)
    fresh.restore(snapshot)
    advance(fresh, 2)
    assert all(torch.equal(whole.masters[n], m) for n, m in fresh.masters.items())
    assert all(".lora_" not in name for name in snapshot.weights)


def test_the_seed_draws_the_adapters_and_an_unknown_target_is_refused(tiny: Any) -> None:
    first, same, other = (adapted(copy.deepcopy(tiny), seed=s) for s in (1, 1, 2))
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(first.masters[name], same.masters[name])
    assert not torch.equal(first.masters[name], other.masters[name])
    assert len(adapted(copy.deepcopy(tiny), targets=("q_proj",)).masters) == 4
    with pytest.raises(UserError, match="q_proj, v_proj"):
        adapted(copy.deepcopy(tiny), targets=("no_such_layer",))


@pytest.mark.parametrize("targets", [("lm_head",), ("lm_head", "q_proj"), ("embed_tokens", "q_proj")])
def test_layers_that_can_have_no_adapter_are_refused(tiny: Any, targets: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="can have no adapter"):
        adapted(tiny, targets=targets)
