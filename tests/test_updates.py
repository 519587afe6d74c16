"""Several updates on one batch, and demonstrations, against a plain loop with torch's own AdamW."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch

from dash_exp.config.schema import BASELINES
from dash_exp.learning.advantages import batch_advantages
from dash_exp.learning.filters import make_filter
from dash_exp.learning.learner import Learner
from dash_exp.learning.packing import Packer
from dash_exp.learning.rounds import LocalLearner
from dash_exp.learning.settings import Forward, Objective, Optimization, UpdateStats
from dash_exp.record.folder import Recorder
from dash_exp.record.ledger import Ledger
from dash_exp.record.metrics import BatchFacts, batch_values, learner_values
from dash_exp.train.loop import (
    StepContext,
    checkpoint_due,
    compute_advantages,
    demonstrated,
    mini_batches,
    repeated_updates,
)
from dash_exp.train.parts import Parts, Plan
from dash_exp.types import AdvantagedGroup, Completion, Decoding, Group, Prompt, Request, Score, ScoredGroup
from tests.conftest import make_groups
from tests.learning.reference import MAX_NEW, VOCABULARY, old_logprobs, reference_gradient

LENGTHS = [[3, 5, 1, 4], [2, 2, 6, 1], [4, 1, 1, 3], [1, 7, 2, 2]]
PROMPTS = [6, 3, 9, 4]


class NoRecord:
    """Takes events and forgets them."""

    def event(self, kind: str, start: float, end: float, **more: Any) -> None:
        pass


def optimization(**changes: Any) -> Optimization:
    values: dict[str, Any] = {
        "lr": 1e-3,
        "schedule": "linear",
        "warmup_share": 0.0,
        "total_updates": 6,
        "weight_decay": 0.1,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "max_grad_norm": 0.05,
        "precision": "fp32",
        "freeze_embeddings": False,
    }
    return Optimization(**{**values, **changes})


def parts_of(learner: Learner | None, aggregation: str, max_tokens: int = 25, **more: Any) -> Parts:
    values: dict[str, Any] = {
        "chooser": None,
        "sampler": None,
        "decoding": Decoding(MAX_NEW, 1.0, (1,)),
        "judges": {},
        "advantages": tuple,
        "filter": make_filter("none"),
        "demonstrations": None,
        "packer": Packer(max_tokens, aggregation, keep_for_kl=False),
        "learner": None if learner is None else LocalLearner(learner),
    }
    return Parts(**{**values, **more})


def context(plan: Plan, parts: Parts, record: Any = None) -> StepContext:
    """The first step, with nothing recorded."""
    return StepContext(plan, parts, Ledger(), cast(Recorder, record or NoRecord()), 1)


def plan_of(passes: int, prompts_per_update: int, aggregation: str) -> Plan:
    return Plan(
        seed=0,
        steps=1,
        prompts_per_step=4,
        group_size=4,
        prompts_per_call=4,
        servers=1,
        waves=None,
        streaming=False,
        in_prompt_order=True,
        batch_wide=False,
        passes=passes,
        prompts_per_update=prompts_per_update,
        aggregation=aggregation,
        denominator="all",
        refill=0,
        overlong_share=0.0,
        mask_truncated=False,
        evaluate_every=0,
        checkpoint_every=0,
        checkpoint_s=None,
        budget=None,
    )


def ours(
    model: Any, groups: list[AdvantagedGroup], goal: Objective, plan: Plan
) -> tuple[Learner, list[UpdateStats]]:
    learner = Learner(model, goal, optimization(), Forward(VOCABULARY, 16))
    run = context(plan, parts_of(learner, plan.aggregation))
    arrived = [groups[i] for i in (2, 0, 3, 1)]  # finished in another order
    return learner, repeated_updates(run, mini_batches(run, arrived))


def theirs(
    model: Any, frozen: Any, groups: list[AdvantagedGroup], goal: Objective, plan: Plan
) -> list[float]:
    """The same updates, written as one would on paper; their gradient norms. Moves `model`."""
    setting = optimization()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=setting.lr,
        betas=setting.betas,
        eps=setting.eps,
        weight_decay=setting.weight_decay,
        foreach=False,
    )
    old = old_logprobs(model, groups, goal.temperature)
    size, number, norms = plan.prompts_per_update, 0, []
    for _ in range(plan.passes):
        for first in range(0, len(groups), size):
            gradient = reference_gradient(
                model, frozen, groups[first : first + size], goal, plan.aggregation, old
            )
            optimizer.param_groups[0]["lr"] = setting.lr * (6 - number) / 6
            number += 1
            if not any(any(g.kept) for g in groups[first : first + size]):
                continue
            for name, parameter in model.named_parameters():
                parameter.grad = gradient[name]
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), setting.max_grad_norm)))
            optimizer.step()
    return norms


@pytest.mark.parametrize(
    ("passes", "prompts_per_update", "beta", "aggregation"),
    [
        (3, 4, 0.0, "constant"),
        (3, 4, 0.04, "sequence_mean"),
        (1, 1, 0.04, "token_mean"),
        (1, 2, 0.0, "sequence_mean"),
        (2, 2, 0.0, "token_mean"),
        (2, 2, 0.04, "constant"),
    ],
)
def test_repeated_updates_equal_a_plain_loop(
    tiny: Any, plain: Any, passes: int, prompts_per_update: int, beta: float, aggregation: str
) -> None:
    goal = Objective("clipped", 0.2, 0.2, beta, "constant", "k3", 0.9)
    plan = plan_of(passes, prompts_per_update, aggregation)
    groups = make_groups(LENGTHS, PROMPTS, kept=0.8)
    learner, done = ours(tiny, groups, goal, plan)
    moved = copy.deepcopy(plain)
    norms = theirs(moved, plain, groups, goal, plan)
    assert len(done) == plan.updates_per_batch == passes * 4 // prompts_per_update
    assert [u.grad_norm for u in done if not u.skipped] == pytest.approx(norms, rel=2e-3)
    expected = dict(moved.named_parameters())
    for name, value in learner.model.named_parameters():
        assert torch.allclose(value, expected[name], atol=2e-4), name


def test_a_falling_beta_weighs_the_kl_term(tiny: Any, plain: Any) -> None:
    """At update 3 of 6 half of it is left."""
    groups = make_groups(LENGTHS, PROMPTS)
    goal = Objective("policy_gradient", 0.2, 0.2, 0.5, "linear", "k3", 1.0)
    moved = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.02
    learner = Learner(tiny, goal, optimization(), Forward(VOCABULARY, 16))
    learner.model.load_state_dict(moved.state_dict())
    learner.updates = 3
    packer = Packer(1000, "constant", keep_for_kl=False)
    for batch in [b for g in groups for b in packer.add(g)] + list(packer.flush()):
        learner.accumulate(batch, learner.reference_logprobs(batch))
    expected = reference_gradient(moved, plain, groups, replace(goal, beta=0.25), "constant")
    for name, value in expected.items():
        assert torch.allclose(learner.gradients[name] / (16 * MAX_NEW), value, atol=2e-5), name


def test_an_emptied_mini_batch_is_a_counted_skipped_update(tiny: Any) -> None:
    groups = make_groups(LENGTHS, PROMPTS)
    groups[1] = replace(groups[1], kept=(False,) * 4)
    goal = Objective("clipped", 0.2, 0.2, 0.0, "constant", "k3", 1.0)
    learner, done = ours(tiny, groups, goal, plan_of(1, 1, "constant"))
    assert [u.skipped for u in done] == [False, True, False, False]
    assert learner.updates == 4
    row = learner_values(BatchFacts(tuple(groups), tuple(done), learner.take_sums(), learner.updates))
    assert (row["updates"], row["updates/skipped"], row["updates/total"]) == (3, 1, 4)


def test_only_the_first_mini_batch_meets_the_sampling_weights(tiny: Any) -> None:
    """Its log-probabilities serve as its old ones; the other three are forwarded once more, before."""
    groups = make_groups(LENGTHS, PROMPTS)
    goal = Objective("clipped", 0.2, 0.2, 0.0, "constant", "k3", 1.0)
    learner, done = ours(tiny, groups, goal, plan_of(1, 1, "constant"))
    sums = learner.take_sums()
    tokens = [sum(own) for own in LENGTHS]
    assert sums["first/tokens"] == tokens[0]
    assert sums["scored/tokens"] == sums["later/tokens"] == sum(tokens[1:])
    assert sums["first/ratio"] == tokens[0]  # exactly 1 each
    assert sums["later/ratio"] != sum(tokens[1:])
    row = learner_values(BatchFacts(tuple(groups), tuple(done), sums, 4))
    assert row["tokens/backpropagated"] == sum(tokens)
    assert row["tokens/forwarded"] == sum(tokens) + sum(tokens[1:])


def test_one_pass_over_the_batch_forwards_nothing_twice(tiny: Any) -> None:
    goal = Objective("clipped", 0.2, 0.2, 0.0, "constant", "k3", 1.0)
    learner, _ = ours(tiny, make_groups(LENGTHS, PROMPTS), goal, plan_of(3, 4, "constant"))
    sums = learner.take_sums()
    assert "scored/tokens" not in sums
    assert sums["later/tokens"] == 2 * sums["first/tokens"]


def test_zero_learning_rate_keeps_every_ratio_at_one(tiny: Any) -> None:
    """The old log-probabilities come from the update's own packing: nothing but the weights can move
    the ratio."""
    groups = make_groups(LENGTHS, PROMPTS)
    goal = Objective("clipped", 1e-6, 1e-6, 0.0, "constant", "k3", 1.0)
    learner = Learner(tiny, goal, optimization(lr=0.0), Forward(VOCABULARY, 16))
    run = context(plan_of(3, 2, "constant"), parts_of(learner, "constant"))
    repeated_updates(run, mini_batches(run, groups))
    sums = learner.take_sums()
    assert sums["later/ratio"] == sums["later/tokens"]
    assert sums["later/clipped"] == 0


def test_sft_is_cross_entropy(tiny: Any, plain: Any) -> None:
    """Gradient and reported likelihood of a supervised batch, against transformers' own loss."""
    prompts = [(5, 6, 7), (8, 9), (10, 11, 12, 13)]
    targets = [(20, 21, 1), (22, 1), (23, 24, 25, 26, 1)]
    shown = {f"p{n}": Completion(t, (math.nan,) * len(t), "", "stop", 0) for n, t in enumerate(targets)}
    groups = [
        demonstrated(Request(n, Prompt(f"p{n}", "t", "", ids, ""), (0,)), shown)
        for n, ids in enumerate(prompts)
    ]
    goal = Objective("policy_gradient", 0.2, 0.2, 0.0, "constant", "k3", 1.0)
    learner = Learner(tiny, goal, optimization(), Forward(VOCABULARY, 16))
    packer = Packer(1000, "token_mean", keep_for_kl=False)
    for batch in [b for g in groups for b in packer.add(g)] + list(packer.flush()):
        learner.accumulate(batch)
    losses, counts = [], []
    for ids, target in zip(prompts, targets, strict=True):
        labels = torch.tensor([[-100] * len(ids) + list(target)])
        logits = plain(input_ids=torch.tensor([[*ids, *target]])).logits[:, :, :VOCABULARY]
        losses.append(
            torch.nn.functional.cross_entropy(
                logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum"
            )
        )
        counts.append(len(target))
    loss = torch.stack(losses).sum() / sum(counts)
    loss.backward()
    for name, parameter in plain.named_parameters():
        assert torch.allclose(learner.gradients[name] / sum(counts), parameter.grad, atol=1e-6), name
    sums = learner.take_sums()
    assert -sums["first/logprob"] / sums["first/tokens"] == pytest.approx(float(loss.detach()), rel=1e-5)


def scored(rewards: list[float]) -> ScoredGroup:
    completion = Completion((1,), (0.0,), "", "stop", 0)
    group = Group(0, Prompt("p", "t", "", (1,), ""), (completion,) * len(rewards))
    return ScoredGroup(group, tuple(Score(r, "wrong") for r in rewards))


def test_shaping_and_mask_change_rewards_and_loss_but_not_the_filter() -> None:
    """The penalty falls over the last 4 of 8 tokens. Three right answers, of 4, 8 (cut) and 6 tokens, have
    rewards of 1, 0 and 0.5, but the filter sees equal verdicts."""
    completions = tuple(
        Completion((1,) * n, (0.0,) * n, "", end, 0) for n, end in ((4, "stop"), (8, "length"), (6, "stop"))
    )
    group = Group(0, Prompt("p", "t", "", (1,), ""), completions)
    arm = partial(batch_advantages, baseline="group_mean", scale="none")
    plan = replace(plan_of(1, 4, "constant"), overlong_share=0.5, mask_truncated=True)

    def made(filter_name: str) -> AdvantagedGroup:
        parts = parts_of(None, "constant", advantages=arm, filter=make_filter(filter_name))
        right = ScoredGroup(group, (Score(1.0, "correct"),) * 3)
        return compute_advantages(context(plan, parts), [right])[0]

    assert made("zero_variance").kept == (False,) * 3
    kept = made("none")
    assert kept.advantages == pytest.approx((0.5, -0.5, 0.0)) and kept.penalties == (0.0, -1.0, -0.5)
    assert (kept.kept, kept.masked) == ((True, False, True), (False, True, False))
    values = batch_values(BatchFacts((kept,), (), {}, 0))
    assert values["completions/dropped_by_truncation"] == 1 and values["tokens/dropped_by_truncation"] == 8
    assert values["completions/dropped_by_filter"] == values["tokens/dropped_by_filter"] == 0
    assert values["reward/mean"] == 1.0 and values["reward/overlong_penalty"] == -0.5
    for keep_for_kl in (False, True):  # what is masked has no KL term either
        (batch,) = [*(packer := Packer(100, "constant", keep_for_kl)).add(kept), *packer.flush()]
        assert batch.lengths == (4, 6)


def test_a_filter_threshold_means_the_same_in_every_arm(tiny: Any) -> None:
    """One right among four: 1.5 and 0.5 standard deviations from the mean, however the arm scales."""
    for baseline, scale in itertools.product(BASELINES, ("none", "batch_std")):
        arm = partial(batch_advantages, baseline=baseline, scale=scale)
        parts = parts_of(None, "constant", advantages=arm, filter=make_filter("advantage", 0.6))
        (made,) = compute_advantages(
            context(plan_of(1, 4, "constant"), parts), [scored([1.0, 0.0, 0.0, 0.0])]
        )
        assert made.kept == (True, False, False, False), (baseline, scale)
        assert made.advantages == arm([[1.0, 0.0, 0.0, 0.0]])[0]


def test_a_checkpoint_is_due_by_steps_or_by_time() -> None:
    plan = replace(plan_of(1, 4, "constant"), steps=9, checkpoint_every=4, checkpoint_s=60.0)
    due = [
        (step, since)
        for step in range(1, 10)
        for since in (0.0, 59.9, 60.0)
        if checkpoint_due(plan, step, since)
    ]
    late = [(step, 60.0) for step in range(1, 10)]
    assert due == sorted({*late, *((step, since) for step in (4, 8, 9) for since in (0.0, 59.9))})
    assert not checkpoint_due(replace(plan, checkpoint_s=None), 1, 1e9)
