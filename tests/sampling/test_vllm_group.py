"""Real vLLM on CPU: the prompt of a group is computed once, and nothing else changes by it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dash_exp.types import Completion, Decoding
from tests.sampling.test_hf import EOS, ask, by_position
from tests.sampling.test_vllm import SEEN, learner_gap

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="for CPU only"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own imports warn
]
BLOCK = 32
FREE = Decoding(max_new_tokens=8, temperature=1.0, stop_ids=(EOS,))


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Iterator[Any]:
    from dash_exp.modeling.attention import ATTENTION
    from dash_exp.modeling.source import load_model
    from dash_exp.sampling.vllm.engine import VLLMSampler

    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    model = load_model(tiny_folder, torch.float32, ATTENTION)
    sampler = VLLMSampler(
        tiny_folder,
        model.named_parameters,
        vocabulary=SEEN,
        max_model_len=128,
        max_sequences=64,
        dtype="float32",
        kv_cache_gb=1,
        gpu_memory_utilization=0.5,
        enforce_eager=True,
    )
    yield sampler, model
    sampler.close()
    torch.set_num_threads = set_threads  # vLLM on CPU replaces it
    torch.set_num_threads(threads)


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


LENGTHS = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 90]


def test_a_prompt_is_computed_once_for_its_group(engine: Any, computed: list[int]) -> None:
    """By the first of each group; the others begin in the next step, with the prompt's last token, and so end
    a step later."""
    sampler, _ = engine
    endless = Decoding(max_new_tokens=4, temperature=1.0, stop_ids=())
    completions(sampler, LENGTHS, endless, repeats=5)
    groups = len(LENGTHS)
    assert computed == [sum(LENGTHS), 5 * groups, 5 * groups, 5 * groups, 4 * groups]


def test_the_distribution_is_the_learners_at_every_length(engine: Any) -> None:
    """Before, in and after a block's last token, and beyond a first shared block. A block copied to the wrong
    place, or too few of them, would show."""
    sampler, model = engine
    sampler.engine.reset_prefix_cache()
    groups = list(sampler.stream(ask(LENGTHS, repeats=5), FREE))
    assert learner_gap(model, groups, 1.0).abs().max() < 2e-3


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


def alone(
    sampler: Any, monkeypatch: pytest.MonkeyPatch, run: Callable[[], list[Completion]]
) -> list[Completion]:
    """The same where no prompt is shared."""
    connector = scheduler_of(sampler).connector
    with monkeypatch.context() as patch:
        patch.setattr(connector, "get_num_new_matched_tokens", lambda request, computed: (0, False))
        return run()


@pytest.mark.parametrize("tokens", [1, 2, 24])
def test_the_same_tokens_as_when_each_computes_its_own(
    engine: Any, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """With one new token whoever computes the prompt is gone when it is wanted."""
    sampler, _ = engine
    decoding = Decoding(max_new_tokens=tokens, temperature=1.0, stop_ids=(EOS,))

    def run() -> list[Completion]:
        return completions(sampler, LENGTHS, decoding, repeats=4)

    same(run(), alone(sampler, monkeypatch, run))


def same(ours: list[Completion], theirs: list[Completion]) -> None:
    assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-3)


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
