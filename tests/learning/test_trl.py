"""Gradients, advantages and penalties against TRL's own loss on the same batch (requirements/bench.txt)."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dash_exp.learning import losses
from dash_exp.learning.advantages import batch_advantages, overlong_penalty
from dash_exp.types import AdvantagedGroup
from tests.conftest import make_groups
from tests.learning.reference import MAX_NEW, entropies, old_logprobs, reference_logprobs
from tests.learning.test_learner import (
    LENGTHS,
    PROMPTS,
    assert_close,
    batches_of,
    learner_of,
    objective,
    perturbed,
)

pytestmark = pytest.mark.long

TOKEN, SEQUENCE = "token", "sequence"
CASES = [
    # surrogate, aggregation, objective, TRL's loss_type and level, its settings
    ("clipped", "sequence_mean", {"beta": 0.04}, "grpo", TOKEN),
    ("clipped", "constant", {}, "dr_grpo", TOKEN),
    ("clipped", "token_mean", {"clip_high": 0.28}, "dapo", TOKEN),
    ("clipped", "token_mean", {"clip_high": 2.0, "entropy": 0.05}, "bnpo", TOKEN),
    ("clipped_sequence", "sequence_mean", {"clip_low": 0.02, "clip_high": 0.03}, "grpo", SEQUENCE),
    ("clipped_weight", "token_mean", {"clip_low": 1.0, "clip_high": 0.1}, "cispo", TOKEN),
    *(
        (
            "clipped",
            "token_mean",
            {"correction": name, "correction_floor": 0.02, "correction_cap": 0.3},
            "dapo",
            TOKEN,
        )
        for name in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    ),
]


def padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def trl_loss(
    model: Any, frozen: Any, groups: list[AdvantagedGroup], goal: Any, kind: str, level: str
) -> Tensor:
    """GRPOTrainer's `_compute_loss` on these completions, padded; log-probabilities by transformers."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    places = [(g, i) for g in groups for i in range(len(g.kept))]
    old = old_logprobs(frozen, groups, goal.temperature)
    before = [old[g.group.position, i] for g, i in places]
    mask = padded([torch.ones(len(row)) for row in before])
    inputs = {
        "prompt_ids": torch.zeros(len(places), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(places), 1),
        "completion_ids": torch.zeros(mask.shape, dtype=torch.long),
        "completion_mask": mask,
        "advantages": torch.tensor([g.advantages[i] for g, i in places]),
        "old_per_token_logps": padded(before),
        "ref_per_token_logps": padded(before),
        "num_items_in_batch": mask.sum(),
    }
    if goal.correction != "none":
        sampled = padded([torch.tensor(g.group.completions[i].logprobs) for g, i in places])
        difference = (inputs["old_per_token_logps"] - sampled) * mask
        if goal.correction.startswith(SEQUENCE):
            difference = difference.sum(-1, keepdim=True)
        ratio, low, high = difference.exp(), goal.correction_floor, goal.correction_cap
        if goal.correction.endswith("truncate"):
            ratio = ratio.clamp(low, high)
        else:
            ratio = ratio.masked_fill((ratio < low) | (ratio > high), 0.0)
        inputs["importance_sampling_ratio"] = ratio
    now = padded([reference_logprobs(model, g, i, goal.temperature) for g, i in places])
    entropy = padded([entropies(model, g, i, goal.temperature) for g, i in places])
    like = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (now, entropy, None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=goal.beta,
        loss_type=kind,
        epsilon_low=goal.clip_low,
        epsilon_high=goal.clip_high + (kind == "cispo"),  # there it is the bound itself
        use_vllm=goal.correction != "none",
        vllm_importance_sampling_correction=True,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_NEW,
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        steps_per_generation=1,
        _entropy_bonus_enabled=goal.entropy > 0,
        use_adaptive_entropy=False,
        entropy_coef=goal.entropy,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    loss: Tensor = trainer._compute_loss(like, model, inputs)
    return loss


@pytest.mark.parametrize(("surrogate", "aggregation", "more", "kind", "level"), CASES)
def test_gradient_is_that_of_trl(
    tiny: Any, plain: Any, surrogate: str, aggregation: str, more: dict[str, Any], kind: str, level: str
) -> None:
    """Off-policy, so that ratios and clips count; within 1e-5 of the largest entry of each tensor."""
    pytest.importorskip("trl")
    goal = replace(objective(surrogate, temperature=0.8), **more)
    groups = make_groups(LENGTHS, PROMPTS)
    old = old_logprobs(plain, groups, 0.8)
    model = perturbed(copy.deepcopy(plain))
    trl_loss(model, plain, groups, goal, kind, level).backward()
    learner = learner_of(tiny, goal, chunk=7)
    perturbed(learner.model)
    for batch in batches_of(groups, 40, aggregation):
        before = [old[p.source.group.position, i] for p in batch.pieces for i in p.indices]
        learner.accumulate(batch, learner.reference_logprobs(batch), torch.cat(before))
    lengths = [len(c.token_ids) for g in groups for c in g.group.completions]
    divisor = losses.denominator(lengths, MAX_NEW, aggregation)
    actual = {name: gradient / divisor for name, gradient in learner.gradients.items()}
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_close(actual, expected, tolerance=1e-5)


def test_penalty_is_that_of_trl() -> None:
    rewards = pytest.importorskip("trl.rewards")
    theirs = rewards.get_soft_overlong_punishment(100, 20)
    lengths = range(1, 103)
    assert theirs(completion_ids=[[0] * n for n in lengths]) == pytest.approx(
        [overlong_penalty(n, 100, 0.2) for n in lengths]
    )


@pytest.mark.parametrize(("scale", "name"), [("std", "group"), ("batch_std", "batch"), ("none", "none")])
def test_advantages_are_those_of_trl(scale: str, name: str) -> None:
    """With the trainer's `nanstd`, as its `_generate_and_score_completions` does (`scale_rewards`)."""
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    rows = [[1.0, 0.0, 0.0, 0.5], [1.0, 1.0, 0.0, 0.25]]
    rewards = torch.tensor(rows, dtype=torch.float64)
    std = {"group": nanstd(rewards, dim=1)[:, None], "batch": nanstd(rewards), "none": 1.0 - 1e-4}[name]
    expected = (rewards - rewards.mean(1, keepdim=True)) / (std + 1e-4)
    actual = batch_advantages(rows, baseline="group_mean", scale=scale)
    assert torch.allclose(torch.tensor(actual, dtype=torch.float64), expected)
