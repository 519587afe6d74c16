"""Rows that no run can use, as a table: each is refused with file and line wherever users' rows are read, and
before anything is frozen."""

from __future__ import annotations

import gzip
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from dash_exp.cell.__main__ import freeze_and_run
from dash_exp.config.compose import compose, find_faults
from dash_exp.errors import Fault, UserError
from dash_exp.judge import read_answers
from dash_exp.sweep.plan import make_plan
from dash_exp.tasks.examples import Layout
from dash_exp.tasks.sources import read_jsonl, read_traces
from dash_exp.types import Score

GOOD = '{"id": "a", "problem": "1+1", "answer": "2", "solution": "2"}'
ROWS = {
    '{"problem": "p", "answer": NaN}': "holds NaN",
    '{"problem": "p", "answer": Infinity}': "holds Infinity",
    '{"problem": "p", "answer": -Infinity}': "holds -Infinity",
    '{"problem": "p", "answer": 1e400}': "holds 1e400",
    '{"problem": "p", "answer": "1", "more": [{"x": -1e999}]}': "holds -1e999",
    '{"problem": "p", "answer": "1", "answer": "2"}': "has the key 'answer' twice",
    '{"problem": "p", "answer": "1", "more": {"x": 1, "x": 1}}': "has the key 'x' twice",
    f'{{"problem": "p", "answer": "1", "more": {"7" * 5000}}}': "holds a number of 5,000 digits",
    '{"problem": "p\\ud800", "answer": "1"}': "has half a character",
    '{"problem": "p", "answer": "1", "\\uDC00": 1}': "has half a character",
    '{"problem": "p", "answer": "1", "more": ' + "[" * 100_000 + "]" * 100_000 + "}": "is nested too deeply",
    '{"problem": "p", "ans': "is not JSON",
    '["p", "1"]': "expected an object",
    "null": "expected an object",
}
EXAMPLES = {
    '{"problem": "p", "answer": "NaN"}': "the answer 'NaN' is NaN, infinite or too large",
    '{"problem": "p", "answer": " -inf"}': "the answer '-inf' is NaN",
    '{"problem": "p", "answer": "$1e400$"}': "the answer '$1e400$' is NaN",
    f'{{"problem": "p", "answer": "{"7" * 5000}"}}': "too large for a number",
    '{"problem": "p", "answer": null}': "the field 'answer' is null",
    '{"problem": null, "answer": "1"}': "the field 'problem' is null",
    '{"problem": "p", "answer": true}': "expected text, got bool",
}


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    def write(row: str) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text(f"{GOOD}\n\n{row}\n")
        return path

    return write


def test_each_row_is_refused_with_its_line_by_every_reader(written: Callable[[str], Path]) -> None:
    for row, what in {**ROWS, **EXAMPLES}.items():
        path = written(row)
        readers: list[Callable[[], object]] = [lambda path=path: read_jsonl(path, "mine", Layout())]
        if row in ROWS:
            readers += [lambda path=path: read_traces(path), lambda path=path: read_answers(path, [])]
        for read in readers:
            with pytest.raises(UserError) as caught:
                read()
            [fault] = [f for f in caught.value.faults if f.where == f"{path}:3"]
            assert what in fault.what and len(str(fault)) < 300, (row[:60], fault)


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("folder", "pipe", "socket", "absent", "empty", "packed")}
    places["folder"].mkdir()
    os.mkfifo(places["pipe"])
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(places["socket"]))
    places["empty"].touch()
    places["packed"].write_bytes(gzip.compress(GOOD.encode()))
    for place in (*places.values(), Path("/dev/zero"), Path("/proc/self/mem")):
        for read in (lambda p: read_jsonl(p, "mine", Layout()), read_traces, lambda p: read_answers(p, [])):
            with pytest.raises(UserError) as caught:
                read(place)
            assert caught.value.faults[0].where == str(place)


def test_nothing_is_frozen_and_no_sweep_is_planned(tmp_path: Path, written: Callable[[str], Path]) -> None:
    path = written('{"problem": "p\\ud800", "answer": "1"}')
    given = ["model=tiny", "dataset=gsm8k", f"dataset.path={path}", "evaluation=none", f"run.dir={tmp_path}"]
    fault = Fault(f"{path}:3", "has half a character, the lone surrogate '\\ud800'")
    for start in (
        lambda: freeze_and_run(compose(given), False, None),
        lambda: make_plan("mine", [given], root=tmp_path),
    ):
        with pytest.raises(UserError) as caught:
            start()
        assert caught.value.faults == [fault]
    assert not (tmp_path / "cells").exists()


def test_an_override_with_an_endless_number() -> None:
    [fault] = find_faults([f"seed={'7' * 5000}"], checked=False)
    assert fault.where == "seed" and len(fault.what) < 400


def test_what_a_program_raises_can_be_written() -> None:
    assert Score(0.0, "wrong", "ValueError: \ud800 é").detail == "ValueError: \\ud800 é"
