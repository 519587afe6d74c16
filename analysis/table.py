"""One table object, and the same numbers as markdown and csv (html and LaTeX: `render`)."""

from __future__ import annotations

import csv
import io
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dash_exp.text import printable

from .estimates import NOTHING, Difference, Estimate

NA = "NA"
MANY = 6
"""A reason that holds in more places than this is given with their number, not with a list."""
CSV_PLACE = ("table", "row", "group", "column", "unit")
CSV_VALUE = ("value", "low", "high", "n_seeds", "n_prompts")
CSV_COMPARED = ("paper", "delta", "delta_low", "delta_high", "p", "verdict", "note")
FORMULAS = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
"""A text that begins with one of these is run by spreadsheets."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A number as it is shown: `estimate` in the column's unit, what the paper has in the same unit, and the
    difference to the table's baseline row. A missing value is NA, and `estimate.note` its reason.

    `pair`: keys of the two recipes that the difference compares, and the evaluation set. `verdict`: whether a
    claim of the page about this pair is decided, and so whether more or less was shown."""

    estimate: Estimate = NOTHING
    paper: float | None = None
    delta: Difference | None = None
    pair: tuple[str, str, str] | None = None
    verdict: Literal["more", "less", ""] = ""


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
    def file_name(self) -> str:
        return file_name(self.id)

    @property
    def footnotes(self) -> list[str]:
        return footnotes(self)

    @property
    def has_paper(self) -> bool:
        return any(entry.paper is not None for _, entries in self.rows for entry in entries)


def file_name(identifier: str) -> str:
    """A file name, and a name for links, made from one that may hold anything: what had to be replaced is
    told apart by a checksum."""
    plain = re.sub(r"[^A-Za-z0-9_.+-]", "_", identifier).lstrip(".")[:80] or "_"
    return plain if plain == identifier else f"{plain}-{zlib.crc32(identifier.encode()):08x}"


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


def number(value: float, digits: int) -> str:
    return NA if math.isnan(value) else f"{value:.{digits}f}"


def interval(estimate: Estimate, digits: int) -> str:
    """` [low, high]`, or nothing where there is none."""
    if not estimate.has_interval:
        return ""
    return f" [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def plain(entry: Entry, column: Column) -> str:
    """A number with its interval and n, or NA."""
    found = entry.estimate
    if math.isnan(found.value):
        return NA
    return f"{number(found.value, column.digits)}{interval(found, column.digits)} n={counted(found)}"


def heading(column: Column) -> str:
    return f"{column.heading} ({column.unit})" if column.unit else column.heading


def footnotes(table: Table) -> list[str]:
    """The table's notes, and the reasons of missing numbers and intervals, each once with where it holds."""
    reasons: dict[str, list[str]] = {}
    for label, entries in table.rows:
        for column, entry in zip(table.columns, entries, strict=True):
            if entry.estimate.note:
                place = f"{label}, {column.heading}" + (f", {column.group}" if _groups(table) > 1 else "")
                reasons.setdefault(entry.estimate.note, []).append(place)
    total = sum(len(entries) for _, entries in table.rows)
    notes = list(table.notes)
    for reason, places in reasons.items():
        where = "all" if len(places) == total else "; ".join(places)
        if MANY < len(places) < total:
            where = f"{len(places)} of {total} values"
        notes.append(f"{reason} ({where})")
    return notes


def _groups(table: Table) -> int:
    return len({column.group for column in table.columns})


def as_markdown(table: Table) -> str:
    """With a column for the paper's value beside each of ours, where the paper has any."""
    head = [""]
    for column in table.columns:
        head.append(f"{column.group} {heading(column)}".strip())
        if table.has_paper:
            head.append("paper")
    lines = [f"**{_markdown(table.title)}**", "", _row(head), _row(["---"] * len(head))]
    for label, entries in table.rows:
        cells = [label]
        for column, entry in zip(table.columns, entries, strict=True):
            delta = delta_text(entry, column)
            cells.append(plain(entry, column) + (f" ({delta})" if delta else ""))
            if table.has_paper:
                cells.append("" if entry.paper is None else number(entry.paper, column.digits))
        lines.append(_row(cells))
    notes = [f"- {_markdown(note)}" for note in footnotes(table)]
    return "\n".join([*lines, "", _markdown(table.caption), *(["", *notes] if notes else []), ""])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_markdown(cell) for cell in cells)} |"


def _markdown(text: str) -> str:
    """Names come from records: no cell ends early, and no html is passed on."""
    text = printable(text).replace("](", "]\\(").replace("|", "/").replace("\n", " ").replace("&", "&amp;")
    return re.sub(r"<(?![0-9])", "&lt;", text)  # p<0.001 stays


def delta_text(entry: Entry, column: Column) -> str:
    """`+3.1 [0.2, 6.0], p=0.04`, with a star where a claim about it is decided; empty where there is none."""
    if entry.delta is None or math.isnan(entry.delta.estimate.value):
        return ""
    found, star = entry.delta.estimate, "*" if entry.verdict else ""
    p = f", {p_text(entry.delta.p)}" if math.isfinite(entry.delta.p) else ""
    return f"{found.value:+.{column.digits}f}{star}{interval(found, column.digits)}{p}"


def p_text(p: float) -> str:
    return "p<0.001" if p < 0.001 else f"p={p:.2g}"


def as_csv(table: Table) -> str:
    """One line per number, unrounded."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*CSV_PLACE, *CSV_VALUE, *CSV_COMPARED])
    for label, entries in table.rows:
        for column, entry in zip(table.columns, entries, strict=True):
            found, delta = entry.estimate, entry.delta or Difference(NOTHING)
            change = (delta.estimate.value, delta.estimate.low, delta.estimate.high, delta.p)
            place = map(_cell, (table.id, label, column.group, column.heading, column.unit))
            value = map(_exact, (found.value, found.low, found.high))
            compared = map(_exact, (entry.paper, *change))
            counts = (found.n_seeds, found.n_prompts)
            writer.writerow([*place, *value, *counts, *compared, entry.verdict, _cell(found.note)])
    return stream.getvalue()


def _cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula."""
    shown = printable(text)
    return f"'{shown}" if shown.lstrip().startswith(FORMULAS) else shown


def _exact(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else repr(round(float(value), 10))
