"""The hf sampler against transformers itself, the learner, and the exact distribution."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from dash_exp.learning.packing import Packer, pack
from dash_exp.sampling.hf import LIKELY, HFSampler, draw, nucleus
from dash_exp.types import AdvantagedGroup, Decoding, Group, Prompt, Request, Score, ScoredGroup
from tests.learning.test_learner import VOCABULARY, learner_of, objective

EOS = 1
FREE = Decoding(max_new_tokens=12, temperature=1.0, stop_ids=(EOS,))
GREEDY = dataclasses.replace(FREE, temperature=0.0)


def sampler_of(model: Any, **changes: Any) -> HFSampler:
    settings = {"vocabulary": VOCABULARY, "max_sequences": 64, **changes}
    return HFSampler(model, lambda ids: " ".join(map(str, ids)), **settings)


def ask(lengths: list[int], repeats: int = 4, seed: int = 0, shared: int = 0) -> list[Request]:
    """`shared`: with how many equal tokens each prompt begins, before `lengths` of its own."""
    rng = np.random.default_rng(seed)
    first = tuple(range(3, 3 + shared))
    return [
        Request(
            p,
            Prompt(f"p{p}", "t", "", first + tuple(int(x) for x in rng.integers(3, 100, n)), ""),
            tuple(1000 * p + i for i in range(repeats)),
        )
        for p, n in enumerate(lengths)
    ]


def by_position(groups: Any) -> dict[int, Group]:
    return {g.position: g for g in groups}


def test_draw_follows_the_distribution() -> None:
    """Chi-square of 60,000 draws over 300 tokens (two blocks), against the exact probabilities."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, generator=generator) * 2
    n = 60_000
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    tokens, logprobs = draw(logits.expand(n, -1).clone(), uniform)
    exact = torch.log_softmax(logits, 0)
    assert torch.allclose(logprobs, exact[tokens], atol=1e-5)
    expected = exact.exp() * n
    counts = torch.bincount(tokens, minlength=300)
    common = expected >= 5
    statistic = float(((counts - expected)[common] ** 2 / expected[common]).sum())
    degrees = int(common.sum())
    assert abs(statistic - degrees) < 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0 - 2**-53])
def test_draw_never_lands_where_there_is_no_mass(value: float) -> None:
    logits = torch.full((1, 1000), -1e4)
    logits[0, 700], logits[0, 255], logits[0, 256] = 0.0, -1.0, -2.0
    tokens, _ = draw(logits, torch.tensor([value], dtype=torch.float64))
    assert int(tokens) in (255, 256, 700)
    tokens, _ = draw(torch.where(logits == 0, 5.0, -1e9), torch.tensor([value], dtype=torch.float64))
    assert int(tokens) == 700


def nucleus_of(logits: Any, top_p: float) -> set[int]:
    """Plain numpy in float64: the fewest most likely tokens with at least `top_p` of the mass, and those
    as likely as the last of them."""
    values = np.asarray(logits, dtype=np.float64)
    shares = np.exp(values - values.max())
    shares /= shares.sum()
    held, least = 0.0, np.inf
    for token in np.argsort(-values):
        if held >= top_p:
            break
        held, least = held + shares[token], values[token]
    return set(np.flatnonzero(values >= least).tolist())


ROUNDING = 2e-6
"""Of a row's mass, summed in float32: processors differ in it."""


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0, 20.0])
def test_the_nucleus_is_that_of_plain_numpy(top_p: float, spread: float) -> None:
    """From one token to nearly all of 2,000: within the first look and beyond it."""
    logits = torch.randn(6, 2000, generator=torch.Generator().manual_seed(7)) * spread
    cut = nucleus(logits, top_p)
    sizes = []
    for before, after in zip(logits, cut, strict=True):
        kept = set(torch.isfinite(after).nonzero().flatten().tolist())
        least, most = (nucleus_of(before.numpy(), top_p + off) for off in (-ROUNDING, ROUNDING))
        assert least <= kept <= most and len(most) - len(least) <= 1
        assert torch.equal(after[sorted(kept)], before[sorted(kept)])
        sizes.append(len(kept))
    if (top_p, spread) == (0.95, 0.1):
        assert min(sizes) > LIKELY
    if (top_p, spread) == (0.1, 20.0):
        assert set(sizes) == {1}


def test_tokens_as_likely_as_the_last_of_the_nucleus_belong_to_it() -> None:
    """Shares 0.4, 0.3, 0.15, 0.15 and top_p 0.75: the third is needed, so is its equal."""
    logits = torch.tensor([[0.15, 0.4, 0.15, 0.3]]).log()
    assert torch.isfinite(nucleus(logits, 0.75)).all()
    assert torch.isfinite(nucleus(logits, 0.69)).tolist() == [[False, True, False, True]]
    assert torch.isfinite(nucleus(logits, 1e-9)).tolist() == [[False, True, False, False]]
    flat = torch.zeros(1, 3 * LIKELY)
    assert torch.isfinite(nucleus(flat, 0.01)).all()


def test_draws_from_the_nucleus_follow_its_renormalised_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, generator=generator) * 2
    n = 40_000
    cut = nucleus(logits[None], 0.8).expand(n, -1)
    tokens, logprobs = draw(cut, torch.rand(n, generator=generator, dtype=torch.float64))
    kept = sorted(nucleus_of(logits.numpy(), 0.8))
    exact = torch.full((300,), float("-inf"))
    exact[kept] = torch.log_softmax(logits[kept], 0)
    assert torch.allclose(logprobs, exact[tokens], atol=1e-5)
    expected = exact.exp() * n
    counts = torch.bincount(tokens, minlength=300)
    assert int(counts[expected == 0].sum()) == 0
    common = expected >= 5
    statistic = float(((counts - expected)[common] ** 2 / expected[common]).sum())
    assert abs(statistic - int(common.sum())) < 5 * (2 * int(common.sum())) ** 0.5


def test_a_sampler_cuts_by_top_p_after_the_temperature(tiny: Any, plain: Any) -> None:
    """Every sampled token lies in the nucleus of its own distribution, which transformers computes."""
    decoding = dataclasses.replace(FREE, temperature=0.7, top_p=0.6, stop_ids=())
    groups = list(sampler_of(tiny).stream(ask([5, 8], repeats=6), decoding))
    for prompt, c in ((g.prompt, c) for g in groups for c in g.completions):
        ids = torch.tensor([[*prompt.token_ids, *c.token_ids]])
        with torch.no_grad():
            logits = plain(ids).logits[0, len(prompt.token_ids) - 1 : -1, :VOCABULARY] / 0.7
        for row, token, logprob in zip(logits, c.token_ids, c.logprobs, strict=True):
            kept = sorted(nucleus_of(row.numpy(), 0.6))
            assert token in kept
            share = torch.log_softmax(row[kept], 0)[kept.index(token)]
            assert logprob == pytest.approx(float(share), abs=1e-4)
    wide = dataclasses.replace(decoding, top_p=1.0)
    free = by_position(sampler_of(tiny).stream(ask([5, 8], repeats=6), wide))
    assert any(g.completions != free[g.position].completions for g in groups)


def test_greedy_is_not_cut(tiny: Any) -> None:
    greedy = dataclasses.replace(GREEDY, top_p=0.3)
    (cut,), (plain,) = (sampler_of(tiny).stream(ask([6], 1), d) for d in (greedy, GREEDY))
    assert cut == plain


@pytest.mark.parametrize(("own", "shared"), [([5, 11, 3], 0), ([5, 11, 3, 1], 7), ([0, 4, 0], 6)])
def test_greedy_equals_generate(tiny: Any, plain: Any, own: list[int], shared: int) -> None:
    """Prompts of unequal length in one batch, with a common beginning, and with nothing else, against
    transformers' generate one at a time."""
    requests = ask(own, repeats=1, shared=shared)
    groups = by_position(sampler_of(tiny, vocabulary=128).stream(requests, GREEDY))
    for request in requests:
        ids = torch.tensor([request.prompt.token_ids])
        out = plain.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=0,
        )
        expected = tuple(out[0, ids.shape[1] :].tolist())
        assert groups[request.position].completions[0].token_ids == expected


@pytest.mark.parametrize(("temperature", "shared"), [(1.0, 0), (0.6, 9)])
def test_logprobs_are_those_the_learner_computes(tiny: Any, temperature: float, shared: int) -> None:
    """Both in fp32: mean gap under 0.001, ratio 1 within 2 %, at a temperature too."""
    decoding = dataclasses.replace(FREE, temperature=temperature)
    groups = list(sampler_of(tiny).stream(ask([5, 11, 3, 8], shared=shared), decoding))
    learner = learner_of(tiny, objective(temperature=temperature))
    packer = Packer(10_000, "constant", keep_for_kl=False)
    for g in groups:
        scored = ScoredGroup(g, (Score(0.0, "wrong"),) * 4)
        for batch in packer.add(AdvantagedGroup(scored, (1.0,) * 4, (True,) * 4)):
            raise AssertionError(batch)
    (batch,) = packer.flush()
    packed = pack(batch)
    assert packed.targets.tolist() == [t for g in groups for c in g.completions for t in c.token_ids]
    gap = learner.logprobs(batch) - packed.sampler_logprobs
    assert gap.abs().mean() < 1e-5
    assert abs(float(gap.exp().mean()) - 1) < 0.02


def test_a_completion_depends_on_its_seed_not_on_its_neighbours(tiny: Any) -> None:
    requests = ask([5, 11, 3, 8])
    together = by_position(sampler_of(tiny).stream(requests, FREE))
    waves = by_position(sampler_of(tiny, max_sequences=4).stream(requests, FREE))
    for request in requests:
        (single,) = sampler_of(tiny).stream([request], FREE)
        for others in (together, waves):
            for a, b in zip(single.completions, others[request.position].completions, strict=True):
                assert a.token_ids == b.token_ids
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_a_group_differs_and_a_seed_repeats(tiny: Any) -> None:
    requests = ask([6], repeats=8)
    (first,) = sampler_of(tiny).stream(requests, FREE)
    (again,) = sampler_of(tiny).stream(requests, FREE)
    assert first == again
    assert len({c.token_ids for c in first.completions}) > 4


def test_every_token_has_a_random_number_of_its_own(tiny: Any) -> None:
    """Under a uniform policy a completion that reused one number would repeat one token."""
    with torch.no_grad():
        tiny.lm_head.weight.zero_()
    decoding = dataclasses.replace(FREE, stop_ids=())
    (group,) = sampler_of(tiny).stream(ask([6], repeats=8), decoding)
    assert all(len(set(c.token_ids)) > 8 for c in group.completions)


def test_ends_are_kept_and_counted(tiny: Any) -> None:
    """The end token belongs to a completion and nothing follows it; a cut one is `length`."""
    stops = tuple(range(3, 30))
    decoding = Decoding(max_new_tokens=5, temperature=1.0, stop_ids=stops)
    groups = list(sampler_of(tiny).stream(ask([4, 7], repeats=8), decoding))
    kinds = set()
    for c in (c for g in groups for c in g.completions):
        ends = [t in stops for t in c.token_ids]
        assert not any(ends[:-1])
        assert c.finish_reason == ("stop" if ends[-1] else "length")
        assert ends[-1] or len(c.token_ids) == 5
        kinds.add(c.finish_reason)
    assert kinds == {"stop", "length"}


def test_groups_arrive_as_they_finish(tiny: Any) -> None:
    """With many stop tokens, some group is done before others have ended."""
    decoding = Decoding(max_new_tokens=30, temperature=1.0, stop_ids=tuple(range(3, 40)))
    order = [g.position for g in sampler_of(tiny).stream(ask([4] * 12, repeats=2), decoding)]
    assert sorted(order) == list(range(12)) and order != list(range(12))


def test_ids_beyond_the_tokenizer_are_never_drawn(tiny: Any) -> None:
    with torch.no_grad():
        tiny.lm_head.weight[90:] *= 50  # make them by far the most likely
    decoding = dataclasses.replace(FREE, stop_ids=())
    groups = sampler_of(tiny, vocabulary=90).stream(ask([4, 7], repeats=8), decoding)
    assert max(t for g in groups for c in g.completions for t in c.token_ids) < 90


def test_gradients_stay_on_between_two_groups(tiny: Any) -> None:
    """The learner works while the generator is suspended."""
    stream = sampler_of(tiny).stream(ask([4, 7]), FREE)
    next(iter(stream))
    assert torch.is_grad_enabled()


def test_new_weights_are_seen(tiny: Any) -> None:
    sampler = sampler_of(tiny)
    (before,) = sampler.stream(ask([6]), FREE)
    with torch.no_grad():
        tiny.model.embed_tokens.weight.mul_(1.3)
    sampler.load_weights(7)
    (after,) = sampler.stream(ask([6]), FREE)
    assert before.completions[0].logprobs != after.completions[0].logprobs
    assert {c.policy_version for c in after.completions} == {7}


def test_a_group_of_more_completions_than_rows_fit_is_one_group(tiny: Any) -> None:
    """The same completions as all at once, up to ties of rounding: in fp32 none here."""
    asked = ask([5, 3], repeats=10)
    at_once = by_position(sampler_of(tiny).stream(asked, FREE))
    parts = by_position(sampler_of(tiny, max_sequences=4).stream(asked, FREE))
    for position, group in at_once.items():
        assert len(parts[position].completions) == 10
        assert [c.token_ids for c in parts[position].completions] == [c.token_ids for c in group.completions]
