"""Generated datasets: sums, one-line functions, reasoning-gym; disjoint splits, right answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dash_exp.config.environment import GYM_PACKAGE, gym_setting_faults, is_installed
from dash_exp.errors import UserError
from dash_exp.tasks.generated import (
    HEADER,
    arithmetic,
    chain,
    chain_far,
    functions,
    gym_examples,
    split_of,
    to_gold,
    try_scoring,
)
from dash_exp.verifiers.judges import judge_integer
from dash_exp.verifiers.types import CodeGold, GymGold

INPUTS = range(-20, 60)


def test_arithmetic_splits_are_disjoint_and_right() -> None:
    train, test = arithmetic("train"), arithmetic("test")
    assert len(train.examples) == 7600 and len(test.examples) == 500
    assert not {e.id for e in train.examples} & {e.id for e in test.examples}
    for example in test.examples:
        x, y = map(int, example.id.split("+"))
        assert int(example.answer) == x + y and 10 <= x <= 99 and 10 <= y <= 99
        assert example.problem == f"12 + 37 = 49\n58 + 24 = 82\n{x} + {y} ="
        assert example.solution == f" {x + y}\n"
        assert judge_integer(example.solution, example.answer).outcome == "correct"
    assert train.content_hash == arithmetic("train").content_hash != test.content_hash


def test_chains_are_disjoint_and_right() -> None:
    sizes = {}
    for make, first in ((chain, range(1, 10)), (chain_far, range(11, 30))):
        train, test = make("train").examples, make("test").examples
        sizes[make] = (len(train), len(test))
        assert len({e.id for e in (*train, *test)}) == len(first) * 81
        for example in (*train, *test):
            a, b, c = map(int, example.id.split("+"))
            assert a in first and {b, c} <= set(range(1, 10)) and int(example.answer) == a + b + c
            assert example.solution == f" {a + b + c}\n"
            assert example.problem.endswith(f"9 + 4 + 6: 9 + 4 = 13, 13 + 6 = 19\n{a} + {b} + {c}:")
    assert sizes == {chain: (479, 250), chain_far: (1289, 250)}


def values_of(source: str) -> tuple[int, ...]:
    space: dict[str, Any] = {}
    exec(source, space)  # noqa: S102 (what the generator wrote)
    return tuple(space["f"](x) for x in INPUTS)


def test_functions_are_right_and_no_two_are_equal() -> None:
    train, test = functions("train").examples, functions("test").examples
    assert (len(train), len(test)) == (560, 160)
    seen = {values_of(f"{HEADER} {shot}\n") for shot in ("x * 5 - 1", "x + 3")}
    for example in (*train, *test):
        assert example.problem.endswith(f"# {example.id}\n{HEADER}")
        gold = CodeGold.from_text(example.answer)
        program = HEADER + example.solution
        assert gold.prefix + example.solution.strip() + "\n" == program
        exec(f"{program}{gold.tests}", {})  # noqa: S102
        assert gold.tests.count("assert f(") == 5 and example.first_test in gold.tests
        values = values_of(program)
        assert values not in seen  # none occurs twice, in other words, or in the prompt
        seen.add(values)


def test_no_two_functions_have_equal_tests() -> None:
    examples = (*functions("train").examples, *functions("test").examples)
    assert len({CodeGold.from_text(e.answer).tests for e in examples}) == len(examples)


def test_functions_are_pinned() -> None:
    first = functions("train").examples[0]
    assert first.problem == (
        "# x times 5 minus 1\ndef f(x):\n    return x * 5 - 1\n\n"
        "# x plus 3\ndef f(x):\n    return x + 3\n\n"
        f"# {first.id}\ndef f(x):\n    return"
    )
    assert functions("train").content_hash == functions("train").content_hash
    assert functions("train").content_hash != functions("test").content_hash


# --- reasoning-gym -----------------------------------------------------------------------------

needs_gym = pytest.mark.skipif(not is_installed(GYM_PACKAGE), reason="pip install 'dash-exp[gym]'")


@needs_gym
@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("chain_sum", {}),
        ("chain_sum", {"max_terms": 2, "min_digits": 1, "max_digits": 1}),  # 180 questions in all
        ("word_sorting", {}),
    ],
)
def test_no_question_is_in_both_splits_or_twice(task: str, options: dict[str, Any]) -> None:
    train = gym_examples("g", task, options, split="train", size=90, extraction="answer_tag")
    test = gym_examples("g", task, options, split="test", size=20, extraction="answer_tag")
    questions = [[e.problem for e in one.examples] for one in (train, test)]
    assert list(map(len, questions)) == [90, 20]
    assert len(set(questions[0]) | set(questions[1])) == 110
    again = gym_examples("g", task, options, split="train", size=90, extraction="answer_tag")
    assert again == train
    assert len({e.id for e in train.examples}) == 90


@needs_gym
def test_other_settings_do_not_bring_held_out_questions_back() -> None:
    small = {"max_terms": 2, "min_digits": 1, "max_digits": 1}
    test = gym_examples("g", "chain_sum", small, split="test", size=20, extraction="whole")
    wide = {"max_terms": 3, "min_digits": 1, "max_digits": 1}
    train = gym_examples("g", "chain_sum", wide, split="train", size=400, extraction="whole")
    assert not {e.problem for e in test.examples} & {e.problem for e in train.examples}
    questions = [f"question {n}" for n in range(4000)]
    assert 900 < sum(split_of(q) == "test" for q in questions) < 1100


@needs_gym
@pytest.mark.parametrize(
    ("extraction", "form"),
    [("answer_tag", "<answer>{}</answer>"), ("boxed_or_last", "\\boxed{{{}}}"), ("whole", "{}")],
)
def test_the_solution_is_the_answer_where_it_is_looked_for(extraction: str, form: str) -> None:
    made = gym_examples("g", "chain_sum", {}, split="train", size=3, extraction=extraction)
    for example in made.examples:
        gold = GymGold.from_text(example.answer)
        assert gold.task == "chain_sum" and gold.entry["question"] == example.problem
        assert example.solution == form.format(gold.entry["answer"])


@needs_gym
def test_a_task_with_too_few_questions() -> None:
    small = {"max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(UserError) as caught:
        gym_examples("g", "chain_sum", small, split="test", size=200, extraction="whole")
    [fault] = caught.value.faults
    assert fault.where == "size" and "different test questions, not 200" in fault.what


@needs_gym
@pytest.mark.long
def test_arc_agi_cannot_be_judged_in_another_process() -> None:
    with pytest.raises(UserError, match="JSON changes a score from 1 to"):
        gym_examples("g", "arc_agi", {}, split="train", size=2, extraction="answer_tag")


class ComparesTuples:
    """A task whose scorer compares with a tuple, which JSON has not."""

    def score_answer(self, answer: Any, entry: dict[str, Any]) -> float:
        return 1.0 if entry["metadata"] == (1, 2) else 0.01


def test_a_task_whose_entries_json_would_change() -> None:
    entry = {"answer": "1", "metadata": (1, 2)}
    with pytest.raises(UserError, match=r"JSON changes a score from 1 to 0\.01"):
        try_scoring(ComparesTuples(), to_gold("odd", entry), entry)


class Broken:
    """A task whose scorer fails."""

    def score_answer(self, answer: Any, entry: dict[str, Any]) -> float:
        raise TypeError("odd")


def test_a_task_that_cannot_be_judged() -> None:
    with pytest.raises(UserError, match="an entry cannot be written as JSON"):
        to_gold("odd", {"answer": "1", "metadata": 1j})
    entry = {"answer": "1", "metadata": {}}
    with pytest.raises(UserError, match=r"its scorer fails: TypeError\('odd'\)"):
        try_scoring(Broken(), to_gold("odd", entry), entry)


@needs_gym
@pytest.mark.parametrize(
    ("task", "options", "where", "what", "hint"),
    [
        ("chain_sun", {}, "x.task", "got 'chain_sun'", "did you mean 'chain_sum'"),
        ("chain_sum", {"max_term": 3}, "x.task_options", "chain_sum has no setting", "'max_terms'"),
        ("chain_sum", {"size": 3}, "x.task_options", "chain_sum has no setting", "x.size"),
        ("chain_sum", {"max_terms": 1}, "x.task_options", "chain_sum refuses", ""),
        ("chain_sum", {"max_terms": "a"}, "x.task_options", "chain_sum refuses", ""),
    ],
)
def test_faults_of_a_tasks_settings(
    task: str, options: dict[str, Any], where: str, what: str, hint: str
) -> None:
    [fault] = gym_setting_faults("x", task, options)
    assert fault.where == where and fault.what.startswith(what) and hint in fault.hint
    assert list(gym_setting_faults("x", "chain_sum", {"max_terms": 3})) == []


@needs_gym
def test_an_entry_is_json_once_in_the_gold() -> None:
    [example] = gym_examples("g", "chain_sum", {}, split="train", size=1, extraction="whole").examples
    assert set(json.loads(example.answer)) == {"task", "entry"}
