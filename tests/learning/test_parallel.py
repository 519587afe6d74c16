"""Three ranks against one: gradients, weights, metrics, and what happens when they fall apart.

The ranks are real processes, started once for the whole file.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dash_exp.learning import losses
from dash_exp.learning.distributed.communicator import Coordinator
from dash_exp.learning.distributed.launch import start_workers
from dash_exp.learning.distributed.learner import DistributedLearner, compare
from dash_exp.learning.packing import Packer
from dash_exp.learning.rounds import RoundLearner, Rounds
from dash_exp.learning.settings import Adapters, Forward, LearnerSpec, Objective, UpdateStats
from dash_exp.train.build import make_learner
from dash_exp.train.loop import mini_batches, repeated_updates
from dash_exp.types import AdvantagedGroup
from tests.conftest import make_groups
from tests.learning.reference import MAX_NEW, VOCABULARY
from tests.learning.test_learner import LENGTHS, OBJECTIVES, PROMPTS, objective, setting
from tests.test_updates import context, parts_of, plan_of

RANKS = 3
KEPT = {
    "all": [(True,) * 4] * 4,
    "some": [(True, False, True, True), (False,) * 4, (True, True, False, False), (False, False, True, True)],
    "one": [(False,) * 4, (False, False, True, False), (False,) * 4, (False,) * 4],
}
"""What a filter may leave: many samples for each rank, or one in all, and two ranks idle."""
TOLERANCE = 2e-5
"""Of the largest entry of each gradient: fp32 sums in another order."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    """Connections to real ranks; the learners they hold are built anew by each test."""
    made = start_workers(RANKS, 60.0, tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()
    assert all(worker.exit_reason() is not None for worker in made.workers.values())


def filtered(kept: list[tuple[bool, ...]]) -> list[AdvantagedGroup]:
    return [replace(g, kept=k) for g, k in zip(make_groups(LENGTHS, PROMPTS), kept, strict=True)]


def spec_of(folder: Path, goal: Objective, **changes: Any) -> LearnerSpec:
    """Adam's eps is large, so that an entry whose gradient is almost 0 does not turn rounding into a step."""
    chosen = setting(**{"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1, **changes})
    return LearnerSpec(folder, goal, chosen, Forward(VOCABULARY, 16), threads=1)


@dataclass
class Learned:
    """What came of some updates."""

    learner: RoundLearner
    gradients: list[dict[str, Tensor]]
    stats: list[UpdateStats]
    sums: dict[str, float]


def learn(
    spec: LearnerSpec,
    coordinator: Coordinator | None,
    groups: list[AdvantagedGroup],
    aggregation: str,
    updates: int = 2,
    max_tokens: int = 25,
) -> Learned:
    """Updates on the same batch, as the loop makes them."""
    learner = make_learner(spec, coordinator)
    counted = [len(c.token_ids) for g in groups for c in g.group.completions]
    divisor = losses.denominator(counted, MAX_NEW, aggregation)
    gradients, stats = [], []
    for _ in range(updates):
        rounds = Rounds(Packer(max_tokens, aggregation, keep_for_kl=False), learner.width)
        for ready in [one for g in groups for one in rounds.add(g)] + list(rounds.flush()):
            learner.accumulate(ready, learner.reference_logprobs(ready))
        stats.append(learner.update(divisor))
        gradients.append({name: g.clone() for name, g in learner.local.gradients.items()})
    return Learned(learner, gradients, stats, learner.take_sums())


def assert_equal(several: Learned, one: Learned) -> None:
    """To rounding; and to the bit between the ranks."""
    for found, expected in zip(several.stats, one.stats, strict=True):
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        assert (found.lr, found.beta, found.skipped) == (expected.lr, expected.beta, expected.skipped)
    for found, expected in zip(several.gradients, one.gradients, strict=True):
        for name, value in expected.items():
            scale = float(value.abs().max()) + 1e-8
            assert float((found[name] - value).abs().max()) <= 10 * TOLERANCE * scale, name
    for name, value in one.learner.local.masters.items():
        assert torch.allclose(several.learner.local.masters[name], value, atol=2e-6), name
    assert several.sums.keys() - {"update/reduce_s"} == one.sums.keys()
    counts = ("tokens", "completions")
    for name, value in one.sums.items():
        if not name.endswith("computed"):  # a prompt that two ranks share is computed by both
            exact = name.endswith(counts)
            assert several.sums[name] == (value if exact else pytest.approx(value, rel=1e-4, abs=1e-4)), name
    assert isinstance(several.learner, DistributedLearner)
    several.learner.check_equal()


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize(("surrogate", "aggregation", "beta"), OBJECTIVES[::3])
def test_ranks_make_the_update_of_one_process(
    ranks: Coordinator, tiny_folder: Path, surrogate: str, aggregation: str, beta: float, kept: str
) -> None:
    spec = spec_of(tiny_folder, objective(surrogate, beta, 0.8))
    groups = filtered(KEPT[kept])
    one = learn(spec, None, groups, aggregation)
    assert not one.stats[0].skipped and one.stats[0].grad_norm > 0
    assert_equal(learn(spec, ranks, groups, aggregation), one)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16_mixed"},
        {"precision": "fp16_mixed"},
        {"max_grad_norm": 0.01},
        {"adapters": Adapters(4, 8.0, (), 7)},
        {"freeze_embeddings": True},
    ],
    ids=lambda c: next(iter(c)),
)
def test_other_settings(ranks: Coordinator, tiny_folder: Path, changes: dict[str, Any]) -> None:
    """Masters apart from the weights, a clipped gradient, adapters drawn from a seed, fewer tensors."""
    spec = spec_of(tiny_folder, objective(beta=0.04), **changes)
    rough = "precision" in changes
    one = learn(spec, None, filtered(KEPT["some"]), "constant", updates=1 if rough else 2)
    several = learn(spec, ranks, filtered(KEPT["some"]), "constant", updates=1 if rough else 2)
    if not rough:  # each forward of another cut is rounded to bf16 in another way
        assert_equal(several, one)
    assert isinstance(several.learner, DistributedLearner)
    several.learner.check_equal()
    assert several.stats[0].grad_norm == pytest.approx(one.stats[0].grad_norm, rel=0.05 if rough else 1e-4)


def test_nothing_kept_moves_nothing_on_any_rank(ranks: Coordinator, tiny_folder: Path) -> None:
    """To the bit, not even by momentum or weight decay; the update counts on every rank."""
    spec = spec_of(tiny_folder, objective(), schedule="linear")
    learner = learn(spec, ranks, filtered(KEPT["all"]), "constant", updates=1).learner
    before = learner._all("checksums", None)
    rounds = Rounds(Packer(25, "constant", keep_for_kl=False), RANKS)
    nothing = filtered([(False,) * 4] * 4)
    assert [one for g in nothing for one in rounds.add(g)] + list(rounds.flush()) == []
    stats = learner.update(100.0)
    assert stats.skipped and stats.lr == pytest.approx(1e-2 * 9 / 10)
    assert learner._all("checksums", None) == before
    assert learner.update(100.0).lr == pytest.approx(1e-2 * 8 / 10)


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(
    ranks: Coordinator, tiny_folder: Path
) -> None:
    learner = DistributedLearner(spec_of(tiny_folder, objective()), ranks)
    before = learner._all("checksums", None)
    groups = filtered(KEPT["all"])
    groups[3] = replace(groups[3], advantages=(float("inf"),) * 4)
    rounds = Rounds(Packer(25, "constant", keep_for_kl=False), RANKS)
    (ready, *_) = [one for g in reversed(groups) for one in rounds.add(g)] + list(rounds.flush())
    learner.accumulate(ready, learner.reference_logprobs(ready))
    stats = learner.update(100.0)
    assert stats.skipped and not stats.finite
    assert learner._all("checksums", None) == before


@pytest.mark.parametrize(("passes", "prompts_per_update", "beta"), [(3, 4, 0.0), (1, 1, 0.04), (2, 2, 0.04)])
def test_several_updates_of_a_batch(
    ranks: Coordinator, tiny_folder: Path, passes: int, prompts_per_update: int, beta: float
) -> None:
    """PPO-Multi and PPO-Mini: old and reference log-probabilities travel with their micro-batch."""
    plan = plan_of(passes, prompts_per_update, "constant")
    spec = spec_of(tiny_folder, Objective("clipped", 0.2, 0.2, beta, "constant", "k3", 0.9))
    found = []
    for chosen in (ranks, None):
        learner = make_learner(spec, chosen)
        parts = replace(parts_of(learner.local, "constant"), learner=learner)
        run = context(plan, parts)
        stats = repeated_updates(run, mini_batches(run, filtered(KEPT["some"])))
        found.append(Learned(learner, [], stats, learner.take_sums()))
    assert any(s.skipped for s in found[0].stats) == (prompts_per_update == 1)
    assert found[0].sums["later/ratio"] != found[0].sums["later/tokens"]
    assert_equal(*found)


def test_state_goes_from_rank_0_to_all(ranks: Coordinator, tiny_folder: Path) -> None:
    """Moments and counters too: the next update is that of a run that was never interrupted, to the bit."""
    spec = spec_of(tiny_folder, objective(beta=0.04), precision="bf16_mixed", schedule="linear")
    groups = filtered(KEPT["some"])

    def advance(learner: RoundLearner) -> UpdateStats:
        rounds = Rounds(Packer(25, "constant", keep_for_kl=False), RANKS)
        for ready in [one for g in groups for one in rounds.add(g)] + list(rounds.flush()):
            learner.accumulate(ready, learner.reference_logprobs(ready))
        return learner.update(100.0)

    whole = learn(spec, ranks, groups, "constant").learner
    snapshot = copy.deepcopy(whole.snapshot(2))
    stats, expected = advance(whole), whole.local.masters
    fresh = DistributedLearner(spec, ranks)
    fresh.restore(snapshot)
    assert repr(advance(fresh)) == repr(stats)
    assert all(torch.equal(expected[name], m) for name, m in fresh.local.masters.items())
    fresh.check_equal()


def test_ranks_with_different_weights_are_found_out(ranks: Coordinator, tiny_folder: Path) -> None:
    learner = DistributedLearner(spec_of(tiny_folder, objective()), ranks)
    with torch.no_grad():
        learner.local.model.model.norm.weight[0] += 1e-3
    with pytest.raises(RuntimeError, match=r"ranks 0 and 1 hold different weights: 1 tensors of \d+.*norm"):
        learner.snapshot(1)


def test_ranks_that_loaded_other_weights_are_found_out() -> None:
    compare([{"a": "1", "b": "2"}, {"a": "1", "b": "2"}])
    with pytest.raises(RuntimeError, match=r"ranks 0 and 1 hold different weights: 1 tensors of 2.* b$"):
        compare([{"a": "1", "b": "2"}, {"a": "1", "b": "3"}])


def test_ranks_with_different_updates_are_found_out(ranks: Coordinator, tiny_folder: Path) -> None:
    learner = DistributedLearner(spec_of(tiny_folder, objective()), ranks)
    learner.local.updates = 5
    learner.local.optimization = replace(learner.local.optimization, lr=1.0)
    with pytest.raises(RuntimeError, match="ranks made different updates"):
        learner.update(100.0)


def test_preflight_on_every_rank(ranks: Coordinator, tiny_folder: Path) -> None:
    learner = DistributedLearner(spec_of(tiny_folder, objective()), ranks)
    rounds = Rounds(Packer(1000, "constant", keep_for_kl=False), 1)
    (ready,) = [*(one for g in filtered(KEPT["all"]) for one in rounds.add(g)), *rounds.flush()]
    learner.preflight(ready[0])
    assert learner.take_sums() == {}
    assert learner.update(1.0).skipped
