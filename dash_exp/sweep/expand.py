"""From axes to combinations of overrides: those of a sweep's file, and those of `-m`. Torch-free."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hydra.core.override_parser.types import Quote, QuotedString

from dash_exp.config.compose import opened, parse, variants_of
from dash_exp.errors import UserError

if TYPE_CHECKING:
    from dash_exp.sweep.spec import Spec

Combination = tuple[str, ...]
"""Overrides (`key=value`, in Hydra's grammar) that together make a cell."""

Axis = tuple[Combination, ...]
"""What an axis chooses from; a choice of several axes that run together (`zip`) has several overrides."""

SPEAKS_FOR_ITSELF = re.compile(r"[A-Za-z0-9_./@+-]+")
OTHER_TYPE = re.compile(r"null|true|false|[+-]?(inf|nan|[\d_]*\.?[\d_]*(e[+-]?[\d_]+)?)", re.IGNORECASE)
SPLIT_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?e[+-]?\d+", re.IGNORECASE)
STREAMING = "sampler.streaming"


@dataclass(frozen=True, slots=True)
class Block:
    """A grid: axes that are multiplied. `exclude`: combinations that hold all overrides of one of these
    are left out; `include`: these are added as they are."""

    axes: tuple[Axis, ...]
    exclude: tuple[frozenset[str], ...] = ()
    include: tuple[Combination, ...] = ()


def combinations(spec: Spec, extra: Sequence[str] = ()) -> list[Combination]:
    """The combinations of a sweep, the first seed's first, so that a part of it is a whole table.

    `extra`: overrides from a command line, several values allowed; they take the place of the sweep's own
    for the same keys. Raises UserError where these cannot be read.
    """
    added = products(extra)
    replaced = {key_of(text) for text in extra}
    found = [
        without_streaming(combination, spec.times)
        for seed, block in itertools.product(spec.seeds, spec.blocks)
        for chosen in chosen_of(block, seed)
        for more in added
        for combination in [(*_others(merged(spec.overrides, chosen), replaced), *more)]
    ]
    return list(dict.fromkeys(found))


def chosen_of(block: Block, seed: int) -> Iterator[Combination]:
    """What a block chooses for a seed."""
    last = f"seed={seed}"
    for parts in itertools.product(*block.axes):
        combination = (*itertools.chain(*parts), last)
        if not any(one <= set(combination) for one in block.exclude):
            yield combination
    yield from (_seeded(combination, last) for combination in block.include)


def _seeded(combination: Combination, seed: str) -> Combination:
    return combination if "seed" in map(key_of, combination) else (*combination, seed)


def merged(common: Iterable[str], chosen: Combination) -> Combination:
    """Common overrides, then those chosen, which win."""
    return (*_others(common, set(map(key_of, chosen))), *chosen)


def without_streaming(combination: Combination, times: bool) -> Combination:
    """Where times are compared, one thing after the other, unless it is said otherwise."""
    if not times or STREAMING in map(key_of, combination):
        return combination
    return (*combination, f"{STREAMING}=false")


def _others(texts: Iterable[str], keys: set[str]) -> Combination:
    return tuple(text for text in texts if key_of(text) not in keys)


def key_of(text: str) -> str:
    """The key of an override."""
    return text.lstrip("+~").partition("=")[0]


def products(overrides: Sequence[str]) -> list[Combination]:
    """All combinations of overrides that may have several values, in the order of Hydra's own sweeper.

    Raises UserError with every override that cannot be read.
    """
    if not overrides:
        return [()]
    with opened():
        parsed, faults = parse(overrides)
        axes = []
        for override in parsed:
            variants, wrong = variants_of(override, sweep=True)
            faults += wrong
            axes.append([variant.input_line or "" for variant in variants])
    if faults:
        raise UserError(faults)
    return list(itertools.product(*axes))


def override_of(key: str, value: object) -> str:
    """A key and a value of yaml as an override."""
    return f"{key}={text_of(value)}"


def text_of(value: object) -> str:
    """A value of yaml in Hydra's grammar. (Yaml takes 1e-4 for text, since it has no dot.)"""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{text_of(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(text_of, value)) + "]"
    return quoted(str(value)) if isinstance(value, str) else str(value)


def quoted(text: str) -> str:
    """Text in Hydra's grammar, in quotes where it would be read as something else."""
    if SPLIT_NUMBER.fullmatch(text):
        return repr(float(text))
    if SPEAKS_FOR_ITSELF.fullmatch(text) and not OTHER_TYPE.fullmatch(text):
        return text
    return QuotedString(text=text, quote=Quote.single).with_quotes()
