"""One table object, and the same numbers as markdown, LaTeX (booktabs), csv and html."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .estimates import NOTHING, Difference, Estimate

NA = "NA"
MANY = 6
"""A reason that holds in more places than this is given with their number, not with a list."""
CSV_PLACE = ("table", "row", "group", "column", "unit")
CSV_VALUE = ("value", "low", "high", "n_seeds", "n_prompts")
CSV_COMPARED = ("paper", "delta", "delta_low", "delta_high", "p", "p_holm", "note")
LATEX = {c: f"\\{c}" for c in "&%_#${}"} | {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
}


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
    lines = [f"**{table.title}**", "", _row(head), _row(["---"] * len(head))]
    for label, entries in table.rows:
        cells = [label]
        for column, entry in zip(table.columns, entries, strict=True):
            cells.append(plain(entry, column) + _delta_text(entry, column))
            if table.has_paper:
                cells.append("" if entry.paper is None else number(entry.paper, column.digits))
        lines.append(_row(cells))
    notes = [f"- {note}" for note in footnotes(table)]
    return "\n".join([*lines, "", table.caption, *(["", *notes] if notes else []), ""])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _delta_text(entry: Entry, column: Column) -> str:
    """` (+3.1)`, with a star where it is significant after Holm's correction."""
    if entry.delta is None or math.isnan(entry.delta.estimate.value):
        return ""
    star = "*" if entry.p_adjusted < 0.05 else ""
    return f" ({entry.delta.estimate.value:+.{column.digits}f}{star})"


def as_latex(table: Table) -> str:
    """A table environment for the booktabs package."""
    per = 2 if table.has_paper else 1
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{_tex(table.title)}. {_tex(table.caption)}}}",
        rf"  \label{{tab:{table.id}}}",
        rf"  \begin{{tabular}}{{l{'r' * per * len(table.columns)}}}",
        r"    \toprule",
    ]
    if any(column.group for column in table.columns):
        lines += _tex_groups(table, per)
    head = [""]
    for column in table.columns:
        head += [_tex(heading(column)), "paper"][:per]
    lines += [f"    {' & '.join(head)} \\\\", r"    \midrule"]
    for label, entries in table.rows:
        cells = [_tex(label)]
        for column, entry in zip(table.columns, entries, strict=True):
            paper = "" if entry.paper is None else number(entry.paper, column.digits)
            cells += [_tex(plain(entry, column)), paper][:per]
        lines.append(f"    {' & '.join(cells)} \\\\")
    notes = [rf"  \\ {{\footnotesize {_tex(note)}}}" for note in footnotes(table)]
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}", *notes, r"\end{table}", ""])


def _tex_groups(table: Table, per: int) -> list[str]:
    """The line of column groups, with a rule under each."""
    spans: list[tuple[str, int]] = []
    for column in table.columns:
        if spans and spans[-1][0] == column.group:
            spans[-1] = (column.group, spans[-1][1] + per)
        else:
            spans.append((column.group, per))
    cells, rules, first = [""], [], 2
    for group, width in spans:
        cells.append(rf"\multicolumn{{{width}}}{{c}}{{{_tex(group)}}}")
        rules.append(rf"\cmidrule(lr){{{first}-{first + width - 1}}}")
        first += width
    return [f"    {' & '.join(cells)} \\\\", f"    {' '.join(rules)}"]


def _tex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


def as_csv(table: Table) -> str:
    """One line per number, unrounded."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*CSV_PLACE, *CSV_VALUE, *CSV_COMPARED])
    for label, entries in table.rows:
        for column, entry in zip(table.columns, entries, strict=True):
            found, delta = entry.estimate, entry.delta or Difference(NOTHING)
            change = (delta.estimate.value, delta.estimate.low, delta.estimate.high, delta.p)
            place = (table.id, label, column.group, column.heading, column.unit)
            value = map(_exact, (found.value, found.low, found.high))
            compared = map(_exact, (entry.paper, *change, entry.p_adjusted))
            writer.writerow([*place, *value, found.n_seeds, found.n_prompts, *compared, found.note])
    return stream.getvalue()


def _exact(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else repr(round(float(value), 10))


def as_html(table: Table) -> str:
    """A figure element; differences are coloured by whether they are better."""
    head = "".join(f'<th scope="col">{escape(c.group)}<br>{escape(heading(c))}</th>' for c in table.columns)
    body = "".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(_td(entry, column) for column, entry in zip(table.columns, entries, strict=True))
        + "</tr>"
        for label, entries in table.rows
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in footnotes(table))
    return (
        f'<figure class="table" id="{table.id}"><figcaption><b>{escape(table.title)}.</b> '
        f'{escape(table.caption)}</figcaption><div class="wide"><table>'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody>"
        f"</table></div>{f'<ul class=notes>{notes}</ul>' if notes else ''}</figure>"
    )


def _td(entry: Entry, column: Column) -> str:
    found = entry.estimate
    shown = f'<span class="na" title="{escape(found.note)}">{NA}</span>'
    if not math.isnan(found.value):
        ends = escape(interval(found, column.digits))
        value = number(found.value, column.digits)
        shown = f"<b>{value}</b><span class=ci>{ends}</span> <span class=n>n={counted(found)}</span>"
    paper = ""
    if entry.paper is not None:
        paper = f"<br><span class=paper>paper {number(entry.paper, column.digits)}</span>"
    return f"<td>{shown}{_html_delta(entry.delta, entry, column)}{paper}</td>"


def _html_delta(delta: Difference | None, entry: Entry, column: Column) -> str:
    if delta is None or math.isnan(delta.estimate.value):
        return ""
    good = delta.estimate.value * column.better
    kind = "better" if good > 0 else "worse" if good < 0 else "same"
    p = "" if math.isnan(entry.p_adjusted) else f", p={entry.p_adjusted:.2g} (Holm)"
    title = f"difference{interval(delta.estimate, column.digits)}{p}"
    return f' <span class="{kind}" title="{escape(title)}">{delta.estimate.value:+.{column.digits}f}</span>'
