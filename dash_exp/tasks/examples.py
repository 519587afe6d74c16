"""Examples: a question and its gold answer, and how a row of a source becomes one."""

from __future__ import annotations

import ast
import builtins
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dash_exp.errors import Fault
from dash_exp.verifiers.types import CodeGold


@dataclass(frozen=True, slots=True)
class Example:
    """A question with its gold answer (see `Prompt.answer`). `solution` is a worked one, if there is
    any: what SFT-H learns and the verifier is tried on. `first_test` is a code task's first assertion,
    which its prompt may show. `fields`: the row's others, where a function of the user's own may read
    them."""

    id: str
    problem: str
    answer: str
    solution: str = ""
    first_test: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExampleSet:
    """Examples in the order of their source, and a hash of all of them."""

    name: str
    examples: tuple[Example, ...]
    origin: str

    @property
    def content_hash(self) -> str:
        digest = hashlib.sha256()
        for e in self.examples:
            row = [e.id, e.problem, e.answer, e.solution, e.first_test, *([e.fields] if e.fields else [])]
            digest.update(json.dumps(row, ensure_ascii=False, default=str).encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a source keeps what an example needs. `fields` maps our names to those it may use, the first
    present winning; a name left out stands for itself.

    `code`: rows are tasks for a program. `own`: functions of the user's own read them, so all fields are
    kept; `free`: one of them judges, so there need be no answer. `answer_after`, `solution_drop`,
    `id_prefix`, `id_range`, `tests_call`, `timeouts`: as in `config.DatasetConfig`."""

    fields: Mapping[str, Sequence[str]] = field(default_factory=dict, hash=False)
    code: bool = False
    own: bool = False
    free: bool = False
    answer_after: str | None = None
    solution_drop: str | None = None
    id_prefix: str = ""
    id_range: tuple[int, int] | None = None
    tests_call: str | None = None
    timeouts: Mapping[str, float] = field(default_factory=dict, hash=False)

    def names(self, ours: str) -> Sequence[str]:
        return self.fields.get(ours, (ours,))


class BadRow(Exception):
    """A row that cannot become an example."""

    def __init__(self, what: str, hint: str = ""):
        self.what, self.hint = what, hint


def to_example(
    row: Mapping[str, Any], where: str, fallback_id: str, layout: Layout
) -> Example | Fault | None:
    """A row as an example; None outside `id_range`; or the fault that prevents it."""
    try:
        name = row_id(_text(row, "id", layout, default=fallback_id), layout.id_prefix)
        if layout.id_range is not None and not _inside(name, layout.id_range):
            return None
        made = _program(row, name, layout) if layout.code else _question(row, name, layout)
        used = {_present(row, ours, layout) for ours in ("problem", "answer")}
        return replace(made, fields={k: v for k, v in row.items() if k not in used}) if layout.own else made
    except BadRow as bad:
        return Fault(where, bad.what, bad.hint)


def row_id(given: str, prefix: str) -> str:
    """`given`, if it has the prefix; else the prefix and its number: HumanEval/7 is humaneval-7."""
    if given.startswith(prefix):
        return given
    number = _number(given)
    return f"{prefix}{given if number is None else number}"


def _number(name: str) -> int | None:
    found = re.search(r"\d+$", name)
    return int(found[0]) if found else None


def _inside(name: str, bounds: tuple[int, int]) -> bool:
    number = _number(name)
    if number is None:
        raise BadRow(f"the id {name!r} does not end in a number", "dataset.id_range needs one")
    return bounds[0] <= number <= bounds[1]


def _question(row: Mapping[str, Any], name: str, layout: Layout) -> Example:
    problem = _text(row, "problem", layout)
    answer = _answer(row, layout)
    if layout.answer_after and layout.answer_after in answer:
        answer = answer.rpartition(layout.answer_after)[2].strip()
    if not answer.strip() and not layout.free:
        raise BadRow("the answer is empty")
    if _is_endless(answer):
        what = f"the answer {answer.strip()[:20]!r} is NaN, infinite or too large for a number"
        raise BadRow(what, "infinity as an answer is written \\infty")
    return Example(name, problem, answer, _solution(row, layout))


def _answer(row: Mapping[str, Any], layout: Layout) -> str:
    """The gold answer; several in a list are a set of answers, as `1, 2` is."""
    name = _present(row, "answer", layout)
    if name is not None and isinstance(row[name], list):
        return ", ".join(_texts(row, "answer", layout))
    return _text(row, "answer", layout, default="" if layout.free else None)


def _is_endless(answer: str) -> bool:
    """Whether an answer is what a program writes for a number that it does not have: NaN, inf, 1e400."""
    try:
        return not math.isfinite(float(answer.strip("$ \t\r\n")))
    except ValueError:
        return False


def _program(row: Mapping[str, Any], name: str, layout: Layout) -> Example:
    """A task for a program. A problem that defines the function's header (HumanEval) is completed by the
    program, so it is the gold's prefix, and belongs to the solution."""
    problem, solution = _text(row, "problem", layout), _solution(row, layout)
    imports, listed = _texts(row, "test_imports", layout), _texts(row, "test_list", layout)
    tests = _text(row, "tests", layout, default="")
    if not tests.strip() and not listed:
        hint = f"it has {', '.join(map(repr, row))}; map one with dataset.fields.tests=[<name>]"
        raise BadRow("has neither tests nor a test_list", hint)
    entry = _text(row, "entry_point", layout, default="") or called_function(listed, solution)
    if not entry:
        raise BadRow("no entry_point is given, and the first assertion calls no function")
    header = problem if _defines(problem, entry) else ""
    if header and solution and not _defines(solution, entry):
        solution = header + solution
    before = [line for line in imports if line not in tests.splitlines()]
    before += [text for text in listed if text not in tests]
    tests = "\n".join([*before, *([tests] if tests.strip() else [])])
    call = (layout.tests_call or "").replace("{entry_point}", entry)
    if call and call not in map(str.strip, tests.splitlines()):
        tests = f"{tests.rstrip()}\n\n{call}\n"
    gold = CodeGold(tests, entry, header, layout.timeouts.get(name))
    return Example(name, problem, gold.to_text(), solution, listed[0].strip() if listed else "")


def _defines(source: str, function: str) -> bool:
    return re.search(rf"^\s*(async\s+)?def\s+{re.escape(function)}\s*\(", source, re.MULTILINE) is not None


def called_function(assertions: Sequence[str], solution: str = "") -> str:
    """The function that an assertion tests: the first one called, from the outside in, that `solution`
    defines; else the first that is not built in. Empty: there is none."""
    others: list[str] = []
    for assertion in assertions:
        try:
            walked = list(ast.walk(ast.parse(assertion)))
        except SyntaxError:
            continue
        calls = [n.func.id for n in walked if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        defined = [name for name in calls if _defines(solution, name)]
        if defined:
            return defined[0]
        others += [name for name in calls if not hasattr(builtins, name)]
    return others[0] if others else ""


def _solution(row: Mapping[str, Any], layout: Layout) -> str:
    found = _text(row, "solution", layout, default="")
    return re.sub(layout.solution_drop, "", found) if layout.solution_drop else found


def _present(row: Mapping[str, Any], ours: str, layout: Layout) -> str | None:
    return next((name for name in layout.names(ours) if row.get(name) is not None), None)


def _text(row: Mapping[str, Any], ours: str, layout: Layout, default: str | None = None) -> str:
    """The text of a field, `default` where the row has none. A number is text too."""
    name = _present(row, ours, layout)
    if name is None:
        if default is not None:
            return default
        wanted, there = " or ".join(map(repr, layout.names(ours))), ", ".join(map(repr, row))
        hint = f"it has {there}; map it with dataset.fields.{ours}=[<name>]"
        null = any(one in row for one in layout.names(ours))
        raise BadRow(f"the field {wanted} is null" if null else f"lacks the field {wanted}", hint)
    value = row[name]
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"field {name!r}: got {value}, which is not a finite number")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow(f"field {name!r}: expected text, got {type(value).__name__}")
    if default is None and not str(value).strip():
        raise BadRow(f"the {ours} is empty")
    return str(value)


def _texts(row: Mapping[str, Any], ours: str, layout: Layout) -> list[str]:
    """A list of texts, empty where the row has none."""
    name = _present(row, ours, layout)
    value = [] if name is None else row[name]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise BadRow(f"field {name!r}: expected a list of texts")
    return value
