"""The door to Hydra: composing a `Config` from overrides, and finding every fault in them."""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dash_exp import PACKAGE
from dash_exp.config.checks import check
from dash_exp.config.held_out import with_own_evaluation
from dash_exp.config.overrides import (
    MAX_CELLS,
    Options,
    common_keys,
    composition_fault,
    option_groups,
    override_faults,
    unreadable,
    variants_of,
)
from dash_exp.config.schema import BudgetConfig, Config, plain
from dash_exp.errors import Fault, UserError
from dash_exp.text import LONG, shorten

VERSION_BASE = "1.3"
COMPOSED = 64
"""Cells of a sweep that are composed and checked before it is planned, about 0.1 s each."""

OPEN_MAPPINGS = ("fields", "timeouts", "task_options", "chat_arguments")
"""Of a dataset."""

CELL_ID = re.compile(r"[0-9a-f]{8}")
MATCH = "budget.match"
ARM_ONLY = (
    "name",
    "source",
    "surrogate",
    "clip_low",
    "clip_high",
    "passes",
    "mini_batch",
    "filters",
    "pass_k",
)
"""Keys that define an arm with several updates; its sizes, beta and the rest hold for its partner too."""
PARTNER_HINT = "name a cell id, an arm (dash), or overrides (experiment=...)"

COMPOSITION_ERRORS = (
    HydraException,
    OmegaConfBaseException,
    yaml.YAMLError,
    ValueError,
    AssertionError,
    RecursionError,
    OSError,
)


def conf_dir() -> Path:
    """The folder of yaml files: beside the package in a checkout, inside it when installed."""
    inside = PACKAGE / "conf"
    return inside if inside.is_dir() else PACKAGE.parent / "conf"


@functools.cache
def register() -> None:
    """Store the schema in Hydra under the name that conf/config.yaml uses. Mappings whose keys the user
    chooses take new ones without Hydra's `+`."""
    schema = OmegaConf.structured(Config)
    OmegaConf.set_struct(schema.cluster.sbatch, False)
    for name in OPEN_MAPPINGS:
        OmegaConf.set_struct(schema.dataset[name], False)
    ConfigStore.instance().store(name="schema", node=schema)
    OmegaConf.register_new_resolver("common_keys", common_keys, replace=True)  # for --help
    OmegaConf.register_new_resolver("option_groups", lambda: option_groups(conf_dir()), replace=True)


def compose(overrides: Sequence[str] = ()) -> Config:
    """The config of these overrides, not checked. Raises UserError with every override that is wrong."""
    with opened():
        try:
            return composed_config(overrides)
        except COMPOSITION_ERRORS as error:
            faults = find_faults(overrides, checked=False)
            raise UserError(faults or Fault("config", str(error))) from None


def find_faults(overrides: Sequence[str], *, sweep: bool = False, checked: bool = True) -> list[Fault]:
    """Every fault in a command line's overrides, in their order, then those of the cells they make.

    `sweep`: a key may have several values, up to MAX_CELLS combinations; the first COMPOSED of the options
    and of each key's values are composed. `checked=False` leaves out `checks.check`.
    """
    with opened():
        parsed, faults = parse(overrides)
        absent_places = _searchpath_faults(parsed)
        if absent_places:
            parsed = [o for o in parsed if o.key_or_group != "hydra.searchpath"]
            faults += absent_places
        options = options_in(search_dirs(parsed))
        axes: list[list[Override]] = []
        for override in parsed:
            variants, variant_faults = variants_of(override, sweep)
            found = [override_faults(variant, options) for variant in variants]
            faults += variant_faults + [fault for many in found for fault in many]
            axes.append([v for v, many in zip(variants, found, strict=True) if not many])
        good = [axis for axis in axes if axis]
        wrong_choice = any(
            not axis and parsed[place].key_or_group in options for place, axis in enumerate(axes)
        )
        cells = math.prod(map(len, good))
        if cells > MAX_CELLS:
            fault = Fault("-m", f"makes {plain(cells)} cells", f"a sweep has at most {MAX_CELLS}: split it")
            return [*dict.fromkeys(faults), fault]
        later = _cells_faults(good, options, checked)
    if wrong_choice:  # the default option stands in its place: only faults of keys that were written count
        written = {axis[0].key_or_group for axis in good}
        later = [fault for fault in later if fault.where in written - set(options)]
    return list(dict.fromkeys(faults + later))


def _cells_faults(axes: list[list[Override]], options: Options, checked: bool) -> list[Fault]:
    """What is wrong with the cells themselves. A fault of some cells says in which."""
    cells = _cells(axes, options)
    seen: dict[Fault, list[tuple[Override, ...]]] = {}
    for cell in cells:
        for fault in _cell_faults(cell, options, checked):
            seen.setdefault(fault, []).append(cell)
    varied = {axis[0].get_key_element(): axis[0].input_line for axis in axes if len(axis) > 1}
    faults = []
    for fault, found in seen.items():
        label = " ".join(
            str(override.input_line)
            for override in found[0]
            if override.get_key_element() in varied
            and all(override in cell for cell in found)
            and (override.key_or_group in options or override.input_line not in varied.values())
        )
        some = label and len(found) < len(cells)
        faults.append(replace(fault, what=f"{fault.what} (in {label})") if some else fault)
    return faults


def _cell_faults(cell: Sequence[Override], options: Options, checked: bool) -> list[Fault]:
    composed = _try(cell, "config", options)
    if isinstance(composed, Config):
        return check(composed) + _partner_faults(composed, cell, options) if checked else []
    return _attributed(cell, options) or composed


def _partner_faults(config: Config, cell: Sequence[Override], options: Options) -> list[Fault]:
    match = config.budget.match
    if match is None or CELL_ID.fullmatch(match):
        return []

    def compose_partner(overrides: Sequence[str]) -> Config:
        parsed, faults = parse(overrides)
        made = faults or _try(parsed, MATCH, options)
        if isinstance(made, Config):
            return made
        raise UserError(made)

    return partner_of(match, [o.input_line or "" for o in cell], compose_partner)[0]


def _attributed(cell: Sequence[Override], options: Options) -> list[Fault]:
    """Which overrides a cell cannot be composed with: each is tried separately, with the search path and (for
    a value) the chosen options."""
    places = [o for o in cell if o.key_or_group == "hydra.searchpath"]
    choices = [o for o in cell if o.key_or_group in options]
    values = [o for o in cell if o not in choices and o not in places]
    faults: list[Fault] = []
    sound: list[Override] = []
    for override in choices:
        composed = _try([*places, override], override.get_key_element(), options)
        if isinstance(composed, Config):
            sound.append(override)
        else:
            faults += composed
    for override in values:
        composed = _try([*places, *sound, override], override.get_key_element(), options)
        faults += [] if isinstance(composed, Config) else composed
    return faults


def _try(overrides: Sequence[Override], where: str, options: Options) -> Config | list[Fault]:
    try:
        return composed_config([override.input_line or "" for override in overrides])
    except UserError as error:
        return error.faults
    except COMPOSITION_ERRORS as error:
        return [composition_fault(error, where, options)]


def raw(overrides: Sequence[str]) -> DictConfig:
    """What Hydra composes from these overrides, before interpolation. Within `opened`."""
    return hydra.compose("config", overrides=list(overrides))


def composed_config(overrides: Sequence[str]) -> Config:
    """The config of these overrides. Within `opened`; raises COMPOSITION_ERRORS or UserError."""
    return with_own_evaluation(_typed(raw(overrides)), overrides)


def _typed(composed: DictConfig) -> Config:
    """What Hydra composed, as a `Config`, every interpolation resolved."""
    absent = [Fault(key, "has no value", f"set {key}=") for key in absent_keys(composed)]
    if absent:
        raise UserError(absent)
    config = OmegaConf.to_object(composed)  # its nodes are those of the schema, so its values have its types
    assert isinstance(config, Config)
    return config


class CachingComposer:
    """Composes many configs, within `opened`. What Hydra makes of a choice of options is kept; a cell's
    values are set in a copy of it by Hydra's own function, since Hydra too sets values last, in their order.

    `searchpath`: overrides of hydra.searchpath that any cell has, for the names of options.
    """

    def __init__(self, searchpath: Sequence[str] = ()):
        self.options = options_in(search_dirs(parse(searchpath)[0]))
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def faults_of(self, text: str) -> list[Fault]:
        """What is wrong with an override by itself."""
        parsed, faults = parse([text])
        faults += _searchpath_faults(parsed)
        for override in parsed:
            variants, several = variants_of(override, sweep=False)
            faults += several + [fault for one in variants for fault in override_faults(one, self.options)]
        return faults

    def compose(self, overrides: Sequence[str]) -> Config:
        """Raises UserError with everything that is wrong with these overrides together."""
        parsed, faults = parse(overrides)
        if faults:
            raise UserError(faults)
        choices = [override for override in parsed if self._is_choice(override)]
        texts = tuple(override.input_line or "" for override in choices)
        try:
            if texts not in self._composed:
                self._composed[texts] = raw(texts)
            config = copy.deepcopy(self._composed[texts])
            values = [override for override in parsed if override not in choices]
            ConfigLoaderImpl._apply_overrides_to_config(values, config)
            return with_own_evaluation(_typed(config), overrides)
        except COMPOSITION_ERRORS as error:
            faults = find_faults(overrides, checked=False)
            raise UserError(faults or Fault("config", str(error))) from None

    def _is_choice(self, override: Override) -> bool:
        """Whether Hydra chooses an option by it, or looks for options by it."""
        key = override.key_or_group
        return key.startswith("hydra.") or (key in self.options and not isinstance(override.value(), dict))


def absent_keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Keys without a value. (OmegaConf.missing_keys raises where one is interpolated.)"""
    for name in map(str, node):
        if OmegaConf.is_missing(node, name) and not OmegaConf.is_interpolation(node, name):
            yield f"{prefix}{name}"
        elif not OmegaConf.is_interpolation(node, name) and OmegaConf.is_dict(node[name]):
            yield from absent_keys(node[name], f"{prefix}{name}.")


def _cells(axes: list[list[Override]], options: Options) -> list[tuple[Override, ...]]:
    """Cells to compose: all combinations of options, since their settings may contradict each other (up to
    COMPOSED), each with the first values of single keys; then other values and options (up to COMPOSED)."""
    choices = [axis for axis in axes if axis[0].key_or_group in options]
    values = [axis for axis in axes if axis[0].key_or_group not in options]
    first = tuple(axis[0] for axis in values)
    products = list(itertools.islice(itertools.product(*choices), COMPOSED + 1))
    cells = [(*chosen, *first) for chosen in products[:COMPOSED]]
    turning = axes if len(products) > COMPOSED else values
    rest = range(1, min(COMPOSED, max((len(axis) for axis in turning), default=0)))
    return cells + [tuple(axis[min(turn, len(axis) - 1)] for axis in (*choices, *values)) for turn in rest]


@contextmanager
def opened() -> Iterator[None]:
    """Hydra's compose on our folder; Hydra's state is restored afterwards."""
    register()
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().hydra = None
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base=VERSION_BASE):
            yield
    finally:
        GlobalHydra.instance().hydra = before  # Hydra has replaced the instance


def parse(overrides: Sequence[str]) -> tuple[list[Override], list[Fault]]:
    """The overrides that can be read, and what is wrong with the others. Within `opened`."""
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    parsed, faults = [], []
    for text in overrides:
        try:
            text.encode()  # a shell may pass bytes that are no UTF-8
            override = parser.parse_overrides([text])[0]
        except (HydraException, ValueError, RecursionError) as error:
            faults.append(unreadable(text, error))
            continue
        if len(override.key_or_group) > LONG:
            faults.append(Fault(shorten(override.key_or_group), "unknown key"))
        elif override.key_or_group:
            parsed.append(override)
        else:
            faults.append(unreadable(text, "there is no key"))
    return parsed, faults


def search_dirs(overrides: Sequence[Override]) -> list[str]:
    """Folders that options come from, ours first, none of Hydra's own."""
    return [str(conf_dir()), *(path for path in _searchpath(overrides) if "://" not in path)]


def _searchpath(overrides: Sequence[Override]) -> list[str]:
    values: list[Any] = [o.value() for o in overrides if o.key_or_group == "hydra.searchpath"]
    lists = [value if isinstance(value, list) else [value] for value in values]
    return [str(entry).removeprefix("file://") for entries in lists for entry in entries]


def _searchpath_faults(overrides: Sequence[Override]) -> list[Fault]:
    """Entries that name no folder, or no package with options."""
    faults = []
    for entry in _searchpath(overrides):
        scheme, divider, rest = entry.rpartition("://")
        if scheme not in ("", "pkg"):
            what, hint = f"{entry}: unknown kind {scheme}://", "write file:///folder or pkg://package.folder"
        elif divider and not is_importable(rest):
            what, hint = f"{entry} is not a package", "it must be importable from here"
        elif not divider and not os.path.isdir(entry):
            what, hint = f"{entry!r} is not a folder", "write [file:///the/complete/path]"
        else:
            continue
        faults.append(Fault("hydra.searchpath", what, hint))
    return faults


def is_importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package.replace("/", ".")) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def options_in(folders: Sequence[str]) -> dict[str, list[str]]:
    """Each config group's options, in all folders; `demo/minute` is the file minute in demo."""
    groups = [path.name for path in conf_dir().iterdir() if path.is_dir() and path.name != "hydra"]
    options: dict[str, list[str]] = {}
    for group, folder in itertools.product(sorted(groups), folders):
        top = Path(folder, group)
        names = [file.relative_to(top).with_suffix("").as_posix() for file in top.rglob("*.yaml")]
        options.setdefault(group, []).extend(sorted(names))
    return options


def partner_overrides(match: str, overrides: Sequence[str]) -> list[str]:
    """The overrides of the partner: this cell's, without its budget, without what `match` replaces, and,
    where that is another arm (directly or by an experiment), without the keys that only this arm uses."""
    wanted = match.split() if "=" in match else [f"algorithm={match}"]
    replaced = {text.partition("=")[0] for text in wanted}
    if replaced & {"algorithm", "experiment"}:
        replaced |= {"algorithm", *(f"algorithm.{name}" for name in ARM_ONLY)}
    kept = [
        text
        for text in overrides
        if (key := text.lstrip("+~").partition("=")[0]) not in replaced and not key.startswith("budget")
    ]
    return [*kept, *wanted]


def partner_of(
    match: str, overrides: Sequence[str], compose: Callable[[Sequence[str]], Config]
) -> tuple[list[Fault], Config | None]:
    """The partner's config without a budget, or everything that is wrong with it."""
    try:
        partner = without_budget(compose(partner_overrides(match, overrides)))
        faults = check(partner)
    except UserError as error:
        faults = error.faults
    return (partner_faults(match, faults), None) if faults else ([], partner)


def partner_faults(match: str, faults: Sequence[Fault]) -> list[Fault]:
    """The faults of a partner, as faults of the cell that names it."""
    return [
        Fault(MATCH, f"its partner {match!r}: {f.where}: {f.what}", f.hint or PARTNER_HINT) for f in faults
    ]


def without_budget(config: Config) -> Config:
    """A copy of a config with nothing to end it early."""
    return replace(config, budget=BudgetConfig())
