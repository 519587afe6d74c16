"""Sweeps as files: `sweeps/<name>.yaml`, what each asks and which cells answer it. Torch-free.

claim      what is tested, a sentence
question   what is looked at to test it
feeds      the tables and figures its cells are in, as table_3 or figure_1
times      true: its result is a time, so its cells belong to a kind of machine (`hardware`) and do one
           thing after the other (sampler.streaming=false, where nothing else is said)
overrides  of every cell
seeds      of every combination
traces     arguments of `python -m dash_exp.traces`, a line each, for cells that learn from a teacher
grid       blocks, all of whose combinations are taken. In a block:
    <key>    an axis: a list of values, or one; axes are multiplied
    zip      a list of mappings from keys to equally long lists that run together
    exclude  combinations that are left out, each named by some of its values
    include  combinations that are added to the block's, each a mapping from keys to values
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dash_exp import PACKAGE
from dash_exp.config.compose import find_faults
from dash_exp.errors import Fault, UserError, nearest
from dash_exp.sweep.expand import Axis, Block, Combination, chosen_of, key_of, override_of

KEYS = ("claim", "question", "feeds", "times", "overrides", "seeds", "traces", "grid")
NEEDED = ("claim", "question", "feeds", "seeds", "grid")
IN_BLOCK = ("zip", "exclude", "include")
FEED = re.compile(r"(table|figure)_[a-z0-9_]+")
NAMED = "write it as a mapping, name: value"


@dataclass(frozen=True, slots=True)
class Spec:
    """A sweep's file, read and found sound. What its keys and options mean is asked when it is planned."""

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

    def about(self) -> dict[str, object]:
        """What a manifest says of where it comes from."""
        return {
            "claim": self.claim,
            "question": self.question,
            "feeds": list(self.feeds),
            "times": self.times,
            "source": str(self.source),
        }


def sweeps_dir() -> Path:
    """The folder of sweeps: beside the package in a checkout, inside it once installed."""
    inside = PACKAGE / "sweeps"
    return inside if inside.is_dir() else PACKAGE.parent / "sweeps"


def names() -> list[str]:
    return sorted(path.stem for path in sweeps_dir().glob("*.yaml"))


def load(name_or_path: str) -> Spec:
    """A sweep by its name in `sweeps/`, or by a file. Raises UserError with everything wrong with it."""
    is_file = name_or_path.endswith((".yaml", ".yml"))
    path = Path(name_or_path) if is_file else sweeps_dir() / f"{name_or_path}.yaml"
    if not path.is_file():
        hint = f"looked in {path.parent.resolve()}" if is_file else nearest(name_or_path, names())
        raise UserError(Fault(name_or_path, "is no sweep" if not is_file else "is not a file", hint))
    return Reader(path).spec()


class Reader:
    """Reads one file; `faults` are collected, and raised together."""

    def __init__(self, path: Path):
        self.path = path
        self.faults: list[Fault] = []

    def spec(self) -> Spec:
        value = self._loaded()
        self._known(value, KEYS, "")
        for key in NEEDED:
            if value.get(key) in (None, "", []):
                self._fault(key, "is missing", f"a sweep has {', '.join(NEEDED)}")
        texts = {key: str(value.get(key) or "").strip() for key in ("claim", "question")}
        overrides = self._combination("overrides", value.get("overrides") or {})
        seeds = self._seeds(value.get("seeds"))
        blocks = self._blocks(value.get("grid"), seeds)
        spec = Spec(
            self.path.stem,
            texts["claim"],
            texts["question"],
            self._feeds(value.get("feeds")),
            overrides,
            seeds,
            blocks,
            self._flag("times", value.get("times", False)),
            self._traces(value.get("traces")),
            self.path,
        )
        if self.faults:  # planning would find what else is wrong, but it is not come to
            raise UserError([*self.faults, *faults_of_each(spec)])
        return spec

    def _fault(self, place: str, what: str, hint: str = "") -> None:
        self.faults.append(Fault(f"{self.path}: {place}" if place else str(self.path), what, hint))

    def _loaded(self) -> dict[str, Any]:
        """The file as a mapping. Raises UserError where it is none."""
        try:
            value = yaml.load(self.path.read_text(encoding="utf-8"), UniqueKeys)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f"{self.path}:{mark.line + 1}" if mark else str(self.path)
            raise UserError(Fault(place, f"not valid yaml: {error.problem}")) from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(Fault(str(self.path), f"cannot be read: {error}")) from None
        if not isinstance(value, dict):
            raise UserError(Fault(str(self.path), "is not a sweep", f"it has {', '.join(NEEDED)}"))
        return value

    def _known(self, value: Mapping[Any, Any], allowed: Sequence[str], place: str) -> None:
        for key in value:
            if key not in allowed:
                self._fault(f"{place}{key}", "unknown key", nearest(str(key), allowed))

    def _flag(self, place: str, value: object) -> bool:
        if not isinstance(value, bool):
            self._fault(place, f"got {value!r}, expected true or false")
        return value is True

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
                self._fault(
                    "feeds", f"got {name!r}", "write table_3, figure_1, or one's own, as table_filter"
                )
        return tuple(feeds)

    def _seeds(self, value: object) -> tuple[int, ...]:
        seeds = self._list("seeds", value)
        wrong = [s for s in seeds if isinstance(s, bool) or not isinstance(s, int) or s < 0]
        if wrong:
            self._fault("seeds", f"got {wrong[0]!r}, expected whole numbers of at least 0")
        elif len(set(seeds)) < len(seeds):
            self._fault("seeds", f"got {seeds}, which names one twice")
        return () if wrong else tuple(seeds)

    def _traces(self, value: object) -> tuple[Combination, ...]:
        lines = self._list("traces", value)
        for line in lines:
            if not isinstance(line, str) or not all("=" in part for part in line.split()):
                self._fault("traces", f"got {line!r}", "write key=value, as for python -m dash_exp.traces")
        return tuple(tuple(str(line).split()) for line in lines)

    def _combination(self, place: str, value: object) -> Combination:
        """A mapping from keys to values as overrides."""
        if not isinstance(value, dict):
            self._fault(place, f"got {value!r}, expected a mapping", NAMED)
            return ()
        return tuple(override_of(str(key), one) for key, one in value.items())

    def _blocks(self, value: object, seeds: Sequence[int]) -> tuple[Block, ...]:
        blocks = [value] if isinstance(value, dict) else self._list("grid", value)
        read = []
        for number, block in enumerate(blocks):
            place = f"grid[{number}]" if isinstance(value, list) else "grid"
            if isinstance(block, dict):
                read.append(self._block(place, block, seeds))
            else:
                self._fault(place, f"got {block!r}, expected a mapping", NAMED)
        return tuple(read)

    def _block(self, place: str, value: dict[str, Any], seeds: Sequence[int]) -> Block:
        before = len(self.faults)
        axes = [self._axis(f"{place}.{key}", key, one) for key, one in value.items() if key not in IN_BLOCK]
        for number, one in enumerate(self._list(f"{place}.zip", value.get("zip"))):
            axes.append(self._zip(f"{place}.zip[{number}]", one))
        keys = [key_of(text) for axis in axes if axis for text in axis[0]]
        for key in sorted({key for key in keys if keys.count(key) > 1}):
            self._fault(f"{place}.{key}", "is on two axes")
        include = tuple(
            self._combination(f"{place}.include[{number}]", one)
            for number, one in enumerate(self._list(f"{place}.include", value.get("include")))
        )
        left_out = self._list(f"{place}.exclude", value.get("exclude"))
        exclude = [self._combination(f"{place}.exclude[{n}]", one) for n, one in enumerate(left_out)]
        if not axes and not include:
            self._fault(place, "names no axis, so it has no cells", "give it one, e.g. algorithm: [dash]")
        block = Block(tuple(axes) or ((),), tuple(map(frozenset, exclude)), include)
        if len(self.faults) == before:
            self._check_cells(place, block, exclude, seeds)
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
        return tuple(
            tuple(override_of(key, one) for key, one in zip(value, row, strict=True)) for row in rows
        )

    def _check_cells(
        self, place: str, block: Block, exclude: Sequence[Combination], seeds: Sequence[int]
    ) -> None:
        """Whether what is left out was there, and anything remains."""
        before = len(self.faults)
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
        empty = not any(True for seed in seeds for _ in chosen_of(block, seed))
        if empty and len(self.faults) == before:
            self._fault(place, "has no cells: all of its combinations are excluded")


def faults_of_each(spec: Spec) -> list[Fault]:
    """What is wrong with the keys and options of a sweep, each taken alone."""
    chosen = (text for block in spec.blocks for axis in block.axes for texts in axis for text in texts)
    added = (text for block in spec.blocks for texts in block.include for text in texts)
    texts = dict.fromkeys((*spec.overrides, *chosen, *added))
    return list(dict.fromkeys(fault for text in texts for fault in find_faults([text], checked=False)))


class UniqueKeys(yaml.SafeLoader):
    """Yaml that names no key twice: of two equal axes only the last one would be run."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                mark = node.value[position][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", mark)
        return super().construct_mapping(node, deep)
