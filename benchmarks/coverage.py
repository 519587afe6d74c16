"""Simulate the rule by which recipes are compared: coverage of its intervals, false positives over looks.

    python -m benchmarks.coverage [--replicates 1000] [--prompts 256] [--json FILE]

Verdicts are Bernoulli with logit = prompt + arm x prompt + seed of the arm (equal seeds may correlate
between arms). The true shares are means over many drawn prompts and seeds. 1,000 replicates take two minutes.
The table is printed as markdown; docs/statistics.md shows it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import describe, machine, write
from dash_exp.statistics import comparison

SEEDS = (3, 5, 10)
SEED_SD = (0.0, 0.15, 0.3, 0.6)
Row = dict[str, Any]
LOOKS = tuple(comparison.LOOK_WEIGHTS)


@dataclass(frozen=True, slots=True)
class World:
    """How verdicts come about. Standard deviations are in logits; `collapse`: share of runs that fail."""

    name: str
    mean: float = 0.0
    prompt_sd: float = 1.5
    arm_prompt_sd: float = 0.0
    correlation: float = 0.0
    second_sd: float = 1.0
    """Seed noise of the second arm, as a multiple of the first's."""
    collapse: float = 0.0


WORLDS = (
    World("plain"),
    World("arm x prompt", arm_prompt_sd=0.7),
    World("equal seeds correlate", correlation=0.7),
    World("small share", mean=-4.0),
    World("unequal noise", second_sd=0.25),
    World("1 run in 10 collapses", collapse=0.1),
)


@dataclass(frozen=True, slots=True)
class Case:
    world: World
    seed_sd: float
    prompts: int

    @property
    def key(self) -> tuple[int, int]:
        """Makes the draws of this case its own."""
        return WORLDS.index(self.world), round(100 * self.seed_sd)


def draw(case: Case, seeds: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Verdicts of two arms: [R, P] each."""
    world, sd = case.world, case.seed_sd
    prompt_P = rng.normal(world.mean, world.prompt_sd, case.prompts)
    shared_R = rng.normal(0, 1, seeds)
    arms = []
    for scale in (1.0, world.second_sd):
        own_R = rng.normal(0, 1, seeds)
        z_R = math.sqrt(world.correlation) * shared_R + math.sqrt(1 - world.correlation) * own_R
        fallen_R = np.where(rng.random(seeds) < world.collapse, -3.0 * sd / 0.6, 0.0)
        shift_P = rng.normal(0, world.arm_prompt_sd, case.prompts)
        logit_RP = prompt_P + shift_P + (sd * scale * z_R + fallen_R)[:, None]
        arms.append((rng.random((seeds, case.prompts)) < 1 / (1 + np.exp(-logit_RP))).astype(float))
    return arms[0], arms[1]


def by_seed(table: np.ndarray, upto: int | None = None) -> dict[int, np.ndarray]:
    return dict(enumerate(table[:upto]))


def true_means(case: Case) -> tuple[float, float]:
    """Of both arms, whose means differ where their noise does."""
    big = Case(case.world, case.seed_sd, 500)
    pairs = [draw(big, 100, np.random.default_rng((i, *case.key))) for i in range(200)]
    return float(np.mean([a.mean() for a, _ in pairs])), float(np.mean([b.mean() for _, b in pairs]))


def coverage(case: Case, seeds: int, replicates: int, truth: tuple[float, float]) -> dict[str, float]:
    """Shares of replicates whose 95 % interval holds the truth, and the mean half width in points."""
    hits, of_share, halves = 0, 0, 0.0
    difference = truth[0] - truth[1]
    for replicate in range(replicates):
        a, b = draw(case, seeds, np.random.default_rng((replicate, seeds, *case.key)))
        found = comparison.compare_scores(by_seed(a), by_seed(b))
        low, high = found.interval()
        hits += low <= difference <= high
        halves += (high - low) / 2
        low, high = comparison.share_interval(a)
        of_share += low <= truth[0] <= high
    return {
        "difference": hits / replicates,
        "share": of_share / replicates,
        "half_points": 100 * halves / replicates,
    }


def looks(case: Case, replicates: int) -> dict[str, float]:
    """Share of replicates of no difference that are called different at any look."""
    corrected, plain = 0, 0
    for replicate in range(replicates):
        a, b = draw(case, LOOKS[-1], np.random.default_rng((replicate, *case.key)))
        p = {n: comparison.compare_scores(by_seed(a, n), by_seed(b, n)).p_value() for n in LOOKS}
        corrected += comparison.sequential_p(p) < 0.05
        plain += min(p.values()) < 0.05
    return {"corrected": corrected / replicates, "uncorrected": plain / replicates}


def rows(replicates: int, prompts: int) -> Iterator[Row]:
    for world in WORLDS:
        for sd in SEED_SD:
            case = Case(world, sd, prompts)
            truth = true_means(case)
            found = {n: coverage(case, n, replicates, truth) for n in SEEDS}
            same = world.second_sd == 1.0  # else the arms' means differ a little
            yield {
                "world": asdict(world),
                "seed_sd": sd,
                "by_seeds": found,
                "looks": looks(case, replicates) if same else None,
            }


def show(results: list[Row]) -> None:
    """As markdown."""
    groups = [f"{what} {n}" for what in ("difference", "share", "half width") for n in SEEDS]
    print(f"| noise | seed sd | {' | '.join(groups)} | looks | uncorrected |")
    print("|---" * (len(groups) + 4) + "|")
    for row in results:
        found = row["by_seeds"]
        line = [row["world"]["name"], f"{row['seed_sd']:g}"]
        line += [f"{100 * found[n][kind]:.1f}" for kind in ("difference", "share") for n in SEEDS]
        line += [f"{found[n]['half_points']:.1f}" for n in SEEDS]
        counts = row["looks"]
        line += [f"{100 * counts[k]:.1f}" if counts else "-" for k in ("corrected", "uncorrected")]
        print(f"| {' | '.join(line)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coverage", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    facts = machine(1)
    print(describe(facts))
    results = list(rows(args.replicates, args.prompts))
    show(results)
    worst = min(f[k] for row in results for f in row["by_seeds"].values() for k in ("difference", "share"))
    print(f"worst coverage {100 * worst:.1f} %")
    write(args.json, {"benchmark": "coverage", "machine": facts, "results": results})


if __name__ == "__main__":
    main()
