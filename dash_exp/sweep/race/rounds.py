"""What `race` decides, as pure functions of measured values: which comparisons are still open, which seeds
they need next, and which recipes go on after a rung."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dash_exp.statistics.comparison import (
    LOOK_WEIGHTS,
    Comparison,
    compare_runs,
    compare_scores,
    holm,
    sequential_p,
)

LOOKS = tuple(LOOK_WEIGHTS)
"""Numbers of seeds at which a comparison is looked at."""
ALPHA = 0.05

Values = Mapping[str, float]
"""What a run scored: by prompt, or one number under a key that is equal for comparable runs."""
Runs = Mapping[str, Mapping[int, Values]]
"""Values of finished runs, by recipe and seed."""


@dataclass(frozen=True, slots=True)
class Field:
    """What is raced. `recipes`: their labels, in the order of the grid; `pairs`: an arm and what it is
    compared with; `seeds`: those that the sweep lists; `untrained`: recipes without a training step;
    `per_run`: whether a run scores one number (else one per prompt); `margins`: of pairs that are asked
    whether they differ by less than this, not whether they differ."""

    recipes: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    seeds: tuple[int, ...]
    untrained: frozenset[str] = frozenset()
    per_run: bool = False
    margins: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def first_seeds(self, count: int) -> tuple[int, ...]:
        """Listed seeds come first, then the smallest other numbers."""
        more = (n for n in range(count + len(self.seeds)) if n not in self.seeds)
        return (*self.seeds, *more)[:count]

    def seeds_of(self, recipe: str, look: int) -> tuple[int, ...]:
        """The seeds that a recipe needs at a look: one is enough of a model that is not trained."""
        return self.first_seeds(1 if recipe in self.untrained else look)


@dataclass(frozen=True, slots=True)
class Standing:
    """A comparison so far. `found`: at the last look, None before the first; `p`: the sequential p-value over
    all looks after Holm's correction over all comparisons; `look`: seeds at the last look, 0 before the
    first; `next_look`: None after the last; `margin`: where it is asked whether they are equal within it."""

    arm: str
    other: str
    found: Comparison | None = None
    p: float = 1.0
    look: int = 0
    margin: float | None = None

    @property
    def next_look(self) -> int | None:
        return next((look for look in LOOKS if look > self.look), None)

    @property
    def decided(self) -> bool:
        return self.p < ALPHA

    @property
    def open(self) -> bool:
        return not self.decided and self.next_look is not None


def standings(raced: Field, runs: Runs) -> list[Standing]:
    """Every comparison at each look whose runs are all finished. A comparison that was not looked at yet
    counts as one with p = 1, so that a later look at it cannot undo a decision."""
    made, p_values = [], []
    for arm, other in raced.pairs:
        found = {look: compare(raced, runs, arm, other, look) for look in LOOKS}
        seen = {look: one for look, one in found.items() if one is not None}
        margin = raced.margins.get((arm, other))
        p = sequential_p(
            {n: one.p_value() if margin is None else one.p_within(margin) for n, one in seen.items()}
        )
        p_values.append(1.0 if math.isnan(p) else p)
        last = max(seen, default=0)
        made.append(Standing(arm, other, seen.get(last), look=last, margin=margin))
    return [replace(one, p=p) for one, p in zip(made, holm(p_values), strict=True)]


def compare(raced: Field, runs: Runs, arm: str, other: str, look: int) -> Comparison | None:
    """`arm` minus `other` with the seeds of a look; None unless all of these runs are finished."""
    tables = []
    for recipe in (arm, other):
        own = {seed: runs.get(recipe, {}).get(seed) for seed in raced.seeds_of(recipe, look)}
        kept = {seed: values for seed, values in own.items() if values is not None}
        if len(kept) < len(own):
            return None
        tables.append(kept)
    keys = sorted(set.intersection(*(set(values) for table in tables for values in table.values())))
    if len(keys) < (1 if raced.per_run else 2):
        note = "runs on different hardware" if raced.per_run else "fewer than two prompts in common"
        return Comparison(math.nan, note=note)
    if raced.per_run:
        a, b = ({seed: values[keys[0]] for seed, values in table.items()} for table in tables)
        return compare_runs(a, b)
    one, two = ({s: np.array([values[k] for k in keys]) for s, values in t.items()} for t in tables)
    if arm in raced.untrained:
        found = compare_scores(two, one, trained=False)
        return replace(found, difference=-found.difference)
    return compare_scores(one, two, trained=other not in raced.untrained)


def wanted(
    raced: Field, found: Sequence[Standing], runs: Runs, stuck: Collection[str] = ()
) -> list[tuple[str, int]]:
    """The runs (recipe and seed) that the open comparisons need for their next look, but for comparisons of
    recipes that are `stuck`."""
    needed: dict[tuple[str, int], None] = {}
    for one in found:
        if one.open and one.next_look and not {one.arm, one.other} & set(stuck):
            for recipe in (one.arm, one.other):
                for seed in raced.seeds_of(recipe, one.next_look):
                    if seed not in runs.get(recipe, {}):
                        needed[recipe, seed] = None
    return list(needed)


def better_half(recipes: Sequence[str], scores: Mapping[str, float], lower: bool = False) -> tuple[str, ...]:
    """The better half (rounded up) of the recipes, in their order; of equal ones the earlier. A recipe
    without a score goes out first."""
    sign = 1.0 if lower else -1.0

    def worth(recipe: str) -> float:
        score = scores.get(recipe, math.nan)
        return math.inf if math.isnan(score) else sign * score

    kept = sorted(recipes, key=worth)[: math.ceil(len(recipes) / 2)]
    return tuple(recipe for recipe in recipes if recipe in kept and worth(recipe) < math.inf)
