"""Reading rows: fields, ids, ranges, code tasks; the same rows from a file and in the hub's schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dash_exp.config.compose import compose
from dash_exp.config.schema import DatasetConfig
from dash_exp.errors import UserError
from dash_exp.record.identity import resolve_paths
from dash_exp.tasks.examples import Example, Layout, called_function, row_id
from dash_exp.tasks.sources import from_rows, layout, load_examples, read_hub, read_jsonl
from dash_exp.verifiers.math.compare import judge_math
from dash_exp.verifiers.types import CodeGold

MATHS = Layout({"id": ["id"], "problem": ["problem", "question"], "answer": ["answer"]})
CODE = Layout({"problem": ["prompt"], "solution": ["code"]}, code=True)
Row = dict[str, Any]


@cache
def dataset(option: str, folder: Path | None = None) -> DatasetConfig:
    """The dataset of an option, its file found."""
    config = compose([f"dataset={option}", "evaluation=none", f"paths.data={folder or 'null'}"])
    return resolve_paths(config).dataset


@cache
def examples_of(option: str, folder: Path) -> tuple[Example, ...]:
    """The examples of an option, read once."""
    return load_examples(dataset(option, folder)).examples


def one(row: Row, how: Layout) -> Example:
    [made] = from_rows("t", [row], "rows", how).examples
    return made


def gold(example: Example) -> CodeGold:
    return CodeGold.from_text(example.answer)


# --- lines ---------------------------------------------------------------------------------------


def test_fields_are_mapped_and_a_missing_id_is_the_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "a", "answer": "x #### 1"}\n\n{"question": "b", "answer": 2}\n')
    found = read_jsonl(path, "mine", replace(MATHS, answer_after="####"))
    assert [(e.id, e.problem, e.answer) for e in found.examples] == [
        ("mine-1", "a", "1"),
        ("mine-3", "b", "2"),
    ]


def test_every_faulty_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    rows = [
        '{"id": 1, "problem": "a", "answer": "1"}',
        "{nonsense",
        '["list"]',
        '{"problem": "b"}',
        '{"problem": "c", "answer": ["1", 2]}',
        '{"id": 1, "problem": "d", "answer": "1"}',
        '{"problem": "e", "answer": " "}',
        '{"problem": "f", "answer": 1, "solution": []}',
    ]
    path.write_text("\n".join(rows))
    with pytest.raises(UserError) as caught:
        read_jsonl(path, "bad", MATHS)
    where = [f.where for f in caught.value.faults]
    assert where == [f"{path}:{n}" for n in (2, 3, 4, 5, 7, 8)] + [str(path)]
    text = str(caught.value)
    assert "not JSON" in text and "lacks the field 'answer'" in text and "occurs twice" in text
    assert "the answer is empty" in text and "'solution': expected text, got list" in text


def test_only_the_first_faults_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("{\n" * 30)
    with pytest.raises(UserError) as caught:
        read_jsonl(path, "bad", MATHS)
    assert len(caught.value.faults) == 21 and caught.value.faults[-1].what == "and 10 more faulty lines"


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe{}"])
def test_empty_or_binary_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"f\.jsonl"):
        read_jsonl(path, "f", MATHS)


# --- ids, solutions ----------------------------------------------------------------------------


def test_ids_of_file_and_hub_agree() -> None:
    assert row_id("humaneval-7", "humaneval-") == row_id("HumanEval/7", "humaneval-") == "humaneval-7"
    assert row_id("12", "mbpp-") == "mbpp-12"
    assert row_id("anything", "") == "anything"
    assert row_id("no number", "x-") == "x-no number"


def test_a_range_of_ids() -> None:
    rows = [{"id": n, "problem": "p", "answer": 1} for n in (1, 2, 5, 6)]
    how = replace(MATHS, id_prefix="t-", id_range=(2, 5))
    assert [e.id for e in from_rows("t", rows, "rows", how).examples] == ["t-2", "t-5"]
    with pytest.raises(UserError, match=r"id_range=\[10, 11\] may leave all of them out"):
        from_rows("t", rows, "rows", replace(how, id_range=(10, 11)))
    with pytest.raises(UserError, match="'t-x' does not end in a number"):
        from_rows("t", [{"id": "t-x", "problem": "p", "answer": 1}], "rows", how)


def test_calculator_annotations_are_dropped() -> None:
    how = replace(MATHS, solution_drop="<<[^<>]*>>")
    row = {"problem": "p", "answer": 24, "solution": "48/2 = <<48/2=24>>24 clips << none"}
    assert one(row, how).solution == "48/2 = 24 clips << none"
    assert one({"problem": "p", "answer": 24}, how).solution == ""


# --- programs ------------------------------------------------------------------------------------


def test_a_program_with_only_a_test_list() -> None:
    row = {
        "prompt": "Add.",
        "code": "def add(a, b): return a + b",
        "test_imports": ["import math"],
        "test_list": ["assert add(1, 2) == 3", "assert math.isclose(add(1., 1.), 2.)"],
    }
    made = one({"id": 3, **row}, replace(CODE, timeouts={"3": 7.0}))
    assert gold(made) == CodeGold("\n".join([*row["test_imports"], *row["test_list"]]), "add", "", 7.0)
    assert (made.problem, made.solution, made.first_test) == ("Add.", row["code"], "assert add(1, 2) == 3")


def test_a_header_is_the_golds_prefix_and_belongs_to_the_solution() -> None:
    row = {
        "prompt": "import os\n\ndef one() -> int:\n",
        "code": "    return 1\n",
        "entry_point": "one",
        "tests": "def check(f):\n    assert f() == 1\n",
    }
    made = one(row, replace(CODE, tests_call="check({entry_point})"))
    assert gold(made).prefix == row["prompt"]
    assert gold(made).tests == "def check(f):\n    assert f() == 1\n\ncheck(one)\n"
    assert made.solution == row["prompt"] + row["code"]
    whole = one({**row, "code": "def one():\n    return 1\n"}, CODE)
    assert whole.solution == "def one():\n    return 1\n"
    called = one({**row, "tests": gold(made).tests}, replace(CODE, tests_call="check({entry_point})"))
    assert gold(called).tests == gold(made).tests  # not called twice


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "p"}, "has neither tests nor a test_list"),
        ({"prompt": "p", "tests": "x = 1"}, "no entry_point is given"),
        ({"prompt": "p", "test_list": "assert f()"}, "expected a list of texts"),
        ({"test_list": ["assert f()"]}, "lacks the field 'prompt'"),
    ],
)
def test_a_program_without_what_it_needs(row: Row, what: str) -> None:
    with pytest.raises(UserError, match=what):
        one(row, CODE)


@pytest.mark.parametrize(
    ("assertion", "solution", "name"),
    [
        ("assert add(1) == 2", "", "add"),
        ("assert set(pairs([1])) == set(helper())", "", "pairs"),
        ("assert outer(inner(1)) == 2", "def inner(x): return x", "inner"),
        ("assert math.isclose(area(1), 2)", "", "area"),
        ("assert f(1) == = 2", "", ""),
        ("assert len([1]) == 1", "", ""),
    ],
)
def test_the_function_that_an_assertion_calls(assertion: str, solution: str, name: str) -> None:
    assert called_function([assertion], solution) == name


# --- the options, on the real files ----------------------------------------------------------------

COUNTS = {
    "math": 12000,
    "math500": 500,
    "gsm8k": 7473,
    "gsm8k_test": 1319,
    "gsm8k_few_shot": 7473,
    "gsm8k_few_shot_test": 1319,
    "aime24": 30,
    "mbppplus": 264,
    "mbppplus_test": 114,
    "mbpp_sanitized": 300,
    "mbpp_sanitized_test": 127,
    "humaneval": 164,
}


@pytest.mark.parametrize(("option", "count"), COUNTS.items())
def test_every_option_reads_its_file(data_folder: Path, option: str, count: int) -> None:
    data = dataset(option, data_folder)
    examples = examples_of(option, data_folder)
    assert len(examples) == count
    assert all(e.solution.strip() for e in examples)
    assert option[:5] != "gsm8k" or not any("<<" in e.solution for e in examples)
    if data.verifier == "code":
        for example in examples:
            found = gold(example)
            assert found.entry_point in found.tests and found.entry_point in example.solution
            assert (data.template == "docstring") == bool(example.first_test)


def test_slow_tasks_have_time(data_folder: Path) -> None:
    found = {
        e.id: gold(e).timeout_s
        for option in ("mbppplus", "mbppplus_test")
        for e in examples_of(option, data_folder)
        if gold(e).timeout_s
    }
    assert found == {"mbppplus-255": 90, "mbppplus-392": 60, "mbppplus-599": 120}


def test_training_tasks_are_not_in_a_test_set(data_folder: Path) -> None:
    def numbers(option: str) -> set[int]:
        examples = examples_of(option, data_folder)
        return {int(e.id.rpartition("-")[2]) for e in examples}

    tests = numbers("mbppplus_test")
    assert not tests & numbers("mbppplus") and not tests & numbers("mbpp_sanitized")
    assert not numbers("mbpp_sanitized") & numbers("mbpp_sanitized_test")
    assert tests <= numbers("mbpp_sanitized_test")


# --- the hub's schemas: the same examples come out ------------------------------------------------


def humaneval_row(row: Row) -> Row:
    """openai/openai_humaneval: the call is in the file here and may be absent there."""
    tests = row["tests"].replace(f"\ncheck({row['entry_point']})\n", "\n")
    return {
        "task_id": f"HumanEval/{row['id'].rpartition('-')[2]}",
        "prompt": row["prompt"],
        "canonical_solution": row["canonical_solution"],
        "test": tests,
        "entry_point": row["entry_point"],
    }


def mbppplus_row(row: Row) -> Row:
    """evalplus/mbppplus: `test` is the extended program alone, and no entry_point is named."""
    shown = "\n".join([*row["test_imports"], *row["test_list"]]) + "\n"
    assert row["tests"].startswith(shown)
    return {
        "task_id": int(row["id"].rpartition("-")[2]),
        "code": row["canonical_solution"],
        "prompt": row["prompt"],
        "source_file": "Benchmark Questions Verification V2.ipynb",
        "test_imports": row["test_imports"],
        "test_list": row["test_list"],
        "test": row["tests"].removeprefix(shown),
    }


def mbpp_row(row: Row) -> Row:
    """google-research-datasets/mbpp, sanitized: the tests are imports and test_list."""
    full = mbppplus_row(row)
    assert not full.pop("test").strip()
    return full


def gsm8k_row(row: Row) -> Row:
    return {"question": row["problem"], "answer": row["solution"]}


def math12k_row(row: Row) -> Row:
    return {"problem": row["problem"], "answer": row["answer"]}


def math500_row(row: Row) -> Row:
    hub = {name: row[name] for name in ("problem", "solution", "answer", "subject", "level")}
    return {**hub, "unique_id": f"test/algebra/{row['id']}.json"}


def aime24_row(row: Row) -> Row:
    hub = {name: row[name] for name in ("problem", "solution", "answer")}
    return {**hub, "id": int(row["id"].rpartition("-")[2]), "url": "", "year": "2024"}


HUB: dict[str, Callable[[Row], Row]] = {
    "humaneval": humaneval_row,
    "mbppplus": mbppplus_row,
    "mbppplus_test": mbppplus_row,
    "mbpp_sanitized": mbpp_row,
    "mbpp_sanitized_test": mbpp_row,
    "gsm8k": gsm8k_row,
    "gsm8k_test": gsm8k_row,
    "math": math12k_row,
    "math500": math500_row,
    "aime24": aime24_row,
}
LOCAL_IDS = {"gsm8k", "gsm8k_test", "math", "math500"}
"""The hub has other ids, or none."""
NO_SOLUTION = {"math"}


PUBLISHED = {
    "aime25": {"problem": "p", "answer": "70", "id": "0"},
    "amc23": {"id": 0, "question": "p", "answer": "70", "url": ""},
    "minerva": {"question": "p", "answer": "70"},
    "olympiadbench": {"id": 1606, "question": "p", "final_answer": ["2", "35"], "solution": ["s"]},
    "dapo_17k": {"prompt": "p", "solution": "70", "data_source": "math_dapo", "ability": "MATH"},
}
"""A row as the hub has it, for sets that are read only from there."""


@pytest.mark.parametrize("option", PUBLISHED)
def test_rows_of_sets_without_a_file_of_ours(option: str) -> None:
    data = compose([f"dataset={option}", "evaluation=none", "model=tiny"]).dataset
    [example] = from_rows(data.name, [PUBLISHED[option]], "hub", layout(data)).examples
    several = option == "olympiadbench"
    assert (example.problem, example.answer, example.solution) == ("p", "2, 35" if several else "70", "")
    text = "So it is \\boxed{35, 2}." if several else "So it is \\boxed{70.0}."
    assert judge_math(text, example.answer, data.extraction).outcome == "correct"


def test_a_streamed_dataset_is_read_as_far_as_its_limit(tmp_path: Path) -> None:
    """From a folder in the hub's layout, as from the hub."""
    rows = [json.dumps({"problem": f"{n}+1?", "answer": str(n + 1)}) for n in range(50)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    given = [f"dataset.hub={tmp_path}", "dataset.hub_split=train", "evaluation=none", "model=tiny"]
    whole = compose(["dataset=own", *given]).dataset
    part = replace(whole, streaming=True, limit=7)
    assert len(read_hub(whole, str(tmp_path)).examples) == 50
    assert [e.answer for e in read_hub(part, str(tmp_path)).examples] == [str(n + 1) for n in range(7)]
    assert "@v1/" in read_hub(replace(whole, revision="v1"), str(tmp_path)).origin


@pytest.mark.parametrize("option", HUB)
def test_hub_rows_make_the_same_examples(data_folder: Path, option: str) -> None:
    data = dataset(option, data_folder)
    assert data.path is not None
    files = {Path(data.path)}
    if option.startswith("mbppplus"):  # one split there, which the ids cut
        files = {data_folder / "mbppplus_train.jsonl", data_folder / "mbppplus_test.jsonl"}
    rows = [json.loads(line) for file in sorted(files, reverse=True) for line in file.open()]
    rows = rows[:500]
    found = from_rows(data.name, [HUB[option](row) for row in rows], "hub", layout(data)).examples
    expected = examples_of(option, data_folder)[: len(found)]
    assert len(found) == min(COUNTS[option], 500)
    for mine, theirs in zip(found, expected, strict=True):
        tests = [gold(e).tests.split() for e in (mine, theirs)] if data.verifier == "code" else [[], []]
        assert tests[0] == tests[1]
        if data.verifier == "code":
            mine, theirs = (replace(e, answer=replace(gold(e), tests="").to_text()) for e in (mine, theirs))
        if option in LOCAL_IDS:
            mine = replace(mine, id=theirs.id)
        if option in NO_SOLUTION:
            theirs = replace(theirs, solution="")
        if option.startswith("gsm8k"):  # the file's answer has no thousands commas
            mine = replace(mine, answer=mine.answer.replace(",", ""))
        assert mine == theirs
