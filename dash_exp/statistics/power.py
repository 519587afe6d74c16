"""How small a difference a number of seeds and prompts can detect, and how many seeds a difference needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from dash_exp.statistics.comparison import MIN_SEEDS, PAIRED_FROM, Array, residual_variance

MOST_SEEDS = 1000
FEW_SEEDS_FACTOR = 1.1
"""Below PAIRED_FROM seeds the rule is a little wider than its formula (docs/statistics.md)."""


@dataclass(frozen=True, slots=True)
class Noise:
    """`seeds`: standard deviation of run means; `prompts`: of the arm x prompt effect; `correlation`: between
    two arms' runs of equal seed. In the unit of the score."""

    seeds: float
    prompts: float
    correlation: float = 0.0


DEFAULT_NOISE = Noise(seeds=0.041, prompts=0.11)
"""Of the bundled demo's accuracies: used where no finished cells say better."""


def detectable(
    noise: Noise, seeds: int, prompts: int, *, power: float = 0.8, equivalence: bool = False
) -> float:
    """The smallest difference found with this power at p < 0.05, in the unit of the noise; for `equivalence`
    the smallest margin within which two equal arms are shown to be. `prompts` 0: numbers per run. NaN below
    MIN_SEEDS."""
    if seeds < MIN_SEEDS:
        return math.nan
    paired = seeds >= PAIRED_FROM
    by_seed = 2 * noise.seeds**2 * (1 - (noise.correlation if paired else 0.0)) / seeds
    variance = by_seed + (noise.prompts**2 / prompts if prompts else 0.0)
    if variance == 0.0:
        return 0.0
    df = (1 if paired else 2) * (seeds - 1) * (variance / by_seed) ** 2 if by_seed else math.inf
    df = min(df, prompts - 1) if prompts else df
    factor = 1.0 if paired else FEW_SEEDS_FACTOR
    levels = (0.95, 0.5 + power / 2) if equivalence else (0.975, power)
    return float(sum(stats.t.ppf(level, df) for level in levels) * math.sqrt(variance) * factor)


def seeds_needed(noise: Noise, effect: float, prompts: int, *, equivalence: bool = False) -> int | None:
    """The smallest number of seeds that detects a stated effect (or shows equality within it); None where no
    number does, so that more prompts are needed."""
    if effect <= 0:
        raise ValueError(f"the effect to detect must be above 0, got {effect}")
    without = replace(noise, seeds=0.0)
    if prompts and detectable(without, PAIRED_FROM, prompts, equivalence=equivalence) >= effect:
        return None
    numbers = range(MIN_SEEDS, MOST_SEEDS)
    return next((n for n in numbers if detectable(noise, n, prompts, equivalence=equivalence) < effect), None)


def estimate_noise(tables: Sequence[Array]) -> Noise | None:
    """Noise of seeds pooled over the arms of a group, and of arm x prompt over their pairs. `tables`: one per
    arm, [R, P] on common prompts (P = 1: numbers per run). None where no arm has two runs."""
    repeated = [table for table in tables if len(table) > 1]
    if not repeated:
        return None
    weights = [len(table) - 1 for table in repeated]
    by_seed = np.average([table.mean(axis=1).var(ddof=1) for table in repeated], weights=weights)
    if repeated[0].shape[1] == 1:  # numbers per run
        return Noise(math.sqrt(float(by_seed)), 0.0)
    rests = {id(table): residual_variance(table) / len(table) for table in repeated}
    found = []
    for i, a in enumerate(repeated):
        for b in repeated[:i]:
            difference = a.mean(axis=0) - b.mean(axis=0)
            prompts = len(difference)
            found.append(difference.var(ddof=1) - prompts * (rests[id(a)] + rests[id(b)]))
    by_prompt = max(float(np.mean(found)), 0.0) if found else DEFAULT_NOISE.prompts**2
    return Noise(math.sqrt(float(by_seed)), math.sqrt(by_prompt))
