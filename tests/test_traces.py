"""`python -m dash_exp.traces`: what is kept, exact resume after kill -9, one writer, one setting a file."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dash_exp.errors import UserError
from dash_exp.record.folder import Row, read_json, read_rows
from dash_exp.tasks.sources import read_traces
from dash_exp.traces.__main__ import main
from dash_exp.traces.file import TraceFile, prompt_line, totals
from dash_exp.traces.settings import TracesConfig, parse, settings_of
from dash_exp.types import Completion, Score
from tests.conftest import REPOSITORY

DIGITS = Path(__file__).parent / "digits.jsonl"
TINY = [
    "model=tiny",
    "sampler=hf",
    "dataset=gsm8k",
    f"dataset.path={DIGITS}",
    "dataset.verifier=integer",
    "dataset.extraction=first_integer",
    "cluster.threads=1",
    "traces.samples=24",
    "traces.temperature=1",
    "traces.max_new_tokens=6",
    "traces.chunk=4",
    "dataset.stop=[x,y,z]",
]


def here(root: Path, *more: str) -> int:
    return main([*TINY, f"run.dir={root}", *more])


def file_of(root: Path) -> Path:
    return root / "traces" / "gsm8k-tiny.jsonl"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    root = tmp_path_factory.mktemp("whole")
    assert here(root) == 0
    return root


def test_kept_traces_are_correct_distinct_and_in_order(whole: Path) -> None:
    rows = read_rows(file_of(whole)).rows
    gold = {r["id"]: r for r in read_rows(DIGITS).rows}
    assert len(rows) > 5
    order = list(gold)
    assert [order.index(r["id"]) for r in rows] == sorted(order.index(r["id"]) for r in rows)
    assert len({(r["id"], r["solution"]) for r in rows}) == len(rows)
    assert len({(r["id"], r["index"]) for r in rows}) == len(rows)
    for r in rows:
        assert list(r) == ["id", "problem", "solution", "tokens", "index", "finish"]
        assert r["problem"] == gold[r["id"]]["problem"]
        digits = "".join(c if c.isdigit() else " " for c in r["solution"]).split()
        assert digits[0] == gold[r["id"]]["answer"]
        assert not {"x", "y", "z"} & set(r["solution"]) and "<eos>" not in r["solution"]
        # one token is one character; a stop token was sampled, but is no part of the solution
        assert len(r["solution"]) <= r["tokens"] - (r["finish"] == "stop")
    assert {r["finish"] for r in rows} == {"stop", "length"}
    assert sum(map(len, read_traces(file_of(whole)).values())) == len(rows)  # what sft_m reads


def test_the_provenance_says_how_they_were_made(whole: Path) -> None:
    facts = read_json(file_of(whole).with_suffix(".provenance.json"))
    counts = facts["counts"]
    rows = read_rows(file_of(whole)).rows
    assert counts["prompts"] == 25 and counts["sampled"] == 25 * 24
    assert counts["kept"] == len(rows) == counts["correct"] - counts["duplicates"]
    assert counts["solved"] == len({r["id"] for r in rows})
    assert 0 < counts["truncated"] < counts["sampled"] and counts["failed"] == 0
    settings = facts["settings"]
    assert settings["samples"] == 24 and settings["seed"] == 0 and settings["template"] == "bare"
    stops = settings["decoding"].pop("stop_ids")
    assert stops[0] == 1 and len(stops) == 4  # the end token, x, y, z
    assert settings["decoding"] == {"max_new_tokens": 6, "temperature": 1.0, "top_p": 0.95}
    assert "integer" in settings["verifier"]
    assert {"code_hash", "model", "datasets", "packages"} <= facts.keys()
    assert not file_of(whole).with_suffix(".partial.jsonl").exists()


def test_a_second_run_says_that_it_is_done(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = file_of(whole).stat().st_mtime_ns
    assert here(whole) == 0
    assert "is there, made with these settings" in capsys.readouterr().out
    assert file_of(whole).stat().st_mtime_ns == before


def test_other_settings_never_go_into_the_same_file(
    whole: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = file_of(whole).read_text()
    assert here(whole, "traces.samples=8", "seed=1") == 2
    text = capsys.readouterr().err
    assert "was made with samples 24, not 8" in text
    assert "was made with seed 0, not 1" in text and "traces.out=" in text
    assert file_of(whole).read_text() == before
    out = tmp_path / "mine.jsonl"
    assert here(whole, "traces.samples=8", "seed=1", "traces.limit=3", f"traces.out={out}") == 0
    assert out.exists() and read_json(tmp_path / "mine.provenance.json")["counts"]["sampled"] == 24


@pytest.mark.long
def test_killed_and_resumed_equals_undisturbed(whole: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of a chunk, and a line torn by it, then the same command."""
    command = [sys.executable, "-m", "dash_exp.traces", *TINY, f"run.dir={tmp_path}"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    partial = file_of(tmp_path).with_suffix(".partial.jsonl")
    deadline = time.monotonic() + 60
    while not partial.exists() or partial.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert not file_of(tmp_path).exists()
    lines = partial.read_bytes().splitlines(keepends=True)
    assert 3 <= len(lines) < 26, "killed too late to show anything"
    keep = 6 if len(lines) > 6 else len(lines) - 1  # in the middle of a chunk of 4
    partial.write_bytes(b"".join(lines[:keep]) + lines[-1][:-9])
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{keep - 1} of 25 prompts are done already" in done.stdout
    assert file_of(tmp_path).read_bytes() == file_of(whole).read_bytes()
    ours, theirs = (read_json(file_of(r).with_suffix(".provenance.json")) for r in (tmp_path, whole))
    assert ours["counts"] == theirs["counts"] and ours["settings"] == theirs["settings"]


@pytest.mark.parametrize(
    "lines", [pytest.param(0, marks=pytest.mark.long), 5, pytest.param(25, marks=pytest.mark.long)]
)
def test_resumed_from_any_number_of_prompts(whole: Path, tmp_path: Path, lines: int) -> None:
    """Also where the kill tore the settings themselves (0), and before the last file was written (25)."""
    kept: list[bytes] = []
    append = TraceFile.append

    class Killed(BaseException):
        pass

    def append_then_kill(self: TraceFile, row: Any) -> None:
        if len(kept) == lines + 1:
            raise Killed
        append(self, row)
        kept.append(b"")

    def finish(*_: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TraceFile, "append", append_then_kill)
        patch.setattr(TraceFile, "finish", finish)
        with pytest.raises(Killed):
            here(tmp_path)
    partial = file_of(tmp_path).with_suffix(".partial.jsonl")
    if lines == 0:
        partial.write_bytes(partial.read_bytes()[:-5])
    appended: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TraceFile, "append", lambda self, row: (appended.append(row), append(self, row)))
        assert here(tmp_path) == 0
    assert len(appended) == 25 - lines + (lines == 0)  # nothing is written twice; the settings if torn
    assert file_of(tmp_path).read_bytes() == file_of(whole).read_bytes()


def test_a_torn_line_is_dropped_before_another_is_added(tmp_path: Path) -> None:
    """Killed twice: first while the settings were written, then in the middle of a prompt's line."""
    file = TraceFile(tmp_path / "t.jsonl", {"samples": 3})
    file.partial.write_text('{"settings": {"sam')
    assert file.begin() == {}
    file.append({"id": "p"})
    with file.partial.open("a") as stream:
        stream.write('{"id": "q", "tra')
    assert file.begin() == {"p": {"id": "p"}}
    file.append({"id": "q"})
    assert list(file.begin()) == ["p", "q"]
    assert read_rows(file.partial).torn == 0


def test_the_file_is_in_the_datasets_order_however_prompts_ended(tmp_path: Path) -> None:
    file = TraceFile(tmp_path / "t.jsonl", {"samples": 3})
    file.begin()
    done = {name: {"id": name, "traces": [{"id": name}] * n} for n, name in ((2, "b"), (1, "a"), (0, "c"))}
    file.finish(done, ["a", "b", "c"], {"counts": {}})
    assert [r["id"] for r in read_rows(file.out).rows] == ["a", "b", "b"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.jsonl", "t.provenance.json"]


def test_a_partial_file_of_other_settings_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = file_of(tmp_path).with_suffix(".partial.jsonl")
    partial.parent.mkdir()
    partial.write_text(json.dumps({"settings": {"samples": 3}}) + "\n")
    assert here(tmp_path) == 2
    assert "was made with samples 3, not 24" in capsys.readouterr().err
    assert read_rows(partial).rows == [{"settings": {"samples": 3}}]


def test_a_file_of_unknown_making_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = file_of(tmp_path)
    file.parent.mkdir()
    file.write_text("precious\n")
    assert here(tmp_path) == 2
    assert "nobody knows how it was made" in capsys.readouterr().err
    assert file.read_text() == "precious\n"


def test_one_writer_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TraceFile(file_of(tmp_path), {}).held():
        assert here(tmp_path) == 2
    assert "another process is sampling into it" in capsys.readouterr().err
    assert here(tmp_path, "traces.limit=2") == 0


# --- pieces ----------------------------------------------------------------------------------


def completion(tokens: int, finish: Any = "stop") -> Completion:
    return Completion((5,) * tokens, (-0.1,) * tokens, "judged", finish, 0)


def test_a_line_worked_by_hand() -> None:
    """Five samples: a right one, the same again, a wrong one, another right one that was cut, a failure."""
    outcomes = ["correct", "correct", "wrong", "correct", "timeout"]
    line = prompt_line(
        "p",
        "1+1",
        ["2", "2", "3", "it is 2", "2"],
        [completion(2), completion(2), completion(3), completion(6, "length"), completion(4)],
        [Score(float(o == "correct"), o) for o in outcomes],  # type: ignore[arg-type]
    )
    common = {"id": "p", "problem": "1+1"}
    assert line == {
        "id": "p",
        "sampled": 5,
        "correct": 3,
        "duplicates": 1,
        "truncated": 1,
        "failed": 1,
        "kept": 2,
        "tokens": 17,
        "traces": [
            {**common, "solution": "2", "tokens": 2, "index": 0, "finish": "stop"},
            {**common, "solution": "it is 2", "tokens": 6, "index": 3, "finish": "length"},
        ],
    }
    assert totals([line, line]) == {
        "prompts": 2,
        "solved": 2,
        "sampled": 10,
        "correct": 6,
        "duplicates": 2,
        "truncated": 2,
        "failed": 2,
        "kept": 4,
        "tokens": 34,
    }


@given(st.lists(st.tuples(st.sampled_from(["2", "02", "+2", "3"]), st.booleans()), max_size=12))
def test_each_correct_solution_is_kept_once(samples: list[tuple[str, bool]]) -> None:
    texts = [text for text, _ in samples]
    scores = [Score(float(right), "correct" if right else "wrong") for _, right in samples]
    line: Row = prompt_line("p", "1+1", texts, [completion(2)] * len(samples), scores)
    kept = [t["solution"] for t in line["traces"]]
    assert set(kept) == {text for text, right in samples if right} and len(kept) == len(set(kept))
    assert line["correct"] == line["kept"] + line["duplicates"]
    assert all(scores[t["index"]].outcome == "correct" for t in line["traces"])


def test_the_papers_values_are_the_defaults() -> None:
    found, faults = settings_of([])
    assert faults == [] and found == TracesConfig(10, 0.7, 0.95, 1024, None, None, 256)


def test_the_default_teacher_and_its_place(data_folder: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        pytest.skip("the teacher samples with vLLM")
    command = parse([f"paths.data={data_folder}"])
    assert command.config.model.hub == "Qwen/Qwen2.5-7B-Instruct"
    assert (command.config.sampler.name, command.config.dataset.name) == ("vllm", "math")
    assert command.out == Path("outputs/traces/math-qwen7b_instruct.jsonl")
    assert command.config.sampler.max_new_tokens == 1024


def test_every_fault_at_once() -> None:
    with pytest.raises(UserError) as raised:
        parse([*TINY, "traces.sample=8", "traces.top_p=2", "traces.chunk=x", "evaluation.x=3", "traces.out"])
    text = str(raised.value)
    for part in (
        "dash_exp: 5 problems",
        "traces.sample: unknown key\n    did you mean 'samples'?",
        "traces.top_p: got 2, must be more than 0 and at most 1",
        "traces.chunk: got 'x', expected a whole number",
        "traces.out: is not key=value",
        "evaluation.x: unknown key",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["traces.temperature=0", "traces.top_p=1"], "they would all be equal"),
        (["traces.temperature=0", "traces.samples=1"], "greedy decoding draws nothing"),
        (["sampler.max_sequences=8"], "less than traces.samples=24"),
        (["dataset.path=absent"], "absent is not a file"),
    ],
)
def test_contradictions(arguments: list[str], says: str) -> None:
    with pytest.raises(UserError) as raised:
        parse([*TINY, *arguments])
    assert says in str(raised.value)
