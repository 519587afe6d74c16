"""Cells in the making: combinations composed, checked and asked what they wait for. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dash_exp.config.checks import check, outside
from dash_exp.config.environment import Installed
from dash_exp.config.schema import NATURAL, Config
from dash_exp.errors import Fault, FaultCollector, UserError
from dash_exp.record.jobs import Resources, Traces
from dash_exp.sweep.composer import Composer, Composition
from dash_exp.sweep.expand import Combination, key_of
from dash_exp.sweep.hardware import hardware_label
from dash_exp.sweep.resources import resource_faults, resources_of
from dash_exp.sweep.settings import Settings, is_setting, settings_of
from dash_exp.traces.settings import out_of

TRACES = "dataset.traces"


@dataclass(slots=True)
class Draft:
    """A cell in the making. `number`: among the sweep's combinations. `overrides`: all that make its config,
    those of the launch too. `marked`: the kind of machine was added to them. `awaits`: a file that is still
    to be made. `needs`: ids of its partners."""

    number: int
    overrides: Combination
    composition: Composition
    resources: Resources
    settings: Settings
    awaits: Path | None = None
    marked: bool = False
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Examined:
    """What is known of a config, whatever its seed."""

    faults: tuple[Fault, ...]
    resources: Resources
    settings: Settings
    awaits: Path | None


@dataclass(slots=True)
class Workshop:
    """What all drafts of a plan are made with. `pool`: folders of cells below `root`, by id."""

    composer: Composer
    faults: FaultCollector
    root: Path
    cache: Path | None
    pool: dict[str, str]
    installed: Installed
    _examined: dict[Combination, Examined] = field(default_factory=dict)
    _settings: dict[object, Settings] = field(default_factory=dict)

    def examine(self, overrides: Combination, composition: Composition) -> Examined:
        """Once for all seeds: the seed changes nothing that is looked at."""
        key = tuple(text for text in overrides if key_of(text) not in ("seed", "hardware"))
        if key not in self._examined:
            config = composition.config
            checked = (fault for fault in check(config, self.installed) if fault.where != "seed")
            faults = (*checked, *resource_faults(config))
            settings = self._settings_of(composition, config)
            self._examined[key] = Examined(faults, resources_of(config), settings, awaited(config))
        return self._examined[key]

    def _settings_of(self, composition: Composition, config: Config) -> Settings:
        """Shared by all cells that set the same of the launch."""
        own = tuple((key, repr(value)) for key, value in composition.values if is_setting(key))
        key = (id(composition.base), own)
        if key not in self._settings:
            self._settings[key] = settings_of(config)
        return self._settings[key]


def awaited(config: Config) -> Path | None:
    """The file of a teacher's traces that this config learns from, where it has not been made."""
    traces = config.dataset.traces
    if config.algorithm.source != "traces" or not traces:
        return None
    path = Path(traces).expanduser().resolve()
    return None if path.is_file() else path


def sound(shop: Workshop, combinations: Sequence[Combination]) -> list[tuple[int, Combination]]:
    """Tell what is wrong with single overrides. What is left are combinations without them; those with
    an option that does not exist are left out, since nobody knows what they would have been."""
    wrong: dict[str, list[Fault]] = {}
    for text in dict.fromkeys(text for combination in combinations for text in combination):
        if found := shop.composer.faults_of(text):
            wrong[text] = found
    kept = []
    for number, combination in enumerate(combinations):
        bad = [text for text in combination if text in wrong]
        for text in bad:
            shop.faults.add(number, wrong[text])
        if not any(key_of(text) in shop.composer.options for text in bad):
            kept.append((number, tuple(text for text in combination if text not in bad)))
    return kept


def drafted(shop: Workshop, number: int, overrides: Combination) -> Draft | None:
    """A combination composed and examined; None, and told, where it cannot be."""
    try:
        composition = shop.composer.compose(overrides)
    except UserError as error:
        shop.faults.add(number, error.faults)
        return None
    seen = shop.examine(overrides, composition)
    shop.faults.add(number, (fault for fault in seen.faults if not (seen.awaits and fault.where == TRACES)))
    shop.faults.add(number, outside("seed", composition.config.seed, NATURAL))
    return Draft(number, overrides, composition, seen.resources, seen.settings, seen.awaits)


def label(shop: Workshop, draft: Draft) -> None:
    """Make the draft a cell of its kind of machine, unless it names one."""
    config = draft.composition.config
    if config.hardware is None:
        draft.overrides = (*draft.overrides, f"hardware={hardware_label(config)}")
        draft.composition = shop.composer.compose(draft.overrides)
        draft.marked = True


def hashed(shop: Workshop, draft: Draft) -> bool:
    """Whether the files that a draft's identity depends on can be read; told where they cannot."""
    try:
        draft.composition.base.described(shop.cache)
    except (UserError, OSError) as error:
        shop.faults.add(draft.number, reading_faults(error))
        return False
    return True


def reading_faults(error: UserError | OSError) -> list[Fault]:
    if isinstance(error, UserError):
        return error.faults
    return [Fault(str(error.filename or "a file"), f"cannot be read: {error.strerror or error}")]


def has_budget(draft: Draft) -> bool:
    budget = draft.composition.config.budget
    return budget.seconds is not None or budget.match is not None


def traces_by_file(commands: Iterable[Combination], launch: Combination) -> dict[Path, Traces]:
    """The commands that make files of traces, by the file. Raises UserError where one cannot be read."""
    found = {}
    for command in commands:
        written = {key_of(text) for text in command}
        arguments = (*command, *(text for text in launch if key_of(text) not in written))
        try:
            path = out_of(arguments).resolve()
        except UserError as error:
            told = f"python -m dash_exp.traces {' '.join(command)}"
            raise UserError([Fault(told, f"{f.where}: {f.what}", f.hint) for f in error.faults]) from None
        found[path] = Traces(path, arguments)
    return found


def cache_of(root: Path) -> Path | None:
    """Where hashes are remembered; None where the outputs have no folder yet, or must not be written."""
    cache = root / "cache"
    deepest = next((path for path in (cache / "hashes", cache, root) if path.exists()), root)
    return cache if os.access(deepest, os.W_OK | os.X_OK) else None


def pool_of(root: Path) -> dict[str, str]:
    """Names of the cells' folders that are there, by id."""
    try:
        names = os.listdir(root / "cells")
    except OSError:
        return {}
    return {name.rpartition("-")[2]: name for name in names if "-" in name}
