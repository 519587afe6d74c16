"""Real vLLM, in process, on the tiny model in fp32: the same distribution as the learner's."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dash_exp.learning.learner import Learner
from dash_exp.learning.packing import Packer, pack
from dash_exp.learning.settings import Forward
from dash_exp.sampling.protocol import EngineSettings
from dash_exp.types import AdvantagedGroup, Completion, Decoding, Group, Score, ScoredGroup
from tests.learning.test_learner import objective, setting
from tests.sampling.test_hf import EOS, ask, by_position, nucleus_of, sampler_of

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own imports warn
]

BLOCK = 32
LENGTHS = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 90]
SEEN = 90  # a vocabulary smaller than the model's 128 rows
FREE = Decoding(max_new_tokens=8, temperature=1.0, stop_ids=(EOS,))
GREEDY = dataclasses.replace(FREE, temperature=0.0)


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Iterator[Any]:
    """One engine for all tests, and the model whose weights it follows."""
    from dash_exp.modeling.attention import ATTENTION
    from dash_exp.modeling.source import load_model
    from dash_exp.sampling.vllm import engine
    from dash_exp.sampling.vllm.sampler import VLLMSampler

    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    model = load_model(tiny_folder, torch.float32, ATTENTION)
    settings = EngineSettings(
        model=str(tiny_folder),
        vocabulary=SEEN,
        max_model_len=128,
        max_sequences=64,
        dtype="float32",
        enforce_eager=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "CPU_BATCHED_TOKENS", 330)  # prompts beyond that wait: none may be split
        sampler = VLLMSampler(settings, model.named_parameters)
    with torch.compiler.set_stance("force_eager"):  # compiling takes longer than all tests
        yield sampler, model
    sampler.close()
    torch.set_num_threads = set_threads  # vLLM on CPU replaces it
    torch.set_num_threads(threads)


def learner_gap(model: Any, groups: list[Group], temperature: float) -> torch.Tensor:
    """Learner's minus sampler's log-probability of every sampled token."""
    goal = objective(temperature=temperature)
    learner = Learner(model, goal, setting(), Forward(SEEN))
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


def test_groups_are_complete_and_seeds_differ_and_repeat(engine: Any) -> None:
    sampler, _ = engine
    asked = ask([5, 11, 120, 120, 110], repeats=6)  # more prompt tokens than one step takes
    first = by_position(sampler.stream(asked, FREE))
    again = by_position(sampler.stream(asked, FREE))
    assert sorted(first) == [0, 1, 2, 3, 4]
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


# --- on CPU the prompt of a group is computed once ---


cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="for CPU only")


def scheduler_of(sampler: Any) -> Any:
    return sampler.engine.engine_core.engine_core.scheduler


@pytest.fixture
def computed(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that each step computes."""
    scheduler = scheduler_of(engine[0])
    found: list[int] = []
    schedule = scheduler.schedule

    def counted(*args: Any, **more: Any) -> Any:
        output = schedule(*args, **more)
        found.append(output.total_num_scheduled_tokens)
        return output

    monkeypatch.setattr(scheduler, "schedule", counted)
    return found


@contextmanager
def blocks_left(sampler: Any, count: int) -> Iterator[None]:
    """All but `count` blocks of the cache are taken."""
    pool = scheduler_of(sampler).kv_cache_manager.block_pool
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - count)
    try:
        yield
    finally:
        pool.free_blocks(taken)


def completions(sampler: Any, lengths: list[int], decoding: Decoding, repeats: int) -> list[Completion]:
    sampler.engine.reset_prefix_cache()
    groups = by_position(sampler.stream(ask(lengths, repeats=repeats), decoding))
    return [c for position in sorted(groups) for c in groups[position].completions]


@cpu_only
def test_a_prompt_is_computed_once_for_its_group(engine: Any, computed: list[int]) -> None:
    """By the first of each group; the others begin in the next step, with the prompt's last token, and so end
    a step later."""
    sampler, _ = engine
    endless = Decoding(max_new_tokens=4, temperature=1.0, stop_ids=())
    completions(sampler, LENGTHS, endless, repeats=5)
    groups = len(LENGTHS)
    assert computed == [sum(LENGTHS), 5 * groups, 5 * groups, 5 * groups, 4 * groups]


@cpu_only
def test_the_distribution_is_the_learners_at_every_length(engine: Any) -> None:
    """Before, in and after a block's last token, and beyond a first shared block. A block copied to the wrong
    place, or too few of them, would show."""
    sampler, model = engine
    sampler.engine.reset_prefix_cache()
    groups = list(sampler.stream(ask(LENGTHS, repeats=5), FREE))
    assert learner_gap(model, groups, 1.0).abs().max() < 2e-3


@cpu_only
def test_several_blocks_are_copied_where_vllm_shares_none(
    engine: Any, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, model = engine
    scheduler = scheduler_of(sampler)
    none = (scheduler.kv_cache_manager.empty_kv_cache_blocks, 0, 0, False)
    monkeypatch.setattr(scheduler, "_get_local_prefix_cache_hit", lambda request: none)
    groups = list(sampler.stream(ask(LENGTHS, repeats=2), FREE))
    assert computed[0] == sum(LENGTHS) and computed[1] <= 2 * len(LENGTHS)
    assert learner_gap(model, groups, 1.0).abs().max() < 2e-3


def not_shared(
    sampler: Any, monkeypatch: pytest.MonkeyPatch, run: Callable[[], list[Completion]]
) -> list[Completion]:
    """The same where no prompt is shared."""
    connector = scheduler_of(sampler).connector
    with monkeypatch.context() as patch:
        patch.setattr(connector, "get_num_new_matched_tokens", lambda request, computed: (0, False))
        return run()


@pytest.mark.parametrize("tokens", [1, 2, 24])
@cpu_only
def test_the_same_tokens_as_when_each_computes_its_own(
    engine: Any, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """With one new token the request that computes the prompt is gone when others want it."""
    sampler, _ = engine
    decoding = Decoding(max_new_tokens=tokens, temperature=1.0, stop_ids=(EOS,))

    def run() -> list[Completion]:
        return completions(sampler, LENGTHS, decoding, repeats=4)

    same(run(), not_shared(sampler, monkeypatch, run))


def same(ours: list[Completion], theirs: list[Completion]) -> None:
    assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-3)


@cpu_only
def test_the_same_where_memory_runs_out(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are preempted, the one that others would copy from among them, and start anew."""
    sampler, _ = engine
    decoding = Decoding(max_new_tokens=40, temperature=1.0, stop_ids=(EOS,))
    lengths = [BLOCK - 3, BLOCK + 5]
    roomy = completions(sampler, lengths, decoding, repeats=4)
    preempted: list[str] = []
    scheduler = scheduler_of(sampler)
    preempt = scheduler._preempt_request

    def noted(request: Any, *args: Any, **more: Any) -> None:
        preempted.append(request.request_id)
        preempt(request, *args, **more)

    monkeypatch.setattr(scheduler, "_preempt_request", noted)
    with blocks_left(sampler, 9):
        tight = completions(sampler, lengths, decoding, repeats=4)
    assert preempted
    same(tight, roomy)
    assert scheduler.connector._holders == {}


@cpu_only
def test_nothing_is_copied_from_one_that_copies_in_the_same_step(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that were preempted with tokens of their own begin again in one step. The first says at once that
    its prompt is computed; the second must not read its blocks: all are filled together, before the step."""
    from types import SimpleNamespace

    from vllm import SamplingParams
    from vllm.v1.request import Request, RequestStatus

    connector = scheduler_of(engine[0]).connector
    blocks = {"holder": ([7],), "first": ([8],), "second": ([9],)}
    of = {name: SimpleNamespace(get_block_ids=lambda ids=ids: ids) for name, ids in blocks.items()}
    monkeypatch.setattr(connector, "_kv_cache_manager", SimpleNamespace(get_block_ids=blocks.__getitem__))
    prompt = list(range(3, 13))
    requests = {name: Request(name, prompt, SamplingParams(max_tokens=9), None) for name in blocks}
    for name in ("first", "second", "holder"):  # the order in which they came
        requests[name].append_output_token_ids([5, 6])
        connector.update_state_after_alloc(requests[name], of[name], 0)
    connector.build_connector_meta(None)
    requests["holder"].status, requests["holder"].num_computed_tokens = RequestStatus.RUNNING, 11
    for name in ("first", "second"):
        assert connector.get_num_new_matched_tokens(requests[name], 0) == (len(prompt), False)
        connector.update_state_after_alloc(requests[name], of[name], len(prompt))
        requests[name].status, requests[name].num_computed_tokens = RequestStatus.RUNNING, len(prompt)
    made = connector.build_connector_meta(None)
    assert (made.sources, made.targets) == ([7, 7], [8, 9])
    for name in blocks:
        connector.request_finished(requests[name], [])
    assert connector._holders == {}
