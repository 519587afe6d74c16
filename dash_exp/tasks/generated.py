"""Generated datasets: sums and one-line functions for two CPU cores, and the tasks of reasoning-gym."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from dash_exp.errors import Fault, UserError
from dash_exp.seeding import permutation, seed_for
from dash_exp.tasks.examples import Example, ExampleSet
from dash_exp.verifiers.types import CodeGold, GymGold

HELD_OUT_SUMS = 500
SPLIT_SEED = 20250518  # fixed for good: the split must be the same in every run


def arithmetic(split: str) -> ExampleSet:
    """Two-digit additions x + y, x and y in 10..99, after two worked examples.

    All 8,100 pairs in one fixed random order: the first 500 are `test`, the rest `train`.
    """
    order = permutation(SPLIT_SEED, 90 * 90)
    chosen = order[:HELD_OUT_SUMS] if split == "test" else order[HELD_OUT_SUMS:]
    rows = []
    for code in chosen.tolist():
        x, y = 10 + code // 90, 10 + code % 90
        problem = f"12 + 37 = 49\n58 + 24 = 82\n{x} + {y} ="
        rows.append(Example(f"{x}+{y}", problem, str(x + y), f" {x + y}\n"))
    return ExampleSet("arithmetic", tuple(rows), f"generated:arithmetic/{split}")


def digits(split: str) -> ExampleSet:
    """Sums below ten, 45 to train on and 10 held out: one-digit answers, so that a random model is sometimes
    right and every arm has something to learn from."""
    pairs = [(x, y) for x in range(10) for y in range(10 - x)]
    order = permutation(SPLIT_SEED, len(pairs)).tolist()
    chosen = [pairs[i] for i in (order[:10] if split == "test" else order[10:])]
    rows = [Example(f"{x}+{y}", f"{x}+{y}=", str(x + y), f"{x + y}\n") for x, y in chosen]
    return ExampleSet("digits", tuple(rows), f"generated:digits/{split}")


CHAINS = ("7 + 5 + 8: 7 + 5 = 12, 12 + 8 = 20", "9 + 4 + 6: 9 + 4 = 13, 13 + 6 = 19")
HELD_OUT_CHAINS = 250


def chain(split: str) -> ExampleSet:
    """Sums of three digits from 1 to 9, after two worked examples that write the steps: 479 to train on, 250
    held out. The solution is the answer without steps: supervised fine-tuning on it learns to leave them out,
    which a small model cannot afford."""
    return _chains("chain", range(1, 10), split)


def chain_far(split: str) -> ExampleSet:
    """The same with a first term from 11 to 29, out of distribution for a model trained on `chain`: 1,289
    and 250 held out."""
    return _chains("chain_far", range(11, 30), split)


def _chains(name: str, first: range, split: str) -> ExampleSet:
    terms = [(a, b, c) for a in first for b in range(1, 10) for c in range(1, 10)]
    order = permutation(SPLIT_SEED, len(terms)).tolist()
    chosen = order[:HELD_OUT_CHAINS] if split == "test" else order[HELD_OUT_CHAINS:]
    rows = []
    for a, b, c in (terms[i] for i in chosen):
        problem = "\n".join((*CHAINS, f"{a} + {b} + {c}:"))
        rows.append(Example(f"{a}+{b}+{c}", problem, str(a + b + c), f" {a + b + c}\n"))
    return ExampleSet(name, tuple(rows), f"generated:{name}/{split}")


FORMS: tuple[tuple[str, str, Callable[[int, int, int], int]], ...] = (
    ("x times {a} plus {b}", "x * {a} + {b}", lambda x, a, b: x * a + b),
    ("{a} times x minus {b}", "{a} * x - {b}", lambda x, a, b: a * x - b),
    ("the remainder of x divided by {b}", "x % {b}", lambda x, a, b: x % b),
    ("the square of x plus {b}", "x * x + {b}", lambda x, a, b: x * x + b),
    ("the square of x times {b}", "x * x * {b}", lambda x, a, b: x * x * b),
    ("{b} minus x", "{b} - x", lambda x, a, b: b - x),
    ("{b} minus x times {a}", "{b} - x * {a}", lambda x, a, b: b - x * a),
    ("the square of x minus {b}", "x * x - {b}", lambda x, a, b: x * x - b),
)
"""Descriptions of functions, their Python, and what they compute."""
FACTORS, TERMS = range(2, 10), range(10, 100)
TRAIN_PER_FORM, TEST_PER_FORM = 70, 20
HEADER = "def f(x):\n    return"
SHOTS = (("x times 5 minus 1", "x * 5 - 1"), ("x plus 3", "x + 3"))
INPUTS = (-7, 0, 1, 5, 12)


def functions(split: str) -> ExampleSet:
    """One-line functions from a description, after two worked examples: 560 to train on, 160 held out.

    Each form of description gives 90 functions of its own, in one fixed random order: the first 20 are
    `test`, the next 70 `train`. No two have the same values. The completion is the line's rest, so the
    header is the gold's prefix, as in HumanEval; the blank at its end lets a stripped completion parse.
    """
    rows: list[Example] = []
    for number, (words, python, compute) in enumerate(FORMS):
        order = permutation(seed_for(SPLIT_SEED, "functions", words), len(TERMS)).tolist()
        kept = order[:TEST_PER_FORM] if split == "test" else order[TEST_PER_FORM:][:TRAIN_PER_FORM]
        for place in kept:
            a, b = FACTORS[(place + number) % len(FACTORS)], TERMS[place]
            values = [(x, compute(x, a, b)) for x in INPUTS]
            rows.append(_function(words.format(a=a, b=b), python.format(a=a, b=b), values))
    mixed = permutation(seed_for(SPLIT_SEED, "functions", split), len(rows)).tolist()
    return ExampleSet("functions", tuple(rows[i] for i in mixed), f"generated:functions/{split}")


def _function(words: str, python: str, values: Sequence[tuple[int, int]]) -> Example:
    worked = "".join(f"# {text}\n{HEADER} {code}\n\n" for text, code in SHOTS)
    tests = [f"assert f({x}) == {y}" for x, y in values]
    gold = CodeGold("\n".join(tests) + "\n", "f", f"{HEADER} ")
    return Example(words, f"{worked}# {words}\n{HEADER}", gold.to_text(), f" {python}\n", tests[0])


GENERATED: Mapping[str, Callable[[str], ExampleSet]] = {
    make.__name__: make for make in (arithmetic, chain, chain_far, digits, functions)
}
"""By `dataset.kind`: from a split's name to its examples."""


# reasoning-gym. The splits are drawn with their own seeds, and a hash of a question's text says to which it
# may belong: no question is in both, whatever the sizes, and also when a test set is easier or harder.

TEST_SHARE = 0.25
"""Of all questions; fixed for good, as the seeds are."""
SEEDS = {"train": 1_000_000_000, "test": 2_000_000_000}
"""A question's own seed is this plus its number, so the splits' streams never meet."""
MAX_TRIES = 20
"""Questions generated per example wanted, before a task counts as too small."""
REFERENCE_FORMS = {"answer_tag": "<answer>{}</answer>", "boxed_or_last": "\\boxed{{{}}}", "whole": "{}"}
"""How a reference answer is written so that each extraction finds it."""


def gym_examples(
    name: str, task: str, options: Mapping[str, Any], *, split: str, size: int, extraction: str
) -> ExampleSet:
    """`size` different questions of a task, the same ones every time. The solution is the reference
    answer as `extraction` finds it.

    Raises UserError for a task that has too few questions, or whose entries JSON would change.
    """
    from reasoning_gym import create_dataset

    source = create_dataset(task, seed=SEEDS[split], size=MAX_TRIES * size, **options)
    rows: dict[str, Example] = {}
    for number in range(MAX_TRIES * size):
        if len(rows) == size:
            break
        entry = source[number]
        question = entry["question"]
        if question in rows or split_of(question) != split:
            continue
        gold, answer = to_gold(task, entry), entry["answer"]
        if not rows and answer is not None:
            try_scoring(source, gold, entry)
        solution = "" if answer is None else REFERENCE_FORMS[extraction].format(answer)
        rows[question] = Example(f"{task}-{split}-{number}", question, gold.to_text(), solution)
    if len(rows) < size:
        what = f"{task} has only {len(rows)} different {split} questions, not {size}"
        hint = f"set it to {max(len(rows), 1)}, or make it richer by dataset.task_options"
        raise UserError(Fault("size", what, hint))
    library = f"reasoning-gym-{version('reasoning-gym')}"
    return ExampleSet(name, tuple(rows.values()), f"generated:{library}/{task}/{split}")


def split_of(question: str) -> str:
    """`test` for a quarter of all questions, by their text only."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") < TEST_SHARE * 2**64 else "train"


def to_gold(task: str, entry: dict[str, Any]) -> GymGold:
    try:
        return GymGold(task, json.loads(json.dumps(entry)))
    except (TypeError, ValueError) as error:
        raise _unfit(task, f"an entry cannot be written as JSON: {error}") from error


def try_scoring(source: Any, gold: GymGold, entry: dict[str, Any]) -> None:
    """The reference answer must be worth what it was worth before the entry went through JSON (arc_agi
    compares with tuples, which JSON has not)."""
    try:
        before = source.score_answer(entry["answer"], entry)
        after = source.score_answer(entry["answer"], gold.entry)
    except Exception as error:
        raise _unfit(gold.task, f"its scorer fails: {error!r}") from error
    if before != after:
        raise _unfit(gold.task, f"JSON changes a score from {before:g} to {after:g}")


def _unfit(task: str, why: str) -> UserError:
    what = f"{task} cannot be judged in another process: {why}"
    return UserError(Fault("task", what, "choose another task"))
