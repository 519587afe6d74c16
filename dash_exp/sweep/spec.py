"""Sweeps as files, `sweeps/<name>.yaml`, and the combinations of overrides that they, or `-m`, expand to. A
file needs only its grid. The folder `sweeps` of the current folder comes first, then the one that is
installed.

claim      what is tested, a sentence
question   what is looked at to test it
feeds      the tables and figures its cells are in, as table_3 or figure_1
times      true: results are times, so its cells are labelled with their kind of machine (`hardware`) and
           do not overlap phases (sampler.streaming=false, unless it is set)
overrides  of every cell
seeds      of every combination; left out: 0
compare    pairs for `race`, each {arm: {key: value}, other: {key: value}}: overrides that select a recipe;
           with `equal_within`, whether they differ by less (points of accuracy, or a factor of time)
traces     arguments of `python -m dash_exp.traces`, a line each, for cells that learn from a teacher
grid       blocks, all of whose combinations are taken. In a block:
    <key>    an axis: a list of values, or one; axes are multiplied
    zip      a list of mappings from keys to equally long lists whose values are used together
    exclude  combinations that are left out, each named by some of its values
    include  combinations that are added to the block's, each a mapping from keys to values
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dash_exp import PACKAGE
from dash_exp.config.compose import find_faults, opened, parse
from dash_exp.config.overrides import MAX_CELLS, quoted, variants_of
from dash_exp.config.schema import POSITIVE, SEED, plain
from dash_exp.errors import Fault, UserError, nearest, print_error

Combination = tuple[str, ...]
"""Overrides (`key=value`, in Hydra's grammar) that together make a cell."""

Pair = tuple[Combination, Combination, float | None]
"""An arm, what it is compared with, and the margin where it is asked whether they are equal."""

Axis = tuple[Combination, ...]
"""What an axis chooses from; with `zip`, a choice has several overrides."""

KEYS = ("claim", "question", "feeds", "times", "overrides", "seeds", "traces", "compare", "grid")
IN_BLOCK = ("zip", "exclude", "include")
FEED = re.compile(r"(table|figure)_[a-z0-9_]+")
STREAMING = "sampler.streaming"


@dataclass(frozen=True, slots=True)
class Block:
    """A grid: axes that are multiplied. `exclude`: combinations with all overrides of one of these are left
    out; `include`: these are added."""

    axes: tuple[Axis, ...]
    exclude: tuple[frozenset[str], ...] = ()
    include: tuple[Combination, ...] = ()

    @property
    def size(self) -> int:
        """Its combinations for one seed, with those that are excluded."""
        return math.prod(map(len, self.axes)) + len(self.include)

    def combinations(self, seed: int) -> Iterator[Combination]:
        last = f"seed={seed}"
        for parts in itertools.product(*self.axes):
            chosen = tuple(itertools.chain(*parts))
            combination = chosen if "seed" in map(key_of, chosen) else (*chosen, last)
            if not any(one <= set(combination) for one in self.exclude):
                yield combination
        for one in self.include:
            yield one if "seed" in map(key_of, one) else (*one, last)


@dataclass(frozen=True, slots=True)
class Spec:
    """A sweep's file without faults of its own. Whether its keys and options exist is checked when it is
    planned."""

    name: str
    claim: str
    question: str
    feeds: tuple[str, ...]
    overrides: Combination
    seeds: tuple[int, ...]
    blocks: tuple[Block, ...]
    times: bool
    traces: tuple[Combination, ...]
    source: Path
    compare: tuple[Pair, ...] = ()

    def about(self) -> dict[str, object]:
        """What a manifest records of the file."""
        pairs = [
            {"arm": list(arm), "other": list(other), **({} if margin is None else {"equal_within": margin})}
            for arm, other, margin in self.compare
        ]
        return {
            **({"compare": pairs} if pairs else {}),
            "claim": self.claim,
            "question": self.question,
            "feeds": list(self.feeds),
            "times": self.times,
            "source": str(self.source),
        }


# Combinations -------------------------------------------------------------------------------------


def combinations(spec: Spec, extra: Sequence[str] = ()) -> list[Combination]:
    """The combinations of a sweep, all of the first seed first, so that a part of it is a complete table.

    `extra`: overrides from a command line, several values allowed; they replace the sweep's own for the same
    keys. Raises UserError where these cannot be read.
    """
    added = products(extra)
    replaced = {key_of(text) for text in extra}
    refuse_many(len(spec.seeds) * len(added) * sum(block.size for block in spec.blocks))
    found = []
    for seed, block in itertools.product(spec.seeds, spec.blocks):
        for chosen, more in itertools.product(block.combinations(seed), added):
            common = _without(spec.overrides, map(key_of, chosen))
            cell = (*_without((*common, *chosen), replaced), *more)
            sequential = spec.times and STREAMING not in map(key_of, cell)
            found.append((*cell, f"{STREAMING}=false") if sequential else cell)
    return list(dict.fromkeys(found))


def _without(texts: Iterable[str], keys: Iterable[str]) -> Combination:
    left_out = set(keys)
    return tuple(text for text in texts if key_of(text) not in left_out)


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
    refuse_many(math.prod(map(len, axes)))
    return list(itertools.product(*axes))


def refuse_many(cells: int) -> None:
    """Raises UserError for more cells than a sweep may have."""
    if cells > MAX_CELLS:
        fault = Fault("sweep", f"makes {plain(cells)} cells", f"at most {MAX_CELLS}: split it")
        raise UserError(fault)


def key_of(text: str) -> str:
    """The key of an override."""
    return text.lstrip("+~").partition("=")[0]


def override_of(key: str, value: object) -> str:
    """A key and a value of yaml as an override."""
    return f"{key}={text_of(value)}"


def text_of(value: object) -> str:
    """A value of yaml in Hydra's grammar. (Yaml reads 1e-4 as text, since it has no dot.)"""
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


# Files --------------------------------------------------------------------------------------------


def folders() -> list[Path]:
    """The folders of sweeps: the user's own, then ours, beside the package in a checkout, inside it once
    installed."""
    inside = PACKAGE / "sweeps"
    ours = inside if inside.is_dir() else PACKAGE.parent / "sweeps"
    own = Path("sweeps")
    return [own, ours] if own.is_dir() and own.resolve() != ours.resolve() else [ours]


def names() -> list[str]:
    return sorted({path.stem for folder in folders() for path in folder.glob("*.yaml")})


@functools.cache
def note_clash(name: str) -> None:
    print_error(f"note: {name} is sweeps/{name}.yaml of this folder, not the installed sweep of that name")


def load(name_or_path: str) -> Spec:
    """A sweep by its name in `sweeps/`, or by a file. Raises UserError with everything wrong with it."""
    is_file = name_or_path.endswith((".yaml", ".yml"))
    files = [Path(name_or_path)] if is_file else [one / f"{name_or_path}.yaml" for one in folders()]
    found = [path for path in files if path.is_file()]
    path = (found or files)[0]
    if len(found) > 1:
        note_clash(name_or_path)
    if not found:
        hint = f"looked in {path.parent.resolve()}" if is_file else nearest(name_or_path, names())
        raise UserError(Fault(name_or_path, "is no sweep" if not is_file else "is not a file", hint))
    return Reader(path).spec()


class UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is there twice: only the last of two equal axes would be run."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                mark = node.value[position][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", mark)
        return super().construct_mapping(node, deep)


class Reader:
    """Reads one file; `faults` are collected and raised together."""

    def __init__(self, path: Path):
        self.path = path
        self.faults: list[Fault] = []

    def spec(self) -> Spec:
        value = self._loaded()
        for key in value:
            if key not in KEYS:
                self._fault(str(key), "unknown key", nearest(str(key), KEYS))
        if value.get("grid") in (None, "", []):
            self._fault("grid", "is missing", "name its axes, e.g. grid: {algorithm: [dash, grpo]}")
        times = value.get("times", False)
        if not isinstance(times, bool):
            self._fault("times", f"got {times!r}, expected true or false")
        seeds = self._seeds(value.get("seeds") or [0])
        spec = Spec(
            name=self.path.stem,
            claim=str(value.get("claim") or "").strip(),
            question=str(value.get("question") or "").strip(),
            feeds=self._feeds(value.get("feeds")),
            overrides=self._combination("overrides", value.get("overrides") or {}),
            seeds=seeds,
            blocks=self._blocks(value.get("grid"), seeds),
            times=times is True,
            traces=self._traces(value.get("traces")),
            source=self.path,
            compare=self._compare(value.get("compare")),
        )
        if self.faults:  # it will not be planned, so faults of its keys and options are found here
            raise UserError([*self.faults, *_faults_of_each(spec)])
        return spec

    def _fault(self, place: str, what: str, hint: str = "") -> None:
        self.faults.append(Fault(f"{self.path}: {place}", what, hint))

    def _loaded(self) -> dict[str, Any]:
        """The file as a mapping. Raises UserError where it is none."""
        try:
            value = yaml.load(self.path.read_text(encoding="utf-8"), UniqueKeys)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f"{self.path}:{mark.line + 1}" if mark else str(self.path)
            raise UserError(Fault(place, f"not valid yaml: {error.problem}")) from None
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise UserError(Fault(str(self.path), f"cannot be read: {error}")) from None
        if not isinstance(value, dict):
            raise UserError(Fault(str(self.path), "is not a sweep", "it is a mapping with a grid"))
        return value

    def _list(self, place: str, value: object) -> list[Any]:
        if isinstance(value, list):
            return value
        if value is not None:
            self._fault(place, f"got {value!r}, expected a list")
        return []

    def _feeds(self, value: object) -> tuple[str, ...]:
        feeds = [str(name) for name in self._list("feeds", value)]
        for name in feeds:
            if not FEED.fullmatch(name):
                self._fault("feeds", f"got {name!r}", "write table_3, figure_1, or your own, as table_filter")
        return tuple(feeds)

    def _seeds(self, value: object) -> tuple[int, ...]:
        seeds = self._list("seeds", value)
        wrong = [s for s in seeds if isinstance(s, bool) or not isinstance(s, int) or not SEED.holds(s)]
        if wrong:
            self._fault("seeds", f"got {wrong[0]!r}, expected whole numbers, {SEED}")
        elif len(set(seeds)) < len(seeds):
            self._fault("seeds", f"got {seeds}, which names one twice")
        return () if wrong else tuple(seeds)

    def _traces(self, value: object) -> tuple[Combination, ...]:
        lines = self._list("traces", value)
        for line in lines:
            if not isinstance(line, str) or not all("=" in part for part in line.split()):
                self._fault("traces", f"got {line!r}", "write key=value, as for python -m dash_exp.traces")
        return tuple(tuple(str(line).split()) for line in lines)

    def _compare(self, value: object) -> tuple[Pair, ...]:
        found = list[Pair]()
        for number, one in enumerate(self._list("compare", value)):
            place = f"compare[{number}]"
            if isinstance(one, dict) and set(one) - {"equal_within"} == {"arm", "other"}:
                arm, other = (self._combination(f"{place}.{name}", one[name]) for name in ("arm", "other"))
                margin = one.get("equal_within")
                wrong = isinstance(margin, bool) or not isinstance(margin, int | float)
                if margin is not None and (wrong or not POSITIVE.holds(margin)):
                    self._fault(f"{place}.equal_within", f"got {margin!r}, expected a number, {POSITIVE}")
                    margin = None
                found.append((arm, other, margin))
            else:
                self._fault(place, f"got {one!r}", "{arm: {algorithm: dash}, other: {algorithm: grpo}}")
        return tuple(found)

    def _combination(self, place: str, value: object) -> Combination:
        """A mapping from keys to values as overrides."""
        if not isinstance(value, dict):
            self._fault(place, f"got {value!r}, expected a mapping", "write it as a mapping, name: value")
            return ()
        return tuple(override_of(str(key), one) for key, one in value.items())

    def _combinations(self, place: str, value: object) -> list[Combination]:
        rows = self._list(place, value)
        return [self._combination(f"{place}[{number}]", one) for number, one in enumerate(rows)]

    def _blocks(self, value: object, seeds: Sequence[int]) -> tuple[Block, ...]:
        if isinstance(value, dict):
            return (self._block("grid", value, seeds),)
        read = []
        for number, block in enumerate(self._list("grid", value)):
            if isinstance(block, dict):
                read.append(self._block(f"grid[{number}]", block, seeds))
            else:
                self._combination(f"grid[{number}]", block)
        return tuple(read)

    def _block(self, place: str, value: dict[str, Any], seeds: Sequence[int]) -> Block:
        before = len(self.faults)
        axes = [self._axis(f"{place}.{key}", key, one) for key, one in value.items() if key not in IN_BLOCK]
        for number, one in enumerate(self._list(f"{place}.zip", value.get("zip"))):
            axes.append(self._zip(f"{place}.zip[{number}]", one))
        keys = [key_of(text) for axis in axes if axis for text in axis[0]]
        for key in sorted({key for key in keys if keys.count(key) > 1}):
            self._fault(f"{place}.{key}", "is on two axes")
        include = self._combinations(f"{place}.include", value.get("include"))
        exclude = self._combinations(f"{place}.exclude", value.get("exclude"))
        if not axes and not include:
            self._fault(place, "names no axis, so it has no cells", "give it one, e.g. algorithm: [dash]")
        block = Block(tuple(axes) or ((),), tuple(map(frozenset, exclude)), tuple(include))
        if len(self.faults) == before:
            self._check_excluded(place, block, exclude, seeds)
        if len(self.faults) == before and not any(any(block.combinations(seed)) for seed in seeds):
            self._fault(place, "has no cells: all of its combinations are excluded")
        return block

    def _axis(self, place: str, key: str, value: object) -> Axis:
        values = value if isinstance(value, list) else [value]
        texts = [override_of(key, one) for one in values]
        if isinstance(value, dict):
            self._fault(place, "got a mapping, expected a list of values or one value")
        if not texts:
            self._fault(place, "has no values, so the grid has no cells", "give it some, or leave it out")
        for text in sorted({text for text in texts if texts.count(text) > 1}):
            self._fault(place, f"names {text.partition('=')[2]} twice")
        return tuple((text,) for text in texts)

    def _zip(self, place: str, value: object) -> Axis:
        if not isinstance(value, dict) or not all(isinstance(one, list) for one in value.values()):
            self._fault(place, f"got {value!r}, expected a mapping from keys to lists")
            return ()
        lengths = {key: len(one) for key, one in value.items()}
        if len(set(lengths.values())) != 1:
            self._fault(place, f"runs lists of unequal lengths together: {lengths}")
            return ()
        if 0 in lengths.values():
            self._fault(place, "has no values, so the grid has no cells")
        rows = zip(*value.values(), strict=True)
        return tuple(tuple(map(override_of, value, row)) for row in rows)

    def _check_excluded(
        self, place: str, block: Block, exclude: Sequence[Combination], seeds: Sequence[int]
    ) -> None:
        """Whether what is left out is on the axes."""
        on_axes: dict[str, list[str]] = {"seed": [str(seed) for seed in seeds]}
        for text in (text for axis in block.axes for choice in axis for text in choice):
            on_axes.setdefault(key_of(text), []).append(text.partition("=")[2])
        for number, one in enumerate(exclude):
            where = f"{place}.exclude[{number}]"
            if not one:
                self._fault(where, "is empty: it would leave out everything")
            for key, _, text in (override.partition("=") for override in one):
                if key not in on_axes:
                    self._fault(f"{where}.{key}", "is no axis of this block", nearest(key, on_axes))
                elif text not in on_axes[key]:
                    self._fault(f"{where}.{key}", f"got {text}", nearest(text, on_axes[key]))


def _faults_of_each(spec: Spec) -> list[Fault]:
    """What is wrong with each key and option of a sweep by itself."""
    chosen = (text for block in spec.blocks for axis in block.axes for texts in axis for text in texts)
    added = (text for block in spec.blocks for texts in block.include for text in texts)
    texts = dict.fromkeys((*spec.overrides, *chosen, *added))
    return list(dict.fromkeys(fault for text in texts for fault in find_faults([text], checked=False)))
