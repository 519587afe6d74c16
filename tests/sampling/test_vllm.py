"""Real vLLM, in process, on the tiny model in fp32: the same distribution as the learner's."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dash_exp.learning.learner import Learner
from dash_exp.learning.packing import Packer, pack
from dash_exp.types import AdvantagedGroup, Decoding, Group, Score, ScoredGroup
from tests.learning.test_learner import objective, setting
from tests.sampling.test_hf import EOS, ask, by_position, nucleus_of, sampler_of

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own imports warn
]

SEEN = 90  # a vocabulary smaller than the model's 128 rows
FREE = Decoding(max_new_tokens=8, temperature=1.0, stop_ids=(EOS,))
GREEDY = dataclasses.replace(FREE, temperature=0.0)


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Iterator[Any]:
    """One engine for all tests, and the model whose weights it follows."""
    from dash_exp.modeling.attention import ATTENTION
    from dash_exp.modeling.source import load_model
    from dash_exp.sampling.vllm import parts as vllm_parts
    from dash_exp.sampling.vllm.engine import VLLMSampler

    # fewer tokens at once than the prompts of a test have: some wait, and none may be read in parts
    batched, vllm_parts.CPU_BATCHED_TOKENS = vllm_parts.CPU_BATCHED_TOKENS, 64
    threads = torch.get_num_threads()
    set_threads = torch.set_num_threads
    model = load_model(tiny_folder, torch.float32, ATTENTION)
    sampler = VLLMSampler(
        tiny_folder,
        model.named_parameters,
        vocabulary=SEEN,
        max_model_len=64,
        max_sequences=64,
        dtype="float32",
        kv_cache_gb=1,
        gpu_memory_utilization=0.5,
        enforce_eager=True,
    )
    vllm_parts.CPU_BATCHED_TOKENS = batched
    yield sampler, model
    sampler.close()
    torch.set_num_threads = set_threads  # vLLM on CPU replaces it
    torch.set_num_threads(threads)


def learner_gap(model: Any, groups: list[Group], temperature: float) -> torch.Tensor:
    """Learner's minus sampler's log-probability of every sampled token."""
    goal = objective(temperature=temperature)
    learner = Learner(model, goal, setting(), vocabulary=SEEN, logit_chunk=512)
    packer = Packer(10_000, "constant", keep_for_kl=False)
    for g in groups:
        n = len(g.completions)
        scored = ScoredGroup(g, (Score(0.0, "wrong"),) * n)
        assert list(packer.add(AdvantagedGroup(scored, (1.0,) * n, (True,) * n))) == []
    (batch,) = packer.flush()
    found = learner.logprobs(batch)
    return found - pack(batch, found.device).sampler_logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_the_learner_computes(engine: Any, temperature: float) -> None:
    sampler, model = engine
    decoding = dataclasses.replace(FREE, temperature=temperature)
    groups = list(sampler.stream(ask([5, 11, 3, 8]), decoding))
    gap = learner_gap(model, groups, temperature)
    assert gap.abs().mean() < 1e-3
    assert abs(float(gap.exp().mean()) - 1) < 0.02


def test_groups_are_whole_and_seeds_differ_and_repeat(engine: Any) -> None:
    sampler, _ = engine
    first = by_position(sampler.stream(ask([5, 11], repeats=6), FREE))
    again = by_position(sampler.stream(ask([5, 11], repeats=6), FREE))
    assert sorted(first) == [0, 1]
    for position, group in first.items():
        assert len(group.completions) == 6
        assert len({c.token_ids for c in group.completions}) > 3
        assert [c.token_ids for c in group.completions] == [c.token_ids for c in again[position].completions]


def test_greedy_equals_the_hf_sampler(engine: Any) -> None:
    sampler, model = engine
    requests = ask([5, 11, 3], repeats=1)
    ours = by_position(sampler_of(model, vocabulary=SEEN).stream(requests, GREEDY))
    theirs = by_position(sampler.stream(requests, GREEDY))
    for position, group in ours.items():
        (a,), (b,) = group.completions, theirs[position].completions
        assert a.token_ids == b.token_ids and a.finish_reason == b.finish_reason
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)


def test_top_p_draws_from_the_same_nucleus_as_the_hf_sampler(engine: Any) -> None:
    """Tokens and log-probabilities are those of the cut distribution, renormalised: one meaning in both
    engines. Tokens at the very edge may differ by rounding, and by ties, so the edge is left out."""
    sampler, model = engine
    decoding = dataclasses.replace(FREE, temperature=0.7, top_p=0.6, stop_ids=())
    checked = 0
    for group in sampler.stream(ask([5, 8], repeats=6), decoding):
        for c in group.completions:
            ids = [*group.prompt.token_ids, *c.token_ids]
            for place, (token, logprob) in enumerate(zip(c.token_ids, c.logprobs, strict=True)):
                row = next_logits(model, ids[: len(group.prompt.token_ids) + place]) / 0.7
                kept = sorted(nucleus_of(row.numpy(), 0.6))
                if kept != sorted(nucleus_of(row.numpy(), 0.6 - 1e-3)):
                    continue
                checked += 1
                assert token in kept
                share = torch.log_softmax(row[kept], 0)[kept.index(token)]
                assert logprob == pytest.approx(float(share), abs=2e-3)
    assert checked > 60


def next_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits after these tokens, by the hf sampler's own forward of a single prompt."""
    from dash_exp.types import Prompt, Request

    request = Request(0, Prompt("p", "t", "", tuple(ids), ""), (0,))
    _, logits = sampler_of(model, vocabulary=SEEN)._prefill([request], FREE, torch.device("cpu"))
    return logits[0]


def test_a_sync_is_complete_and_forgets_cached_prefixes(engine: Any) -> None:
    """Every tensor perturbed, the tied one included; the same prompts are asked again, so a stale
    prefix cache or a tensor left behind would show in the first token's log-probability."""
    sampler, model = engine
    before = by_position(sampler.stream(ask([17, 20], repeats=2), FREE))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    sampler.load_weights(3)
    after = list(sampler.stream(ask([17, 20], repeats=2), FREE))
    assert {c.policy_version for g in after for c in g.completions} == {3}
    assert learner_gap(model, after, 1.0).abs().max() < 2e-3
    changed = by_position(after)[0].completions[0].logprobs[0]
    assert abs(changed - before[0].completions[0].logprobs[0]) > 1e-3


def test_loading_in_place_leaves_what_a_reload_leaves(engine: Any) -> None:
    """Every layer computes the same, to the bit, and the same tokens come with the same log-probabilities."""
    from tests.sampling.load_probe import compare

    sampler, model = engine
    named = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    (found,) = sampler.llm.apply_model(lambda inner: compare(sampler._loader, inner, named))
    assert found["different"] == [] and found["changed"] > 10
    asked = ask([17, 20, 5], repeats=3)
    sampler.load_weights(1)
    ours = by_position(sampler.stream(asked, FREE))
    (_,) = sampler.llm.apply_model(lambda inner: sampler._loader.reload(named.items()))
    assert sampler.llm.reset_prefix_cache()
    theirs = by_position(sampler.stream(asked, FREE))
    for place, group in ours.items():
        assert [c.token_ids for c in group.completions] == [c.token_ids for c in theirs[place].completions]
        assert [c.logprobs for c in group.completions] == [c.logprobs for c in theirs[place].completions]


def test_a_tensor_that_is_missing_is_noticed(engine: Any) -> None:
    sampler, model = engine
    named = dict(model.named_parameters())
    named.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"no weights came for \['model\.norm\.weight'\]"):
        sampler.llm.apply_model(lambda inner: sampler._loader.load(named))
    sampler.load_weights(2)


def test_ids_beyond_the_tokenizer_are_never_drawn(engine: Any) -> None:
    sampler, model = engine
    with torch.no_grad():
        model.lm_head.weight[SEEN:] *= 50
    sampler.load_weights(4)
    groups = list(sampler.stream(ask([5, 7], repeats=8), dataclasses.replace(FREE, stop_ids=())))
    assert max(t for g in groups for c in g.completions for t in c.token_ids) < SEEN
    assert learner_gap(model, groups, 1.0).abs().mean() < 1e-3
