"""What is wrong with the datasets of a config: settings that do not fit together.

What each key may be is declared in the schema; missing files are found in `config/environment.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from dash_exp.config.schema import (
    CHATS,
    COUNT,
    KINDS,
    MATH_EXTRACTIONS,
    NATURAL,
    TEMPLATES,
    VERIFIERS,
    Config,
    DatasetConfig,
    dataset_places,
    evaluation_places,
)
from dash_exp.errors import Fault, nearest

SHOT_KEYS = ("problem", "solution")
EXTRACTIONS_OF: dict[str, tuple[str, ...]] = {
    "math": MATH_EXTRACTIONS,
    "math_verify": MATH_EXTRACTIONS,  # unused: the library finds the answer itself
    "integer": ("first_integer",),
    "code": ("program", "last_block"),
    "reasoning_gym": ("answer_tag", "boxed_or_last", "whole"),
}
VERIFIERS_OF: dict[str, tuple[str, ...]] = {
    "jsonl": ("math", "math_verify", "integer", "code"),
    "arithmetic": ("integer", "math", "math_verify"),
    "chain": ("math", "math_verify"),
    "chain_far": ("math", "math_verify"),
    "digits": ("integer", "math", "math_verify"),
    "functions": ("code",),
    "reasoning_gym": ("reasoning_gym",),
}
"""Which verifiers understand the gold of a kind of dataset."""


def dataset_faults(config: Config) -> Iterator[Fault]:
    """Every fault of every dataset, and of the mixture they make."""
    checks: tuple[Callable[[str, DatasetConfig], Iterator[Fault]], ...] = (
        _source,
        _judging,
        _asking,
        _fetched,
        _generated,
    )
    for place, data in dataset_places(config).items():
        for one in checks:
            yield from one(place, data)
    yield from _mixture(config)
    yield from _evaluation_template(config)


def _source(place: str, data: DatasetConfig) -> Iterator[Fault]:
    bounds = data.id_range
    if bounds and (len(bounds) != 2 or bounds[0] > bounds[1] or not NATURAL.holds(bounds[0])):
        what = f"got {bounds}, must be the first and the last number of an id"
        yield Fault(f"{place}.id_range", what, "e.g. [2, 593]; [] uses all")
    if data.kind in KINDS and data.kind != "jsonl" and data.path:
        what = f"got {data.path}, but {place}.kind={data.kind} is generated and reads no file"
        hint = "choose a dataset that is read, e.g. dataset=own dataset.path=<file>"
        yield Fault(f"{place}.path", what, hint)
    if data.kind != "jsonl":
        return
    needed = [("problem",), ("tests", "test_list") if data.verifier == "code" else ("answer",)]
    absent = [" or ".join(names) for names in needed if not any(data.fields.get(n) for n in names)]
    if absent:
        what, hint = f"no source is named for {' and '.join(absent)}", f"{place}.fields.problem=[question]"
        yield Fault(f"{place}.fields", what, f"name them, e.g. {hint}")
    try:
        re.compile(data.solution_drop or "")
    except re.error as error:
        yield Fault(f"{place}.solution_drop", f"{data.solution_drop!r} is no regular expression: {error}")


def _judging(place: str, data: DatasetConfig) -> Iterator[Fault]:
    modes, fitting = EXTRACTIONS_OF.get(data.verifier), VERIFIERS_OF.get(data.kind)
    if modes and data.extraction not in modes:
        yield Fault(f"{place}.extraction", f"got {data.extraction!r}", nearest(data.extraction, modes))
    if fitting and data.verifier in VERIFIERS and data.verifier not in fitting:
        what = f"got {data.verifier!r}, which does not understand the answers of {place}.kind={data.kind}"
        yield Fault(f"{place}.verifier", what, f"allowed: {', '.join(sorted(fitting))}")
    names = [text.rpartition("/")[2] for text in data.rewards]
    if len(set(names)) < len(names):
        yield Fault(f"{place}.rewards", f"got {names}, which names one twice", "each is recorded by its name")
    if data.reward_weights and len(data.reward_weights) != len(data.rewards):
        what = f"got {len(data.reward_weights)} for the {len(data.rewards)} of {place}.rewards"
        yield Fault(f"{place}.reward_weights", what, "name one for each, or leave it out: all 1")
    for key in ("timeouts", "tests_call"):
        if getattr(data, key) and data.verifier != "code":
            what = f"is for programs, but {place}.verifier={data.verifier}"
            yield Fault(f"{place}.{key}", what, "leave it out")


def _asking(place: str, data: DatasetConfig) -> Iterator[Fault]:
    for key in ("system", "chat_arguments"):
        if getattr(data, key):
            yield from _chat(f"{place}.{key}", data.template)
    if data.template == "docstring":
        yield from _docstring(f"{place}.template", place, data)
    if data.template == "few_shot":
        yield from _shots(place, data)


def _chat(key: str, template: str) -> Iterator[Fault]:
    if template not in CHATS and template in TEMPLATES:
        yield Fault(key, f"is for chats, but the template is {template}", f"choose {' or '.join(CHATS)}")


def _docstring(key: str, place: str, data: DatasetConfig) -> Iterator[Fault]:
    if data.verifier != "code" and data.verifier in VERIFIERS:
        what = f"'docstring' shows a program's first assertion, but {place}.verifier={data.verifier}"
        yield Fault(key, what, "choose bare or problem_solution")


def _shots(place: str, data: DatasetConfig) -> Iterator[Fault]:
    if not data.shots:
        hint = "give a list of {problem: ..., solution: ...}, or choose another template"
        yield Fault(f"{place}.shots", "empty, but the template few_shot shows them", hint)
    for number, shot in enumerate(data.shots):
        if set(shot) != set(SHOT_KEYS) or not all(text.strip() for text in shot.values()):
            hint = "it needs a problem and a solution, neither empty"
            yield Fault(f"{place}.shots[{number}]", f"has {', '.join(shot) or 'nothing'}", hint)


def _fetched(place: str, data: DatasetConfig) -> Iterator[Fault]:
    if data.streaming and data.limit is None:
        yield Fault(f"{place}.streaming", f"needs {place}.limit", "or leave it out: all rows are fetched")
    for key in ("revision", "streaming"):
        if getattr(data, key) and not data.hub:
            yield Fault(
                f"{place}.{key}", f"is for a dataset of the hub, but {place}.hub=null", "leave it out"
            )


def _generated(place: str, data: DatasetConfig) -> Iterator[Fault]:
    if data.kind == "reasoning_gym":
        for key, example in (("task", "chain_sum"), ("size", "1000")):
            if getattr(data, key) is None:
                hint = f"e.g. {place}.{key}={example}, or dataset=reasoning_gym"
                yield Fault(f"{place}.{key}", f"not set, but {place}.kind=reasoning_gym needs it", hint)
    elif data.kind in KINDS and data.size is not None and COUNT.holds(data.size):
        what = f"got {data.size}, but {place}.kind={data.kind} has a size of its own"
        yield Fault(f"{place}.size", what, f"use {place}.limit for the first so many prompts")


def _mixture(config: Config) -> Iterator[Fault]:
    """Parts of a mixture may differ in everything but how a completion ends: a step samples them all
    together."""
    data, names = config.dataset, {config.dataset.name: "dataset"}
    for label, part in data.mix.items():
        place = f"dataset.mix.{label}"
        if part.mix:
            what = "a dataset that is mixed in cannot be a mixture itself"
            yield Fault(f"{place}.mix", what, "name its parts in dataset.mix")
        for key in ("stop", "max_new_tokens"):
            here, there = getattr(part, key), getattr(data, key)
            if here != there:
                hint = "a step samples all parts together: make them equal"
                yield Fault(f"{place}.{key}", f"got {here}, but dataset.{key}={there}", hint)
        if part.name in names:
            hint = f"give it another, e.g. {place}.name={label}_{part.name}"
            yield Fault(f"{place}.name", f"{part.name!r} is the name of {names[part.name]} too", hint)
        names.setdefault(part.name, place)
    for place, held_out in evaluation_places(config).items():
        if held_out.mix:
            hint = "give each dataset a label of its own in evaluation.sets"
            yield Fault(f"{place}.mix", "only what is trained on can be a mixture", hint)


def _evaluation_template(config: Config) -> Iterator[Fault]:
    """The one template of all sets, where the config names one, must fit each of them."""
    name = config.evaluation.template
    for place, data in evaluation_places(config).items():
        if name == "docstring" != data.template:
            yield from _docstring("evaluation.template", place, data)
        if name == "few_shot" != data.template:
            yield from _shots(place, data)
