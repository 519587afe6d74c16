"""How numbers, durations and paths are written for a person."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def format_seconds(seconds: float) -> str:
    """Seconds as 8s, 3m05s or 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def format_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def format_accuracy(row: Mapping[str, Any]) -> str:
    """A share with its interval, or a dash for what could not be measured."""
    value, low, high = (format_number(row.get(key)) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def format_path(path: Path) -> str:
    """A path relative to where the user stands, if it lies below."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
