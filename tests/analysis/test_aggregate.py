"""Aggregates over tasks against rliable's formulas, written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from analysis.aggregate import bootstrap, interquartile_mean, panel, probability_of_improvement, table
from analysis.load import load
from analysis.variants import variants
from tests.analysis.folders import config, make_cell

ARM = [np.array([0.5, 0.7, 0.9]), np.array([0.2, 0.4, 0.3])]
OTHER = [np.array([0.4, 0.7, 0.6]), np.array([0.1, 0.3, 0.5])]


def test_the_interquartile_mean_is_the_mean_of_the_middle_half() -> None:
    scores = [np.array([0.1, 0.9, 0.3, 0.4]), np.array([0.5, 0.2, 0.8, 0.6])]
    assert interquartile_mean(scores) == pytest.approx((0.3 + 0.4 + 0.5 + 0.6) / 4)


def test_the_probability_of_improvement_counts_pairs() -> None:
    per_task = [
        np.mean([[1.0 if a > b else 0.5 if a == b else 0.0 for b in two] for a in one])
        for one, two in zip(ARM, OTHER, strict=True)
    ]
    assert probability_of_improvement(ARM, OTHER) == pytest.approx(np.mean(per_task))
    found = bootstrap(probability_of_improvement, ARM, OTHER)
    assert 0 <= found.low < found.value < found.high <= 1
    assert found == bootstrap(probability_of_improvement, ARM, OTHER)  # the same draws every time


def test_arms_of_two_tasks_have_a_row_and_a_panel(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    number = 0
    for model in ("one", "two"):
        for arm, share in (("grpo", 0.4), ("dash", 0.6)):
            for seed in range(3):
                plain = config(arm, seed, model__name=model)
                after = [float(x) for x in rng.random(40) < share]
                make_cell(tmp_path, f"{arm}-{model}-d-s{seed}-d{number:07}", plain, after=after)
                number += 1
    records = load([tmp_path])
    (made,) = table(records, variants(records))
    assert [label for label, _ in made.rows] == ["GRPO", "DASH"]
    better = made.rows[1][1][1].estimate
    assert better.value > 0.9 and better.n_seeds == 6
    assert len(panel(records, variants(records))) == 1
    single = load([tmp_path / "cells" / p.name for p in sorted((tmp_path / "cells").glob("*-one-*"))])
    assert table(single, variants(single)) == []
