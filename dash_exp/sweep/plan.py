"""From combinations of overrides to a plan: every cell is composed, checked and given its id before anything
is written or queued."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dash_exp.capacity.memory import memory_faults
from dash_exp.config.checks import check
from dash_exp.config.compose import (
    CELL_ID,
    MATCH,
    PARTNER_HINT,
    CachingComposer,
    compose,
    opened,
    partner_faults,
    partner_overrides,
    without_budget,
)
from dash_exp.config.environment import TRACES_HINT, Installed, is_installed
from dash_exp.config.overrides import quoted
from dash_exp.config.schema import Config
from dash_exp.errors import Fault, UserError
from dash_exp.record.identity import Cell, make_cell, resolve_paths
from dash_exp.record.manifest import Plan, PlannedCell, Traces, Waiting
from dash_exp.sweep.faults import FaultCollector
from dash_exp.sweep.resources import (
    NOT_REPEATED,
    OF_A_CELL,
    card_of,
    common_actions,
    differing_faults,
    hardware_label,
    is_setting,
    resource_faults,
    resources_of,
    settings_of,
    split,
)
from dash_exp.sweep.spec import Combination, Spec, combinations, key_of
from dash_exp.sweep.states import frozen_values, names_by_id
from dash_exp.tasks.sources import data_faults
from dash_exp.text import format_command
from dash_exp.traces.settings import out_of

TRACES = "dataset.traces"


@dataclass(frozen=True, slots=True)
class SweepOptions:
    """What a sweep says beside its cells. `times`: results are times, so every cell is labelled with its kind
    of machine. `traces`: arguments of `python -m dash_exp.traces` that make the files cells learn from.
    `about`: copied to the manifest."""

    times: bool = False
    traces: Sequence[Combination] = ()
    about: Mapping[str, object] | None = None


@dataclass(slots=True)
class Draft:
    """A cell that has no id yet. `number`: its index among the combinations. `overrides`: all that make its
    config, settings of the launch included. `labelled`: the kind of machine was added to them. `needs`: ids
    of its partners."""

    number: int
    overrides: Combination
    config: Config
    labelled: bool = False
    needs: tuple[str, ...] = ()

    @property
    def pending_traces(self) -> Path | None:
        """The file of a teacher's traces that this cell learns from, if it has not been made."""
        traces = self.config.dataset.traces
        if self.config.algorithm.source != "traces" or not traces:
            return None
        path = Path(traces).expanduser().resolve()
        return None if path.is_file() else path

    @property
    def has_budget(self) -> bool:
        return self.config.budget.seconds is not None or self.config.budget.match is not None


@dataclass(frozen=True, slots=True)
class PlanContext:
    """What all drafts of a plan are made with. `cache`: where hashes of files are kept; `pool`: names of the
    cells' folders below `root`, by id."""

    composer: CachingComposer
    faults: FaultCollector
    root: Path
    cache: Path | None
    pool: Mapping[str, str]
    installed: Installed

    def faults_of(self, config: Config) -> list[Fault]:
        faults = [*check(config, self.installed), *resource_faults(config)]
        if faults or (card := card_of(config)) is None:
            return faults
        return memory_faults(asdict(config), card)

    def cell(self, config: Config) -> Cell:
        """The cell that a run by itself makes of this config. Raises UserError or OSError where a file that
        its id depends on cannot be read."""
        return make_cell(config, self.cache)


def plan_spec(
    spec: Spec,
    *,
    root: Path,
    actions: Sequence[str] = (),
    extra: Sequence[str] = (),
    name: str | None = None,
    installed: Installed = is_installed,
) -> Plan:
    """The plan of a sweep's file. `extra`: overrides from the command line, several values allowed, that
    replace the file's own for the same keys, settings of the launch included."""
    own, settings = split(extra)
    options = SweepOptions(spec.times, spec.traces, spec.about())
    cells = combinations(spec, (*own, *settings))
    return make_plan(
        name or spec.name, cells, root=root, actions=actions, options=options, installed=installed
    )


def make_plan(
    name: str,
    combinations: Sequence[Sequence[str]],
    *,
    root: Path,
    actions: Sequence[str] = (),
    options: SweepOptions = SweepOptions(),
    installed: Installed = is_installed,
) -> Plan:
    """Compose, check and identify every cell. Writes nothing but hashes, in an existing `<root>/cache`.

    `actions`: overrides of run, tracking, cluster and paths for all cells. Cells with a budget are labelled
    with their kind of machine, as with `options.times`. Raises UserError with every fault of every cell.
    """
    prepared = prepare(combinations, actions, root)
    if not prepared:
        raise UserError(Fault(name, "has no cells", "a grid needs at least one combination"))
    faults = FaultCollector(prepared)
    searchpath = {text: None for one in prepared for text in one if key_of(text) == "hydra.searchpath"}
    with opened():
        composer = CachingComposer(tuple(searchpath))
        context = PlanContext(
            composer, faults, root, _cache_below(root), names_by_id(root / "cells"), installed
        )
        drafts = _compose_drafts(context, prepared, options.times)
        settings = {draft.number: settings_of(draft.config) for draft in drafts}
        faults.add_all(differing_faults(list(settings.values())))
        traces = _pending_traces(context, drafts, options.traces, split(prepared[0])[1])
        cells = _identify(context, [draft for draft in drafts if draft.pending_traces is None])
        faults.raise_if_any()
    differ = len({tuple(one.items()) for one in settings.values()}) > 1
    keep = OF_A_CELL if differ else frozenset()
    planned = [PlannedCell(c, kept_overrides(d, keep), resources_of(d.config), d.needs) for d, c in cells]
    pending = [(draft, draft.pending_traces) for draft in drafts]
    waiting = [Waiting(kept_overrides(draft, keep), traces[path]) for draft, path in pending if path]
    duplicates = len(combinations) - len(planned) - len(waiting)
    common = common_actions(list(settings.values()), settings_of(compose()))
    return Plan(name, tuple(planned), tuple(waiting), duplicates, common, options.about)


def prepare(combinations: Sequence[Sequence[str]], actions: Sequence[str], root: Path) -> list[Combination]:
    """The combinations, each once, with the settings of the launch (a combination's own win) and without
    settings of Hydra's launchers."""
    common = [
        *(text for text in split(actions)[1] if key_of(text) not in NOT_REPEATED),
        f"run.dir={quoted(str(root))}",
    ]
    found: dict[Combination, None] = {}
    for combination in combinations:
        own, launch = split(combination)
        mine = [text for text in launch if key_of(text) not in NOT_REPEATED]
        keys = set(map(key_of, mine))
        found[(*own, *mine, *(text for text in common if key_of(text) not in keys))] = None
    return list(found)


def kept_overrides(draft: Draft, settings: frozenset[str]) -> Combination:
    """The overrides that make a draft again together with the plan's actions: those of the cell, and these
    settings of the launch."""
    kept = {"cluster", *settings} if settings else set()
    return tuple(text for text in draft.overrides if not is_setting(text) or key_of(text) in kept)


def _compose_drafts(context: PlanContext, prepared: Sequence[Combination], times: bool) -> list[Draft]:
    """Compose and check every combination, and report what is wrong. Overrides with a fault are left out, so
    that other faults show; a combination without its option is not composed at all."""
    texts = dict.fromkeys(text for combination in prepared for text in combination)
    wrong = {text: faults for text in texts if (faults := context.composer.faults_of(text))}
    drafts = []
    for number, combination in enumerate(prepared):
        bad = [text for text in combination if text in wrong]
        context.faults.add(number, (fault for text in bad for fault in wrong[text]))
        if any(key_of(text) in context.composer.options for text in bad):
            continue
        overrides = tuple(text for text in combination if text not in wrong)
        try:
            draft = Draft(number, overrides, context.composer.compose(overrides))
        except UserError as error:
            context.faults.add(number, error.faults)
            continue
        found = context.faults_of(draft.config)
        context.faults.add(number, (f for f in found if not (draft.pending_traces and f.where == TRACES)))
        drafts.append(draft)
    if times or any(draft.has_budget for draft in drafts):
        for draft in drafts:
            if draft.config.hardware is None:
                draft.overrides = (*draft.overrides, f"hardware={hardware_label(draft.config)}")
                draft.config = context.composer.compose(draft.overrides)
                draft.labelled = True
    return drafts


def _pending_traces(
    context: PlanContext, drafts: Sequence[Draft], commands: Sequence[Combination], launch: Combination
) -> Mapping[Path, Traces]:
    """The commands that make the traces of the drafts, by file; a fault where no command makes one."""
    if not any(draft.pending_traces for draft in drafts):
        return {}
    found = {}
    for command in commands:
        written = {key_of(text) for text in command}
        arguments = (*command, *(text for text in launch if key_of(text) not in written))
        try:
            path = out_of(arguments).resolve()
        except UserError as error:
            where = format_command("dash_exp.traces", *command)
            context.faults.add_all(Fault(where, f"{f.where}: {f.what}", f.hint) for f in error.faults)
            return {}
        found[path] = Traces(path, arguments)
    for draft in drafts:
        if draft.pending_traces and draft.pending_traces not in found:
            fault = Fault(TRACES, f"{draft.pending_traces} is not a file", TRACES_HINT)
            context.faults.add(draft.number, [fault])
    return found


def _identify(context: PlanContext, drafts: Sequence[Draft]) -> list[tuple[Draft, Cell]]:
    """Each cell once, with the first draft that makes it, after partners have been found."""
    cells: dict[int, Cell] = {}
    for draft in drafts:
        if not context.faults.has(draft.number):
            try:
                cells[draft.number] = context.cell(draft.config)
                context.faults.add(draft.number, data_faults(resolve_paths(draft.config)))
            except (UserError, OSError) as error:
                context.faults.add(draft.number, reading_faults(error))
    find_partners(context, [draft for draft in drafts if draft.number in cells], cells)
    found: dict[str, tuple[Draft, Cell]] = {}
    for draft in drafts:
        if context.faults.has(draft.number):
            continue
        cell = cells[draft.number]
        name = f"{cell.name}-{cell.id}"
        first = found.setdefault(cell.id, (draft, cell))[1]
        other = context.pool.get(cell.id, name) if first.digest == cell.digest else f"{first.name}-{first.id}"
        if first.digest != cell.digest or other != name:
            hint = "eight digits are too few here: change either in anything, e.g. its seed"
            fault = Fault("id", f"{name} has the id of another cell, {other}", hint)
            context.faults.add(draft.number, [fault])
    return list(found.values())


def reading_faults(error: UserError | OSError) -> list[Fault]:
    if isinstance(error, UserError):
        return error.faults
    return [Fault(str(error.filename or "a file"), f"cannot be read: {error.strerror or error}")]


def _cache_below(root: Path) -> Path | None:
    """Where hashes are kept; None where the outputs have no folder yet, or it cannot be written."""
    cache = root / "cache"
    deepest = next((path for path in (cache / "hashes", cache, root) if path.exists()), root)
    return cache if os.access(deepest, os.W_OK | os.X_OK) else None


@dataclass(frozen=True, slots=True)
class Candidates:
    """Cells that a description may mean: `same`, with the sweep's label of the machine, and `single`, as a
    run by itself makes it of `overrides`."""

    same: Cell
    single: Cell
    overrides: Combination


def find_partners(context: PlanContext, drafts: Sequence[Draft], cells: dict[int, Cell]) -> None:
    """Replace each description in `budget.match` by the id of the cell it means, and update `cells`, by the
    drafts' numbers. What is wrong with partners goes to the context's faults."""
    known: dict[Combination, Candidates | list[Fault]] = {}
    described: dict[int, Candidates] = {}
    for draft in drafts:
        match = draft.config.budget.match
        if match is None or CELL_ID.fullmatch(match):
            continue
        found = _candidates(context, draft, match, known)
        if isinstance(found, list):
            context.faults.add(draft.number, partner_faults(match, found))
            continue
        cell = context.cell(without_budget(draft.config))
        if cell.id == found.same.id:  # it is its own partner
            draft.config, cells[draft.number] = without_budget(draft.config), cell
        else:
            described[draft.number] = found
    clear = [d for d in drafts if d.number not in described and not context.faults.has(d.number)]
    partners = {cells[draft.number].id: cells[draft.number] for draft in clear}
    for draft in drafts:
        if draft.number in described:
            _choose(context, draft, described[draft.number], partners)
        if (match := draft.config.budget.match) and not context.faults.has(draft.number):
            context.faults.add(draft.number, _unequal(context, draft, match, partners))
            draft.needs = (match,)
            cells[draft.number] = context.cell(draft.config)


def _candidates(
    context: PlanContext, draft: Draft, match: str, known: dict[Combination, Candidates | list[Fault]]
) -> Candidates | list[Fault]:
    """The cells that this draft's description may mean, or what is wrong with them; made once."""
    same = tuple(partner_overrides(match, draft.overrides))
    if same not in known:
        single = tuple(text for text in same if not (draft.labelled and key_of(text) == "hardware"))
        try:
            known[same] = Candidates(_partner(context, same), _partner(context, single), single)
        except (UserError, OSError) as error:
            known[same] = reading_faults(error)
    return known[same]


def _partner(context: PlanContext, overrides: Combination) -> Cell:
    """A partner's cell, which has no budget. Raises UserError with what is wrong with it."""
    faults = [fault for text in overrides for fault in context.composer.faults_of(text)]
    if faults:
        raise UserError(faults)
    config = without_budget(context.composer.compose(overrides))
    if faults := context.faults_of(config):
        raise UserError(faults)
    return context.cell(config)


def _choose(context: PlanContext, draft: Draft, found: Candidates, partners: Mapping[str, Cell]) -> None:
    """The partner with the sweep's label of the machine, else the one without, in the sweep or frozen."""
    if found.same.id in partners:
        budget = replace(draft.config.budget, match=found.same.id)
        draft.config = replace(draft.config, budget=budget)
    elif found.single.id in partners or found.single.id in context.pool:
        others = (text for text in draft.overrides if key_of(text) != MATCH)
        draft.overrides = (*others, f"{MATCH}={found.single.id}")
        draft.config = context.composer.compose(draft.overrides)
    else:
        what = f"its partner is neither in this sweep nor in {context.root / 'cells'}"
        places = ("run.dir", "paths.data")
        makes = [text for text in found.overrides if not is_setting(text) or key_of(text) in places]
        hint = f"add it to the sweep, or run it first: {format_command('dash_exp', *makes)}"
        context.faults.add(draft.number, [Fault(MATCH, what, hint)])


def _unequal(context: PlanContext, draft: Draft, match: str, partners: Mapping[str, Cell]) -> list[Fault]:
    """Whether the partner, by its id, exists, and has the seed and model of the draft."""
    if match not in partners and match not in context.pool:
        what = f"there is no cell {match}, neither in this sweep nor in {context.root / 'cells'}"
        return [Fault(MATCH, what, PARTNER_HINT)]
    folder = context.root / "cells" / context.pool.get(match, "")
    try:
        frozen = partners[match].frozen if match in partners else frozen_values(folder)
        theirs = {"seed": frozen["seed"], "model": frozen["model"]["name"]}
    except UserError as error:
        return [Fault(MATCH, f"the partner {match} cannot be read"), *error.faults]
    mine = {"seed": draft.config.seed, "model": draft.config.model.name}
    hint = "seconds are comparable for equal seed, model and hardware only"
    return [
        Fault(MATCH, f"the partner {match} has {key} {theirs[key]}, this cell {mine[key]}", hint)
        for key in mine
        if mine[key] != theirs[key]
    ]
