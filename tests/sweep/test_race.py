"""Races: what they decide, as pure functions; their rounds, with stand-ins for launches; a real one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dash_exp.record import journal
from dash_exp.record import manifest as manifests
from dash_exp.record.folder import Recorder, read_json
from dash_exp.record.manifest import Plan
from dash_exp.statistics.comparison import LOOK_WEIGHTS
from dash_exp.sweep import report
from dash_exp.sweep.detectable import power_of, power_text
from dash_exp.sweep.dispatch import LaunchRequest
from dash_exp.sweep.race import rounds, run
from dash_exp.sweep.race.rounds import Field, Runs
from tests.sweep.sweep_fixtures import FROZEN, Capture, cell_of, command, refused, write_yaml

# Decisions ----------------------------------------------------------------------------------------

RNG = np.random.default_rng(5)
ASKED = [f"p{n}" for n in range(60)]


def runs_of(mean: float, seeds: int) -> dict[int, dict[str, float]]:
    """Verdicts of `seeds` runs whose accuracy is about `mean`."""
    return {s: {p: float(RNG.random() < mean) for p in ASKED} for s in range(seeds)}


def field_of(*recipes: str, **more: Any) -> Field:
    return Field(recipes, tuple((one, recipes[0]) for one in recipes[1:]), (0, 1), **more)


LOW, HIGH = 0.2, 0.8
STANDINGS: list[tuple[str, Field, Runs, list[tuple[int, str, int | None]]]] = [
    # case, what is raced, its runs, and of each comparison: seeds looked at, how it stands, the next look
    ("nothing has run", field_of("a", "b"), {}, [(0, "open", 3)]),
    ("two seeds are no look", field_of("a", "b"), {r: runs_of(LOW, 2) for r in "ab"}, [(0, "open", 3)]),
    (
        "one arm lacks a seed",
        field_of("a", "b"),
        {"a": runs_of(LOW, 3), "b": runs_of(HIGH, 2)},
        [(0, "open", 3)],
    ),
    (
        "a large difference",
        field_of("a", "b"),
        {"a": runs_of(LOW, 3), "b": runs_of(HIGH, 3)},
        [(3, "decided", 5)],
    ),
    ("no difference", field_of("a", "b"), {r: runs_of(LOW, 5) for r in "ab"}, [(5, "open", 8)]),
    (
        "no difference at the last look",
        field_of("a", "b"),
        {r: runs_of(LOW, 12) for r in "ab"},
        [(12, "undecided", None)],
    ),
    (
        "one is decided, the other goes on",
        field_of("a", "b", "c"),
        {"a": runs_of(LOW, 3), "b": runs_of(HIGH, 3), "c": runs_of(LOW, 3)},
        [(3, "decided", 5), (3, "open", 5)],
    ),
    (
        "one run of a base model is enough",
        field_of("a", "b", untrained=frozenset("a")),
        {"a": runs_of(LOW, 1), "b": runs_of(HIGH, 3)},
        [(3, "decided", 5)],
    ),
    (
        "a base model may be the arm",
        Field(("b", "a"), (("a", "b"),), (0, 1), frozenset("a")),
        {"a": runs_of(LOW, 1), "b": runs_of(HIGH, 3)},
        [(3, "decided", 5)],
    ),
    (
        "numbers of runs on one machine",
        field_of("a", "b", per_run=True),
        {"a": {s: {"cpu": 1 + s / 99} for s in range(3)}, "b": {s: {"cpu": 9 + s / 99} for s in range(3)}},
        [(3, "decided", 5)],
    ),
    *(
        (
            f"equal within {margin}",
            Field(("a", "b"), (("b", "a"),), (0, 1, 2), per_run=True, margins={("b", "a"): margin}),
            {r: {s: {"cpu": 1 + s / 99} for s in range(3)} for r in "ab"},
            [(3, word, 5)],
        )
        for margin, word in ((0.5, "decided"), (0.03, "open"))
    ),
    (
        "times of different machines are not compared",
        field_of("a", "b", per_run=True),
        {"a": {s: {"cpu": 1 + s / 99} for s in range(3)}, "b": {s: {"gpu": 9 + s / 99} for s in range(3)}},
        [(3, "open", 5)],
    ),
]


@pytest.mark.parametrize(
    ("field", "runs", "expected"), [case[1:] for case in STANDINGS], ids=[c[0] for c in STANDINGS]
)
def test_how_comparisons_stand(field: Field, runs: Runs, expected: list[tuple[int, str, int | None]]) -> None:
    found = rounds.standings(field, runs)
    words = ["decided" if one.decided else "open" if one.open else "undecided" for one in found]
    assert [(one.look, word, one.next_look) for one, word in zip(found, words, strict=True)] == expected


def test_a_difference_has_the_sign_of_its_arm() -> None:
    base = {"a": runs_of(LOW, 1), "b": runs_of(HIGH, 3)}
    for arm, other, sign in (("a", "b", -1), ("b", "a", 1)):
        (one,) = rounds.standings(Field((other, arm), ((arm, other),), (0,), frozenset("a")), base)
        assert one.found is not None and math.copysign(1, one.found.difference) == sign


def test_a_decision_is_never_undone_by_a_later_look_at_another_comparison() -> None:
    """With p just small enough for two comparisons, one of which has not been looked at yet."""
    field, runs = field_of("a", "b", "c"), {"a": runs_of(0.4, 3), "b": runs_of(0.6, 3)}
    before = rounds.standings(field, runs)
    after = rounds.standings(field, {**runs, "c": runs_of(0.4, 3)})
    assert before[0].p == after[0].p == pytest.approx(2 * _raw(field, runs))


def _raw(field: Field, runs: Runs) -> float:
    found = rounds.compare(field, runs, "b", "a", 3)
    assert found is not None
    return min(0.5, found.p_value() / LOOK_WEIGHTS[3])


def test_only_open_arms_get_seeds_and_listed_seeds_come_first() -> None:
    field = Field(("a", "b", "c"), (("b", "a"), ("c", "a")), (7, 2))
    assert field.first_seeds(5) == (7, 2, 0, 1, 3)
    runs = {r: {7: {}, 2: {}, 0: {}} for r in "abc"}
    found = [rounds.Standing("b", "a", p=0.01, look=3), rounds.Standing("c", "a", p=0.3, look=3)]
    assert rounds.wanted(field, found, runs) == [("c", 1), ("c", 3), ("a", 1), ("a", 3)]
    assert rounds.wanted(field, found, runs, stuck={"c"}) == []
    done = [found[0], rounds.Standing("c", "a", p=0.3, look=12)]
    assert rounds.wanted(field, done, runs) == []


NAN = math.nan
HALVES: list[tuple[dict[str, float], bool, str]] = [
    ({"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.4}, False, "bd"),
    ({"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.4}, True, "ac"),
    ({"a": 0.1, "b": 0.3, "c": 0.2}, False, "bc"),  # rounded up
    ({"a": 0.2, "b": 0.2, "c": 0.2, "d": 0.2}, False, "ab"),  # of equal ones the earlier
    ({"a": NAN, "b": 0.0, "c": NAN, "d": NAN}, False, "b"),  # without a score, none goes on
    ({"a": 0.5}, False, "a"),
]


def test_the_better_half_goes_on() -> None:
    for scores, lower, kept in HALVES:
        assert "".join(rounds.better_half(list(scores), scores, lower)) == kept, scores


# Rounds, with launches that are stood in for ------------------------------------------------------

Curve = Callable[[Sequence[str], int], float]


class StandIn:
    """In place of `launch`: writes the manifest as a launch does, and of each cell the record that training
    would leave. `curve`: the reward at a step, by the cell's overrides. `launches`: names of folders."""

    def __init__(self, curve: Curve, fails: str = "-"):
        self.curve, self.fails = curve, fails
        self.launches: list[list[str]] = []
        self.die_in: int | None = None

    def __call__(self, request: LaunchRequest, **_: Any) -> int:
        manifest = manifests.write(request.plan, request.root)
        until = next((int(a.partition("=")[2]) for a in manifest.actions if "until_step" in a), 99)
        self.launches.append(list(request.cells or ()))
        for number, entry in enumerate(e for e in manifest.entries if request.includes(e)):
            if len(self.launches) == self.die_in and number == 1:
                raise KeyboardInterrupt
            self.train(manifest.cell(entry), entry.overrides, min(until, 8))
        return 0

    def train(self, folder: Path, overrides: Sequence[str], end: int) -> None:
        done = int(read_json(folder / "status.json")["step"])
        journal.note(folder, "start", host="elsewhere", pid=1, job=None, sweep="tried")
        with Recorder(folder) as recorder:
            steps = [
                {"step": n, "reward/mean": self.curve(overrides, n), "time/step_s": 1.0}
                for n in range(done + 1, end + 1)
            ]
            recorder.append("steps", steps)
            failed = any(self.fails in text for text in overrides)
            state = "failed" if failed else "finished" if end == 8 else "interrupted"
            recorder.status(state, end, reason="planned")
        journal.note_end(folder, 1 if failed else 0, "nan" if failed else None)


@pytest.fixture
def raced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., StandIn]:
    def install(curve: Curve, **more: Any) -> StandIn:
        made = StandIn(curve, **more)
        monkeypatch.setattr(run, "launch", made)
        monkeypatch.setattr(run, "FOLLOW_S", 0.0)
        return made

    return install


def by_beta(overrides: Sequence[str], step: int) -> float:
    """Larger beta, larger reward; a little noise of seeds."""
    values = dict(text.split("=") for text in overrides if "=" in text)
    return float(values["algorithm.beta"]) * step + noise(overrides, step)


def noise(overrides: Sequence[str], step: int) -> float:
    return 0.001 * (sum(map(ord, "".join(overrides))) % 7)


def test_seeds_are_added_until_decided(
    tmp_path: Path, capsys: Capture, raced: Callable[..., StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two recipes differ clearly and are decided with three seeds; two are equal but for noise, and get more
    seeds, up to the last look. Killed in the second round, it goes on there, without a run done twice."""
    monkeypatch.setattr(rounds, "LOOKS", (3, 5))
    monkeypatch.setattr(report, "runs", lambda pid, word: False)  # this process would be taken for the race
    path = write_yaml(tmp_path, **{"algorithm.beta": [0.1, 0.9, 0.1001], "algorithm.steps": [8]})
    compare_also(path, (0.9, 0.1001), (0.1001, 0.1))
    words = ["race", path, "--until", "decided", "--metric", "reward", f"run.dir={tmp_path / 'out'}"]
    stand_in = raced(by_beta)
    stand_in.die_in = 2
    assert command(*words) == 130
    assert [len(cells) for cells in stand_in.launches] == [9, 4]
    assert command("status", "tried", f"run.dir={tmp_path / 'out'}") == 0
    assert "race until decided, reward: not running; the same" in capsys.readouterr().out
    stand_in.die_in = None
    assert command(*words) == 0
    assert [len(cells) for cells in stand_in.launches] == [9, 4, 3]
    assert set(stand_in.launches[2]) < set(stand_in.launches[1])
    manifest = manifests.read(tmp_path / "out" / "sweeps" / "tried")
    betas = [text for e in manifest.entries for text in e.overrides if "beta" in text]
    assert [betas.count(f"algorithm.beta={value}") for value in (0.1, 0.9, 0.1001)] == [5, 3, 5]
    assert {read_json(manifest.cell(e) / "status.json")["attempt"] for e in manifest.entries} == {1}
    printed = capsys.readouterr().out
    assert "beta=0.9 against beta=0.1001: decided after 3 seeds" in printed
    assert "beta=0.1001 against beta=0.1: undecided after 5 seeds" in printed
    assert command("status", "tried", f"run.dir={tmp_path / 'out'}") == 0
    assert "race until decided, reward: ended" in capsys.readouterr().out
    assert command(*words) == 0 and len(stand_in.launches) == 3  # it has ended


def test_halving_finds_the_same_winner(
    tmp_path: Path, capsys: Capture, raced: Callable[..., StandIn]
) -> None:
    path = write_yaml(tmp_path, **{"algorithm.beta": [0.1, 0.4, 0.2, 0.3], "algorithm.steps": [8]})
    path.write_text(path.read_text().replace("[0, 1]", "[0]"))
    words = ["race", path, "--rungs", "2,4", "--halve", "reward", f"run.dir={tmp_path / 'out'}"]
    stand_in = raced(by_beta)
    stand_in.die_in = 2
    assert command(*words) == 130
    stand_in.die_in = None
    assert command(*words) == 0
    assert [len(cells) for cells in stand_in.launches] == [4, 2, 1, 1]
    manifest = manifests.read(tmp_path / "out" / "sweeps" / "tried")
    steps = [read_json(manifest.cell(e) / "status.json")["step"] for e in manifest.entries]
    assert sorted(steps) == [2, 2, 4, 8]
    printed = capsys.readouterr().out
    assert "end: beta=0.4" in printed and "50% of the steps that all cells would have taken" in printed
    everything = raced(by_beta)
    words[3:6] = ["2,4", "--metric", "reward"]
    assert command(*words) == 0  # no recipe is out: those that had stopped go on
    assert [len(cells) for cells in everything.launches] == [2, 3]
    assert "end: beta=0.4" in capsys.readouterr().out


def test_failed_cells_and_a_spent_budget_end_a_race(
    tmp_path: Path, capsys: Capture, raced: Callable[..., StandIn]
) -> None:
    path = write_yaml(tmp_path, **{"algorithm.beta": [0.1, 0.9], "algorithm.steps": [8]})
    words = ["race", path, "--until", "decided", "--metric", "reward"]
    stand_in = raced(by_beta, fails="beta=0.9")
    assert command(*words, f"run.dir={tmp_path / 'a'}") == 1 and len(stand_in.launches) == 1
    assert "beta=0.9 against beta=0.1: open; beta=0.9 failed" in capsys.readouterr().out
    stand_in = raced(noise)
    assert command(*words, f"run.dir={tmp_path / 'b'}", "--budget-hours", "1e-9") == 1
    assert len(stand_in.launches) == 1 and "budget spent" in capsys.readouterr().out


REFUSED = {
    "": "needs either --until decided or --rungs",
    "--until decided --rungs 2": "needs either --until decided or --rungs",
    "--halve reward": "needs --rungs",
    "--rungs 3,2": "growing numbers",
    "--rungs 2,x": "growing numbers",
    "--rungs 2,9 --halve digits": "allowed: reward, time|the cells have 8 steps",
    "--until decided --metric rewrad run.force=true": "did you mean 'reward'|archive what each round has",
    "--until decided --metric reward --budget-hours 0": "above 0",
    "--until decided --metric reward algorithm.beta=1": "one recipe",
    "--rungs 3 --halve accuracy evaluation=digits evaluation.every=2": "is not measured at step 3",
}


def compare_also(path: Path, *pairs: tuple[float, float]) -> None:
    """State in a sweep's file which values of beta are compared."""
    stated = [{"arm": {"algorithm.beta": arm}, "other": {"algorithm.beta": other}} for arm, other in pairs]
    path.write_text(json.dumps({**json.loads(path.read_text()), "compare": stated}))


def test_what_is_refused_before_anything_starts(tmp_path: Path, capsys: Capture) -> None:
    path = write_yaml(tmp_path, **{"algorithm.beta": [0.1, 0.9], "algorithm.steps": [8]})
    for words, expected in REFUSED.items():
        printed = refused(capsys, "race", path, f"run.dir={tmp_path / 'out'}", *words.split())
        assert all(text in printed for text in expected.split("|")), words
    compare_also(path, (0.9, 0.5))
    printed = refused(capsys, "race", path, f"run.dir={tmp_path / 'out'}", "--until", "decided")
    assert "algorithm.beta=0.5 selects 0 of the 2 recipes" in printed
    assert not (tmp_path / "out").exists()


def test_plan_states_what_its_seeds_can_detect(tmp_path: Path) -> None:
    """With too few seeds, with assumed noise, and with the noise of cells that have finished."""
    sets = {
        "evaluation": {
            **FROZEN["evaluation"],
            "limit": 40,
            "sets": {"sums": {"limit": None, "kind": "digits"}},
        }
    }
    for data in sets["evaluation"]["sets"].values():
        data.update({"path": None, "id_range": None})
    texts = []
    for seeds in (2, 3, 3):
        cells = [
            cell_of(arm, seed, 10 * n + seed)
            for n, arm in enumerate(("dash", "grpo"))
            for seed in range(seeds)
        ]
        plan = Plan(
            "mine", tuple(replace(c, cell=replace(c.cell, frozen={**c.cell.frozen, **sets})) for c in cells)
        )
        found = power_of(plan, tmp_path)
        assert found is not None
        texts.append(power_text(found))
        if len(texts) == 2:  # now its cells are finished
            for cell in manifests.write(plan, tmp_path).entries:
                with Recorder(tmp_path / "cells" / cell.folder) as recorder:
                    rows = [
                        {"step": 2, "dataset": "sums", "prompt": p, "scores": [v], "outcomes": [""]}
                        for p, v in runs_of(0.5, 1)[0].items()
                    ]
                    recorder.append("eval_samples", rows)
                    recorder.status("finished", 2)
    assert texts[0] == "accuracy on sums: 2 seeds: no verdict (needs 3)"
    assert (
        texts[1].startswith("3 seeds and 40 prompts of sums detect differences of ")
        and "assumed noise: sd 4.1" in texts[1]
    )
    assert texts[2].startswith("3 seeds and 60 prompts of sums") and "noise of 6 finished cells" in texts[2]
