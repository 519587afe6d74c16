"""Which cell a cell waits for: the partners of `budget.match` in a whole sweep. Torch-free.

As budget.resolve_match does for a single run, but that a sweep knows its partners: among its own cells first,
of the same kind of machine; else a cell that has been frozen, as it is run by itself.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dash_exp.config.compose import CELL_ID, MATCH, PARTNER_HINT, partner_faults, partner_overrides
from dash_exp.errors import Fault, UserError
from dash_exp.record.identity import Cell
from dash_exp.sweep.drafts import Draft, Workshop, reading_faults
from dash_exp.sweep.expand import Combination, key_of
from dash_exp.sweep.settings import split

NO_BUDGET = {"budget.seconds": None, "budget.match": None}
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Cells that a description may mean: `same`, on the machine of the sweep, and `alone`, as it is run by
    itself. `overrides` make it alone."""

    same: Cell
    alone: Cell
    overrides: Combination


def match_of(draft: Draft) -> str | None:
    return draft.composition.config.budget.match


def pair(shop: Workshop, drafts: Sequence[Draft]) -> None:
    """Put partners' ids into the drafts' budgets and needs, and tell what is wrong with partners."""
    known: dict[Combination, Candidates | list[Fault]] = {}
    described: dict[int, Candidates] = {}
    for draft in drafts:
        match = match_of(draft)
        if match is None or CELL_ID.fullmatch(match):
            continue
        found = _candidates(shop, draft, match, known)
        if isinstance(found, list):
            shop.faults.add(draft.number, partner_faults(match, found))
        elif draft.composition.changed(NO_BUDGET).cell(shop.cache).id == found.same.id:
            draft.composition = draft.composition.changed(NO_BUDGET)  # its own partner
        else:
            described[draft.number] = found
    clear = [d for d in drafts if d.number not in described and not shop.faults.has(d.number)]
    cells = {cell.id: cell for cell in (draft.composition.cell(shop.cache) for draft in clear)}
    for draft in drafts:
        if draft.number in described:
            _choose(shop, draft, described[draft.number], cells)
        if (match := match_of(draft)) and not shop.faults.has(draft.number):
            shop.faults.add(draft.number, _unequal(shop, draft, match, cells))
            draft.needs = (match,)


def _candidates(
    shop: Workshop, draft: Draft, match: str, known: dict[Combination, Candidates | list[Fault]]
) -> Candidates | list[Fault]:
    """The cells that this draft's description may mean, or what is wrong with them; made once."""
    same = tuple(partner_overrides(match, draft.overrides))
    if same not in known:
        alone = tuple(text for text in same if not (draft.marked and key_of(text) == "hardware"))
        try:
            known[same] = Candidates(_cell(shop, same), _cell(shop, alone), alone)
        except (UserError, OSError) as error:
            known[same] = reading_faults(error)
    return known[same]


def _cell(shop: Workshop, overrides: Combination) -> Cell:
    """A partner's cell, which has no budget. Raises UserError with what is wrong with it."""
    faults = [fault for text in overrides for fault in shop.composer.faults_of(text)]
    if faults:
        raise UserError(faults)
    composition = shop.composer.compose(overrides).changed(NO_BUDGET)
    faults = list(shop.examine(overrides, composition).faults)
    if faults:
        raise UserError(faults)
    return composition.cell(shop.cache)


def _choose(shop: Workshop, draft: Draft, found: Candidates, cells: Mapping[str, Cell]) -> None:
    """The partner of the same machine in the sweep, else the one alone, in the sweep or frozen."""
    if found.same.id in cells:
        draft.composition = draft.composition.changed({MATCH: found.same.id})
    elif found.alone.id in cells or found.alone.id in shop.pool:
        others = (text for text in draft.overrides if key_of(text) != MATCH)
        draft.overrides = (*others, f"{MATCH}={found.alone.id}")  # what it was taken for, said outright
        draft.composition = shop.composer.compose(draft.overrides)
    else:
        what = f"its partner is neither in this sweep nor in {shop.root / 'cells'}"
        makes = [text for text in split(found.overrides)[0] if key_of(text) != "seed"]
        command = shlex.join(["python", "-m", "dash_exp", *makes])
        hint = f"add it to the sweep, or run it first, with the same seed: {command}"
        shop.faults.add(draft.number, [Fault(MATCH, what, hint)])


def _unequal(shop: Workshop, draft: Draft, match: str, cells: Mapping[str, Cell]) -> list[Fault]:
    """Whether the partner, by its id, is there, and has the seed and model of the draft."""
    if match not in cells and match not in shop.pool:
        what = f"there is no cell {match}, neither in this sweep nor in {shop.root / 'cells'}"
        return [Fault(MATCH, what, PARTNER_HINT)]
    path = shop.root / "cells" / shop.pool.get(match, "") / "config.yaml"
    try:
        frozen = cells[match].frozen if match in cells else frozen_in(path)
        theirs = {"seed": frozen["seed"], "model": frozen["model"]["name"]}
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        return [Fault(MATCH, f"the partner {match} cannot be read from {path}: {error}")]
    config = draft.composition.config
    mine = {"seed": config.seed, "model": config.model.name}
    hint = "seconds are comparable for equal seed, model and hardware only"
    return [
        Fault(MATCH, f"the partner {match} has {key} {theirs[key]}, this cell {mine[key]}", hint)
        for key in mine
        if mine[key] != theirs[key]
    ]


@functools.lru_cache(maxsize=256)
def frozen_in(path: Path) -> Mapping[str, Any]:
    """A frozen config, as plain values; frozen, so reading it once is enough."""
    loaded: Mapping[str, Any] = yaml.load(path.read_text(encoding="utf-8"), LOADER)
    return loaded
