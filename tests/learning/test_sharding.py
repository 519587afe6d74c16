"""Three ranks that hold a part of everything each, against one that holds all: gradients, weights, state.

The ranks are real processes, started once for the whole file.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from dash_exp.config.compose import compose
from dash_exp.config.schema import changed
from dash_exp.learning.distributed.communicator import Coordinator
from dash_exp.learning.distributed.launch import start_workers
from dash_exp.learning.distributed.learner import in_parts
from dash_exp.learning.packing import Packer
from dash_exp.learning.rounds import RoundLearner, Rounds
from dash_exp.learning.settings import LearnerSpec, Objective, UpdateStats
from dash_exp.modeling.attention import ATTENTION
from dash_exp.modeling.source import load_computing, load_model
from dash_exp.record import checkpoint
from dash_exp.record.checkpoint import Snapshot
from dash_exp.record.identity import cell_of, described
from dash_exp.sampling.hf import HFSampler
from dash_exp.train.build import make_learner, model_to_sample
from dash_exp.train.loop import mini_batches, repeated_updates
from dash_exp.types import AdvantagedGroup
from tests.learning.test_learner import objective
from tests.learning.test_parallel import KEPT, TOLERANCE, Learned, filtered, learn, spec_of
from tests.test_updates import context, parts_of, plan_of

RANKS = 3
"""64 rows of a tensor make 22 + 22 + 20."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    made = start_workers(RANKS, 60.0, tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()
    assert not torch.distributed.is_initialized()


def shards(spec: LearnerSpec) -> LearnerSpec:
    return replace(spec, sharding="fsdp")


def assert_same(found: Snapshot, expected: Snapshot, tolerance: float) -> None:
    """Weights to `tolerance`; moments relative to the largest entry of each, so gradients too."""
    assert found.weights.keys() == expected.weights.keys()
    assert found.optimizer.keys() == expected.optimizer.keys()
    for name, value in expected.weights.items():
        assert found.weights[name].shape == value.shape and found.weights[name].dtype == value.dtype
        assert torch.allclose(found.weights[name], value, rtol=0, atol=tolerance), name
    for name, value in expected.optimizer.items():
        scale = float(value.abs().max()) + 1e-12
        assert float((found.optimizer[name] - value).abs().max()) <= 20 * TOLERANCE * scale, name
    assert found.state == expected.state


def assert_equal(several: Learned, one: Learned, tolerance: float = 2e-6) -> None:
    for found, expected in zip(several.stats, one.stats, strict=True):
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        assert (found.lr, found.beta, found.skipped) == (expected.lr, expected.beta, expected.skipped)
    assert_same(several.learner.snapshot(1), one.learner.snapshot(1), tolerance)
    counts = ("tokens", "completions")
    assert several.sums.keys() == one.sums.keys()
    for name, value in one.sums.items():
        if not name.endswith("computed"):
            exact = name.endswith(counts)
            assert several.sums[name] == (value if exact else pytest.approx(value, rel=1e-4, abs=1e-4)), name


@pytest.mark.parametrize("kept", ["some", "one"])
@pytest.mark.parametrize(
    ("surrogate", "aggregation", "beta"),
    [
        ("policy_gradient", "constant", 0.04),
        ("clipped", "token_mean", 0.0),
        ("clipped", "sequence_mean", 0.04),
    ],
)
def test_shards_make_the_update_of_one_process(
    ranks: Coordinator, tiny_folder: Path, surrogate: str, aggregation: str, beta: float, kept: str
) -> None:
    """After one update the first moment is (1 - beta1) times the gradient; after two everything has moved."""
    spec = spec_of(tiny_folder, objective(surrogate, beta, 0.8))
    groups = filtered(KEPT[kept])
    for updates in (1, 2):
        one = learn(spec, None, groups, aggregation, updates)
        assert not one.stats[0].skipped and one.stats[0].grad_norm > 0
        assert_equal(learn(shards(spec), ranks, groups, aggregation, updates), one)


@pytest.mark.parametrize(
    "changes", [{"max_grad_norm": 0.01}, {"freeze_embeddings": True}], ids=lambda c: next(iter(c))
)
def test_other_settings(ranks: Coordinator, tiny_folder: Path, changes: dict[str, Any]) -> None:
    spec = spec_of(tiny_folder, objective(beta=0.04), **changes)
    one = learn(spec, None, filtered(KEPT["some"]), "constant")
    assert_equal(learn(shards(spec), ranks, filtered(KEPT["some"]), "constant"), one)


def test_gradient_checkpointing(ranks: Coordinator, tiny_folder: Path) -> None:
    spec = spec_of(tiny_folder, objective(beta=0.04))
    one = learn(spec, None, filtered(KEPT["some"]), "constant")
    saving = replace(shards(spec), forward=replace(spec.forward, gradient_checkpointing=True))
    assert_equal(learn(saving, ranks, filtered(KEPT["some"]), "constant"), one)


@pytest.mark.parametrize("freeze", [False, True], ids=["all", "embeddings frozen"])
def test_bf16_computes_with_rounded_masters(ranks: Coordinator, tiny_folder: Path, freeze: bool) -> None:
    """The same cut, all of it on one rank or a micro-batch on each: every forward and backward is rounded
    alike, and what is added is not, so equal but for the order of fp32 sums."""
    spec = spec_of(tiny_folder, objective(beta=0.04), precision="bf16_mixed", freeze_embeddings=freeze)
    found = []
    for chosen, how in ((None, spec), (ranks, shards(spec))):
        learner = make_learner(how, chosen)
        packer = Packer(16, "constant", keep_for_kl=False)
        cut = [b for g in filtered(KEPT["all"]) for b in packer.add(g)] + list(packer.flush())
        assert len(cut) > RANKS
        for first in range(0, len(cut), learner.width):
            ready = tuple(cut[first : first + learner.width])
            learner.accumulate(ready, learner.reference_logprobs(ready))
        stats = [learner.update(100.0)]
        found.append(Learned(learner, [], stats, learner.take_sums()))
    one, several = found
    assert_equal(several, one, tolerance=1e-6)
    rounded = {name: t.clone() for name, t in several.learner.compute_weights()}
    masters = several.learner.snapshot(1).weights
    assert rounded.keys() == masters.keys()
    assert all(torch.equal(rounded[name], masters[name].bfloat16()) for name in masters)


def test_every_rank_holds_its_rows_only(ranks: Coordinator, tiny_folder: Path) -> None:
    learner = learn(
        shards(spec_of(tiny_folder, objective(beta=0.04))), ranks, filtered(KEPT["all"]), "constant", 1
    ).learner
    whole = dict(load_model(tiny_folder, torch.float32, ATTENTION).named_parameters())
    local = learner.local
    (batch, *_) = [*(packer := Packer(99, "constant", False)).add(filtered(KEPT["all"])[0]), *packer.flush()]
    learner.reference_logprobs((batch,))  # nor is anything left whole after a forward alone
    learner.logprobs((batch,))
    assert local.masters.keys() == whole.keys()
    for name, master in local.masters.items():
        rows = -(-len(whole[name]) // RANKS)
        state = local.optimizer.state[master]
        for held in (master, local.gradients[name], state["exp_avg"], state["exp_avg_sq"]):
            assert held.shape == (rows, *whole[name].shape[1:]), name
    assert local.reference is not None
    for scorer in (local.policy, local.reference):
        held = sum(p.to_local().numel() for p in scorer.parameters())
        assert held <= sum(-(-len(p) // RANKS) * p[0].numel() for p in whole.values())


def test_nothing_kept_moves_nothing(ranks: Coordinator, tiny_folder: Path) -> None:
    learner = learn(
        shards(spec_of(tiny_folder, objective())), ranks, filtered(KEPT["all"]), "constant", 1
    ).learner
    before = copy.deepcopy(learner.snapshot(1))
    stats = learner.update(100.0)
    assert stats.skipped
    after = learner.snapshot(1)
    assert all(torch.equal(before.weights[name], t) for name, t in after.weights.items())
    assert all(torch.equal(before.optimizer[name], t) for name, t in after.optimizer.items())


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(
    ranks: Coordinator, tiny_folder: Path
) -> None:
    learner = make_learner(shards(spec_of(tiny_folder, objective())), ranks)
    before = copy.deepcopy(learner.snapshot(1))
    groups = filtered(KEPT["all"])
    groups[3] = replace(groups[3], advantages=(float("inf"),) * 4)
    rounds = Rounds(Packer(25, "constant", keep_for_kl=False), RANKS)
    (ready, *_) = [one for g in reversed(groups) for one in rounds.add(g)] + list(rounds.flush())
    learner.accumulate(ready, learner.reference_logprobs(ready))
    stats = learner.update(100.0)
    assert stats.skipped and not stats.finite
    after = learner.snapshot(1)
    assert all(torch.equal(before.weights[name], t) for name, t in after.weights.items())


def test_several_updates_of_a_batch(ranks: Coordinator, tiny_folder: Path) -> None:
    """PPO-Mini: a mini-batch that the filter has emptied; ranks without work in forwards alone, too."""
    plan = plan_of(2, 1, "constant")
    spec = spec_of(tiny_folder, Objective("clipped", 0.2, 0.2, 0.04, "constant", "k3", 0.9))
    found = []
    for chosen, how in ((ranks, shards(spec)), (None, spec)):
        learner = make_learner(how, chosen)
        parts = replace(parts_of(learner.local, "constant"), learner=learner)
        run = context(plan, parts)
        stats = repeated_updates(run, mini_batches(run, filtered(KEPT["some"])))
        found.append(Learned(learner, [], stats, learner.take_sums()))
    assert any(s.skipped for s in found[0].stats)
    assert_equal(*found)


def advance(learner: RoundLearner, groups: list[AdvantagedGroup]) -> UpdateStats:
    rounds = Rounds(Packer(25, "constant", keep_for_kl=False), learner.width)
    for ready in [one for g in groups for one in rounds.add(g)] + list(rounds.flush()):
        learner.accumulate(ready, learner.reference_logprobs(ready))
    return learner.update(100.0)


def test_state_goes_to_any_sharding(ranks: Coordinator, tiny_folder: Path, tmp_path: Path) -> None:
    """Written by shards, read by one process and by shards, and back again: the same bits; the next update is
    that of a run that was never interrupted, to the bit where it is made in the same way."""
    spec, groups = spec_of(tiny_folder, objective(beta=0.04), schedule="linear"), filtered(KEPT["some"])
    whole = learn(shards(spec), ranks, groups, "constant").learner
    folder = checkpoint.save(tmp_path, 2, whole.snapshot(2, row={"step": 2}), tiny_folder)
    written = checkpoint.load(folder)
    stats, expected = advance(whole, groups), copy.deepcopy(whole.snapshot(3))
    for chosen, how in ((None, spec), (ranks, shards(spec))):
        fresh = make_learner(how, chosen)
        fresh.restore(written)
        read = fresh.snapshot(2, row={"step": 2})
        assert all(torch.equal(t, written.weights[n]) for n, t in read.weights.items())
        assert all(torch.equal(t, written.optimizer[n]) for n, t in read.optimizer.items())
        assert read.state == written.state and read.optimizer.keys() == written.optimizer.keys()
        found = advance(fresh, groups)
        assert found.grad_norm == pytest.approx(stats.grad_norm, rel=1e-4)
        assert_same(fresh.snapshot(3), expected, tolerance=2e-6)
    assert repr(found) == repr(stats)
    assert all(torch.equal(t, expected.weights[n]) for n, t in fresh.snapshot(3).weights.items())


def test_a_checkpoint_is_a_whole_folder(ranks: Coordinator, tiny_folder: Path, tmp_path: Path) -> None:
    learner = make_learner(shards(spec_of(tiny_folder, objective())), ranks)
    folder = checkpoint.save(tmp_path, 0, learner.snapshot(0), tiny_folder)
    assert checkpoint.damage(folder) is None
    found, expected = (load_model(f, torch.float32, ATTENTION) for f in (folder, tiny_folder))
    for (name, value), (_, other) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(value, other), name


def test_weights_for_samplers_are_whole_and_taken_as_one_likes(ranks: Coordinator, tiny_folder: Path) -> None:
    """Some at a time, and a consumer that stops early leaves nobody waiting."""
    spec = shards(spec_of(tiny_folder, objective(), precision="bf16_mixed"))
    learner = make_learner(spec, ranks)
    assert len(list(islice(learner.compute_weights(), 2))) == 2
    expected = dict(load_computing(tiny_folder, "bf16_mixed", ATTENTION).named_parameters())
    found = dict(learner.compute_weights())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    some = list(in_parts(learner.local.weights, size=5000))
    assert [name for names in some for name in names] == list(expected) and len(some) > 3


def test_the_sampler_in_this_process_has_a_copy(ranks: Coordinator, tiny_folder: Path) -> None:
    """It begins as the learner does, and follows when it is told to."""
    config = compose(["model=tiny", "learner.ranks=3", "learner.sharding=fsdp", "paths.data=null"])
    spec = shards(spec_of(tiny_folder, objective(), precision="bf16_mixed"))
    learner = make_learner(spec, ranks)
    model = model_to_sample(config, learner, tiny_folder)
    sampler = HFSampler(model, str, vocabulary=100, max_sequences=64, weights=learner.compute_weights)

    def follows() -> bool:
        own = dict(model.named_parameters())
        return all(torch.equal(own[name], tensor) for name, tensor in learner.compute_weights())

    assert follows()
    advance(learner, filtered(KEPT["all"]))
    assert not follows()
    sampler.load_weights(1)
    assert follows() and sampler.policy_version == 1


def test_preflight_on_every_rank(ranks: Coordinator, tiny_folder: Path) -> None:
    learner = make_learner(shards(spec_of(tiny_folder, objective(beta=0.04))), ranks)
    rounds = Rounds(Packer(1000, "constant", keep_for_kl=False), 1)
    (ready,) = [*(one for g in filtered(KEPT["all"]) for one in rounds.add(g)), *rounds.flush()]
    learner.preflight(ready[0])
    assert learner.take_sums() == {}
    assert learner.update(1.0).skipped


def test_a_cell_without_shards_keeps_its_id(tmp_path: Path) -> None:
    """The key came later than many records."""
    config = compose(["model=tiny", "paths.data=null"])
    frozen, identity = described(config, tmp_path)
    before = {k: v for k, v in identity["learner"].items() if k != "sharding"}
    assert cell_of(frozen, identity).id == cell_of(frozen, {**identity, "learner": before}).id
    config = changed(config, {"learner.sharding": "fsdp"})
    assert cell_of(*described(config, tmp_path)).id != cell_of(frozen, identity).id
