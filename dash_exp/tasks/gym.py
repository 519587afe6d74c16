"""Tasks that the package reasoning-gym generates. Torch-free.

The splits are drawn with seeds of their own, and a hash of a question's text says to which of them it may
belong. So no question is in both, whatever the sizes, and also when a test set is easier or harder than
the training set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from dash_exp.errors import Fault, UserError
from dash_exp.record.hashing import package_version
from dash_exp.tasks.examples import Example, ExampleSet
from dash_exp.verifiers.code.gold import GymGold

TEST_SHARE = 0.25
"""Of all questions; fixed for good, as the seeds are."""
SEEDS = {"train": 1_000_000_000, "test": 2_000_000_000}
"""A question's own seed is this plus its number, so the splits' streams never meet."""
MAX_TRIES = 20
"""Questions generated per example wanted, before a task counts as too small."""
FORMS = {"answer_tag": "<answer>{}</answer>", "boxed_or_last": "\\boxed{{{}}}", "whole": "{}"}
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
        solution = "" if answer is None else FORMS[extraction].format(answer)
        rows[question] = Example(f"{task}-{split}-{number}", question, gold.to_text(), solution)
    if len(rows) < size:
        raise UserError(
            Fault(
                "size",
                f"{task} has only {len(rows)} different {split} questions, not {size}",
                f"set it to {max(len(rows), 1)}, or make it richer by dataset.task_options",
            )
        )
    library = f"reasoning-gym-{package_version('reasoning-gym')}"
    return ExampleSet(name, tuple(rows.values()), f"generated:{library}/{task}/{split}")


def split_of(question: str) -> str:
    """`test` for a quarter of all questions, by their text alone."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") < TEST_SHARE * 2**64 else "train"


def to_gold(task: str, entry: dict[str, Any]) -> GymGold:
    try:
        return GymGold(task, json.loads(json.dumps(entry)))
    except (TypeError, ValueError) as error:
        raise UserError(_unfit(task, f"an entry cannot be written as JSON: {error}")) from error


def try_scoring(source: Any, gold: GymGold, entry: dict[str, Any]) -> None:
    """The reference answer must be worth what it was worth before the entry went through JSON (arc_agi
    compares with tuples, which JSON has not)."""
    try:
        before = source.score_answer(entry["answer"], entry)
        after = source.score_answer(entry["answer"], gold.entry)
    except Exception as error:
        raise UserError(_unfit(task=gold.task, why=f"its scorer fails: {error!r}")) from error
    if before != after:
        raise UserError(_unfit(gold.task, f"JSON changes a score from {before:g} to {after:g}"))


def _unfit(task: str, why: str) -> Fault:
    return Fault("task", f"{task} cannot be judged in another process: {why}", "choose another task")
