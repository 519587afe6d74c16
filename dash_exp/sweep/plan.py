"""From combinations of overrides to a plan: every cell resolved, checked and named, before anything is
written or queued. Torch-free."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from dash_exp.config.environment import TRACES_HINT, Installed, is_installed
from dash_exp.errors import Fault, FaultCollector, UserError
from dash_exp.record.identity import Cell
from dash_exp.record.jobs import Plan, PlannedCell, Traces, Waiting
from dash_exp.sweep.composer import Composer
from dash_exp.sweep.drafts import (
    TRACES,
    Draft,
    Workshop,
    cache_of,
    drafted,
    has_budget,
    hashed,
    label,
    pool_of,
    sound,
    traces_by_file,
)
from dash_exp.sweep.expand import Combination, combinations, key_of, quoted
from dash_exp.sweep.hardware import slug
from dash_exp.sweep.pairing import pair
from dash_exp.sweep.settings import (
    NOT_REPEATED,
    OF_A_CELL,
    common_actions,
    differing_faults,
    is_setting,
    settings_of,
    split,
)
from dash_exp.sweep.spec import Spec

SHOWN_VALUES, NAME_LENGTH = 4, 80
SPEAKING = ("algorithm", "model", "dataset", "experiment", "evaluation", "recipe", "sampler")
"""Keys whose options speak for themselves."""


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
    take the place of the file's own; those of the launch among them count as `actions`."""
    own, more = split(extra)
    return make_plan(
        name or spec.name,
        combinations(spec, own),
        root=root,
        actions=(*actions, *more),
        about=spec.about(),
        times=spec.times,
        traces=spec.traces,
        installed=installed,
    )


def make_plan(
    name: str,
    combinations: Sequence[Sequence[str]],
    *,
    root: Path,
    actions: Sequence[str] = (),
    about: Mapping[str, object] | None = None,
    times: bool = False,
    traces: Sequence[Combination] = (),
    installed: Installed = is_installed,
) -> Plan:
    """Resolve, check and name every cell. Nothing is written but hashes in an existing `<root>/cache`.

    `actions`: overrides of run, tracking, cluster and paths for all cells. `times`: the result is a time,
    so cells belong to the kind of machine; so they do where one of them has a budget. `traces`: arguments of
    `python -m dash_exp.traces` that make what cells may wait for.

    Raises UserError with every fault of every cell; RuntimeError if Hydra composed a cell otherwise.
    """
    whole = prepared(combinations, actions, root)
    if not whole:
        raise UserError(Fault(name, "has no cells", "a grid needs at least one combination"))
    faults = FaultCollector(whole)
    places = {text: None for one in whole for text in one if key_of(text) == "hydra.searchpath"}
    with Composer(tuple(places)) as composer:
        shop = Workshop(composer, faults, root, cache_of(root), pool_of(root), installed)
        drafts = _drafts(shop, whole, times)
        found = list({id(draft.settings): draft.settings for draft in drafts}.values())
        faults.add_all(differing_faults(found))
        awaited = _awaited(shop, drafts, traces, whole[0])
        cells = _cells(shop, [draft for draft in drafts if draft.awaits is None])
        faults.raise_if_any()
        composer.check_sample([draft.overrides for draft in drafts])
        actions_of_all = common_actions(found, settings_of(composer.compose(()).config))
    several = len({tuple(one.items()) for one in found}) > 1
    planned = [
        PlannedCell(cell, repeated(draft, several), draft.resources, draft.needs) for draft, cell in cells
    ]
    waiting = [Waiting(repeated(draft, several), awaited[draft.awaits]) for draft in drafts if draft.awaits]
    duplicates = len(combinations) - len(planned) - len(waiting)
    return Plan(name, tuple(planned), tuple(waiting), duplicates, actions_of_all, about)


def prepared(combinations: Sequence[Sequence[str]], actions: Sequence[str], root: Path) -> list[Combination]:
    """Combinations with the settings of the launch, in which they win, and without those of Hydra's own
    launchers; equal ones once."""
    common = [
        *(text for text in split(actions)[1] if key_of(text) not in NOT_REPEATED),
        f"run.dir={quoted(str(root))}",
    ]
    found: dict[Combination, None] = {}
    for combination in combinations:
        own, launch = split(combination)
        mine = [text for text in launch if key_of(text) not in NOT_REPEATED]
        said = set(map(key_of, mine))
        found[(*own, *mine, *(text for text in common if key_of(text) not in said))] = None
    return list(found)


def repeated(draft: Draft, several: bool) -> Combination:
    """The overrides that make a draft again beside the plan's actions. `several`: its cells ask for
    different things of a cluster."""
    kept = {"cluster", *OF_A_CELL} if several else set()
    return tuple(text for text in draft.overrides if not is_setting(text) or key_of(text) in kept)


def _drafts(shop: Workshop, whole: Sequence[Combination], times: bool) -> list[Draft]:
    """What can be composed, checked; with its kind of machine where times count."""
    found = [
        draft for number, texts in sound(shop, whole) if (draft := drafted(shop, number, texts)) is not None
    ]
    if times or any(map(has_budget, found)):
        for draft in found:
            label(shop, draft)
    return found


def _awaited(
    shop: Workshop, drafts: Sequence[Draft], commands: Sequence[Combination], first: Combination
) -> Mapping[Path, Traces]:
    """How the files are made that drafts wait for; told where nobody knows."""
    files = {draft.awaits for draft in drafts if draft.awaits}
    launch = split(first)[1]
    try:
        known = traces_by_file(commands, launch) if files else {}
    except UserError as error:
        shop.faults.add_all(error.faults)
        return {}
    for draft in drafts:
        if draft.awaits and draft.awaits not in known:
            shop.faults.add(draft.number, [Fault(TRACES, f"{draft.awaits} is not a file", TRACES_HINT)])
    return known


def _cells(shop: Workshop, drafts: Sequence[Draft]) -> list[tuple[Draft, Cell]]:
    """Each cell once, with the first draft that made it; partners found, equal ids of unequal cells told."""
    readable = [draft for draft in drafts if not shop.faults.has(draft.number) and hashed(shop, draft)]
    pair(shop, readable)
    found: dict[str, tuple[Draft, Cell]] = {}
    for draft in readable:
        if shop.faults.has(draft.number):
            continue
        cell = draft.composition.cell(shop.cache)
        name = f"{cell.name}-{cell.id}"
        before = found.setdefault(cell.id, (draft, cell))[1]
        in_pool = shop.pool.get(cell.id, name)
        if before.digest != cell.digest or in_pool != name:
            other = f"{before.name}-{before.id}" if before.digest != cell.digest else in_pool
            hint = "eight digits are too few here: change either in anything, e.g. its seed"
            shop.faults.add(draft.number, [Fault("id", f"{name} has the id of another cell, {other}", hint)])
    return list(found.values())


def ad_hoc_name(combinations: Sequence[Sequence[str]]) -> str:
    """A name for combinations from a command line: what varies, and a hash of them, in whatever order and
    however they are launched."""
    cells = [split(combination)[0] for combination in combinations]
    lines = sorted({" ".join(sorted(cell)) for cell in cells})
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]
    values: dict[str, list[str]] = {}
    for text in dict.fromkeys(text for cell in cells for text in cell):
        values.setdefault(key_of(text), []).append(text.partition("=")[2])
    varied = {key: found for key, found in values.items() if len(found) > 1} or values
    name = slug("-".join(_shown(key, found) for key, found in varied.items()) or "sweep")[:NAME_LENGTH]
    return f"{name.rstrip('-_.+')}-{digest}"


def _shown(key: str, values: Sequence[str]) -> str:
    last = key.rpartition(".")[2]
    if len(values) > SHOWN_VALUES:
        return f"{len(values)}x{last}"
    short = "+".join(value.rpartition("/")[2] for value in values)
    return short if key in SPEAKING else f"{last}{short}"
