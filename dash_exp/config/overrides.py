"""Keys as they are written on the command line: what is wrong with one override (its key, its option, its
type), the settings that a command adds, and the lists of keys in the help and in `docs/config.md`.

`python -m dash_exp.config.overrides` prints that page.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import math
import re
import shlex
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dash_exp.config.schema import Config, Key, is_action, plain
from dash_exp.errors import Fault, nearest
from dash_exp.text import LONG, hide_credentials, shorten

Settings = TypeVar("Settings")
Options = Mapping[str, Sequence[str]]
"""Config group to the names of its options."""

TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
HELP_WIDTH = 78
PAGE_HEADER = """# Every config key

What a key means and what it may be, made from `dash_exp/config/schema.py`
(`python -m dash_exp.config.overrides > docs/config.md`). Values are in `conf/`;
`python -m dash_exp --cfg job --resolve` prints those of a run.
"""
MAY_BE_EMPTY = ("id_prefix",)
SECRETS = "it would be recorded: set the variable MLFLOW_TRACKING_URI, or for servers DASH_SERVER_KEY"
MAX_CELLS = 5000
"""Cells that a sweep may have; counted before it is expanded."""
UNQUOTED = re.compile(r"[A-Za-z0-9_./@+-]+")
OTHER_TYPE = re.compile(r"null|true|false|[+-]?(inf|nan|[\d_]*\.?[\d_]*(e[+-]?[\d_]+)?)", re.IGNORECASE)
FLOAT_WITHOUT_DOT = re.compile(r"[+-]?\d+(\.\d*)?e[+-]?\d+", re.IGNORECASE)
TABLE_HEADER = "| key | value | meaning |\n|---|---|---|"
KINDS = {"str": "text", "bool": "true or false", "int": "whole number", "float": "number"}


def override_faults(override: Override, options: Options) -> list[Fault]:
    """Faults of one override with one value. Keys of Hydra's own are left to Hydra, as far as it checks."""
    key, value = override.key_or_group, override.value()
    if key == "hydra.sweeper.max_batch_size" and isinstance(value, int) and value < 1:
        return [Fault(key, f"got {plain(value)}, must be at least 1")]
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        return []
    if key.split("/")[0] in options and not isinstance(value, dict):
        return _group_faults(override, options)
    if type_of(key) is None:
        return [unknown_key(key, options)]
    if is_action(key) and hide_credentials(text := str(value)) != text:
        return [
            Fault(key, f"got {shorten(hide_credentials(text))}: a user, password or token in a URL", SECRETS)
        ]
    if value == "" and key.rpartition(".")[2] not in MAY_BE_EMPTY:
        return [Fault(key, "is empty", f"write {key}=null, or leave it out")]
    if override.is_delete():
        if not _is_mapping(type_of(key.rpartition(".")[0])):
            return [Fault(key, "a setting cannot be removed", "give it another value")]
        return []
    return _type_faults(key, value, options)


def unreadable(text: str, why: object) -> Fault:
    key, equals, value = text.partition("=")
    place = shorten(key or text).encode(errors="backslashreplace").decode()
    if not equals:
        return Fault(place, "is not key=value", "see python -m dash_exp --help")
    if len(value) > LONG:
        return Fault(place, f"cannot read its value of {len(value)} characters: {first_line(why)}")
    written = shlex.quote(f"{key}={quoted(value)}")
    hint = f"write a value that holds one of {{}}[](),=: in quotes: {written}"
    return Fault(place, f"cannot read {text!r}: {first_line(why)}", hint)


def first_line(error: object) -> str:
    return shorten((str(error).splitlines() or [type(error).__name__])[0])


def variants_of(override: Override, sweep: bool) -> tuple[list[Override], list[Fault]]:
    """The override once for each of its values."""
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [override], []
    if not sweep:
        hint = f"add -m for one cell per value, or quote one value with commas: '{key}=\"a,b\"'"
        return [], [Fault(key, f"got several values: {shorten(override.input_line or '')}", hint)]
    if not override.is_discrete_sweep():
        return [], [Fault(key, "an interval has no list of values", f"write {key}=a,b,c")]
    try:
        many = count_of_values(override)
    except (ValueError, ArithmeticError, HydraException) as error:
        return [], [Fault(key, f"cannot read {override.input_line}: {first_line(error)}")]
    if many > MAX_CELLS:
        return [], [Fault(key, f"has {plain(many)} values", f"a sweep has at most {MAX_CELLS} cells")]
    texts = [f"{key}={value}" for value in override.sweep_string_iterator()]
    if not texts:
        return [], [Fault(key, f"no value matches {override.input_line}")]
    return OverridesParser.create().parse_overrides(texts), []


def count_of_values(override: Override) -> int:
    """How many values an override has, without making them. Raises ValueError or ArithmeticError for a range
    that has no end."""
    value = override._value
    if isinstance(value, RangeSweep):
        start, stop, step = (Decimal(str(number)) for number in (value.start, value.stop, value.step))
        if not (step and (start - stop).is_finite()):
            raise ValueError("a range needs finite ends and a step other than 0")
        return max(0, math.ceil((stop - start) / step))
    values = value.list if isinstance(value, ChoiceSweep) else value
    return len(values) if isinstance(values, list) else 1  # a glob has as many as there are options


def quoted(text: str) -> str:
    """Text in Hydra's grammar, in quotes where it would be read as something else."""
    if FLOAT_WITHOUT_DOT.fullmatch(text):
        return repr(float(text))
    if UNQUOTED.fullmatch(text) and not OTHER_TYPE.fullmatch(text):
        return text
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def _group_faults(override: Override, options: Options) -> list[Fault]:
    group, value = override.key_or_group, override.value()
    if "/" in group:
        first, _, rest = group.partition("/")
        return [Fault(group, "is a folder of options", f"write {first}={rest}/{value}")]
    if override.is_delete():
        return [Fault(group, "a config group cannot be removed", nearest("none", options[group]))]
    if (override.is_add() or override.is_force_add()) and not override.package:
        return [Fault(group, "already has an option", f"write {group}={value}, without +")]
    chosen = value if isinstance(value, list) else [value]
    names = [str(name).removesuffix(".yaml") for name in chosen]
    own = {name: f"write {group}.name={name}" for name in names if ":" in name and group == "filter"}
    return [
        Fault(group, f"unknown option {name!r}", own.get(name) or nearest(name, options[group]))
        for name in names
        if name not in options[group]
    ]


def _type_faults(key: str, value: Any, options: Options) -> list[Fault]:
    """Whether the schema takes this value."""
    holder, nested = key, value
    for parent in _parents(key):
        if _is_mapping(type_of(parent)):  # its entries are not in the empty schema: set the complete mapping
            nested = _nested(key.removeprefix(f"{parent}."), value)
            holder = parent
    try:
        OmegaConf.update(copy.deepcopy(_schema()), holder, nested, merge=True)
    except OmegaConfBaseException as error:
        inner = error.full_key or key
        if type_of(inner) is None:
            return [unknown_key(inner, options)]
        if inner != key:
            return [Fault(inner, _headline(str(error), inner))]
        return [Fault(key, f"got {shown(value)}, expected {describe(type_of(key))}")]
    return []


@functools.cache
def _schema() -> DictConfig:
    """The config's types, built once; a copy takes a third of the time."""
    schema: DictConfig = OmegaConf.structured(Config)
    return schema


def _parents(key: str) -> list[str]:
    """The keys above a dotted key, the nearest first."""
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _nested(key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: _nested(rest, value) if rest else value}


def _is_mapping(hint: Any) -> bool:
    return any(typing.get_origin(arm) is dict for arm in (hint, *typing.get_args(hint)))


def shown(value: Any) -> str:
    """A value as it was written, with its type."""
    kind = type(value).__name__
    return "null" if value is None else f"{shorten(repr(value))} ({KINDS.get(kind, kind)})"


def describe(hint: Any) -> str:
    """A type in words."""
    if isinstance(hint, types.UnionType):
        return " or ".join(describe(part) for part in typing.get_args(hint))
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is list:
        return "a list like [a,b]"
    if typing.get_origin(hint) is dict or dataclasses.is_dataclass(hint):
        return "a mapping like {name: value}"
    return TYPE_NAMES.get(hint, str(hint))


def type_of(key: str) -> Any:
    """The declared type of a dotted key of `Config`; None when there is no such key."""
    hint: Any = Config
    for part in key.split(".") if key else ():
        inner = [arm for arm in typing.get_args(hint) if arm is not type(None)]
        if isinstance(hint, types.UnionType):
            hint = inner[0]
        if dataclasses.is_dataclass(hint):
            hint = typing.get_type_hints(hint).get(part)
        elif typing.get_origin(hint) is dict and part:
            hint = typing.get_args(hint)[1]
        else:
            return None
        if hint is None:
            return None
    return hint


def leaf_keys(kind: Any = Config, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """Every dotted key of the schema that holds a value, with what is declared of it."""
    hints = typing.get_type_hints(kind)
    for one in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[one.name]):
            yield from leaf_keys(hints[one.name], f"{prefix}{one.name}.")
        else:
            yield f"{prefix}{one.name}", one.metadata["key"]


def common_keys() -> str:
    """The keys that have an example, one a line, for `--help`."""
    margin = " " * 30
    rows = [(f"{key}={declared.example}", declared) for key, declared in leaf_keys() if declared.example]
    return "\n".join(
        textwrap.fill(declared.meaning, HELP_WIDTH, initial_indent=f"{text:29} ", subsequent_indent=margin)
        for text, declared in rows
    )


def option_groups(root: Path) -> str:
    """The options of each config group below `root`, for `--help`."""
    groups: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*/*.yaml")):
        groups.setdefault(path.parent.relative_to(root).as_posix(), []).append(path.stem)
    texts = []
    for group in sorted(group for group in groups if not group.startswith("hydra")):
        text = f"{group}: {', '.join(groups[group])}"
        texts.append(textwrap.fill(text, HELP_WIDTH, subsequent_indent="  ", break_on_hyphens=False))
    return "\n".join(texts)


def page() -> str:
    """`docs/config.md`: every key, one table for each group."""
    groups: dict[str, list[str]] = {}
    for key, declared in leaf_keys():
        meaning = declared.meaning.replace("|", "\\|")
        row = f"| `{key}` | {_value(key, declared)} | {meaning} |"
        groups.setdefault(key.rpartition(".")[0], []).append(row)
    parts = [PAGE_HEADER]
    for group, rows in sorted(groups.items()):
        about = " ".join(type_of(group).__doc__.split())
        parts.append("\n".join([f"## {group or 'A run'}\n\n{about}\n", TABLE_HEADER, *rows, ""]))
    return "\n".join(parts)


def _value(key: str, declared: Key) -> str:
    hint = type_of(key)
    optional = isinstance(hint, types.UnionType)
    if declared.allowed or declared.plugin:
        own = ["`module:function`"] * bool(declared.plugin)
        kind = ", ".join([*(f"`{name}`" for name in declared.allowed), *own])
        return f"a list of {kind}" if typing.get_origin(hint) is list else kind + optional * ", null"
    kind = describe(hint).replace(" or null", "")
    return f"{kind}{f', {declared.range}' if declared.range else ''}{optional * ', or null'}"


def unknown_key(key: str, options: Options) -> Fault:
    """A fault that names the key probably meant: the same name elsewhere, or a similar one."""
    parent, _, last = key.rpartition(".")
    while type_of(parent) is None:
        parent = parent.rpartition(".")[0]
    inside = _names_in(parent) if parent else sorted({*_names_in(parent), *options})
    leaves = {leaf: leaf.rpartition(".")[2] for leaf, _ in leaf_keys()}
    meant = [leaf for leaf, name in leaves.items() if name == last]
    if not meant:
        close = difflib.get_close_matches(last, inside, n=1, cutoff=0.6)
        meant = [f"{parent}.{name}" if parent else name for name in close]
    if not meant:
        close = difflib.get_close_matches(last, leaves.values(), n=1, cutoff=0.75)
        meant = [leaf for leaf, name in leaves.items() if name in close]
    allowed = f"{f'in {parent}' if parent else 'allowed'}: {', '.join(inside)}"
    if key.startswith("hydra"):
        return Fault(key, "unknown key")
    if meant:
        names = " or ".join(map(repr, meant))
        return Fault(key, "unknown key", f"did you mean {names}? ({allowed})")
    return Fault(key, "unknown key", allowed)


def _names_in(key: str) -> list[str]:
    hint = type_of(key)
    return sorted(typing.get_type_hints(hint)) if dataclasses.is_dataclass(hint) else []


def composition_fault(error: Exception, where: str, options: Options) -> Fault:
    """A fault from an error of Hydra, OmegaConf or yaml; `where` is for errors that name no key."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return Fault(f"{mark.name}:{mark.line + 1}", f"not valid yaml: {error.problem}")
    if isinstance(error, AssertionError):  # how OmegaConf reports that a parent is null
        return Fault(where, "cannot be set: the mapping that would hold it is null")
    text = "\n".join(str(e) for e in (error, error.__cause__) if e is not None)
    file = re.search(r"In '([^']+)'", text)
    inside = f" (in {file[1]}.yaml)" if file else ""
    key = re.search(r"full_key: ([\w.\[\]-]+)", text)
    if key and re.search(r"Key '[^']*' (is )?not in", text) and type_of(key[1]) is None:
        fault = unknown_key(key[1], options)
        return dataclasses.replace(fault, what=fault.what + inside)
    option = re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", text)
    if option:
        listed = re.search(r"Available options in[^\n]*\n((?:\t[^\n]*\n?)*)", text)
        names = listed[1].split() if listed else options.get(option[1], ())
        return Fault(option[1], f"unknown option {option[2]!r}{inside}", nearest(option[2], names))
    override = re.search(r"Could not override '([^']+)'", text)
    if override:
        meant = re.search(r"Did you mean[^?]*\?", text)
        return Fault(override[1], f"nothing there to set{inside}", meant[0] if meant else "")
    return Fault(key[1] if key else where, _headline(text, key[1] if key else "") + inside)


def _headline(text: str, key: str) -> str:
    """The line of an error that says what happened."""
    noise = r"\s*(full_key|reference_type|object_type)|In '.*raised while|To append|\s*$"
    lines = [line.strip() for line in text.splitlines() if not re.match(noise, line)]
    misfit = re.match(r"Value ('.*') of type '(\w+)'", lines[0]) if lines else None
    if misfit and type_of(key) is not None:
        kind = KINDS.get(misfit[2], misfit[2])
        return f"got {misfit[1]} ({kind}), expected {describe(type_of(key))}"
    return re.sub(r"^In '[^']*': ", "", lines[0]) if lines else text


def split_off(prefix: str, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that begin with `prefix.`, with it removed, and the others."""
    own = [text.removeprefix(f"{prefix}.") for text in arguments if text.startswith(f"{prefix}.")]
    return own, [text for text in arguments if not text.startswith(f"{prefix}.")]


def own_settings(schema: type[Settings], prefix: str, texts: Sequence[str]) -> tuple[Settings, list[Fault]]:
    """A command's dataclass filled from these `name=value`, and what is wrong with them."""
    settings = OmegaConf.structured(schema)
    types = typing.get_type_hints(schema)
    faults = []
    for text in texts:
        name, equals, value = text.partition("=")
        where = f"{prefix}.{name}"
        if not equals:
            faults.append(Fault(where, "is not key=value"))
        elif name not in types:
            faults.append(Fault(where, "unknown key", nearest(name, types)))
        else:
            try:
                settings = OmegaConf.merge(settings, OmegaConf.from_dotlist([text]))
            except (OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError):
                faults.append(Fault(where, f"got {shorten(repr(value))}, expected {describe(types[name])}"))
    made: Any = OmegaConf.to_object(settings)
    assert isinstance(made, schema)
    return made, faults


if __name__ == "__main__":
    print(page(), end="")
