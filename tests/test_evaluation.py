"""Evaluation: its statistics against brute force and hand-worked tables; what a base result depends on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import Future
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dash_exp.evaluation import metrics as evaluation
from dash_exp.evaluation.metrics import (
    EvalResult,
    EvalSet,
    base_key,
    cached,
    evaluate,
    judging_code,
    shared,
    summarise,
)
from dash_exp.record.folder import Row
from dash_exp.statistics.shares import bootstrap_interval, pass_at_k, wilson_interval
from dash_exp.tasks.prompts import PromptSet
from dash_exp.types import Completion, Decoding, Group, Prompt, Score
from tests.conftest import REPOSITORY

# --- statistics ------------------------------------------------------------------------------


def exact_pass_at_k(n: int, correct: int, k: int) -> Fraction:
    """All ways of drawing k of n samples, counted one by one."""
    draws = list(itertools.combinations(range(n), k))
    return Fraction(sum(min(draw) < correct for draw in draws), len(draws))


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_equals_every_draw_counted(n: int) -> None:
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        assert pass_at_k(n, correct, k) == pytest.approx(float(exact_pass_at_k(n, correct, k)), abs=1e-12)


def test_pass_at_k_by_hand() -> None:
    # n = 8, c = 2, k = 4: 1 - C(6,4) / C(8,4) = 1 - 15/70
    assert pass_at_k(8, 2, 4) == pytest.approx(55 / 70)
    assert math.isnan(pass_at_k(4, 4, 5))  # cannot be estimated, though every sample was right


@given(st.integers(1, 300), st.data())
def test_pass_at_k_grows_with_k_and_with_the_count(n: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, n))
    values = [pass_at_k(n, correct, k) for k in range(1, n + 1)]
    assert values[0] == pytest.approx(correct / n)
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(values))
    assert all(0 <= v <= 1 for v in values)
    if correct < n:
        assert pass_at_k(n, correct + 1, 1) > values[0]


def test_wilson_by_hand() -> None:
    # 7 of 10, z = 1.96: centre (0.7 + 0.19207) / 1.38415, half 1.95996 x 0.17403 / 1.38415 (Wilson 1927)
    low, high = wilson_interval(7, 10)
    assert (low, high) == (pytest.approx(0.39678, abs=1e-5), pytest.approx(0.89221, abs=1e-5))


def test_the_bootstrap_covers_about_as_often_as_it_says() -> None:
    """200 samples of 60 prompts with a known mean: 95 % intervals hold it 88 to 100 % of the time."""
    rng = random.Random(5)
    hits = 0
    for seed in range(200):
        values = [rng.choice([0, 0.125, 0.5, 1.0]) for _ in range(60)]
        low, high = bootstrap_interval(values, seed=seed, resamples=400)
        hits += low <= statistics.fmean([0, 0.125, 0.5, 1.0]) <= high
    assert 176 <= hits <= 200


# --- summaries -------------------------------------------------------------------------------


def row(outcomes: str, scores: list[float | None] | None = None, tokens: int = 3) -> Row:
    """A prompt's row: c correct, w wrong, t timeout, e verifier_error."""
    names = {"c": "correct", "w": "wrong", "t": "timeout", "e": "verifier_error"}
    values = {"c": 1.0, "w": 0.0, "t": 0.0, "e": None}
    return {
        "dataset": "d",
        "prompt": "p",
        "scores": [values[o] for o in outcomes] if scores is None else scores,
        "outcomes": [names[o] for o in outcomes],
        "tokens": [tokens] * len(outcomes),
        "truncated": [o == "t" for o in outcomes],
    }


def by_metric(rows: list[Row]) -> dict[str, Row]:
    return {r["metric"]: r for r in rows}


def test_a_table_worked_by_hand() -> None:
    """Three prompts x 4 samples with 4, 1 and 0 right: accuracy (1 + 1/4 + 0) / 3; pass@2 (1 + 1/2 + 0)/3,
    since 1 - C(3,2)/C(4,2) = 1 - 3/6; pass@4 (1 + 1 + 0)/3."""
    found = by_metric(summarise("d", [row("cccc", tokens=2), row("wcww"), row("wwwt", tokens=4)], [1, 2, 4]))
    assert list(found) == [
        "accuracy",
        "pass@1",
        "pass@2",
        "pass@4",
        "length/mean_tokens",
        "length/truncated_share",
        "verdicts/failed",
    ]
    assert found["accuracy"]["value"] == pytest.approx(1.25 / 3)
    assert found["pass@1"]["value"] == pytest.approx(1.25 / 3)
    assert found["pass@2"]["value"] == pytest.approx(1.5 / 3)
    assert found["pass@4"]["value"] == pytest.approx(2 / 3)
    assert found["length/mean_tokens"]["value"] == pytest.approx((4 * 2 + 4 * 3 + 4 * 4) / 12)
    assert found["length/truncated_share"]["value"] == pytest.approx(1 / 12)
    assert found["verdicts/failed"]["value"] == 1
    assert {r["n"] for r in found.values()} == {3}
    low, high = bootstrap_interval([1.0, 0.25, 0.0])
    assert (found["accuracy"]["low"], found["accuracy"]["high"]) == (low, high)


def test_what_cannot_be_estimated_has_no_value() -> None:
    found = by_metric(summarise("d", [row("cc"), row("ww")], [2, 4]))
    assert found["pass@4"] == {"dataset": "d", "metric": "pass@4", "n": 0}
    assert found["pass@2"]["value"] == 0.5


def test_one_sample_a_prompt_is_accuracy_with_wilsons_interval() -> None:
    found = by_metric(summarise("d", [row("c")] * 7 + [row("w")] * 3, [1]))
    low, high = wilson_interval(7, 10)
    for metric in ("accuracy", "pass@1"):
        assert found[metric] == {
            "dataset": "d",
            "metric": metric,
            "value": 0.7,
            "n": 10,
            "low": low,
            "high": high,
        }


def test_an_interval_is_over_prompts_never_over_samples() -> None:
    """The same verdicts as 4 prompts x 25 equal samples and as 100 prompts: the first is far less sure."""
    few = by_metric(summarise("d", [row("c" * 25)] * 2 + [row("w" * 24 + "c")] * 2))["accuracy"]
    many = by_metric(summarise("d", [row("c")] * 52 + [row("w")] * 48))["accuracy"]
    assert few["value"] == many["value"] == 0.52
    assert few["n"] == 4 and few["high"] - few["low"] > 3 * (many["high"] - many["low"])


def test_all_prompts_right_leaves_an_interval_with_a_width() -> None:
    accuracy = by_metric(summarise("d", [row("cccc")] * 20))["accuracy"]
    assert accuracy["value"] == 1.0 and accuracy["low"] < 0.9 and accuracy["high"] == 1.0


def test_a_verdict_that_could_not_be_reached_is_neither_right_nor_wrong() -> None:
    """`ce`: one verdict, right. `ee`: none, so this prompt is in no mean. pass@2 needs two verdicts."""
    found = by_metric(summarise("d", [row("ce"), row("ee"), row("cw")], [1, 2]))
    assert (found["accuracy"]["value"], found["accuracy"]["n"]) == (0.75, 2)
    assert (found["pass@1"]["value"], found["pass@1"]["n"]) == (0.75, 2)
    assert (found["pass@2"]["value"], found["pass@2"]["n"]) == (1.0, 1)
    assert found["verdicts/failed"]["value"] == 3
    nothing = by_metric(summarise("d", [row("e")], [1]))
    assert nothing["accuracy"] == {"dataset": "d", "metric": "accuracy", "n": 0}


def test_scores_may_be_fractions_but_only_correct_passes() -> None:
    found = by_metric(summarise("d", [row("ww", [0.5, 0.25]), row("cw", [1.0, 0.1])], [2]))
    assert found["accuracy"]["value"] == pytest.approx((0.375 + 0.55) / 2)
    assert found["pass@2"]["value"] == 0.5
    single = by_metric(summarise("d", [row("w", [0.5]), row("c", [1.0])]))["accuracy"]
    assert (single["low"], single["high"]) == bootstrap_interval([0.5, 1.0])


@given(st.lists(st.text("cwte", min_size=3, max_size=3), min_size=1, max_size=12), st.randoms())
def test_the_order_of_prompts_and_samples_changes_nothing(prompts: list[str], rng: random.Random) -> None:
    def values(rows: list[str]) -> dict[str, Any]:
        return {r["metric"]: (r.get("value"), r["n"]) for r in summarise("d", [row(p) for p in rows], [1, 3])}

    mixed = ["".join(rng.sample(p, 3)) for p in rng.sample(prompts, len(prompts))]
    first, second = values(prompts), values(mixed)
    for metric, (value, n) in first.items():
        assert second[metric][1] == n
        assert second[metric][0] == (None if value is None else pytest.approx(value))
    if first["accuracy"][0] is not None:
        assert first["pass@1"][0] == pytest.approx(first["accuracy"][0])  # all scores are 0 or 1
        if first["pass@3"][1] == first["pass@1"][1]:
            assert first["pass@3"][0] >= first["pass@1"][0] - 1e-12


# --- asking ----------------------------------------------------------------------------------


class FakeSampler:
    """Answers `1` when a seed is even, in an order of its own; remembers what it was asked."""

    policy_version = 0

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def stream(self, requests: Any, decoding: Decoding) -> Any:
        self.asked.append((requests, decoding))
        for r in reversed(requests):
            done = [Completion((5, 1), (-0.1, -0.2), str(s % 2), "stop", 0) for s in r.seeds]
            yield Group(r.position, r.prompt, tuple(done))

    def load_weights(self, version: int) -> None: ...

    def close(self) -> None: ...


class FakeJudge:
    version = "fake-1"

    def submit(self, text: str, answer: str, facts: object = None) -> Future[Score]:
        future: Future[Score] = Future()
        right = text == answer
        future.set_result(Score(float(right), "correct" if right else "wrong"))
        return future


def eval_set(**changes: Any) -> EvalSet:
    prompts = tuple(Prompt(f"p{n}", "t", "", (3 + n, 4), "0") for n in range(6))
    one = EvalSet(
        "d", PromptSet("t", prompts, 0, "hash"), FakeJudge(), Decoding(8, 0.7, (1,), 0.9), 4, "v/x", (2,)
    )
    return dataclasses.replace(one, **changes)


def test_every_prompt_is_asked_as_often_and_kept_in_order() -> None:
    sampler = FakeSampler()
    result = evaluate(eval_set(), sampler, run_seed=3)
    ((requests, decoding),) = sampler.asked
    assert decoding.top_p == 0.9
    assert [len(set(r.seeds)) for r in requests] == [4] * 6
    assert [r["prompt"] for r in result.prompts] == [f"p{n}" for n in range(6)]
    for r, asked in zip(result.prompts, requests, strict=True):
        assert r["scores"] == [float(s % 2 == 0) for s in asked.seeds]
    assert result == evaluate(eval_set(), FakeSampler(), run_seed=3)
    assert result != evaluate(eval_set(), FakeSampler(), run_seed=4)
    assert [m["metric"] for m in result.metrics][:2] == ["accuracy", "pass@2"]


def test_the_outcome_counts_where_a_function_of_the_user_judges() -> None:
    class Odd(FakeJudge):
        def submit(self, text: str, answer: str, facts: object = None) -> Future[Score]:
            future: Future[Score] = Future()
            verdict = super().submit(text, answer).result()
            future.set_result(dataclasses.replace(verdict, value=10 * verdict.value - 3))
            return future

    own = evaluate(eval_set(judge=Odd(), judging="own/5 s"), FakeSampler(), run_seed=3)
    assert own == evaluate(eval_set(), FakeSampler(), run_seed=3)


# --- base results ----------------------------------------------------------------------------

ENGINE = {"sampler": "hf", "precision": "bf16", "device": "cpu", "packages": {"torch": "2"}}


def key_of(**changes: Any) -> dict[str, Any]:
    settings = {"weights": "w", "engine": ENGINE, "run_seed": 0, **changes}
    one = settings.pop("one", eval_set())
    return base_key(one, settings["weights"], settings["engine"], settings["run_seed"])


def with_decoding(**changes: Any) -> EvalSet:
    return eval_set(decoding=dataclasses.replace(eval_set().decoding, **changes))


def with_prompts(**changes: Any) -> EvalSet:
    return eval_set(prompts=dataclasses.replace(eval_set().prompts, **changes))


class OtherJudge(FakeJudge):
    version = "fake-2"


OTHER_TEMPLATE = (Prompt("p0", "t", "", (9, 9, 9), "0"), *eval_set().prompts.prompts[1:])


CHANGES: dict[str, dict[str, Any]] = {
    "weights": {"weights": "other"},
    "precision": {"engine": {**ENGINE, "precision": "fp32"}},
    "engine's version": {"engine": {**ENGINE, "packages": {"torch": "3"}}},
    "seed": {"run_seed": 1},
    "top_p": {"one": with_decoding(top_p=1.0)},
    "temperature": {"one": with_decoding(temperature=0.8)},
    "length": {"one": with_decoding(max_new_tokens=9)},
    "stop": {"one": with_decoding(stop_ids=(1, 2))},
    "template": {"one": with_prompts(prompts=OTHER_TEMPLATE)},
    "gold answers": {"one": with_prompts(content_hash="other")},
    "samples": {"one": eval_set(samples=5)},
    "judge": {"one": eval_set(judge=OtherJudge())},
    "extraction": {"one": eval_set(judging="v/y")},
    "label": {"one": eval_set(label="e")},  # part of the samples' seeds
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_can_change_a_base_result_is_in_its_key(name: str) -> None:
    assert key_of(**CHANGES[name]) != key_of()


def test_what_cannot_change_it_is_not() -> None:
    greedy = with_decoding(temperature=0.0, top_p=1.0)
    assert key_of(one=greedy) == key_of(one=dataclasses.replace(greedy, label="e"), run_seed=5)
    assert key_of(one=eval_set(k=(1, 8))) == key_of()  # a summary of the same verdicts
    assert json.loads(json.dumps(key_of())) == key_of()


def test_other_code_gives_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, judging = key_of(), {v: judging_code(v) for v in ("integer", "math", "code")}
    for part in (*evaluation.SAMPLING_CODE, evaluation.JUDGES):
        source, copy = REPOSITORY / "dash_exp" / part, tmp_path / part
        files = source.rglob("*.py") if source.is_dir() else [source]
        for file in files:
            place = copy / file.relative_to(source) if source.is_dir() else copy
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())
    monkeypatch.setattr(evaluation, "PACKAGE", tmp_path)
    assert key_of() == before and {v: judging_code(v) for v in judging} == judging
    (tmp_path / "verifiers" / "math" / "extract.py").write_text("")
    assert [v for v in judging if judging_code(v) != judging[v]] == ["math"]
    (tmp_path / "verifiers" / "judges.py").write_text("")
    assert all(judging_code(v) != judging[v] for v in judging)
    (tmp_path / "sampling" / "hf.py").write_text("")
    assert key_of()["code"] != before["code"]


def result_of(outcomes: str) -> EvalResult:
    rows = (row(outcomes),)
    return EvalResult(tuple(summarise("d", rows)), rows)


@pytest.mark.parametrize(
    ("outcomes", "judging", "kept"),
    [
        ("cw", "math/boxed", True),
        ("ct", "math/boxed", False),
        ("ce", "math/boxed", False),
        ("ct", "code/program", True),
        ("ce", "code/program", False),
    ],
)
def test_a_result_with_failed_verdicts_is_not_stored(
    tmp_path: Path, outcomes: str, judging: str, kept: bool
) -> None:
    """A program that runs too long is wrong; a maths answer that does may have met a busy machine."""
    calls = []

    def compute() -> EvalResult:
        calls.append(1)
        return result_of(outcomes)

    first = cached({"judging": judging}, tmp_path, compute, "the first")
    again = cached({"judging": judging}, tmp_path, compute, "the second")
    assert (first[1], again[1], len(calls)) == ("", "the first" if kept else "", 1 if kept else 2)
    assert first[0] == again[0] == result_of(outcomes)


def test_another_label_and_other_k_share_the_verdicts(tmp_path: Path) -> None:
    one = with_decoding(temperature=0.0, top_p=1.0)
    first, hit = shared(one, key_of(one=one), tmp_path, lambda: evaluate(one, FakeSampler(), 0))
    other = dataclasses.replace(one, label="mine", k=(1, 4))
    again, known = shared(other, key_of(one=other), tmp_path, lambda: pytest.fail("asked again"))
    assert (hit, known) == ("", "this run")
    assert {r["dataset"] for r in (*again.prompts, *again.metrics)} == {"mine"}
    assert [m["metric"] for m in again.metrics][:3] == ["accuracy", "pass@1", "pass@4"]
    assert [r["scores"] for r in again.prompts] == [r["scores"] for r in first.prompts]


ASKER = """
import sys, time
from pathlib import Path
from dash_exp.evaluation.metrics import cached
from tests.test_evaluation import result_of

folder = Path(sys.argv[1])

def compute():
    with (folder / "calls").open("a") as stream:
        stream.write("x")
    (folder / f"asking-{sys.argv[2]}").touch()
    time.sleep(1.0)
    return result_of("cwc")

(folder / f"there-{sys.argv[2]}").touch()
while len(list(folder.glob("there-*"))) < 2:
    time.sleep(0.01)
result, hit = cached({"a": 1}, folder / "base", compute)
print(bool(hit), result.metrics[0]["value"])
"""


def test_two_processes_that_ask_at_once_compute_once(tmp_path: Path) -> None:
    start = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ASKER, str(tmp_path), str(n)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    said = sorted(p.communicate(timeout=60)[0].split() for p in processes)
    assert said == [["False", str(2 / 3)], ["True", str(2 / 3)]], time.monotonic() - start
    assert (tmp_path / "calls").read_text() == "x"
