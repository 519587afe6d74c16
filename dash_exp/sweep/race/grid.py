"""The recipes and seeds of a sweep that is raced, and what would make racing it impossible."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dash_exp.errors import Fault, UserError, nearest
from dash_exp.record import manifest as manifests
from dash_exp.record.manifest import Plan, PlannedCell, sweep_folder
from dash_exp.record.reading import read_config
from dash_exp.sweep.dispatch import LaunchRequest
from dash_exp.sweep.faults import FaultCollector
from dash_exp.sweep.local import planned_cell
from dash_exp.sweep.plan import SweepOptions, make_plan
from dash_exp.sweep.race.rounds import Field
from dash_exp.sweep.spec import key_of
from dash_exp.sweep.states import frozen_values
from dash_exp.sweep.status import labels

UNTIL_STEP = "run.until_step="
PER_RUN = ("reward", "time")
"""Metrics that are one number for each run; the others are scores of prompts."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`rungs`: steps at which cells pause; empty: seeds are added until comparisons are decided. `halve`:
    only the better half goes on after a rung."""

    metric: str
    rungs: tuple[int, ...] = ()
    halve: bool = False
    budget_hours: float | None = None


@dataclass(slots=True)
class Grid:
    """The cells of a plan by recipe (its label) and seed. `overrides`: of each recipe."""

    plan: Plan
    root: Path
    overrides: dict[str, tuple[str, ...]] = field(default_factory=dict)
    cells: dict[tuple[str, int], PlannedCell] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = [recipe_of(cell) for cell in self.plan.cells]
        recipes = list(dict.fromkeys(own))
        names = [self.plan.cells[own.index(recipe)].folder_name for recipe in recipes]
        shown = labels(recipes, names) if len(recipes) > 1 else ["all cells"]
        if len(set(shown)) < len(shown):
            shown = [f"{label} #{number}" for number, label in enumerate(shown, 1)]
        self.overrides = dict(zip(shown, recipes, strict=True))
        label_of = dict(zip(recipes, shown, strict=True))
        self.cells = {(label_of[r], seed_of(c)): c for r, c in zip(own, self.plan.cells, strict=True)}

    def frozen(self, recipe: str) -> Mapping[str, Any]:
        """Of any of its cells: one config may be damaged. Raises UserError if all are."""
        own = [cell.cell for (label, _), cell in self.cells.items() if label == recipe]
        known = (one.frozen or read_config(one.folder(self.root)).value for one in own)
        return next(filter(None, known), None) or frozen_values(own[0].folder(self.root))

    def steps(self, recipe: str) -> int | None:
        steps = self.frozen(recipe)["algorithm"]["steps"]
        return None if steps is None else int(steps)

    def grown(self, wanted: Sequence[tuple[str, int]]) -> Grid:
        """With cells of further seeds, and the partners that they need."""
        fresh = sorted({seed for recipe, seed in wanted if (recipe, seed) not in self.cells})
        if not fresh:
            return self
        about = self.plan.about
        made = make_plan(
            self.plan.name,
            [(*recipe, f"seed={seed}") for seed in fresh for recipe in self.overrides.values()],
            root=self.root,
            actions=self.plan.actions,
            options=SweepOptions(times=bool((about or {}).get("times")), about=about),
        )
        by_id = {cell.id: cell for cell in made.cells}
        label_of = {recipe: label for label, recipe in self.overrides.items()}
        taken = [c.id for c in made.cells if (label_of[recipe_of(c)], seed_of(c)) in set(wanted)]
        known = {cell.id for cell in self.plan.cells}
        for one in taken:  # grows meanwhile
            taken += [need for need in by_id[one].needs if need in by_id and need not in taken]
        more = tuple(by_id[one] for one in dict.fromkeys(taken) if one not in known)
        return Grid(replace(self.plan, cells=(*self.plan.cells, *more)), self.root)


def recipe_of(cell: PlannedCell) -> tuple[str, ...]:
    return tuple(text for text in cell.overrides if key_of(text) != "seed")


def seed_of(cell: PlannedCell) -> int:
    return next((int(t.partition("=")[2]) for t in cell.overrides if key_of(t) == "seed"), 0)


def grid_of(request: LaunchRequest) -> Grid:
    """The sweep as planned, with the seeds that a race of it has added before. Raises UserError where other
    cells were launched under its name."""
    plan, folder = request.plan, sweep_folder(request.root, request.plan.name)
    if (folder / manifests.NAME).is_file():
        recipes = {recipe_of(cell): {seed_of(one) for one in plan.cells} for cell in plan.cells}
        known = {cell.id for cell in plan.cells}
        added = [planned_cell(e) for e in manifests.read(folder).entries if e.id not in known]
        lost = sum(seed_of(one) in recipes.get(recipe_of(one), {seed_of(one)}) for one in added)
        if lost:
            what = f"{folder} is another sweep: {lost} of its cells are not in this one"
            raise UserError(Fault("run.sweep", what, f"choose another name, or race {folder} itself"))
        plan = replace(plan, cells=(*plan.cells, *added))
    actions = tuple(text for text in plan.actions if not text.startswith(UNTIL_STEP))
    return Grid(replace(plan, actions=actions), request.root)


def field_of(grid: Grid, metric: str) -> Field:
    recipes = tuple(grid.overrides)
    stated = (grid.plan.about or {}).get("compare") or ()
    assert isinstance(stated, Sequence)
    pairs = [(_named(grid, one["arm"]), _named(grid, one["other"])) for one in stated]
    margins = {
        pair: in_unit(one["equal_within"], metric)
        for pair, one in zip(pairs, stated, strict=True)
        if "equal_within" in one
    }
    seeds = tuple(dict.fromkeys(seed for _, seed in grid.cells))
    return Field(
        recipes,
        tuple(pairs or ((recipe, recipes[0]) for recipe in recipes[1:])),
        seeds,
        frozenset(recipe for recipe in recipes if grid.steps(recipe) == 0),
        metric in PER_RUN,
        margins,
    )


def in_unit(margin: float, metric: str) -> float:
    """A margin as comparisons of a metric measure it: points of an accuracy as a share, a factor of a time as
    its logarithm. Raises UserError for a factor that is not above 1."""
    if metric != "time":
        return margin if metric in PER_RUN else margin / 100
    if margin <= 1:
        hint = "for --metric time it is a factor, e.g. 1.05"
        raise UserError(Fault("compare.equal_within", f"got {margin:g}, must be more than 1", hint))
    return math.log(margin)


def _named(grid: Grid, overrides: Sequence[str]) -> str:
    """The one recipe that has these overrides. Raises UserError for none or several."""
    found = [label for label, own in grid.overrides.items() if set(overrides) <= set(own)]
    if len(found) != 1:
        what = f"{' '.join(overrides)} selects {len(found)} of the {len(grid.overrides)} recipes, must be one"
        raise UserError(Fault("compare", what, f"recipes: {'; '.join(grid.overrides)}"))
    return found[0]


def refuse_faults(grid: Grid, settings: Settings, force: bool) -> None:
    """Raises UserError with everything that is wrong with racing this sweep so, before anything starts."""
    found = FaultCollector(list(grid.overrides.values()))
    sets = [list(grid.frozen(recipe)["evaluation"]["sets"]) for recipe in grid.overrides]
    common = [label for label in sets[0] if all(label in own for own in sets)]
    allowed = [*(["accuracy"] if common else []), *common, *PER_RUN]
    known = settings.metric in allowed
    if not known:
        found.add_all([Fault("--metric", f"got {settings.metric}", nearest(settings.metric, allowed))])
    if force:
        hint = "leave it out"
        found.add_all([Fault("run.force", "would archive what each round has recorded", hint)])
    if grid.plan.waiting:
        what = f"{len(grid.plan.waiting)} cells have no traces to learn from yet"
        hint = f"python -m dash_exp.sweep launch {grid.plan.name} makes them"
        found.add_all([Fault("race", what, hint)])
    try:
        field_of(grid, settings.metric)
    except UserError as error:
        found.add_all(error.faults)
    if len(grid.overrides) < 2 and (settings.halve or not settings.rungs):
        what = "the sweep has one recipe, and nothing to compare it with"
        found.add_all([Fault("race", what, "give its grid another one")])
    for number, recipe in enumerate(grid.overrides):
        found.add(number, _recipe_faults(grid, recipe, settings, measured=known))
    found.raise_if_any()


def _recipe_faults(grid: Grid, recipe: str, settings: Settings, measured: bool) -> Iterator[Fault]:
    """What is wrong with one recipe: its partner, its last rung, or when it is evaluated."""
    frozen, steps = grid.frozen(recipe), grid.steps(recipe)
    evaluation, match = frozen["evaluation"], frozen["budget"]["match"]
    if settings.rungs and match:
        what = "a cell that waits until its partner is finished cannot pause at the same rungs"
        yield Fault("budget.match", what, "leave the recipe out of this sweep")
    elif f"budget.match={match}" in grid.overrides[recipe]:
        what = "names one seed's partner by its id, so further seeds have none"
        yield Fault("budget.match", what, "describe the partner, and add its recipe to the sweep")
    if settings.rungs and steps is not None and settings.rungs[-1] > steps:
        yield Fault("--rungs", f"got {settings.rungs[-1]}, but the cells have {steps} steps")
    if settings.metric in PER_RUN or not measured:
        return
    if not evaluation["after"]:
        yield Fault("evaluation.after", "got false", "set it to true, or choose --metric reward or time")
    every = evaluation["every"]
    rungs = settings.rungs if settings.halve else ()
    missing = [str(rung) for rung in rungs if rung != steps and (not every or rung % every)]
    if missing:
        what = f"got {every}, so {settings.metric} is not measured at step {', '.join(missing)}"
        yield Fault("evaluation.every", what, f"set it to {math.gcd(*rungs)}, or choose --halve reward")
