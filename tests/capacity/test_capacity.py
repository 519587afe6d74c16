"""The capacity model by hand, by brute force and by properties; its command as typed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dash_exp.capacity.model import (
    Curves,
    Decode,
    Setting,
    best_waves,
    draw_lengths,
    learn,
    of_two,
    pieces,
    predict,
    predict_batch,
    sample,
    splits,
    wave_choices,
)
from dash_exp.learning.packing import pieces_of
from dash_exp.sampling.protocol import groups_at_once
from tests.conftest import make_groups

SHARED = Decode.of_rates([(1, 100.0), (64, 100.0)])
"""A server that makes 100 tokens a second however many sequences share them."""


def curves(**changes: Any) -> Curves:
    values: dict[str, Any] = {
        "decode": SHARED,
        "prefill_tokens_per_s": float("inf"),
        "learner_tokens_per_s": 100.0,
        "lengths": ((10, 10),),
        "cap": 10,
        "prompt_tokens": 1,
    }
    return Curves(**{**values, **changes})


def test_one_server_and_one_sequence() -> None:
    """30 prompt tokens at 60 a second, 20 tokens at 10 a second, then 30 + 19 input tokens at 100."""
    measured = curves(
        decode=Decode.of_rates([(1, 10.0)]),
        prefill_tokens_per_s=60.0,
        prompt_tokens=30,
        optimizer_s=0.1,
        sync_s=0.2,
        other_s=0.05,
    )
    p = predict(measured, Setting(prompts=1, group=1, tokens=20, equal=True))
    assert p.sampling_s == pytest.approx(0.5 + 2.0)
    assert p.backprop_s == pytest.approx(0.49)
    assert p.step_s == pytest.approx(2.5 + 0.49 + 0.1 + 0.2 + 0.05)
    assert (p.tokens, p.sequences, p.hidden_s) == (20, 1, 0)


def test_equal_lengths_decode_together() -> None:
    """Eight sequences at 40 tokens a second in all: 20 steps of 8/40 s; half of them on each of two servers
    at 32 a second: 20 steps of 4/32 s."""
    decode = Decode.of_rates([(4, 32.0), (8, 40.0)])
    lengths = ((20, 20),) * 4
    one, two = (sample(lengths, decode, 0.0, Setting(servers=n)) for n in (1, 2))
    assert (one.seconds, one.sequences) == (pytest.approx(4.0), 8)
    assert (two.seconds, two.sequences) == (pytest.approx(2.5), 4)


def test_the_tail_is_decoded_faster() -> None:
    """Ten steps of two at 0.2 s, then ten of one at 0.1 s. The first group is complete after 2 s."""
    decode = Decode.of_rates([(1, 10.0), (2, 10.0)])
    done = sample(((10,), (20,)), decode, 0.0, Setting())
    assert done.ends == ((pytest.approx(2.0), 0), (pytest.approx(3.0), 1))


def test_no_room_means_waiting() -> None:
    """Two of three groups fit; the third begins when the first ends, at 10 steps of 0.2 s, beside ten more
    steps of the second: 2 + 10 x 0.2 s for its ten tokens."""
    decode = Decode.of_rates([(1, 10.0), (2, 10.0)])
    done = sample(((10,), (20,), (10,)), decode, 0.0, Setting(max_sequences=2))
    assert [time for time, _ in done.ends] == [pytest.approx(t) for t in (2.0, 4.0, 4.0)]


def test_a_wave_counts_completions_of_any_group() -> None:
    """Four at once, a step of 0.1 s however many. After 2 s two are done, one of each group, and the third
    group begins: it is complete at 3 s, before the two that began first."""
    decode = Decode.of_rates([(1, 10.0), (2, 20.0), (4, 40.0)])
    lengths = ((10, 40), (20, 40), (10, 10))
    done = sample(lengths, decode, 0.0, Setting(streaming=True, waves=2))
    assert [group for _, group in done.ends] == [2, 0, 1]
    assert [time for time, _ in done.ends] == [pytest.approx(t) for t in (3.0, 4.0, 4.0)]
    assert done.sequences == 4


def test_decode_steps_between_below_and_beyond_what_was_measured() -> None:
    decode = Decode.of_rates([(2, 20.0), (4, 20.0)])  # 0.1 and 0.2 s
    assert [decode.seconds(n) for n in (1, 2, 3, 4, 6)] == [
        pytest.approx(s) for s in (0.1, 0.1, 0.15, 0.2, 0.3)
    ]
    noisy = Decode.of_rates([(1, 10.0), (2, 40.0)])  # a step of two cannot take 0.05 s
    assert noisy.seconds(2) == pytest.approx(0.1)


@pytest.mark.parametrize("rate", [60.0, 100.0, 250.0])
@pytest.mark.parametrize("waves", [2, 4, 8])
def test_waves_reach_the_ideal_but_for_what_the_packer_holds_back(waves: int, rate: float) -> None:
    """64 groups of one sequence, 11 tokens; S = 704 / 100 s, B = 64 x (1 + 10) / rate. Pieces of one
    group: at the end of a wave the last one waits for the next group."""
    setting = Setting(
        prompts=64, group=1, waves=waves, tokens=11, equal=True, streaming=True, micro_batch_tokens=11
    )
    p = predict(curves(learner_tokens_per_s=rate), setting)
    assert p.sampling_s == pytest.approx(7.04)
    assert p.backprop_s == pytest.approx(704 / rate)
    s, b = p.sampling_s, p.backprop_s
    ideal = max(s, b) + min(s, b) / waves
    assert ideal - 1e-9 <= p.step_s <= ideal + 11 / rate + 1e-9
    assert p.hidden_s == pytest.approx(s + b - p.step_s)


def test_the_batch_at_once_overlaps_nothing_where_lengths_are_equal() -> None:
    setting = Setting(prompts=8, group=2, tokens=10, equal=True, streaming=True)
    apart, turns = predict(curves(), setting), predict(curves(), replace(setting, streaming=False))
    assert apart.step_s == pytest.approx(turns.step_s)


def test_a_call_at_a_time_adds_up() -> None:
    """Two prompts at a time: four times 40 tokens at 100 a second, then 2 x (1 + 18) at 100."""
    p = predict(curves(), Setting(prompts=8, group=2, tokens=10, equal=True, call=2))
    assert p.sampling_s == pytest.approx(4 * 0.4)
    assert p.step_s == pytest.approx(4 * (0.4 + 0.38))


def test_learners_share_micro_batches_and_reduce_on_a_ring() -> None:
    """Four pieces of 100 tokens at 100 a second over three learners: a round of 1 s, then a third of the
    last one each. Of 100, 60 and 80 a round of 1 s. The reduction takes 2 (3 - 1) / 3 of 0.3 s."""
    assert learn([(0.0, [100.0] * 4)], 100.0, learners=3, most=100) == pytest.approx(1 + 1 / 3)
    unequal = [(0.0, [100.0, 60.0, 80.0, 90.0])]
    assert learn(unequal, 100.0, learners=3, most=100) == pytest.approx(1 + 0.3)
    p = predict(curves(reduce_s=0.3), Setting(prompts=4, group=2, tokens=10, equal=True, learners=3))
    assert p.reduce_s == pytest.approx(0.4)


def test_a_micro_batch_starts_when_it_is_full_or_when_there_is_nothing_else_to_do() -> None:
    """Pieces of 60 tokens, 0.6 s each. Of 1, 2 and 5 s each is learned from before the next comes. Of 1, 1.2
    and 1.4 s the first keeps the learner until 1.6; then it finds both others, in one micro-batch or two.
    Two learners cut each piece in halves."""
    apart, dense = ([(t, [60.0]) for t in times] for times in ((1.0, 2.0, 5.0), (1.0, 1.2, 1.4)))
    for most in (100, 1000):
        assert learn(apart, 100.0, learners=1, most=most) == pytest.approx(5.6)
        assert learn(dense, 100.0, learners=1, most=most) == pytest.approx(1.6 + 1.2)
        assert learn(apart, 100.0, learners=2, most=most) == pytest.approx(5.3)
    at_once = [(0.0, [60.0]), (0.0, [60.0])]  # no gap, so as they are packed: of 60, not of 120
    assert learn(at_once, 100.0, learners=2, most=100) == pytest.approx(0.6)


def test_a_reduction_over_many_converted_to_two() -> None:
    """Over 4 learners each sends 2 x 3 / 4 = 1.5 of its gradients, over 2 one: 0.9 s there are 0.6 s here."""
    assert of_two(0.9, 4) == pytest.approx(0.6)
    assert of_two(0.9, 2) == 0.9 and of_two(0.9, 1) == 0.0
    p = predict(curves(reduce_s=of_two(0.9, 4)), Setting(prompts=4, group=2, learners=4))
    assert p.reduce_s == pytest.approx(0.9)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    prompt=st.integers(1, 20),
    most=st.integers(10, 120),
)
def test_pieces_are_those_of_the_packer(lengths: list[int], prompt: int, most: int) -> None:
    (group,) = make_groups([lengths], [prompt])
    assert list(pieces(prompt, lengths, most)) == [p.tokens for p in pieces_of(group, most, False)]


BATCHES = st.lists(
    st.lists(st.integers(1, 50), min_size=2, max_size=2).map(tuple), min_size=1, max_size=10
).map(tuple)


@settings(max_examples=60, deadline=None)
@given(
    lengths=BATCHES,
    waves=st.integers(1, 5),
    servers=st.integers(1, 3),
    learners=st.integers(1, 3),
    kept=st.floats(0, 1),
)
def test_bounds_and_monotone_properties(
    lengths: Any, waves: int, servers: int, learners: int, kept: float
) -> None:
    setting = Setting(
        servers=servers,
        learners=learners,
        prompts=len(lengths),
        group=2,
        waves=waves,
        kept=kept,
        streaming=True,
        micro_batch_tokens=40,
    )
    measured = curves(decode=Decode.of_rates([(1, 20.0), (8, 80.0)]), prompt_tokens=3)

    def step(measured: Curves = measured, **changes: Any) -> float:
        return predict_batch(measured, replace(setting, **changes), lengths).step_s

    p = predict_batch(measured, setting, lengths)
    tiny = 1e-9
    assert max(p.sampling_s, p.backprop_s) - tiny <= p.step_s <= p.sampling_s + p.backprop_s + tiny
    alone = predict_batch(measured, replace(setting, learners=1), lengths).backprop_s
    assert alone / learners - tiny <= p.backprop_s <= alone + tiny
    assert step(kept=kept / 2, learners=1) <= step(learners=1) + tiny + 40 / 100  # cut otherwise
    assert step(replace(measured, sync_s=1.0)) == pytest.approx(p.step_s + 1)
    faster = replace(measured, learner_tokens_per_s=200.0)
    assert step(faster) <= p.step_s + tiny
    slower = replace(measured, decode=Decode.of_rates([(1, 10.0), (8, 40.0)]))
    assert predict_batch(slower, setting, lengths).sampling_s == pytest.approx(2 * p.sampling_s)
    longer = tuple(tuple(n + 5 for n in group) for group in lengths)
    one = replace(setting, servers=1, waves=1)
    before = predict_batch(measured, one, lengths).sampling_s
    assert predict_batch(measured, one, longer).sampling_s >= before - tiny


@pytest.mark.parametrize(
    ("prompts", "waves", "servers", "expected"),
    [(16, 4, 1, 4), (16, 4, 2, 4), (16, 5, 1, 4), (16, 16, 4, 4), (16, 1, 4, None), (2, 2, 8, 8)],
)
def test_no_wave_leaves_a_server_without_a_group(
    prompts: int, waves: int, servers: int, expected: int | None
) -> None:
    assert groups_at_once(prompts, waves, servers) == expected


def test_lengths_are_drawn_by_group_and_scaled() -> None:
    measured = curves(lengths=((1, 2), (9, 10)), cap=10)
    found = draw_lengths(measured, Setting(prompts=50, group=3, tokens=20), seed=0)
    assert {n for group in found for n in group} == {2, 4, 18, 20}
    assert all(max(group) - min(group) == 2 or len(set(group)) == 1 for group in found)
    assert found == draw_lengths(measured, Setting(prompts=50, group=3, tokens=20), seed=0)


def test_the_best_number_of_waves_is_that_of_trying_all() -> None:
    measured = curves(decode=Decode.of_rates([(1, 20.0), (16, 160.0)]))
    setting = Setting(prompts=16, group=1, tokens=40, equal=True, streaming=True, micro_batch_tokens=41)
    waves, best = best_waves(measured, setting)
    assert wave_choices(16) == [1, 2, 4, 8, 16]
    tried = {w: predict(measured, replace(setting, waves=w)).step_s for w in wave_choices(16)}
    assert best.step_s == min(tried.values()) == tried[waves]
    assert best_waves(measured, replace(setting, streaming=False))[0] == 1


def test_the_best_split_is_that_of_trying_all() -> None:
    """Each token costs three times as much to sample as to learn from: 3 of 4 devices sample."""
    measured = curves(learner_tokens_per_s=300.0, prompt_tokens=1)
    setting = Setting(prompts=48, group=1, tokens=30, equal=True, micro_batch_tokens=30)
    found = splits(measured, setting, 4)
    assert len(found) == 3
    assert (found[0][0].servers, found[0][0].learners) == (3, 1)
    tried = {
        (h, w): predict(measured, replace(setting, servers=h, learners=4 - h, waves=w, streaming=True)).step_s
        for h in range(1, 4)
        for w in wave_choices(48)
    }
    assert found[0][1].step_s == min(tried.values())
    ((alone, _),) = splits(measured, setting, 1)
    assert (alone.servers, alone.learners, alone.streaming) == (1, 1, False)
