"""One self-contained page (claims, tables, figures, cells; it opens offline), and what each table and figure
was made from."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dash_exp.record.reading import unusable

from .claims import Finding
from .figures import Picture
from .load import Problem, Records
from .table import Table, as_html, counted, interval
from .variants import Variant

READ = ("config.yaml", "status.json", "steps.jsonl", "evals.jsonl", "eval_samples.jsonl", "events.jsonl")
"""The files of a cell that decide what is made from it."""
LIBRARIES = ("numpy", "scipy", "pandas", "matplotlib")
HERE = Path(__file__).parent

STYLE = """
:root { --ink: #1b1b1b; --soft: #666; --line: #ddd; --good: #006d3c; --bad: #a8321a; }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink) }
body { margin: 0 auto; padding: 1rem; max-width: 62rem }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.2rem; margin-top: 2.2rem }
nav a { margin-right: 1rem } a { color: #0056a3 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
thead th { border-bottom: 2px solid #999; font-weight: 600 }
.ci, .n, .paper, .notes, .small { color: var(--soft); font-size: .8rem } .na { color: var(--bad) }
.better { color: var(--good) } .worse { color: var(--bad) }
figure { margin: 1.5rem 0 } figcaption { margin-bottom: .5rem; font-size: .92rem }
figure img { width: 100%; height: auto; display: block }
.claim { border-left: 5px solid #999; padding: .3rem .8rem; margin: .8rem 0 }
.claim.supported { border-color: var(--good) } .claim.contradicted { border-color: var(--bad) }
.verdict { font-weight: 600 } ul.notes { padding-left: 1.2rem; margin: .4rem 0 }
@media (max-width: 40rem) { body { font-size: 15px; padding: .7rem } th, td { padding: .25rem .4rem } }
@media print { nav { display: none } figure, .claim { break-inside: avoid } }
"""
MARKS = {"supported": "&#10003;", "contradicted": "&#10007;", "undecided": "?"}


def page(
    records: Records,
    variants: Sequence[Variant],
    tables: Sequence[Table],
    images: Sequence[tuple[Picture, bytes]],
    findings: Sequence[Finding],
    problems: Sequence[Problem],
) -> str:
    """The html page."""
    sections = [
        ("claims", "Claims of the paper", _claims(findings)),
        ("tables", "Tables", "".join(as_html(table) for table in tables)),
        ("figures", "Figures", "".join(_figure(picture, data) for picture, data in images)),
        ("left-out", "What is missing or odd", _problems(problems)),
        ("cells", "Cells", _cells(records)),
        ("how", "How this was made", _how()),
    ]
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in sections)
    body = "".join(f'<section id="{n}"><h2>{escape(t)}</h2>{text}</section>' for n, t, text in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(_title(records))}</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(_title(records))}</h1>{_lead(records, variants, problems)}<nav>{links}</nav>{body}"
        "</body></html>\n"
    )


def _title(records: Records) -> str:
    names = sorted({name for sweeps in records.cells["sweeps"] for name in sweeps})
    return f"Report: {', '.join(names)}" if names else "Report"


def _lead(records: Records, variants: Sequence[Variant], problems: Sequence[Problem]) -> str:
    states = records.cells["state"].value_counts()
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    seeds = sorted({len(v.cells) for v in variants})
    spread = (
        f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else f"{seeds[0]} seed" + "s" * (seeds[0] > 1)
    )
    some = "1 thing is" if len(problems) == 1 else f"{len(problems)} things are"
    rest = f' <a href="#left-out">{some} missing or odd.</a>' if problems else ""
    return (
        f"<p>{len(records.cells)} runs ({counts}) of {len(variants)} recipes, {spread} each. Every "
        f"number has its 95 % interval and n; NA has a reason.{rest}</p>"
    )


TWINS = """<p class=small>Each is judged for the models and data named below it, nothing else; the paper's own
number stands at the end.</p>"""


def _claims(findings: Sequence[Finding]) -> str:
    if not findings:
        return "<p>These data hold no two arms that a claim of the paper compares.</p>"
    return TWINS + "".join(_claim(f) for f in findings)


def _claim(f: Finding) -> str:
    effect = f.effect
    if math.isnan(effect.value):
        result = f"no value: {escape(effect.note)}"
    else:
        note = f"; {escape(effect.note)}" if effect.note else ""
        n = counted(effect).replace("x", " seeds x ") + (" prompts" if effect.n_prompts else " seeds")
        n = n.replace("1 seeds", "1 seed") if effect.n_seeds == 1 else n
        value = f"{effect.value:.2f}" if f.unit.startswith("x") else f"{effect.value:+.2f}"
        result = f"{value}{interval(effect, 2)} {escape(f.unit)}, n = {n}{note}"
    return (
        f'<div class="claim {f.verdict}"><span class=verdict>{MARKS[f.verdict]} {f.verdict}</span> &middot; '
        f"{escape(f.claim)}<br><span class=small>{escape(f.where)}: {result}. Paper: {escape(f.paper)}."
        "</span></div>"
    )


def _figure(picture: Picture, data: bytes) -> str:
    source = base64.b64encode(data).decode()
    return (
        f'<figure id="{picture.id}"><figcaption><b>{escape(picture.title)}.</b> {escape(picture.caption)}'
        f'</figcaption><img alt="{escape(picture.title)}" src="data:image/png;base64,{source}"></figure>'
    )


def _problems(problems: Sequence[Problem]) -> str:
    if not problems:
        return "<p>Nothing.</p>"
    return "<ul>" + "".join(f"<li><b>{escape(p.where)}</b> {escape(p.what)}</li>" for p in problems) + "</ul>"


def _cells(records: Records) -> str:
    titles = ("cell", "seed", "state", "steps", "hardware", "judges", "commit", "requeues")
    columns = ("seed", "state", "step", "hardware", "judges", "commit", "requeues")
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    rows = "".join(
        f"<tr><td>{escape(str(name))}</td>"
        + "".join(f"<td>{escape(_short(row[key]))}</td>" for key in columns)
        + "</tr>"
        for name, row in records.cells.iterrows()
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _short(value: object) -> str:
    text = "" if value is None else str(value)
    return text[:10] if len(text) == 40 and text.isalnum() else text


HOW = """Accuracies: means over seeds and prompts; intervals by resampling both (from three seeds on). Times
and lengths: Student's t over seeds. Comparisons are paired by seed (and prompt); p values are Holm's over a
table. A claim is decided only by an interval over at least three seeds. Times of different hardware are never
put together. Beside each table and figure lies a .json with its cells, their code and content."""


def _how() -> str:
    made = f"analysis code {code_hash()[:12]}; " + ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return f"<p>{HOW}</p><p class=small>{escape(made)}. Paper: arXiv 2505.17218.</p>"


@cache
def content_of(folder: str) -> str:
    """One hash over what a cell's folder holds."""
    digest = hashlib.sha256()
    for name in READ:
        path = Path(folder, name)
        if path.is_file() and unusable(path) is None:
            with path.open("rb") as stream:
                digest.update(f"{name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


@cache
def code_hash() -> str:
    """SHA-256 over the analysis code and its data files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in HERE.rglob("*") if p.suffix in (".py", ".csv", ".mplstyle")):
        digest.update(f"{path.relative_to(HERE)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def sidecar(records: Records, title: str, cells: Sequence[str], files: Mapping[str, bytes]) -> str:
    """The JSON beside a table or figure: its cells with code and content, and what it is made with."""
    value: dict[str, Any] = {
        "title": title,
        "n_cells": len(set(cells)),
        "cells": [_source(records, name) for name in sorted(set(cells))],
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())},
        "analysis_code": code_hash(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def _source(records: Records, name: str) -> dict[str, Any]:
    row = records.cells.loc[name]
    return {
        "cell": name,
        "seed": int(row["seed"]),
        "state": row["state"],
        "step": int(row["step"]),
        "commit": row["commit"],
        "code_hash": row["code_hash"],
        "hardware": row["hardware"],
        "content": content_of(str(row["folder"])),
    }
