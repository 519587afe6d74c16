"""One table object, from which markdown, LaTeX, csv and html are made (render.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .estimates import NOTHING, Difference, Estimate


@dataclass(frozen=True, slots=True)
class Entry:
    """A number as it is shown: `estimate` in the column's unit, what the paper has in the same unit, and the
    paired difference to the table's baseline row. A missing value is NA, and `estimate.note` its reason."""

    estimate: Estimate = NOTHING
    paper: float | None = None
    delta: Difference | None = None
    p_adjusted: float = math.nan
    """Of the difference, after Holm's correction over the table."""


@dataclass(frozen=True, slots=True)
class Column:
    """`group` is printed above neighbouring columns that share it. `better`: +1 more is better, -1 less is,
    0 neither. `digits` after the point."""

    heading: str
    unit: str
    group: str = ""
    better: int = 1
    digits: int = 1


@dataclass(frozen=True, slots=True)
class Table:
    """`rows`: a label and one entry per column. `cells`: what it was made from."""

    id: str
    title: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, tuple[Entry, ...]], ...]
    notes: tuple[str, ...]
    cells: tuple[str, ...]

    def _repr_html_(self) -> str:
        """Shown as a table in a notebook."""
        from .render import as_html

        return as_html(self)

    @property
    def has_paper(self) -> bool:
        return any(entry.paper is not None for _, entries in self.rows for entry in entries)


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The same estimate in another unit."""
    return Estimate(
        estimate.value * factor,
        estimate.low * factor,
        estimate.high * factor,
        estimate.n_seeds,
        estimate.n_prompts,
        estimate.note,
    )


def counted(estimate: Estimate) -> str:
    """Where a number comes from, in a few characters: `3x256` seeds and prompts, or `3` seeds."""
    return f"{estimate.n_seeds}x{estimate.n_prompts}" if estimate.n_prompts else str(estimate.n_seeds)
