"""From records to all files of a report; every path from data to bytes goes through here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis import claims, curves, figures, more_tables, render, style, tables, timeline, trace
from analysis.load import Problem, Records
from analysis.report import page
from analysis.table import Table
from analysis.variants import Variant, repeated, variants

DRAWERS: tuple[Callable[[Records, Sequence[Variant]], list[figures.Picture]], ...] = (
    figures.time_bars, timeline.delivery, figures.filter_effect, figures.reuse, curves.pass_at_k,
    figures.without_kl, curves.accuracy_against_cost, curves.phases, curves.watched,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Report:
    """Every file of a report by its path below the report's folder, and what was left out."""

    files: dict[str, bytes]
    problems: tuple[Problem, ...]
    tables: tuple[Table, ...]
    findings: tuple[claims.Finding, ...]


def make(records: Records, *, pictures: bool = True) -> Report:
    """Everything that the data allow; without `pictures` the tables only, which is much faster."""
    found = variants(records)
    problems = (*records.problems, *repeated(records, found))
    made = [
        *tables.paper_tables(records, found),
        *tables.recipe_tables(records, found),
        *more_tables.more_tables(records, found),
    ]
    told = claims.findings(records, found)
    files: dict[str, bytes] = {}
    for table in made:
        forms = {"md": render.markdown(table), "tex": render.latex(table), "csv": render.as_csv(table)}
        own = {f"tables/{table.id}.{kind}": text.encode() for kind, text in forms.items()}
        own[f"tables/{table.id}.html"] = render.as_html(table).encode()
        files |= own
        files[f"tables/{table.id}.json"] = trace.sidecar(records, table.title, table.cells, own).encode()
    images: list[tuple[figures.Picture, bytes]] = []
    with style.applied():
        for draw in DRAWERS if pictures else ():
            for picture in draw(records, found):
                stem = f"figures/{picture.id}"
                own = {f"{stem}.pdf": style.pdf(picture.drawn), f"{stem}.png": style.png(picture.drawn)}
                files |= own
                text = trace.sidecar(records, picture.title, picture.cells, own)
                files[f"{stem}.json"] = text.encode()
                images.append((picture, own[f"{stem}.png"]))
    if pictures:
        files["report.html"] = page(records, found, made, images, told, problems).encode()
    return Report(files, problems, tuple(made), tuple(told))


def write(report: Report, folder: Path) -> None:
    """Write what changed; each file whole or not at all."""
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
