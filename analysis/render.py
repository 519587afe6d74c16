"""Tables and the page as html and LaTeX, by templates that escape every name they are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dash_exp.text import printable

from . import table as forms
from .table import Column, Entry, Table

TEMPLATES = Path(__file__).parent / "templates"
LATEX = {c: f"\\{c}" for c in "&%_#${}"} | {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def escape_latex(value: object) -> str:
    """A text on one line, without commands."""
    text = printable(str(value)).replace("\n", " ")
    start = f"{{{text[0]}}}" if text[:1] in ("[", "*") else ""  # after a line break they are arguments
    return start + "".join(LATEX.get(c, c) for c in text[1 if start else 0 :])


def kind(entry: Entry, column: Column) -> str:
    """`better` or `worse` where a verdict stands, else nothing: the class that colours a difference."""
    sign = {"more": 1, "less": -1, "": 0}[entry.verdict] * column.better
    return "better" if sign > 0 else "worse" if sign < 0 else ""


HELPERS = {
    "zip": zip,
    "isnan": math.isnan,
    "heading": forms.heading,
    "number": forms.number,
    "interval": forms.interval,
    "counted": forms.counted,
    "plain": forms.plain,
    "delta_text": forms.delta_text,
    "kind": kind,
}


def _shown(value: object) -> object:
    return printable(value) if type(value) is str else value


@cache
def _html() -> Environment:
    made = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, finalize=_shown
    )
    made.globals.update(HELPERS)
    return made


@cache
def _latex() -> Environment:
    """With delimiters that LaTeX does not use; everything inserted is escaped."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=False,
        finalize=escape_latex,
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
        comment_start_string="<#",
        comment_end_string="#>",
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    made.globals.update(HELPERS)
    return made


def render(template: str, **values: Any) -> str:
    """An html template of this package."""
    return _html().get_template(template).render(**values)


def as_html(table: Table) -> str:
    """A figure element."""
    module: Any = _html().get_template("table.html.j2").module
    return str(module.table(table))


def as_latex(table: Table) -> str:
    """A table environment for the booktabs package."""
    per = 2 if table.has_paper else 1
    groups = _groups(table, per) if any(column.group for column in table.columns) else []
    rules, first = [], 2
    for _, width in groups:
        rules.append((first, first + width - 1))
        first += width
    return _latex().get_template("table.tex.j2").render(t=table, groups=groups, rules=rules)


def _groups(table: Table, per: int) -> Sequence[tuple[str, int]]:
    """Neighbouring columns of one group, and how many columns of the page they take."""
    spans: list[tuple[str, int]] = []
    for column in table.columns:
        if spans and spans[-1][0] == column.group:
            spans[-1] = (column.group, spans[-1][1] + per)
        else:
            spans.append((column.group, per))
    return spans
