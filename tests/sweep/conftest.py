"""Fixtures that several of these files share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of the width that all output is made for."""
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "outputs"
