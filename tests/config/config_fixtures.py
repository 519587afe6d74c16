"""Fixtures of the config tests: a config without faults, and a folder of one's own options."""

from __future__ import annotations

from pathlib import Path

import pytest

from dash_exp.config.schema import Config, changed
from tests.config.composed import composed


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A config without faults: DASH on the tiny model."""
    made: Config = changed(composed("model=tiny"), {"run.dir": str(tmp_path / "outputs")})
    return made


@pytest.fixture
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where DASH_DATA is not set."""
    monkeypatch.delenv("DASH_DATA", raising=False)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of options of someone's own."""
    (tmp_path / "algorithm").mkdir()
    return tmp_path
