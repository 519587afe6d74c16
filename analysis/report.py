"""One self-contained page (claims, tables, figures, cells; it opens offline), and what each table and figure
was made from."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dash_exp.record.reading import unusable
from dash_exp.statistics.comparison import MIN_SEEDS

from .claims import Finding
from .figures import Picture
from .load import Problem, Records
from .render import render
from .table import Table, interval, p_text
from .variants import Variant, differences

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
.delta { font-size: .85rem; white-space: nowrap } .better { color: var(--good) } .worse { color: var(--bad) }
figure { margin: 1.5rem 0 } figcaption { margin-bottom: .5rem; font-size: .92rem }
figure img { width: 100%; height: auto; display: block }
.claim { border-left: 5px solid #999; padding: .3rem .8rem; margin: .8rem 0 }
.claim.supported { border-color: var(--good) } .claim.contradicted { border-color: var(--bad) }
.verdict { font-weight: 600 } ul.notes { padding-left: 1.2rem; margin: .4rem 0 }
@media (max-width: 40rem) { body { font-size: 15px; padding: .7rem } th, td { padding: .25rem .4rem } }
@media print { nav { display: none } figure, .claim { break-inside: avoid } }
"""
MARKS = {"supported": "\u2713", "contradicted": "\u2717", "undecided": "?"}
SECTIONS = (
    ("claims", "Claims"),
    ("tables", "Tables"),
    ("figures", "Figures"),
    ("configs", "Configs"),
    ("left-out", "Missing or odd"),
    ("cells", "Cells"),
    ("how", "How this was made"),
)
CELL_COLUMNS = {
    "seed": "seed",
    "state": "state",
    "steps": "step",
    "hardware": "hardware",
    "judges": "judges",
    "commit": "commit",
    "requeues": "requeues",
}


def page(
    records: Records,
    variants: Sequence[Variant],
    tables: Sequence[Table],
    images: Sequence[tuple[Picture, bytes]],
    findings: Sequence[Finding],
    problems: Sequence[Problem],
) -> str:
    """The html page."""
    labels, rows = differences(records, variants)
    made = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return render(
        "report.html.j2",
        title=_title(records),
        style=Markup(STYLE),
        summary=_summary(records, variants, findings, problems),
        sections=SECTIONS,
        findings=findings,
        family=sum(math.isfinite(f.p) for f in findings),
        marks=MARKS,
        result=_result(findings),
        tables=tables,
        pictures=[(picture, base64.b64encode(data).decode()) for picture, data in images],
        labels=labels,
        differences=rows,
        problems=problems,
        cell_titles=("cell", *CELL_COLUMNS),
        cells=[
            (name, *(_short(row[key]) for key in CELL_COLUMNS.values()))
            for name, row in records.cells.iterrows()
        ],
        how=HOW,
        made=f"analysis code {code_hash()[:12]}; {made}",
    )


def _title(records: Records) -> str:
    names = sorted({name for sweeps in records.cells["sweeps"] for name in sweeps})
    return f"Report: {', '.join(names)}" if names else "Report"


def _summary(
    records: Records, variants: Sequence[Variant], findings: Sequence[Finding], problems: Sequence[Problem]
) -> list[str]:
    """What was run, what was concluded, and what is needed or missing."""
    states = records.cells["state"].value_counts()
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    numbers = [len(v.cells) for v in variants]
    low, high = min(numbers, default=0), max(numbers, default=0)
    seeds = f"{low} to {high} seeds" if low < high else f"{low} seed{'s' if low != 1 else ''}"
    ran = f"{len(records.cells)} runs ({counts}) of {len(variants)} recipes, {seeds} each."
    verdicts = Counter(str(f.verdict) for f in findings)
    decided = [f"{verdicts[v]} {v}" for v in MARKS if verdicts[v]]
    concluded = (
        f"Of {len(findings)} claims of the paper that these runs can be asked about, {', '.join(decided)}."
        if findings
        else "These runs can be asked about no claim of the paper."
    )
    if high < MIN_SEEDS:
        concluded += f" No recipe has {MIN_SEEDS} seeds, so nothing is ranked."
    some = "1 thing is" if len(problems) == 1 else f"{len(problems)} things are"
    rest = f"{some} missing or odd (listed below)." if problems else "Nothing is missing."
    return [ran, concluded, rest]


def _result(findings: Sequence[Finding]) -> Callable[[Finding], str]:
    """How a finding's numbers are shown; a raw p-value below 0.05 that does not decide is explained."""
    family = sum(math.isfinite(f.p) for f in findings)

    def result(f: Finding) -> str:
        effect = f.effect
        if math.isnan(effect.value):
            return f"no value: {effect.note}"
        seeds = f"{effect.n_seeds} seed{'s' if effect.n_seeds != 1 else ''}"
        n = f"{seeds} x {effect.n_prompts} prompts" if effect.n_prompts else seeds
        value = f"{effect.value:.2f}" if f.unit.startswith("times") else f"{effect.value:+.2f}"
        text = f"{value}{interval(effect, 2)} {f.unit}, n = {n}"
        if math.isfinite(f.p):
            text += f", {p_text(f.p)}"
            if family > 1:
                text += f", {p_text(f.p_adjusted)} after {family} claims"
        return f"{text}; {effect.note}" if effect.note else text

    return result


def _short(value: object) -> str:
    text = "" if value is None else str(value)
    return text[:10] if len(text) == 40 and text.isalnum() else text


HOW = """Every interval and p-value follows one rule, which counts the noise of seeds and that of prompts
(docs/statistics.md). A claim is decided only with at least three seeds, where its p-value, corrected over the
claims of this page, is below 0.05; a star and a colour mark differences that such a claim is about. Times of
different hardware are never put together. Beside each table and figure lies a json with its cells, their code
and content."""


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
    for path in sorted(p for p in HERE.rglob("*") if p.suffix in (".py", ".csv", ".mplstyle", ".j2")):
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
