"""`python -m dash_exp.evaluate` as typed, on a real cell of the tiny model."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dash_exp.cell.__main__ import run_config
from dash_exp.config.compose import compose
from dash_exp.errors import UserError
from dash_exp.evaluate import __main__ as evaluate
from dash_exp.evaluate.__main__ import main
from dash_exp.evaluate.target import parse, subject_of
from dash_exp.evaluation.metrics import EvalResult, EvalSet
from dash_exp.record.folder import Recorder, Row, read_final, read_json, read_rows
from dash_exp.signals import Interrupted
from tests.conftest import REPOSITORY

DIGITS = Path(__file__).parent / "digits.jsonl"
SETS = [
    "evaluation=gsm8k",
    f"evaluation.sets.gsm8k.path={DIGITS}",
    "evaluation.sets.gsm8k.verifier=integer",
    "evaluation.sets.gsm8k.extraction=first_integer",
]
TRAIN = [
    "model=tiny",
    "algorithm.steps=4",
    "algorithm.prompts_per_step=4",
    "algorithm.group_size=8",
    "checkpoint.every=2",
    "run.progress=none",
    "learner.lr=1e-3",
    "dataset=gsm8k",
    f"dataset.path={DIGITS}",
    "dataset.verifier=integer",
    "dataset.extraction=first_integer",
    "cluster.threads=1",
    "sampler.max_new_tokens=6",
    *SETS,
    "evaluation.samples=16",
    "evaluation.temperature=1",
    "evaluation.k=[1,4]",
]
ONE = "cluster.threads=1"


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cell, which was evaluated with 16 samples a prompt."""
    root = tmp_path_factory.mktemp("cell")
    assert run_config(compose([*TRAIN, f"run.dir={root}"])) == 0
    (folder,) = (root / "cells").iterdir()
    return folder


@pytest.fixture
def mine(cell: Path, tmp_path: Path) -> Path:
    """A copy of it, with the cache of base results."""
    shutil.copytree(cell.parents[1], tmp_path / "outputs")
    return tmp_path / "outputs" / "cells" / cell.name


def metrics(folder: Path) -> dict[str, Row]:
    return {r["metric"]: r for r in read_final(folder, "evals")}


def only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and "evaluations" not in p.parts
    }


def test_the_newest_checkpoint_answers_as_it_did_in_training(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same seeds, weights and code: every verdict and length is that of the cell's own record, which
    is left as it was."""
    before = contents(mine)
    assert main([f"cell={mine}", ONE]) == 0
    folder = only(mine / "evaluations")
    assert re.fullmatch(r"gsm8k-step-000004-[0-9a-f]{8}", folder.name)
    assert {p.name for p in folder.iterdir()} >= {
        "config.yaml",
        "provenance.json",
        "evals.jsonl",
        "eval_samples.jsonl",
        "log.txt",
        "status.json",
    }
    ours = {r["prompt"]: r for r in read_final(folder, "eval_samples")}
    theirs = {r["prompt"]: r for r in read_final(mine, "eval_samples") if r["step"] == 4}
    assert len(ours) == 25 and any(sum(r["scores"]) > 0 for r in ours.values())
    assert ours == theirs
    found = metrics(folder)
    assert found == {r["metric"]: r for r in read_final(mine, "evals") if r["step"] == 4}
    assert {"accuracy", "pass@1", "pass@4"} <= found.keys()
    assert contents(mine) == before
    text = capsys.readouterr().out
    assert "16 completions a prompt, T 1, top_p 1" in text
    value, low, high = (f"{found['pass@4'][k]:.3f}" for k in ("value", "low", "high"))
    assert re.search(rf"pass@4 +{value} +\[{low}, {high}\] +25\n", text)


def test_a_known_evaluation_is_shown_and_forced_ones_are_archived(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [f"run={mine}", ONE, "evaluation.samples=2", "evaluation.k=[1,2,4]"]
    assert main(command) == 0
    first = capsys.readouterr().out
    folder = only(mine / "evaluations")
    content = (folder / "evals.jsonl").read_text()
    assert main(command) == 0
    again = capsys.readouterr().out
    assert "is known; run.force=true" in again
    assert first.partition("\n\n")[2] == again.partition("\n\n")[2]  # the same table
    assert re.search(r"pass@4 +- +- +0\n", again)  # more than the samples: no value
    assert max(map(len, again.splitlines()[1:-1])) <= 80
    assert (folder / "evals.jsonl").read_text() == content
    assert main([*command, "run.force=true"]) == 0
    assert len(list((mine / "archive").iterdir())) == 1
    assert (only(mine / "evaluations") / "evals.jsonl").read_text() == content


def test_overrides_go_on_top_of_the_frozen_config(mine: Path) -> None:
    """Another group, another set, another decoding: what is not named stays as the cell had it."""
    assert main([f"cell={mine}", ONE, "evaluation.top_p=0.5"]) == 0
    assert main([f"cell={mine}", ONE, "evaluation=arithmetic", "evaluation.limit=7"]) == 0
    added = "+dataset@evaluation.sets.sums=arithmetic_test"
    assert main([f"cell={mine}", ONE, added, "evaluation.sets.sums.limit=3", "evaluation.limit=null"]) == 0
    found = sorted((mine / "evaluations").iterdir())
    assert [p.name.rpartition("-step")[0] for p in found] == ["arithmetic", "gsm8k", "gsm8k"]
    accuracy = [[r for r in read_final(p, "evals") if r["metric"] == "accuracy"] for p in found]
    assert [(r["dataset"], r["n"]) for r in accuracy[0]] == [("arithmetic", 7)]
    assert sorted([[(r["dataset"], r["n"]) for r in rows] for rows in accuracy[1:]], key=len) == [
        [("gsm8k", 25)],
        [("gsm8k", 25), ("sums", 3)],
    ]
    cuts = [read_json(p / "provenance.json")["keys"] for p in found[1:]]
    assert sorted(keys["gsm8k"]["decoding"]["top_p"] for keys in cuts) == [0.5, 1.0]
    greedy = [len(r["scores"]) for r in read_final(found[0], "eval_samples")]
    assert greedy == [1] * 7  # the option's own decoding, not the cell's


def test_a_named_checkpoint(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = mine / "checkpoints" / "step-000004"
    first = Path(shutil.copytree(newest, mine / "checkpoints" / "step-000002"))
    small = ["evaluation.samples=1", "evaluation.limit=3", "evaluation.k=[]"]
    for named in ("2", str(first), "4"):
        assert main([f"cell={mine}", ONE, *small, f"checkpoint={named}"]) == 0
    names = sorted(p.name.rpartition("-")[0] for p in (mine / "evaluations").iterdir())
    assert names == ["gsm8k-step-000002", "gsm8k-step-000004"]  # step and folder are one evaluation
    elsewhere = shutil.copytree(newest, mine.parent / "step-final")
    assert main([f"cell={mine}", ONE, *small, f"checkpoint={elsewhere}"]) == 0
    assert {r["step"] for r in read_final(next(mine.glob("evaluations/*final*")), "evals")} == {0}
    weights = bytearray((first / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (first / "model.safetensors").write_bytes(bytes(weights))
    capsys.readouterr()
    assert main([f"cell={mine}", ONE, *small, "checkpoint=2"]) == 2
    assert "model.safetensors has changed since it was written" in capsys.readouterr().err


def test_training_data_are_not_needed(mine: Path) -> None:
    text = (mine / "config.yaml").read_text()
    gone = text.replace(f"path: {DIGITS}", "path: /nowhere/train.jsonl", 1)
    assert gone != text
    (mine / "config.yaml").write_text(gone)
    assert main([f"cell={mine}", ONE, "evaluation.limit=3"]) == 0


def test_base_models_share_the_cells_cache(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cell has evaluated its base: asked again, alone, nothing is sampled; the result is its row."""
    base = [r for r in read_final(mine, "eval_samples") if r["step"] == 0]
    same = [a for a in TRAIN if not a.startswith(("algorithm", "run.progress", "learner"))]
    assert main([*same, f"run.dir={mine.parents[1]}"]) == 0
    assert f"(known from {mine.name})" in capsys.readouterr().out
    folder = only(mine.parents[1] / "evaluations")
    assert re.fullmatch(r"tiny-gsm8k-[0-9a-f]{8}", folder.name)
    assert read_final(folder, "eval_samples") == base
    assert main([*same, f"run.dir={mine.parents[1]}", "run.force=true"]) == 0
    assert "known" not in capsys.readouterr().out
    assert read_final(folder, "eval_samples") == base  # asked again, with the same seeds
    provenance = read_json(folder / "provenance.json")
    assert {"code_hash", "packages", "model", "datasets", "verifiers", "keys"} <= provenance.keys()


@pytest.mark.long
def test_and_the_other_way_round(tmp_path: Path) -> None:
    """A base model evaluated first is not evaluated again by a cell."""
    same = [a for a in TRAIN if not a.startswith(("algorithm", "run.progress", "learner"))]
    assert main([*same, f"run.dir={tmp_path}"]) == 0
    assert run_config(compose([*TRAIN, f"run.dir={tmp_path}"])) == 0
    events = read_rows(only(tmp_path / "cells") / "events.jsonl").rows
    assert [r["cached"] for r in events if r["kind"] == "evaluate"] == [True, False]


def faults_of(*arguments: str) -> str:
    with pytest.raises(UserError) as raised:
        subject_of(parse(arguments))
    return str(raised.value)


def test_every_fault_at_once(cell: Path) -> None:
    text = faults_of(
        f"cell={cell}", "checkpoint=3", "evaluation.sample=4", "algorithm.steps=3", "sampler=hff", "-x"
    )
    for part in (
        "dash_exp: 5 problems, nothing was started",
        "-x: unknown flag",
        "checkpoint: no checkpoint of step 3\n    there are: 4",
        "algorithm.steps: is fixed: the cell is trained already",
        "evaluation.sample: unknown key\n    did you mean 'evaluation.samples'?",
        "sampler: unknown option 'hff'\n    did you mean 'hf'?",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["cell={cells}/dash-tiny"], "is not a folder\n    did you mean"),
        (["cell={cells}"], "has no checkpoints"),
        (["cell={cells}"], "holds no config.yaml, so it is not a cell"),
        (["cell={cell}", "run={cell}"], "cell is given twice"),
        (["cell={cell}", "model=tiny"], "a cell brings its model along"),
        (["cell={cell}", "checkpoint=nowhere"], "neither a step nor a model's folder"),
        (["cell={cell}", "evaluation.temperature=0"], "they would all be equal"),
        (["cell={cell}", "evaluation.top_p=0"], "must be more than 0 and at most 1"),
        (["cell={cell}", "evaluation=none"], "names no set to evaluate on"),
        (["cell={cell}", "evaluation.sets.gsm8k.path=absent"], "absent is not a file"),
        (["model=tiny", "checkpoint=3"], "belongs to a cell"),
        (["model=tinny", "evaluation=mth"], "unknown option 'tinny'\n    did you mean 'tiny'?"),
        (["model=tinny", "evaluation=mth"], "unknown option 'mth'\n    did you mean 'math'?"),
        ([], "name a cell or a model"),
    ],
)
def test_what_the_user_can_fix(cell: Path, arguments: list[str], says: str) -> None:
    text = faults_of(*(a.format(cells=cell.parent, cell=cell) for a in arguments))
    assert says in text


def test_no_file_of_a_training_set_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DASH_DATA", raising=False)
    training = ["dataset.kind=jsonl", "dataset.file=absent.jsonl"]
    assert subject_of(parse(["model=tiny", "evaluation=arithmetic", *training])).step == 0


def test_two_processes_cannot_write_one_evaluation(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [f"cell={mine}", ONE, "evaluation.limit=3"]
    assert main(command) == 0
    capsys.readouterr()
    with Recorder(only(mine / "evaluations")):
        assert main(command) == 2
    assert "is being run by another process" in capsys.readouterr().err


SUMS = ["+dataset@evaluation.sets.sums=arithmetic_test", "evaluation.sets.sums.limit=80"]


def test_an_interrupted_evaluation_goes_on_with_the_next_set(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [f"cell={mine}", ONE, "evaluation.samples=1", "evaluation.k=[]", *SUMS]
    ask = evaluate.evaluate

    def ask_once(one: EvalSet, *rest: Any) -> EvalResult:
        if one.label == "sums":
            raise Interrupted(signal.SIGTERM)
        return ask(one, *rest)

    monkeypatch.setattr(evaluate, "evaluate", ask_once)
    assert main(command) == 128 + signal.SIGTERM
    assert "Interrupted by SIGTERM" in capsys.readouterr().out
    folder = only(mine / "evaluations")
    status = read_json(folder / "status.json")
    assert (status["state"], status["failure"]) == ("interrupted", "SIGTERM")
    monkeypatch.undo()
    assert main(command) == 0
    rows = read_rows(folder / "evals.jsonl").rows
    assert {(r["dataset"], r["attempt"]) for r in rows} == {("gsm8k", 1), ("sums", 2)}
    assert read_json(folder / "status.json")["state"] == "finished"
    assert read_json(folder / "provenance.json")["evaluated"]["cell"] == mine.name


@pytest.mark.long
def test_a_process_stopped_by_ctrl_c(mine: Path) -> None:
    command = [sys.executable, "-m", "dash_exp.evaluate", f"cell={mine}", ONE, "evaluation.samples=32", *SUMS]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not list(mine.glob("evaluations/*/evals.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Interrupted by SIGINT" in output and "Traceback" not in output
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_json(only(mine / "evaluations") / "status.json")["state"] == "finished"


def test_a_misspelt_key_is_an_error(cell: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"cell={cell}", "evaluation.sample=4"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "did you mean 'evaluation.samples'?" in said.err
