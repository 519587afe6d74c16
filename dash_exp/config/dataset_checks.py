"""Checks of the datasets of a config: names, ranges, and settings that do not fit together. Torch-free.

Whether files and packages are there is asked in `config/environment.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from dash_exp.config.limits import (
    COUNT,
    DATASET_ALLOWED,
    DATASET_RANGES,
    EXTRACTIONS_OF,
    NATURAL,
    POSITIVE,
    VERIFIERS_OF,
    outside,
    unknown,
)
from dash_exp.config.schema import Config, DatasetConfig, dataset_places, evaluation_places
from dash_exp.errors import Fault

SHOT_KEYS = ("problem", "solution")


def dataset_faults(config: Config) -> Iterator[Fault]:
    """Every fault of every dataset, and of the mixture they make."""
    checks: tuple[Callable[[str, DatasetConfig], Iterator[Fault]], ...] = (
        _names,
        _ranges,
        _source,
        _judging,
        _asking,
        _generated,
    )
    for place, data in dataset_places(config).items():
        for one in checks:
            yield from one(place, data)
    yield from _mixture(config)
    yield from _evaluation_template(config)


def _names(place: str, data: DatasetConfig) -> Iterator[Fault]:
    for key, allowed in DATASET_ALLOWED.items():
        if getattr(data, key) not in allowed:
            yield unknown(f"{place}.{key}", getattr(data, key), allowed)
    modes = EXTRACTIONS_OF.get(data.verifier)
    if modes and data.extraction not in modes:
        yield unknown(f"{place}.extraction", data.extraction, modes)


def _ranges(place: str, data: DatasetConfig) -> Iterator[Fault]:
    for key, interval in DATASET_RANGES.items():
        yield from outside(f"{place}.{key}", getattr(data, key), interval)
    for name, seconds in data.timeouts.items():
        yield from outside(f"{place}.timeouts.{name}", seconds, POSITIVE)
    bounds = data.id_range
    if bounds and (len(bounds) != 2 or bounds[0] > bounds[1] or not NATURAL.holds(bounds[0])):
        yield Fault(
            f"{place}.id_range",
            f"got {bounds}, must be the first and the last number of an id",
            "e.g. [2, 593]; [] uses all",
        )


def _source(place: str, data: DatasetConfig) -> Iterator[Fault]:
    if data.kind in ("arithmetic", "functions", "reasoning_gym") and data.path:
        yield Fault(
            f"{place}.path",
            f"got {data.path}, but {place}.kind={data.kind} is generated and reads no file",
            "choose a dataset that is read, e.g. dataset=gsm8k dataset.path=<file>",
        )
    if data.kind != "jsonl":
        return
    code = data.verifier == "code"
    needed = [("problem",), ("tests", "test_list")] if code else [("problem",), ("answer",)]
    absent = [" or ".join(names) for names in needed if not any(data.fields.get(n) for n in names)]
    if absent:
        yield Fault(
            f"{place}.fields",
            f"no source is named for {' and '.join(absent)}",
            f"name them, e.g. {place}.fields.problem=[question]",
        )
    if data.solution_drop is not None:
        try:
            re.compile(data.solution_drop)
        except re.error as error:
            yield Fault(f"{place}.solution_drop", f"{data.solution_drop!r} is no regular expression: {error}")


def _judging(place: str, data: DatasetConfig) -> Iterator[Fault]:
    fitting = VERIFIERS_OF.get(data.kind)
    if fitting and data.verifier in DATASET_ALLOWED["verifier"] and data.verifier not in fitting:
        yield Fault(
            f"{place}.verifier",
            f"got {data.verifier!r}, which does not understand the answers of {place}.kind={data.kind}",
            f"allowed: {', '.join(sorted(fitting))}",
        )
    for key in ("timeouts", "tests_call"):
        if getattr(data, key) and data.verifier != "code":
            yield Fault(
                f"{place}.{key}", f"is for programs, but {place}.verifier={data.verifier}", "leave it out"
            )


def _asking(place: str, data: DatasetConfig) -> Iterator[Fault]:
    if data.template == "docstring":
        yield from _docstring(f"{place}.template", place, data)
    if data.template == "few_shot":
        yield from _shots(place, data)


def _docstring(key: str, place: str, data: DatasetConfig) -> Iterator[Fault]:
    if data.verifier != "code" and data.verifier in DATASET_ALLOWED["verifier"]:
        yield Fault(
            key,
            f"'docstring' shows a program's first assertion, but {place}.verifier={data.verifier}",
            "choose bare or problem_solution",
        )


def _shots(place: str, data: DatasetConfig) -> Iterator[Fault]:
    if not data.shots:
        yield Fault(
            f"{place}.shots",
            "empty, but the template few_shot shows them",
            "give a list of {problem: ..., solution: ...}, or choose another template",
        )
    for number, shot in enumerate(data.shots):
        if set(shot) != set(SHOT_KEYS) or not all(text.strip() for text in shot.values()):
            yield Fault(
                f"{place}.shots[{number}]",
                f"has {', '.join(shot) or 'nothing'}",
                "it needs a problem and a solution, neither empty",
            )


def _generated(place: str, data: DatasetConfig) -> Iterator[Fault]:
    if data.kind == "reasoning_gym":
        for key, example in (("task", "chain_sum"), ("size", "1000")):
            if getattr(data, key) is None:
                yield Fault(
                    f"{place}.{key}",
                    f"not set, but {place}.kind=reasoning_gym needs it",
                    f"e.g. {place}.{key}={example}, or dataset=reasoning_gym",
                )
    elif data.kind in DATASET_ALLOWED["kind"] and data.size is not None and COUNT.holds(data.size):
        yield Fault(
            f"{place}.size",
            f"got {data.size}, but {place}.kind={data.kind} has a size of its own",
            f"use {place}.limit for the first so many prompts",
        )


def _mixture(config: Config) -> Iterator[Fault]:
    """Parts of a mixture may differ in everything but how a completion ends: a step samples them all
    together."""
    data, names = config.dataset, {config.dataset.name: "dataset"}
    for label, part in data.mix.items():
        place = f"dataset.mix.{label}"
        if part.mix:
            yield Fault(
                f"{place}.mix",
                "a dataset that is mixed in cannot be a mixture itself",
                "name its parts in dataset.mix",
            )
        for key in ("stop", "max_new_tokens"):
            here, there = getattr(part, key), getattr(data, key)
            if here != there:
                yield Fault(
                    f"{place}.{key}",
                    f"got {here}, but dataset.{key}={there}",
                    "a step samples all parts together: make them equal",
                )
        if part.name in names:
            yield Fault(
                f"{place}.name",
                f"{part.name!r} is the name of {names[part.name]} too",
                f"give it another, e.g. {place}.name={label}_{part.name}",
            )
        names.setdefault(part.name, place)
    if data.mix and config.algorithm.source == "traces":
        yield Fault(
            "dataset.mix",
            "a mixture has no traces: they are of one dataset",
            "choose algorithm=sft_h, or one dataset",
        )
    for place, held_out in evaluation_places(config).items():
        if held_out.mix:
            yield Fault(
                f"{place}.mix",
                "only what is trained on can be a mixture",
                "give each dataset a label of its own in evaluation.sets",
            )


def _evaluation_template(config: Config) -> Iterator[Fault]:
    """The one template of all sets, where the config names one, must fit each of them."""
    key, name = "evaluation.template", config.evaluation.template
    if name is None:
        return
    if name not in DATASET_ALLOWED["template"]:
        yield unknown(key, name, DATASET_ALLOWED["template"])
    for place, data in evaluation_places(config).items():
        if name == "docstring" != data.template:
            yield from _docstring(key, place, data)
        if name == "few_shot" != data.template:
            yield from _shots(place, data)
