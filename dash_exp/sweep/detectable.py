"""The smallest difference that a sweep's seeds and prompts can detect, for `plan`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dash_exp.record.folder import read_json
from dash_exp.record.manifest import Plan, PlannedCell
from dash_exp.record.metrics import judged_prompts
from dash_exp.record.reading import read_config
from dash_exp.statistics.comparison import too_few
from dash_exp.statistics.power import DEFAULT_NOISE, Noise, detectable, estimate_noise
from dash_exp.sweep.race.grid import recipe_of, seed_of

ASSUMED_PROMPTS = 256
"""Where the size of an evaluation set is not known before it is read."""
Scores = Mapping[str, float]


def power_of(plan: Plan, root: Path) -> dict[str, Any] | None:
    """Of the first evaluation set that all cells share: `seeds` of the recipe with fewest, `prompts`, the
    noise as standard deviations in points and the number of finished `cells` it is from (0: assumed), and
    `detects`, the smallest difference in points found with a power of 80 %; None where nothing
    is compared."""
    recipes: dict[tuple[str, ...], list[PlannedCell]] = {}
    for cell in plan.cells:
        recipes.setdefault(recipe_of(cell), []).append(cell)
    frozen = [
        cell.cell.frozen or read_config(cell.cell.folder(root)).value for (cell, *_) in recipes.values()
    ]
    asked = [one["evaluation"] for one in frozen if "evaluation" in one]  # without damaged configs
    sets = [list(one.get("sets") or ()) for one in asked if one.get("after")]
    common = [label for label in sets[0] if all(label in own for own in sets)] if sets else []
    if len(recipes) < 2 or not common:
        return None
    scores = [[_scores(cell.cell.folder(root), common[0]) for cell in own] for own in recipes.values()]
    known = [found for own in scores for found in own if found]
    noise = _noise(scores)
    prompts = len(set.intersection(*map(set, known))) if known else _size(asked[0], common[0])
    seeds = min(len({seed_of(cell) for cell in own}) for own in recipes.values())
    used = noise or DEFAULT_NOISE
    found = detectable(used, seeds, prompts or ASSUMED_PROMPTS)
    return {
        "set": common[0],
        "seeds": seeds,
        "prompts": prompts,
        "seed_sd": 100 * used.seeds,
        "prompt_sd": 100 * used.prompts,
        "cells": len(known) if noise else 0,
        "detects": 100 * found if found == found else None,
    }


def power_text(found: Mapping[str, Any]) -> str:
    """One sentence, as `plan` prints it."""
    seeds, prompts = found["seeds"], found["prompts"]
    if found["detects"] is None:
        return f"accuracy on {found['set']}: {too_few(seeds)}"
    asked = f"{prompts} prompts" if prompts else f"{ASSUMED_PROMPTS} prompts (assumed)"
    noise = f"noise of {found['cells']} finished cells" if found["cells"] else "assumed noise"
    spread = f"sd {found['seed_sd']:.1f} points over seeds, {found['prompt_sd']:.1f} over prompts"
    size = f"detect differences of {found['detects']:.1f} points and more"
    return f"{seeds} seeds and {asked} of {found['set']} {size} (power 80 %; {noise}: {spread})"


def _scores(folder: Path, dataset: str) -> Scores:
    """The scores of a finished cell by prompt; empty for others."""
    status = read_json(folder / "status.json")
    if status.get("state") != "finished":
        return {}
    rows, _ = judged_prompts(folder, dataset, int(status.get("step", 0)))
    return {row["prompt"]: row["score"] for row in rows}


def _noise(scores: Iterable[Iterable[Scores]]) -> Noise | None:
    """Of the prompts that all finished cells share; None where no recipe has two
    of them."""
    finished = [[one for one in own if one] for own in scores]
    common = sorted(set.intersection(*(set(one) for own in finished for one in own)) if any(finished) else ())
    if len(common) < 2:
        return None
    found = estimate_noise([np.array([[one[p] for p in common] for one in own]) for own in finished if own])
    return found if found and found != Noise(0.0, 0.0) else None  # runs that are all equal show no noise


def _size(evaluation: Mapping[str, Any], label: str) -> int | None:
    """How many prompts a set has, where that is known without loading it."""
    data = evaluation["sets"][label]
    limits = [value for value in (evaluation["limit"], data["limit"]) if value is not None]
    if data["kind"] == "reasoning_gym":
        limits.append(data["size"])
    elif data["path"] and not data["id_range"] and Path(data["path"]).is_file():
        with Path(data["path"]).open("rb") as stream:
            limits.append(sum(bool(line.strip()) for line in stream))
    return min(limits, default=None)
