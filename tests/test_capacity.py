"""The capacity model by hand, by brute force and by properties; its command as typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dash_exp.capacity_curves import curves_of, read_cells, read_curves
from dash_exp.capacity_model import (
    Curves,
    Decode,
    Setting,
    best_waves,
    draw_lengths,
    learn,
    pieces,
    predict,
    predict_batch,
    sample,
    splits,
    wave_choices,
)
from dash_exp.errors import UserError
from dash_exp.learning.packing import pieces_of
from tests.conftest import REPOSITORY, make_groups

SHARED = Decode.of_rates([(1, 100.0), (64, 100.0)])
"""A server that makes 100 tokens a second however many sequences share them."""


def curves(**changes: Any) -> Curves:
    values: dict[str, Any] = {
        "decode": SHARED, "prefill_tokens_per_s": float("inf"), "learner_tokens_per_s": 100.0,
        "lengths": ((10, 10),), "cap": 10, "prompt_tokens": 1,
    }  # fmt: skip
    return Curves(**{**values, **changes})


def test_one_server_and_one_sequence() -> None:
    """30 prompt tokens at 60 a second, 20 tokens at 10 a second, then 30 + 19 input tokens at 100."""
    measured = curves(
        decode=Decode.of_rates([(1, 10.0)]), prefill_tokens_per_s=60.0, prompt_tokens=30,
        optimizer_s=0.1, sync_s=0.2, other_s=0.05,
    )  # fmt: skip
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
    one = sample(lengths, decode, 0.0, servers=1, max_sequences=64, at_once=None)
    two = sample(lengths, decode, 0.0, servers=2, max_sequences=64, at_once=None)
    assert (one.seconds, one.sequences) == (pytest.approx(4.0), 8)
    assert (two.seconds, two.sequences) == (pytest.approx(2.5), 4)


def test_the_tail_goes_faster_alone() -> None:
    """Ten steps of two at 0.2 s, then ten of one at 0.1 s. The first group is complete after 2 s."""
    decode = Decode.of_rates([(1, 10.0), (2, 10.0)])
    done = sample(((10,), (20,)), decode, 0.0, servers=1, max_sequences=64, at_once=None)
    assert done.ends == ((pytest.approx(2.0), 0), (pytest.approx(3.0), 1))


def test_no_room_means_waiting() -> None:
    """Two of three groups fit; the third begins when the first ends, at 10 steps of 0.2 s, beside ten more
    steps of the second: 2 + 10 x 0.2 s for its ten tokens."""
    decode = Decode.of_rates([(1, 10.0), (2, 10.0)])
    done = sample(((10,), (20,), (10,)), decode, 0.0, servers=1, max_sequences=2, at_once=None)
    assert [time for time, _ in done.ends] == [pytest.approx(t) for t in (2.0, 4.0, 4.0)]


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


def test_the_whole_batch_at_once_overlaps_nothing_where_lengths_are_equal() -> None:
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


def test_a_micro_batch_starts_when_it_is_full() -> None:
    """At 1 s one piece of 60 waits; at 2 s the second does not fit, so the first starts: 0.6 s. At 5 s the
    third: the second starts, ends at 5.6, and the last, of 60, at 6.2."""
    arrivals = [(float(t), [60.0]) for t in (1, 2, 5)]
    assert learn(arrivals, 100.0, learners=1, most=100) == pytest.approx(6.2)
    assert learn(arrivals, 100.0, learners=1, most=1000) == pytest.approx(5 + 1.8)


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
    lengths=BATCHES, waves=st.integers(1, 5), servers=st.integers(1, 3), learners=st.integers(1, 3),
    kept=st.floats(0, 1),
)  # fmt: skip
def test_bounds_and_monotone_properties(
    lengths: Any, waves: int, servers: int, learners: int, kept: float
) -> None:
    setting = Setting(
        servers=servers, learners=learners, prompts=len(lengths), group=2, waves=waves, kept=kept,
        streaming=True, micro_batch_tokens=40,
    )  # fmt: skip
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
    """Each token costs three times as much to sample as to learn from: 6 of 8 devices sample."""
    measured = curves(learner_tokens_per_s=300.0, prompt_tokens=1)
    setting = Setting(prompts=96, group=1, tokens=30, equal=True, micro_batch_tokens=30)
    found = splits(measured, setting, 8)
    assert len(found) == 7
    assert (found[0][0].servers, found[0][0].learners) == (6, 2)
    tried = {
        (h, w): predict(measured, replace(setting, servers=h, learners=8 - h, waves=w, streaming=True)).step_s
        for h in range(1, 8)
        for w in wave_choices(96)
    }
    assert found[0][1].step_s == min(tried.values())
    ((alone, _),) = splits(measured, setting, 1)
    assert (alone.servers, alone.learners, alone.streaming) == (1, 1, False)


# --- files and the command ---

FOUND = {
    "decode": [[1, 50.0], [8, 200.0], [32, 400.0]], "prefill_tokens_per_s": 1000.0,
    "learner_tokens_per_s": 300.0, "lengths": [[5, 9, 7, 16], [16, 16, 12, 3]], "cap": 16,
    "prompt_tokens": 29.0, "optimizer_s": 0.1, "sync_s": 0.5,
    "setting": {"prompts": 8, "group": 4, "waves": 4, "streaming": True, "micro_batch_tokens": 256},
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "curves.json"
    path.write_text(json.dumps({"rows": {"curves": {"curves": FOUND}}}))
    return path


def capacity(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command; that it imports no torch is asserted in its own process."""
    code = (
        "import sys; from dash_exp.capacity import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules); sys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=REPOSITORY, env=dict(os.environ),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_the_command_predicts_what_was_measured_and_what_is_asked(file: Path) -> None:
    done = capacity(f"curves={file}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines[1:-1])  # the first names the file
    found = json.loads(lines[-1])
    assert found["setting"]["prompts"] == 8 and found["setting"]["tokens"] == 16
    assert found["recommended_waves"] in wave_choices(8)
    assert found["step_s"] >= found["step_s_at_recommended_waves"] > 0.6
    other = capacity(f"curves={file}", "prompts=64", "group=4", "tokens=512", "kept=0.6", "gpus=8")
    assert other.returncode == 0, other.stderr
    assert all(len(line) <= 80 for line in other.stdout.splitlines()[1:-1])
    summary = json.loads(other.stdout.splitlines()[-1])
    assert [s["servers"] + s["learners"] for s in summary["splits"]] == [8] * 7
    assert summary["splits"][0]["step_s"] == pytest.approx(summary["step_s"])
    assert "note:" in other.stdout  # 512 tokens, and more learners, were not measured


def test_every_fault_of_the_command_at_once(file: Path) -> None:
    done = capacity("server=2", "kept=2", "tokens=0", "streaming=maybe", "prompts", f"cell={file.parent}",
                    f"curves={file}", "gpus=4", "learners=1")  # fmt: skip
    assert done.returncode == 2
    assert "8 problems" not in done.stdout
    for text in ("did you mean 'servers'", "between 0 and 1", "1 or more", "true or false", "not key=value",
                 "both curves= and cell=", "leave them out"):  # fmt: skip
        assert text in done.stderr, text
    assert "Traceback" not in done.stderr
    assert capacity().returncode == 2
    assert capacity("curves=nowhere.json").returncode == 2
    assert "does not divide" in capacity(f"curves={file}", "call=3").stderr
    assert capacity("--help").returncode == 0


def test_every_fault_of_a_file_at_once() -> None:
    broken = {**FOUND, "decode": [[1, 0]], "lengths": [[]], "cap": "many", "sync_s": -1}
    with pytest.raises(UserError) as error:
        curves_of(broken)
    assert [f.where for f in error.value.faults] == [
        "curves.decode", "curves.lengths", "curves.cap", "curves.sync_s",
    ]  # fmt: skip
    with pytest.raises(UserError, match="above it"):
        curves_of({**FOUND, "cap": 15})
    with pytest.raises(UserError, match="no curves"):
        curves_of({"rows": {}})


def test_curves_of_a_file(file: Path) -> None:
    measured = read_curves(file)
    assert measured.curves.decode.seconds(8) == pytest.approx(8 / 200)
    assert measured.setting == Setting(
        prompts=8, group=4, waves=4, streaming=True, tokens=16, micro_batch_tokens=256
    )
    assert measured.notes == ()


def test_curves_of_a_record(tmp_path: Path) -> None:
    """Step 2: 2 prompts x 2 completions of 3, 5, 8 and 4 tokens, all at once: 8 decode steps, 20 tokens, so
    2.5 sequences; 4 s of sampling: 5 tokens a second. One group is kept: 8 + 4 tokens, 10 of them inputs;
    40 inputs computed, so its prompt has 30; 40 inputs in 0.5 + 1.5 s."""
    config = {
        "algorithm": {"prompts_per_step": 2, "group_size": 2},
        "sampler": {"name": "hf", "max_new_tokens": 8, "schedule": "preemptive", "servers": 1, "waves": 1,
                    "streaming": True, "prompts_per_call": 1, "max_sequences": 64},
        "learner": {"micro_batch_tokens": 128},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    times = {"sample": 4.0, "verify": 0.1, "logprob": 0.5, "backprop": 1.5, "optimizer": 0.2, "sync": 0.3,
             "other": 0.01}  # fmt: skip
    row = {"tokens/computed": 40, "completions/forwarded": 2, "tokens/forwarded": 12,
           "filter/kept_share": 0.5, **{f"time/{k}_s": v for k, v in times.items()}}  # fmt: skip
    rows = [{**row, "step": n, "attempt": 1} for n in (1, 2)]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    samples = [
        {"step": n, "attempt": 1, "prompt": p, "index": i, "tokens": t}
        for n in (1, 2)
        for p, own in (("a", (3, 5)), ("b", (8, 4)))
        for i, t in enumerate(own)
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in samples))
    measured = read_cells([tmp_path])
    assert measured.curves.decode.points == ((2.5, pytest.approx(2.5 / 5)),)
    assert measured.curves.lengths == ((3, 5), (8, 4))
    assert measured.curves.learner_tokens_per_s == pytest.approx(20.0)
    assert measured.curves.prompt_tokens == 30
    assert (measured.curves.optimizer_s, measured.curves.sync_s) == (0.2, 0.3)
    assert measured.curves.other_s == pytest.approx(0.11)
    assert measured.setting.kept == 0.5 and not measured.setting.streaming
    assert "one point" in measured.notes[0]
    p = predict_batch(measured.curves, measured.setting, measured.curves.lengths)
    assert p.sampling_s == pytest.approx(4.0)


def test_a_folder_that_is_no_cell(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a cell"):
        read_cells([tmp_path])
