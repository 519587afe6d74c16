"""A table as markdown, LaTeX (booktabs), csv and html: the same numbers, each with its interval and n."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Sequence

from .estimates import Difference, Estimate
from .table import Column, Entry, Table, counted

NA = "NA"
MANY = 6
"""Places of a reason that are still listed one by one."""
CSV_COLUMNS = (
    "table",
    "row",
    "group",
    "column",
    "unit",
    "value",
    "low",
    "high",
    "n_seeds",
    "n_prompts",
    "paper",
    "delta",
    "delta_low",
    "delta_high",
    "p",
    "p_holm",
    "note",
)
LATEX = {
    "&": r"\&",
    "%": r"\%",
    "_": r"\_",
    "#": r"\#",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
}


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
    told = []
    for reason, places in reasons.items():
        where = "all" if len(places) == total else "; ".join(places)
        if MANY < len(places) < total:
            where = f"{len(places)} of {total} values"
        told.append(f"{reason} ({where})")
    return [*table.notes, *told]


def _groups(table: Table) -> int:
    return len({column.group for column in table.columns})


def markdown(table: Table) -> str:
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


def latex(table: Table) -> str:
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
    """One line per number, unrounded: for whoever computes on."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for label, entries in table.rows:
        for column, entry in zip(table.columns, entries, strict=True):
            found, delta = entry.estimate, entry.delta
            change = (
                [delta.estimate.value, delta.estimate.low, delta.estimate.high, delta.p]
                if delta
                else [None] * 4
            )
            writer.writerow(
                [
                    table.id,
                    label,
                    column.group,
                    column.heading,
                    column.unit,
                    *map(_exact, (found.value, found.low, found.high)),
                    found.n_seeds,
                    found.n_prompts,
                    _exact(entry.paper),
                    *map(_exact, change),
                    _exact(entry.p_adjusted),
                    found.note,
                ]
            )
    return stream.getvalue()


def _exact(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else repr(round(float(value), 10))


def as_html(table: Table) -> str:
    """A figure element; differences are coloured by whether they are better."""
    head = "".join(f'<th scope="col">{_esc(c.group)}<br>{_esc(heading(c))}</th>' for c in table.columns)
    body = "".join(
        f'<tr><th scope="row">{_esc(label)}</th>'
        + "".join(_td(entry, column) for column, entry in zip(table.columns, entries, strict=True))
        + "</tr>"
        for label, entries in table.rows
    )
    notes = "".join(f"<li>{_esc(note)}</li>" for note in footnotes(table))
    return (
        f'<figure class="table" id="{table.id}"><figcaption><b>{_esc(table.title)}.</b> {_esc(table.caption)}'
        f'</figcaption><div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody>'
        f"</table></div>{f'<ul class=notes>{notes}</ul>' if notes else ''}</figure>"
    )


def _td(entry: Entry, column: Column) -> str:
    found = entry.estimate
    shown = f'<span class="na" title="{_esc(found.note)}">{NA}</span>'
    if not math.isnan(found.value):
        ends = _esc(interval(found, column.digits))
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
    return f' <span class="{kind}" title="{_esc(title)}">{delta.estimate.value:+.{column.digits}f}</span>'


def _esc(text: str) -> str:
    return html.escape(text)
