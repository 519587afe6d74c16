"""Which prompts are asked: skipping by GRESO's rule, and fresh prompts for what the filter dropped."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from dash_exp.config.schema import SelectionConfig
from dash_exp.record.folder import read_final
from dash_exp.tasks.prompts import PromptSet, prompts_at
from dash_exp.tasks.selection import Chooser, kind_of
from dash_exp.train.loop import prompts_missing
from dash_exp.train.parts import Plan
from dash_exp.types import AdvantagedGroup, Group, Outcome, Prompt, Score, ScoredGroup
from tests.test_run import differences, run_here
from tests.test_updates import plan_of

PROMPTS = PromptSet("t", tuple(Prompt(f"p{i}", "t", "", (1,), "") for i in range(20)), 0, "hash")


def scores(*outcomes: Outcome) -> list[Score]:
    return [Score(float(o == "correct"), o) for o in outcomes]


RIGHT, WRONG, MIXED = scores("correct", "correct"), scores("wrong", "timeout"), scores("correct", "wrong")


def greso(**settings: float) -> Chooser:
    return Chooser(PROMPTS, 3, SelectionConfig("greso", **settings))


def test_what_a_group_says_of_its_prompt() -> None:
    assert [kind_of(one) for one in (RIGHT, WRONG, MIXED)] == ["easy", "hard", None]
    assert (
        kind_of(scores("correct", "verifier_error")) == "easy" and kind_of(scores("verifier_error")) is None
    )


def test_without_selection_the_order_is_the_endless_one() -> None:
    chooser = Chooser(PROMPTS, 3, SelectionConfig())
    drawn = [p.id for count in (3, 8, 30) for p in chooser.draw(count)]
    chooser.observe([(PROMPTS.prompts[0], RIGHT)])
    assert drawn == [p.id for p in prompts_at(PROMPTS, 3, 0, 41)]
    assert chooser.streaks == {} and chooser.take_numbers() == {}


def test_streaks_count_groups_of_one_kind_in_a_row() -> None:
    chooser, prompt = greso(), PROMPTS.prompts[0]
    lengths = []
    for seen in (RIGHT, RIGHT, WRONG, WRONG, WRONG, MIXED, RIGHT):
        chooser.observe([(prompt, seen)])
        streak = chooser.streaks.get("t/p0")
        lengths.append((streak.kind, streak.length) if streak else None)
    assert lengths == [("easy", 1), ("easy", 2), ("hard", 1), ("hard", 2), ("hard", 3), None, ("easy", 1)]


def test_a_prompt_is_asked_again_with_probability_explore_to_the_length_of_its_streak() -> None:
    """Over 400 epochs: 0.5 ** 2 for two prompts, 1 for all others; within four standard errors."""
    chooser = greso(explore=0.5, adjust=0.0)
    for _ in range(2):
        chooser.observe([(PROMPTS.prompts[0], RIGHT), (PROMPTS.prompts[1], WRONG)])
    epochs = 400
    asked: Counter[str] = Counter()
    while chooser.place < epochs * len(PROMPTS.prompts):
        asked.update(p.id for p in chooser.draw(1))
    expected, error = epochs / 4, (epochs * 0.25 * 0.75) ** 0.5
    assert all(abs(asked[name] - expected) < 4 * error for name in ("p0", "p1"))
    assert {asked[f"p{i}"] for i in range(2, 20)} == {epochs}
    numbers = chooser.take_numbers()
    assert numbers["selection/skipped"] == 2 * epochs - asked["p0"] - asked["p1"]
    assert chooser.take_numbers()["selection/skipped"] == 0


def test_exploration_moves_towards_the_shares_that_are_wanted() -> None:
    chooser = greso(explore=0.5, adjust=0.1, easy_share=0.5, hard_share=0.5)
    one, two = PROMPTS.prompts[:2]
    for seen, expected in (((RIGHT, MIXED), (0.4, 0.6)), ((WRONG, WRONG), (0.5, 0.5))):
        chooser.observe([(one, seen[0]), (two, seen[1])])
        assert (chooser.explore["easy"], chooser.explore["hard"]) == expected
    for _ in range(20):
        chooser.observe([(one, WRONG)])
    assert chooser.explore == {"easy": 1.0, "hard": 0.0}


def test_a_set_with_nothing_left_to_learn_is_still_asked() -> None:
    chooser = greso(explore=0.0)
    chooser.observe([(prompt, RIGHT) for prompt in PROMPTS.prompts])
    assert len(chooser.draw(50)) == 50


def test_the_state_continues_the_same_draws() -> None:
    chooser, again = greso(), greso()
    chooser.draw(7)
    chooser.observe([(prompt, RIGHT) for prompt in PROMPTS.prompts[:9]])
    again.restore(json.loads(json.dumps(chooser.state())))
    assert [p.id for p in chooser.draw(40)] == [p.id for p in again.draw(40)]
    assert chooser.state() == again.state()


@pytest.mark.parametrize(
    ("kept", "prompts"),
    [((4, 4, 4, 4), 0), ((4, 4, 4, 0), 2), ((2, 2, 2, 2), 4), ((0, 0, 0, 0), 4), ((4, 4, 4, 3), 1)],
)
def test_how_many_prompts_are_drawn_to_fill_a_batch(kept: tuple[int, ...], prompts: int) -> None:
    """Of four groups of four: what is missing over the share kept so far, at most a batch."""
    plan: Plan = plan_of(1, 4, "constant")
    groups = [
        AdvantagedGroup(
            ScoredGroup(Group(0, PROMPTS.prompts[0], ()), ()), (0.0,) * 4, tuple(i < n for i in range(4))
        )
        for n in kept
    ]
    assert prompts_missing(plan, groups) == prompts


REFILLED = ("filter=dynamic", "selection=greso")


def test_refill_and_selection_continue_exactly_where_they_were_stopped(tmp_path: Path) -> None:
    """Every step keeps as many completions as the batch has (64) or has tried eight more batches; no prompt
    position is asked twice; and a run that pauses twice has the record of one that does not."""
    undisturbed = run_here(tmp_path / "a", *REFILLED)
    rows = read_final(undisturbed, "steps")
    samples = read_final(undisturbed, "samples")
    for row in rows:
        own = [s for s in samples if s["step"] == row["step"]]
        asked = row["completions/sampled"] // 16
        assert len(own) == row["completions/sampled"] and row["refill/prompts"] == asked - 4
        assert sum(s["kept"] for s in own) >= 64 or asked == 4 * 9
        assert row["refill/tokens"] == sum(s["tokens"] for s in own[64:])
    assert any(row["refill/prompts"] > 0 for row in rows)
    assert any(row["selection/skipped"] > 0 for row in rows)
    for until in (2, 5, 6):
        folder = run_here(tmp_path / "b", *REFILLED, f"run.until_step={until}")
    assert differences(undisturbed, folder) == []


@pytest.mark.long
@pytest.mark.parametrize(
    "more",
    [
        ("filter=advantage", "filter.refill=3"),
        ("algorithm=dapo", "filter=dynamic", "algorithm.mini_batch=32"),
    ],
)
def test_refill_with_other_filters_and_several_updates(tmp_path: Path, more: tuple[str, ...]) -> None:
    undisturbed = run_here(tmp_path / "a", *more)
    rows = read_final(undisturbed, "steps")
    assert {row["updates"] + row["updates/skipped"] for row in rows} == {2 if "algorithm=dapo" in more else 1}
    assert any(row["refill/prompts"] > 0 for row in rows)
    for until in itertools.chain((1, 4), (6,)):
        folder = run_here(tmp_path / "b", *more, f"run.until_step={until}")
    assert differences(undisturbed, folder) == []
