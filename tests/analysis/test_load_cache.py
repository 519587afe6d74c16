"""The cache gives what a fresh reading gives, and notices every change."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from analysis.load import Records, load
from tests.analysis.folders import config, make_cell, step_row


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    for seed in range(3):
        make_cell(tmp_path, f"dash-m-d-s{seed}-d000000{seed}", config("dash", seed), after=[1.0, 0.0])
    return tmp_path


def same(one: Records, other: Records) -> bool:
    def ordered(table: pd.DataFrame) -> pd.DataFrame:
        plain = table.assign(cell=table["cell"].astype(str))
        keys = [c for c in ("cell", "step", "metric") if c in plain]
        return plain.sort_values(keys, ignore_index=True)[sorted(plain.columns)]

    pd.testing.assert_frame_equal(ordered(one.steps), ordered(other.steps), check_dtype=False)
    pd.testing.assert_frame_equal(ordered(one.evals), ordered(other.evals), check_dtype=False)
    return bool((one.cells.index == other.cells.index).all())


def test_the_cache_equals_a_fresh_reading(outputs: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert same(load([outputs], cache), load([outputs]))
    assert same(load([outputs], cache), load([outputs]))
    assert len(list(cache.glob("*.feather"))) == 2


def test_a_step_more_is_noticed(outputs: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    load([outputs], cache)
    folder = outputs / "cells" / "dash-m-d-s1-d0000001"
    (folder / "status.json").write_text(json.dumps({"state": "running", "step": 5}))
    with (folder / "steps.jsonl").open("a") as stream:
        stream.write(json.dumps({"attempt": 1, **step_row(5, 0.9, 10.0)}) + "\n")
    found = load([outputs], cache)
    assert len(found.steps) == 13
    assert same(found, load([outputs]))


def test_a_torn_line_is_reported_every_time(outputs: Path, tmp_path: Path) -> None:
    with (outputs / "cells" / "dash-m-d-s1-d0000001" / "steps.jsonl").open("a") as stream:
        stream.write('{"step": 5, "rew\n')
    for _ in range(3):
        assert any("1 damaged line left out" in p.what for p in load([outputs], tmp_path / "cache").problems)


def test_fewer_places_give_fewer_rows(outputs: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    load([outputs], cache)
    one = load([outputs / "cells" / "dash-m-d-s0-d0000000"], cache)
    assert set(one.steps["cell"]) == {"dash-m-d-s0-d0000000"}


@pytest.mark.parametrize("spoil", ["signatures.json", "steps"])
def test_a_broken_cache_is_ignored(outputs: Path, tmp_path: Path, spoil: str) -> None:
    cache = tmp_path / "cache"
    load([outputs], cache)
    victim = next(cache.glob(f"{spoil}*"))
    victim.write_bytes(b"nonsense")
    assert same(load([outputs], cache), load([outputs]))
