"""From records to all files of a report; every path from data to bytes goes through here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from . import aggregate, claims, curves, figures, more_tables, style, tables, timeline
from .claims import TOO_FEW_EVALUATIONS
from .estimates import NOTHING
from .load import Problem, Records
from .more_tables import NO_FILTER, NO_REWARD, NOT_JUDGED
from .quantities import NONE_FINISHED
from .render import as_html, as_latex
from .report import page, sidecar
from .table import Entry, Table, as_csv, as_markdown
from .tables import NOT_TRAINED
from .variants import Variant, repeated, variants

Drawer = Callable[[Records, Sequence[Variant]], list[figures.Picture]]
DRAWERS: tuple[Drawer, ...] = (
    figures.time_bars,
    timeline.delivery,
    figures.filter_effect,
    figures.reuse,
    curves.pass_at_k,
    figures.without_kl,
    aggregate.panel,
    curves.rewards,
    curves.accuracy_against_cost,
    curves.response,
    curves.phases,
    curves.watched,
)
EXPECTED = (
    "",
    NOTHING.note,
    NOT_TRAINED,
    NONE_FINISHED,
    NOT_JUDGED,
    NO_REWARD,
    NO_FILTER,
    TOO_FEW_EVALUATIONS,
    aggregate.COMPARED,
)
"""Reasons for a missing number that are expected, or already reported for the cell."""


@dataclass(frozen=True, slots=True)
class Report:
    """Every file of a report by its path below the report's folder, and what was left out."""

    files: dict[str, bytes]
    problems: tuple[Problem, ...]
    tables: tuple[Table, ...]
    findings: tuple[claims.Finding, ...]


def make(records: Records, *, pictures: bool = True, metrics: Sequence[str] = ()) -> Report:
    """Everything that the data allow; without `pictures` the tables only, which is much faster. `metrics`:
    of steps, drawn beside the rest. Raises UserError for one that no cell has."""
    found = variants(records)
    curves.known(records, metrics)
    made = [
        *tables.paper_tables(records, found),
        *tables.recipe_tables(records, found),
        *aggregate.table(records, found),
        *more_tables.more_tables(records, found),
    ]
    judged = claims.findings(records, found)
    made = [with_verdicts(table, judged) for table in made]
    problems = (*records.problems, *repeated(records, found), *missing(made))
    files: dict[str, bytes] = {}
    for table in made:
        forms = {"md": as_markdown(table), "tex": as_latex(table), "csv": as_csv(table)}
        own = {f"tables/{table.file_name}.{kind}": text.encode() for kind, text in forms.items()}
        own[f"tables/{table.file_name}.html"] = as_html(table).encode()
        files |= own
        files[f"tables/{table.file_name}.json"] = sidecar(records, table.title, table.cells, own).encode()
    images: list[tuple[figures.Picture, bytes]] = []
    drawers: tuple[Drawer, ...] = (*DRAWERS, partial(curves.asked, metrics=metrics)) if pictures else ()
    with style.applied():
        for draw in drawers:
            for picture in draw(records, found):
                stem = f"figures/{picture.file_name}"
                own = {f"{stem}.pdf": style.pdf(picture.drawn), f"{stem}.png": style.png(picture.drawn)}
                files |= own
                text = sidecar(records, picture.title, picture.cells, own)
                files[f"{stem}.json"] = text.encode()
                images.append((picture, own[f"{stem}.png"]))
    if pictures:
        files["report.html"] = page(records, found, made, images, judged, problems).encode()
    return Report(files, problems, tuple(made), tuple(judged))


def with_verdicts(table: Table, findings: Sequence[claims.Finding]) -> Table:
    """The table with marks at the differences that a decided claim of the page is about."""
    decided: dict[tuple[str, str, str], Literal["more", "less"]] = {}
    for finding in findings:
        if finding.pair and finding.verdict != "undecided" and not finding.of_equality:
            arm, other, dataset = finding.pair
            if finding.effect.value > 0:
                decided[finding.pair], decided[other, arm, dataset] = "more", "less"
            else:
                decided[finding.pair], decided[other, arm, dataset] = "less", "more"

    def marked(entry: Entry) -> Entry:
        return replace(entry, verdict=decided.get(entry.pair, "")) if entry.pair else entry

    rows = tuple((label, tuple(map(marked, entries))) for label, entries in table.rows)
    return replace(table, rows=rows)


def missing(tables: Sequence[Table]) -> list[Problem]:
    """Numbers that a table could not give, by their reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for table in tables:
        for label, entries in table.rows:
            for column, entry in zip(table.columns, entries, strict=True):
                note = entry.estimate.note
                if math.isnan(entry.estimate.value) and note not in EXPECTED:
                    found.setdefault((f"{table.id}, {column.heading}", note), []).append(label)
    return [Problem(where, f"NA for {', '.join(labels)}: {why}") for (where, why), labels in found.items()]


def write(report: Report, folder: Path) -> None:
    """Write what changed; each file is replaced atomically."""
    for name, data in report.files.items():
        path = folder / name
        if path.is_file() and path.read_bytes() == data:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(data)
        temporary.replace(path)


def differences(report: Report, folder: Path) -> list[str]:
    """Files below a folder that no longer follow from the data: other bytes, missing, or not made now.
    Only what is text is compared: pictures may differ by a library's version."""
    wrong = []
    for name, data in sorted(report.files.items()):
        path = folder / name
        if path.suffix not in (".md", ".tex", ".csv"):
            continue
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.read_bytes() != data:
            wrong.append(f"{name} does not follow from the data")
    found = (f"tables/{path.name}" for path in sorted((folder / "tables").glob("*.csv")))
    return wrong + [f"{name} is not made from these data" for name in found if name not in report.files]
