"""`python -m dash_exp.judge` as typed: real files, real verdicts, one JSON line at the end."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from dash_exp.config.schema import DatasetConfig
from dash_exp.judge import main, names_of, reference
from dash_exp.tasks.examples import Example
from tests.conftest import REPOSITORY

TORCH_FREE = (
    "import sys; from dash_exp.judge import main; code = main(sys.argv[1:]);"
    "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules); sys.exit(code)"
)
OWN = ["dataset=gsm8k", "dataset.verifier=integer", "dataset.extraction=first_integer"]


def judge(*arguments: str, folder: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """The command, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.delenv("DASH_DATA", raising=False)
        patch.chdir(folder)
        code = main(arguments)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def judge_as_typed(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own, which must not import torch."""
    variables = {k: v for k, v in os.environ.items() if k != "DASH_DATA"}
    return subprocess.run(
        [sys.executable, "-c", TORCH_FREE, *arguments],
        cwd=folder,
        env={**variables, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def summary(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    found = json.loads(last)
    assert list(found) == ["dataset", "n", "outcomes"]
    assert found["n"] == sum(found["outcomes"].values())
    return dict(found)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"id": f"{n}+1", "problem": f"{n}+1=", "answer": str(n + 1)} for n in range(4)]
    return write(tmp_path / "data.jsonl", *rows)


@pytest.mark.parametrize(
    ("option", "file", "n"),
    [
        pytest.param("math500", "math500_test", 500, marks=pytest.mark.long),
        pytest.param("gsm8k_test", "gsm8k_test", 1319, marks=pytest.mark.long),
        ("aime24", "aime24_test", 30),
    ],
)
def test_every_reference_solution_is_correct(data_folder: Path, option: str, file: str, n: int) -> None:
    done = judge(f"dataset={option}", f"dataset.path={data_folder / f'{file}.jsonl'}")
    assert summary(done)["outcomes"] == {"correct": n}
    assert max(map(len, done.stdout.splitlines())) <= 110


@pytest.mark.long
@pytest.mark.parametrize(
    ("option", "n"),
    [("math", 12_000), ("gsm8k", 7473), ("humaneval", 164), ("mbppplus", 264), ("mbppplus_test", 114)],
)
def test_every_reference_solution_of_the_large_sets_is_correct(
    data_folder: Path, option: str, n: int
) -> None:
    done = judge(f"dataset={option}", f"paths.data={data_folder}")
    assert summary(done)["outcomes"] == {"correct": n}, done.stdout


def test_a_generated_set_needs_no_file(tmp_path: Path) -> None:
    done = judge_as_typed("dataset=arithmetic_test", folder=tmp_path)
    assert summary(done) == {"dataset": "arithmetic", "n": 500, "outcomes": {"correct": 500}}
    assert list(tmp_path.iterdir()) == []  # and leaves none


def test_completions_are_judged_and_the_exceptions_named(data: Path, tmp_path: Path) -> None:
    """Both spellings of both fields, right and wrong ones: exit code 0 all the same."""
    file = write(
        tmp_path / "c.jsonl",
        {"id": "0+1", "completion": "1"},
        {"prompt": "1+1", "text": " 2 of them"},
        {"id": "1+1", "solution": "2"},
        {"id": "2+1", "completion": "4"},
        {"prompt": "3+1", "completion": "who knows"},
        "\n",
    )
    done = judge(*OWN, f"dataset.path={data}", f"completions={file}")
    assert summary(done) == {
        "dataset": "gsm8k",
        "n": 5,
        "outcomes": {"correct": 3, "no_answer": 1, "wrong": 1},
    }
    lines = done.stdout.splitlines()
    assert "  2+1: wrong, found 4, expected 3" in lines
    assert "  3+1: no_answer, no integer in the text" in lines
    assert f"  {'correct':<16} {3:>8} {0.6:>8.3f}" in lines


@pytest.mark.parametrize(
    ("prefix", "given", "known"),
    [
        ("humaneval-", "humaneval-7", "humaneval-7"),
        ("humaneval-", "HumanEval/7", "humaneval-7"),
        ("humaneval-", "humanevalplus-7", "humaneval-7"),
        ("humaneval-", "HumanEval_7", "humaneval-7"),
        ("humaneval-", "7", "humaneval-7"),
        ("mbppplus-", "Mbpp/7", "mbppplus-7"),
        ("mbpp-", "MBPP/7", "mbpp-7"),
        ("humaneval-", "gsm8k-7", None),
        ("humaneval-", "humaneval", None),
        ("", "a-7", "a-7"),
        ("", "b-7", None),
    ],
)
def test_ids_as_the_source_writes_them(prefix: str, given: str, known: str | None) -> None:
    assert (known or "nothing") in (*names_of(given, [prefix]), "nothing")
    if known is None:
        assert f"{prefix}7" not in names_of(given, [prefix])


def test_at_most_twenty_exceptions_are_listed(data: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "c.jsonl", *[{"id": "0+1", "text": "2"}] * 25)
    lines = judge(*OWN, f"dataset.path={data}", f"completions={file}").stdout.splitlines()
    assert sum(line.startswith("  0+1: wrong") for line in lines) == 20
    assert "  and 5 more" in lines


def test_the_samples_of_a_cell_are_judged_as_they_are(data: Path, tmp_path: Path) -> None:
    """A step that a resumed run wrote again counts once, a line torn by a crash not at all."""
    common = {"index": 0, "tokens": 3, "reward": 0.0}
    file = write(
        tmp_path / "samples.jsonl",
        {"attempt": 1, "step": 1, "prompt": "0+1", "text": "1", **common},
        {"attempt": 1, "step": 2, "prompt": "1+1", "text": "9", **common},
        '{"attempt": 1, "step": 2, "pro\n',
        {"attempt": 2, "step": 2, "prompt": "1+1", "text": "2", **common},
    )
    done = judge(*OWN, f"dataset.path={data}", f"completions={file}")
    assert summary(done)["outcomes"] == {"correct": 2}


def test_every_faulty_line_is_named_at_once(data: Path, tmp_path: Path) -> None:
    file = write(
        tmp_path / "c.jsonl",
        {"id": "0+1", "text": "1"},
        {"id": "7+1", "text": "8"},
        {"id": "0+1"},
        {"text": "1"},
        "{no\n",
        {"id": 3, "text": None},
        [1],
    )
    done = judge(*OWN, f"dataset.path={data}", f"completions={file}")
    assert (done.returncode, done.stdout) == (2, "")
    for text in (
        f"{file}:2: the dataset has no example '7+1'",
        f"{file}:3: lacks 'completion' or 'text' or 'solution' as text",
        f"{file}:4: lacks 'id' or 'prompt' as text",
        f"{file}:5: is not JSON",
        f"{file}:6: lacks 'id' or 'prompt' and 'completion' or 'text' or 'solution' as text",
        f"{file}:7: expected an object, got list",
    ):
        assert text in done.stderr
    assert "dash_exp: 6 problems" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["dataset=maths500"], "did you mean 'math500'?"),
        (["dataset=gsm8k", "dataset.path=absent.jsonl"], "absent.jsonl is not a file"),
        (["dataset=math", "dataset.extraction=last_box"], "dataset.extraction: got 'last_box'"),
        (["dataset=arithmetic", "completions=absent.jsonl"], "absent.jsonl: cannot be read"),
        (["dataset=arithmetic", "verifier.worker=3"], "did you mean 'verifier.workers'?"),
    ],
)
def test_what_the_user_can_fix_is_said_with_exit_code_2(
    tmp_path: Path, arguments: list[str], says: str
) -> None:
    done = judge(*arguments, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done.stdout
    assert says in done.stderr and "Traceback" not in done.stderr


def test_the_reference_of_an_example() -> None:
    maths = DatasetConfig(verifier="math", extraction="boxed")
    integer = DatasetConfig(verifier="integer", extraction="first_integer")
    worked = Example("a", "1+1", "2", solution="so \\boxed{2}")
    assert reference(worked, maths) == worked.solution
    assert reference(Example("a", "1+1", "2"), maths) == "\\boxed{2}"
    assert reference(Example("a", "1+1", "2", solution="it is two"), maths) == "\\boxed{2}"
    assert reference(Example("a", "1+1", "2"), integer) == "2"
