"""One self-contained page: claims, tables, figures, cells and where everything comes from. Opens offline."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from importlib.metadata import version

from . import render, trace
from .claims import Finding
from .figures import Picture
from .load import Problem, Records
from .table import Table, counted
from .variants import Variant

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
    """The whole page."""
    sections = [
        ("claims", "Claims of the paper", _claims(findings)),
        ("tables", "Tables", "".join(render.as_html(table) for table in tables)),
        ("figures", "Figures", "".join(_figure(picture, data) for picture, data in images)),
        ("left-out", "What is missing or odd", _problems(problems)),
        ("cells", "Cells", _cells(records)),
        ("how", "How this was made", _how()),
    ]
    links = "".join(f'<a href="#{name}">{_esc(title)}</a>' for name, title, _ in sections)
    body = "".join(f'<section id="{n}"><h2>{_esc(t)}</h2>{text}</section>' for n, t, text in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_esc(_title(records))}</title><style>{STYLE}</style></head><body>"
        f"<h1>{_esc(_title(records))}</h1>{_lead(records, variants, problems)}<nav>{links}</nav>{body}"
        "</body></html>\n"
    )


def _title(records: Records) -> str:
    names = sorted({name for sweeps in records.cells["sweeps"] for name in sweeps})
    return f"Report: {', '.join(names)}" if names else "Report"


def _lead(records: Records, variants: Sequence[Variant], problems: Sequence[Problem]) -> str:
    states = records.cells["state"].value_counts()
    told = ", ".join(f"{count} {state}" for state, count in states.items())
    seeds = sorted({len(v.cells) for v in variants})
    spread = (
        f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else f"{seeds[0]} seed" + "s" * (seeds[0] > 1)
    )
    some = "1 thing is" if len(problems) == 1 else f"{len(problems)} things are"
    rest = f' <a href="#left-out">{some} missing or odd.</a>' if problems else ""
    return (
        f"<p>{len(records.cells)} runs ({told}) of {len(variants)} recipes, {spread} each. Every "
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
        told = f"no value: {_esc(effect.note)}"
    else:
        note = f"; {_esc(effect.note)}" if effect.note else ""
        n = counted(effect).replace("x", " seeds x ") + (" prompts" if effect.n_prompts else " seeds")
        n = n.replace("1 seeds", "1 seed") if effect.n_seeds == 1 else n
        value = f"{effect.value:.2f}" if f.unit.startswith("x") else f"{effect.value:+.2f}"
        told = f"{value}{render.interval(effect, 2)} {_esc(f.unit)}, n = {n}{note}"
    return (
        f'<div class="claim {f.verdict}"><span class=verdict>{MARKS[f.verdict]} {f.verdict}</span> &middot; '
        f"{_esc(f.claim)}<br><span class=small>{_esc(f.where)}: {told}. Paper: {_esc(f.paper)}.</span></div>"
    )


def _figure(picture: Picture, data: bytes) -> str:
    source = base64.b64encode(data).decode()
    return (
        f'<figure id="{picture.id}"><figcaption><b>{_esc(picture.title)}.</b> {_esc(picture.caption)}'
        f'</figcaption><img alt="{_esc(picture.title)}" src="data:image/png;base64,{source}"></figure>'
    )


def _problems(problems: Sequence[Problem]) -> str:
    if not problems:
        return "<p>Nothing.</p>"
    return "<ul>" + "".join(f"<li><b>{_esc(p.where)}</b> {_esc(p.what)}</li>" for p in problems) + "</ul>"


def _cells(records: Records) -> str:
    columns = {
        "seed": "seed",
        "state": "state",
        "step": "steps",
        "hardware": "hardware",
        "commit": "commit",
        "requeues": "requeues",
    }
    head = "".join(f"<th>{_esc(title)}</th>" for title in ("cell", *columns.values()))
    rows = "".join(
        f"<tr><td>{_esc(str(name))}</td>"
        + "".join(f"<td>{_esc(_short(row[key]))}</td>" for key in columns)
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
    made = f"analysis code {trace.code_hash()[:12]}; " + ", ".join(
        f"{name} {version(name)}" for name in trace.LIBRARIES
    )
    return f"<p>{HOW}</p><p class=small>{_esc(made)}. Paper: arXiv 2505.17218.</p>"


def _esc(text: str) -> str:
    return html.escape(text)
