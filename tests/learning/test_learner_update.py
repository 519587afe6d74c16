"""What an update of the learner does, and what is kept of it: optimizer, precisions, snapshots, preflight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from dash_exp.errors import UserError
from dash_exp.learning.learner import Learner, check_dropout
from dash_exp.learning.packing import Packer, largest_micro_batch
from dash_exp.learning.settings import PATIENCE, Forward, LossScale, UpdateStats
from dash_exp.types import AdvantagedGroup
from tests.conftest import make_groups
from tests.learning.reference import MAX_NEW, VOCABULARY, reference_gradient
from tests.learning.test_learner import (
    LENGTHS,
    PROMPTS,
    assert_close,
    batches_of,
    learner_gradient,
    learner_of,
    objective,
    setting,
)


def test_nothing_kept_moves_nothing(tiny: Any) -> None:
    """Not by momentum, not by weight decay; bit by bit. The update is counted, and the schedule goes
    on as planned."""
    learner = learner_of(tiny, objective(), weight_decay=0.1, schedule="linear")
    groups = make_groups(LENGTHS, PROMPTS)
    for batch in batches_of(groups, 1000, "constant"):
        learner.accumulate(batch)
    assert not learner.update(100.0).skipped
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    moments = copy.deepcopy(learner.optimizer.state_dict())
    nothing = [AdvantagedGroup(g.scored, g.advantages, (False,) * 4) for g in groups]
    assert batches_of(nothing, 1000, "constant") == []
    stats = learner.update(100.0)
    assert stats.skipped and learner.updates == 2
    assert all(torch.equal(before[n], p) for n, p in learner.model.named_parameters())
    after = learner.optimizer.state_dict()
    for key, state in moments["state"].items():
        assert all(torch.equal(v, after["state"][key][k]) for k, v in state.items())
    assert stats.lr == pytest.approx(1e-3 * 9 / 10)


def test_update_is_adamw_on_the_divided_clipped_gradient(tiny: Any, plain: Any) -> None:
    """The logged norm is a manual norm; the step is torch's own AdamW on the reference gradient."""
    groups = make_groups(LENGTHS, PROMPTS)
    expected = reference_gradient(plain, plain, groups, objective(), "constant")
    norm = torch.sqrt(sum(g.square().sum() for g in expected.values()))
    learner = learner_of(tiny, objective(), max_grad_norm=0.5 * float(norm))
    for batch in batches_of(groups, 30, "constant"):
        learner.accumulate(batch)
    stats = learner.update(16 * MAX_NEW)
    assert stats.grad_norm == pytest.approx(float(norm), rel=1e-4)
    assert stats.lr == learner.optimizer.param_groups[0]["lr"] == 1e-3
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5 * float(norm))
    optimizer.step()
    for name, parameter in plain.named_parameters():
        gap = (dict(learner.model.named_parameters())[name] - parameter).abs().max()
        assert gap < 2e-5, name  # one AdamW step moves an entry by up to 1e-3


def test_tied_embedding_is_one_tensor(tiny: Any) -> None:
    learner = learner_of(tiny, objective())
    assert "lm_head.weight" not in learner.masters and "model.embed_tokens.weight" in learner.masters
    for batch in batches_of(make_groups(LENGTHS, PROMPTS), 1000, "constant"):
        learner.accumulate(batch)
    learner.update(100.0)
    assert learner.model.lm_head.weight is learner.model.model.embed_tokens.weight


def test_frozen_embeddings_do_not_move(tiny: Any) -> None:
    learner = learner_of(tiny, objective(), freeze_embeddings=True)
    before = learner.model.model.embed_tokens.weight.clone()
    for batch in batches_of(make_groups(LENGTHS, PROMPTS), 1000, "constant"):
        learner.accumulate(batch)
    learner.update(100.0)
    assert torch.equal(before, learner.model.model.embed_tokens.weight)
    assert "model.embed_tokens.weight" not in learner.masters


def moved_share(model: Any, precision: str) -> float:
    """Share of trainable numbers that changed after 5 updates with lr 1e-5."""
    learner = learner_of(model, objective(), precision=precision, lr=1e-5)
    before = {n: m.detach().clone() for n, m in learner.masters.items()}
    groups = make_groups(LENGTHS, PROMPTS)
    for _ in range(5):
        for batch in batches_of(groups, 1000, "constant"):
            learner.accumulate(batch)
        learner.update(100.0)
    changed = sum(int((before[n] != m).sum()) for n, m in learner.masters.items())
    return changed / sum(m.numel() for m in before.values())


def test_fp32_masters_take_updates_that_pure_bf16_loses(tiny: Any) -> None:
    assert moved_share(copy.deepcopy(tiny), "bf16_mixed") > 0.95
    assert moved_share(copy.deepcopy(tiny), "bf16") < 0.6


def test_bf16_computes_with_rounded_masters(tiny: Any) -> None:
    learner = learner_of(tiny, objective(), precision="bf16_mixed")
    for batch in batches_of(make_groups(LENGTHS, PROMPTS), 1000, "constant"):
        learner.accumulate(batch)
    learner.update(100.0)
    for name, parameter in learner.model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, learner.masters[name].bfloat16())
        assert learner.gradients[name].dtype == torch.float32
    assert learner.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_an_fp16_update_is_the_fp32_one_whatever_the_scale_of_the_loss(tiny: Any, plain: Any) -> None:
    """Gradients are divided by the scale again: the norm is that of the exact gradient, to the precision of
    fp16, at a scale of 1 and of 2^10. What overflows moves nothing, and the scale is halved, until there is
    nothing left to halve; all of it is saved and restored."""
    groups = make_groups(LENGTHS, PROMPTS)
    batches = batches_of(groups, 1000, "constant")
    exact = reference_gradient(plain, plain, groups, objective(), "constant")
    norm = float(torch.sqrt(sum(g.square().sum() for g in exact.values())))

    def update(learner: Learner) -> UpdateStats:
        for batch in batches:
            learner.accumulate(batch)
        return learner.update(16 * MAX_NEW)

    for scale in (1.0, 2.0**10):
        learner = learner_of(copy.deepcopy(tiny), objective(), precision="fp16_mixed")
        learner.loss_scale = LossScale(scale, dynamic=True)
        stats = update(learner)
        assert stats.grad_norm == pytest.approx(norm, rel=5e-3) and not stats.skipped
        assert next(learner.model.parameters()).dtype == torch.float16
    before = {name: master.clone() for name, master in learner.masters.items()}
    learner.loss_scale = LossScale(2.0**30, 7, dynamic=True)
    stats = update(learner)
    assert stats.skipped and stats.finite
    assert all(torch.equal(before[name], master) for name, master in learner.masters.items())
    assert learner.loss_scale == LossScale(2.0**29, 0, dynamic=True)
    fresh = learner_of(tiny, objective(), precision="fp16_mixed")
    fresh.restore(copy.deepcopy(learner.snapshot(2)))
    assert fresh.loss_scale == learner.loss_scale
    assert LossScale(2.0**-16, dynamic=True).is_least and LossScale().is_least
    assert LossScale(4.0, PATIENCE - 1, dynamic=True).after(True) == LossScale(8.0, 0, dynamic=True)


def test_beta_zero_loads_no_reference_model(tiny: Any) -> None:
    assert learner_of(copy.deepcopy(tiny), objective(beta=0.0)).reference is None
    learner = learner_of(tiny, objective(beta=0.04))
    assert learner.reference is not None
    assert not any(p.requires_grad for p in learner.reference.parameters())
    assert learner.reference.model.lm_head.weight.data_ptr() != learner.model.lm_head.weight.data_ptr()


def test_two_scorings_are_identical_and_dropout_is_refused(tiny: Any) -> None:
    learner = learner_of(tiny, objective())
    (batch,) = batches_of(make_groups(LENGTHS, PROMPTS), 1000, "constant")
    assert torch.equal(learner.logprobs(batch), learner.logprobs(batch))
    tiny.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(UserError, match=r"dropout 0\.1"):
        check_dropout(tiny)


def test_gradient_checkpointing_changes_nothing(tiny: Any) -> None:
    groups = make_groups(LENGTHS, PROMPTS)
    one = learner_of(copy.deepcopy(tiny), objective())
    two = Learner(tiny, objective(), setting(), Forward(VOCABULARY, gradient_checkpointing=True))
    batches = batches_of(groups, 1000, "constant")
    expected = learner_gradient(one, batches, groups, "constant")
    assert_close(learner_gradient(two, batches, groups, "constant"), expected)


def test_snapshot_restores_bit_by_bit(tiny: Any, tiny_folder: Any) -> None:
    groups = make_groups(LENGTHS, PROMPTS)
    batches = batches_of(groups, 1000, "constant")

    def advance(learner: Learner, updates: int) -> None:
        for _ in range(updates):
            for batch in batches:
                learner.accumulate(batch)
            learner.update(100.0)

    whole = learner_of(copy.deepcopy(tiny), objective(), precision="bf16_mixed", schedule="linear")
    advance(whole, 4)
    half = learner_of(copy.deepcopy(tiny), objective(), precision="bf16_mixed", schedule="linear")
    advance(half, 2)
    snapshot = copy.deepcopy(half.snapshot(2))
    fresh = learner_of(tiny, objective(), precision="bf16_mixed", schedule="linear")
    fresh.restore(snapshot)
    advance(fresh, 2)
    assert all(torch.equal(whole.masters[n], m) for n, m in fresh.masters.items())
    assert fresh.updates == 4


def test_preflight_takes_the_largest_micro_batch_and_leaves_no_trace(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learner_of(tiny, objective())
    before = {n: p.detach().clone() for n, p in learner.model.named_parameters()}
    packer = Packer(200, "constant", keep_for_kl=False)
    largest = largest_micro_batch(20, 30, 4, packer)
    assert largest.tokens == 200 and list(packer.flush()) == []  # 136 of a group, 20 + 29 + 15 of a second
    for budget, tokens in (
        (160, 160),
        (150, 136),
        (272, 272),
        (60, 49),
        (10, 49),
    ):  # a prompt alone is nothing
        assert largest_micro_batch(20, 30, 4, Packer(budget, "constant", keep_for_kl=False)).tokens == tokens
    learner.preflight(largest)
    assert learner.update(1.0).skipped and learner.take_sums() == {}
    assert all(torch.equal(before[n], p) for n, p in learner.model.named_parameters())

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(learner.policy, "forward", full)
    with pytest.raises(UserError, match="micro_batch_tokens"):
        learner.preflight(largest)


def test_nothing_counted_is_a_skipped_update(tiny: Any) -> None:
    """`filter.denominator=kept` with KL terms of dropped completions and none kept: no 0/0."""
    learner = learner_of(tiny, objective())
    for batch in batches_of(make_groups(LENGTHS, PROMPTS), 1000, "constant"):
        learner.accumulate(batch)
    assert learner.update(0.0).skipped
    assert all(torch.isfinite(p).all() for p in learner.model.parameters())


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_told(tiny: Any) -> None:
    learner = learner_of(tiny, objective())
    before = {n: p.detach().clone() for n, p in learner.model.named_parameters()}
    for batch in batches_of(make_groups(LENGTHS, PROMPTS), 1000, "constant"):
        learner.accumulate(batch)
    learner.gradients["model.norm.weight"][0] = float("nan")
    stats = learner.update(100.0)
    assert stats.skipped and not stats.finite
    assert all(torch.equal(before[n], p) for n, p in learner.model.named_parameters())
