"""Whole runs of the tiny model: every arm, the record, exact resume, interruption, damage."""

from __future__ import annotations

import gzip
import json
import os
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
from dash_exp.record.folder import Recorder, Row, differences, read_final, read_json, read_rows
from tests.conftest import REPOSITORY

SMALL = [
    "model=tiny",
    "algorithm.steps=6",
    "algorithm.prompts_per_step=4",
    "algorithm.group_size=16",
    "checkpoint.every=2",
    "evaluation.limit=8",
    "run.progress=none",
    "learner.lr=1e-3",
    "dataset=gsm8k",
    f"dataset.path={Path(__file__).parent / 'digits.jsonl'}",
    "dataset.verifier=integer",
    "dataset.extraction=first_integer",
    "evaluation=arithmetic",
    "cluster.threads=1",
    "sampler.max_new_tokens=6",
]
"""Sums of one digit: a random model is right now and then, so there is something to learn from."""


def run_here(root: Path, *overrides: str) -> Path:
    """Run a cell in this process; its folder."""
    config = compose([*SMALL, f"run.dir={root}", *overrides])
    before = set((root / "cells").glob("*")) if root.exists() else set()
    assert run_config(config) == 0
    (folder,) = set((root / "cells").glob("*")) - before or before
    return folder


def steps_of(folder: Path) -> list[Row]:
    return read_final(folder, "steps")


def start(root: Path, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    """The same as a user would start it."""
    return subprocess.Popen(
        [sys.executable, "-m", "dash_exp", *SMALL, "run.progress=plain", f"run.dir={root}", *overrides],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )


def finish(process: subprocess.Popen[str], timeout: float = 120) -> str:
    output, _ = process.communicate(timeout=timeout)
    return output


def wait_for_steps(folder_of: Any, count: int, process: subprocess.Popen[str], within_s: float = 90) -> None:
    """Until the record shows `count` steps."""
    deadline = time.time() + within_s
    while time.time() < deadline:
        folders = list(folder_of.glob("cells/*/steps.jsonl"))
        if folders and len(read_rows(folders[0]).rows) >= count:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"no step in {within_s} s")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of an undisturbed run."""
    return run_here(tmp_path_factory.mktemp("whole"))


def test_the_record_is_complete(whole: Path) -> None:
    status = read_json(whole / "status.json")
    assert status["state"] == "finished" and status["step"] == 6 and status["failure"] is None
    assert status["attempt"] == 1
    rows = steps_of(whole)
    assert [r["step"] for r in rows] == list(range(1, 7))
    names = {
        "attempt",
        "updates",
        "reward/mean",
        "time/step_s",
        "tokens/sampled",
        "tokens/forwarded",
        "tokens/backpropagated",
        "filter/kept_share",
        "length/mean_tokens",
        "advantage/mean_abs",
        "memory/peak_mb",
        "time/overlap_s",
    }
    for row in rows:
        assert names <= row.keys(), names - row.keys()
    samples = read_final(whole, "samples")
    assert len(samples) == 6 * 64
    assert {"prompt", "index", "tokens", "reward", "outcome", "advantage", "kept"} <= samples[0].keys()
    evals = read_rows(whole / "evals.jsonl").rows
    accuracy = [r for r in evals if r["metric"] == "accuracy"]
    assert [(r["step"], r["dataset"], r["n"]) for r in accuracy] == [
        (0, "arithmetic", 8),
        (6, "arithmetic", 8),
    ]
    provenance = read_json(whole / "provenance.json")
    assert {"code_hash", "packages", "hardware", "model", "datasets", "verifiers"} <= provenance.keys()
    kinds = {r["kind"] for r in read_rows(whole / "events.jsonl").rows}
    assert {"sample", "judge", "backprop", "sync", "checkpoint", "evaluate"} <= kinds
    assert (whole / "config.yaml").exists() and (whole / "log.txt").exists()


def test_ledger_sums_to_the_wall_and_rows_agree_with_samples(whole: Path) -> None:
    samples = read_final(whole, "samples")
    phases = (
        "sample",
        "verify",
        "logprob",
        "backprop",
        "optimizer",
        "sync",
        "evaluate",
        "checkpoint",
        "other",
    )
    for row in steps_of(whole):
        own = [s for s in samples if s["step"] == row["step"]]
        assert row["reward/mean"] == pytest.approx(sum(s["reward"] for s in own) / 64)
        assert row["tokens/sampled"] == sum(s["tokens"] for s in own)
        assert row["tokens/kept"] == sum(s["tokens"] for s in own if s["kept"])
        assert row["filter/kept_share"] == sum(s["kept"] for s in own) / 64
        total = sum(row[f"time/{p}_s"] for p in phases)
        assert total == pytest.approx(row["time/step_s"], rel=0.02)
        assert row["tokens/forwarded"] == row["tokens/kept"]


def test_checkpoint_loads_with_transformers_as_it_is(whole: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (folder,) = (whole / "checkpoints").iterdir()
    assert folder.name == "step-000006" and not (folder / "resume").exists()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("12 + 3").input_ids) == "12 + 3"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    start = AutoModelForCausalLM.from_pretrained(model_folder(whole), dtype=torch.float32)
    pairs = zip(model.parameters(), start.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def model_folder(cell: Path) -> Path:
    (folder,) = (p for p in (cell.parents[1] / "cache" / "models").iterdir() if p.is_dir())
    return folder


@pytest.mark.parametrize("point", [3, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2, 4, 5))])
def test_killed_at_any_step_and_resumed_equals_undisturbed(whole: Path, tmp_path: Path, point: int) -> None:
    """kill -9 in the middle of training, then the same command."""
    process = start(tmp_path)
    wait_for_steps(tmp_path, point, process)
    process.kill()
    process.communicate()
    again = start(tmp_path)
    output = finish(again)
    assert again.returncode == 0, output
    (folder,) = (tmp_path / "cells").iterdir()
    assert differences(whole, folder) == []
    assert read_json(folder / "status.json")["attempt"] == 2


def test_paused_at_a_step_and_continued_equals_undisturbed(whole: Path, tmp_path: Path) -> None:
    """At a step with a checkpoint of its own and at one without, and twice at the same."""
    for until, step in ((3, 3), (3, 3), (4, 4)):
        folder = run_here(tmp_path, f"run.until_step={until}")
        status = read_json(folder / "status.json")
        assert (status["state"], status["step"]) == ("interrupted", step)
        assert status["reason"] == f"paused at step {step} (run.until_step)"
    assert run_here(tmp_path, "run.until_step=6", "run.profile=1") == folder and folder.name == whole.name
    (trace,) = (folder / "profile").iterdir()
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert trace.name == "step-000006.json.gz" and any("backward" in e.get("name", "") for e in events)
    assert read_json(folder / "status.json")["state"] == "finished"
    assert differences(whole, folder) == []


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.long), (signal.SIGTERM, 143)]
)
def test_a_signal_ends_the_step_saves_and_can_be_resumed(
    whole: Path, tmp_path: Path, number: int, code: int
) -> None:
    process = start(tmp_path, "algorithm.steps=400", "checkpoint.every=0")
    wait_for_steps(tmp_path, 2, process)
    process.send_signal(number)
    output = finish(process)
    assert process.returncode == code, output
    assert "Traceback" not in output
    (folder,) = (tmp_path / "cells").iterdir()
    status = read_json(folder / "status.json")
    assert status["state"] == "interrupted" and status["failure"] == signal.Signals(number).name
    assert (folder / "checkpoints" / f"step-{status['step']:06d}").exists()
    assert len(steps_of(folder)) == status["step"]


@pytest.mark.long
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(whole: Path, tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for_steps(tmp_path, 5, process)
    process.kill()
    process.communicate()
    (folder,) = (tmp_path / "cells").iterdir()
    newest = max((folder / "checkpoints").glob("step-*"))
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(bytes(content))
    with (folder / "steps.jsonl").open("a") as stream:
        stream.write('{"attempt": 1, "step": 6, "rew')  # and a torn line
    again = start(tmp_path)
    output = finish(again)
    assert again.returncode == 0, output
    assert f"{newest.name} is damaged" in output and "model.safetensors has changed" in output
    assert differences(whole, folder) == []
    assert read_rows(folder / "steps.jsonl").torn == 1
    faults = [r for r in read_rows(folder / "events.jsonl").rows if r["kind"] == "fault"]
    assert [f["where"] for f in faults] == [newest.name]


def test_finished_says_so_and_force_archives(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = whole.parents[1]
    before = (whole / "steps.jsonl").read_text()
    config = compose([*SMALL, f"run.dir={root}", "run.progress=plain"])
    assert run_config(config) == 0
    assert "is finished; run.force=true" in capsys.readouterr().out
    assert (whole / "steps.jsonl").read_text() == before
    assert run_config(compose([*SMALL, f"run.dir={root}", "run.force=true"])) == 0
    (archived,) = (root / "archive").iterdir()
    assert (archived / "steps.jsonl").read_text() == before
    assert differences(archived, whole) == []


def test_streaming_and_micro_batches_change_nothing_but_time(whole: Path, tmp_path: Path) -> None:
    """In fp32, gradient sums in another grouping agree to rounding: rewards are the same samples."""
    options = [["sampler.streaming=false"], ["learner.micro_batch_tokens=70"]]
    reference = steps_of(run_here(tmp_path / "base", "learner.precision=fp32"))
    for number, option in enumerate(options):
        rows = steps_of(run_here(tmp_path / str(number), "learner.precision=fp32", *option))
        for a, b in zip(reference, rows, strict=True):
            assert a["reward/mean"] == b["reward/mean"] and a["tokens/sampled"] == b["tokens/sampled"]
            if "optimizer/grad_norm" in a:
                assert a["optimizer/grad_norm"] == pytest.approx(b["optimizer/grad_norm"], rel=1e-3)


def test_sampler_and_learner_agree_in_fp32(tmp_path: Path) -> None:
    rows = steps_of(run_here(tmp_path, "learner.precision=fp32", "algorithm=no_gf"))
    assert all(r["policy/logprob_gap"] < 1e-3 for r in rows)


def test_an_update_budget_in_seconds_stops_between_updates(tmp_path: Path) -> None:
    folder = run_here(tmp_path, "budget.seconds=0.001")
    assert read_json(folder / "status.json")["reason"] == "budget"
    assert len(steps_of(folder)) == 1
    assert read_rows(folder / "evals.jsonl").rows[-1]["step"] == 1


def test_base_results_are_shared(tmp_path: Path) -> None:
    first = run_here(tmp_path, "algorithm.steps=1")
    second = run_here(tmp_path, "algorithm.steps=1", "seed=1")
    hits = [
        [r["cached"] for r in read_rows(f / "events.jsonl").rows if r["kind"] == "evaluate"]
        for f in (first, second)
    ]
    assert hits == [[False, False], [True, False]]


def test_equal_cells_share_a_folder_wherever_the_data_lie(tmp_path: Path) -> None:
    """Identity is content: the same file elsewhere is the same cell, a changed one is not."""
    from dash_exp.record.identity import make_cell

    ids = []
    for name, answer in [("a.jsonl", "2"), ("b.jsonl", "2"), ("c.jsonl", "3")]:
        path = tmp_path / name
        path.write_text(json.dumps({"id": "1", "problem": "1+1", "answer": answer}) + "\n")
        config = compose([*SMALL, "evaluation=none", f"dataset.path={path}"])
        ids.append(make_cell(config, tmp_path / "cache").id)
    assert ids[0] == ids[1] != ids[2]
    actions = compose([*SMALL, "run.dir=elsewhere", "run.force=true", "cluster.threads=1"])
    assert make_cell(actions, tmp_path / "cache").id == make_cell(compose(SMALL), tmp_path / "cache").id
    unread = tmp_path / "traces.jsonl"  # named, but only sft_m reads it
    named = [make_cell(compose([*SMALL, f"dataset.traces={unread}"]), tmp_path / "cache").id]
    unread.write_text('{"id": "1", "solution": "2"}\n')
    named.append(make_cell(compose([*SMALL, f"dataset.traces={unread}"]), tmp_path / "cache").id)
    assert set(named) == {make_cell(compose(SMALL), tmp_path / "cache").id}
    other = compose([*SMALL, "learner.lr=2e-3"])
    assert make_cell(other, tmp_path / "cache").id != make_cell(compose(SMALL), tmp_path / "cache").id


@pytest.mark.long
def test_a_frozen_cell_runs_from_its_folder(whole: Path, tmp_path: Path) -> None:
    target = tmp_path / "cells" / whole.name
    target.mkdir(parents=True)
    (target / "config.yaml").write_text((whole / "config.yaml").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "dash_exp.cell", str(target), "cluster.threads=1"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert differences(whole, target) == []


def test_a_bad_data_file_stops_before_any_model_and_harms_no_record(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"problem": "1+1"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:1: lacks the field 'answer'"):
        run_here(tmp_path, "evaluation=none", f"dataset.path={path}")


def disk_of(tmp_path: Path, size: str) -> Path:
    """A real small disk, where mounting one is allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("a small disk cannot be mounted here (needs root)")
    return place


@pytest.mark.long
def test_a_full_disk_is_said_plainly_and_what_was_recorded_stays(tmp_path: Path) -> None:
    place = disk_of(tmp_path, "3m")
    try:
        process = start(place, "algorithm.steps=60", "checkpoint.keep=60", "checkpoint.every=1")
        output = finish(process)
        assert process.returncode == 2, output
        assert "no space left on the disk" in output and "Traceback" not in output
        (folder,) = (place / "cells").iterdir()
        rows = read_rows(folder / "steps.jsonl")
        assert rows.rows and rows.torn <= 1
        assert all(not p.name.startswith(".saving") for p in (folder / "checkpoints").iterdir())
    finally:
        subprocess.run(["umount", str(place)], check=True)


class Killed(BaseException):
    """Stands for a kill: nothing after it runs, no handler of ours catches it."""


@pytest.mark.parametrize("where", ["prune", "save", "finalise", "write_finished"])
def test_killed_between_two_file_operations(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Right before and after a checkpoint appears, and on either side of the last status."""
    from dash_exp.record import checkpoint

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    status = Recorder.status

    def status_then_kill(self: Recorder, state: str, *rest: Any, **more: Any) -> None:
        if state == "finished":
            raise Killed
        status(self, state, *rest, **more)

    if where == "write_finished":
        monkeypatch.setattr(Recorder, "status", status_then_kill)
    else:
        monkeypatch.setattr(checkpoint, where, kill)
    with pytest.raises(Killed):
        run_here(tmp_path)
    monkeypatch.undo()
    (folder,) = (tmp_path / "cells").iterdir()
    assert run_config(compose([*SMALL, f"run.dir={tmp_path}"])) == 0
    assert differences(whole, folder) == []
    assert not list(folder.glob("checkpoints/*/resume"))
    assert checkpoint.damage(*(folder / "checkpoints").iterdir()) is None


def test_two_processes_cannot_run_or_archive_one_cell(whole: Path) -> None:
    config = [*SMALL, f"run.dir={whole.parents[1]}"]
    with Recorder(whole), pytest.raises(UserError, match="being run by another process"):
        run_config(compose(config))
    with Recorder(whole), pytest.raises(UserError, match=r"run\.force"):
        run_config(compose([*config, "run.force=true"]))
    assert whole.exists()


def test_a_verifier_that_always_fails_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dash_exp.types import Score
    from dash_exp.verifiers import judges

    failed = Score(float("nan"), "verifier_error", "no worker")
    monkeypatch.setattr(judges, "judge_integer", lambda text, answer: failed)
    with pytest.raises(UserError, match="every verdict of step 1 failed: no worker"):
        run_here(tmp_path)
    (folder,) = (tmp_path / "cells").iterdir()
    assert read_json(folder / "status.json")["state"] == "failed"
    evals = read_final(folder, "evals")
    assert [r["n"] for r in evals if r["metric"] == "accuracy"] == [0]
    assert not list((tmp_path / "cache" / "base_results").glob("*.json"))


def test_a_record_on_a_full_device_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(tmp_path, "algorithm.steps=1")
    (folder,) = (tmp_path / "cells").iterdir()
    for name in ("samples.jsonl", "status.json"):
        (folder / name).unlink()
    (folder / "samples.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr("dash_exp.record.folder.unusable", lambda path: None)  # it is no regular file
    with pytest.raises(UserError, match="no space left"):
        run_config(compose([*SMALL, f"run.dir={tmp_path}", "algorithm.steps=1", "seed=0"]))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"junk" * 10), "is damaged"),
        (lambda f: (f / "config.json").write_text("{}"), "config.json"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "does not load"),
        (lambda f: _drop_tensor(f / "model.safetensors"), "lacks 1 tensors"),
    ],
)
def test_a_broken_model_folder_is_a_clear_error(
    tiny_folder: Path, tmp_path: Path, harm: Any, says: str
) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    harm(folder)
    with pytest.raises(UserError, match=says):
        run_here(tmp_path / "out", f"model.path={folder}")


def _drop_tensor(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_damaged_frozen_config_is_a_clear_error(whole: Path, tmp_path: Path) -> None:
    from dash_exp.cell.__main__ import main

    text = (whole / "config.yaml").read_text()
    broken = {"yaml": "a: [", "key": text + "nonsense: 1\n", "value": text.replace("seed: 0", "seed: 1", 1)}
    for name, content in broken.items():
        folder = tmp_path / "cells" / f"{name}-{whole.name}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(content)
        assert main([str(folder)]) == 2
    assert main([str(tmp_path)]) == 2


@pytest.mark.long
def test_an_evaluation_that_a_signal_prevented_is_made_up_for(tmp_path: Path) -> None:
    process = start(tmp_path, "evaluation.every=1", "algorithm.steps=300", "checkpoint.every=0")
    wait_for_steps(tmp_path, 2, process)
    process.send_signal(signal.SIGTERM)
    finish(process)
    (folder,) = (tmp_path / "cells").iterdir()
    step = read_json(folder / "status.json")["step"]
    assert step not in {r["step"] for r in read_final(folder, "evals")}
    again = start(tmp_path, "evaluation.every=1", "algorithm.steps=300", "checkpoint.every=0")
    wait_for_steps(tmp_path, step + 1, again)
    again.kill()
    again.communicate()
    assert step in {r["step"] for r in read_final(folder, "evals")}


@pytest.mark.long
def test_a_sweep_runs_each_cell_in_a_process_of_its_own(tmp_path: Path) -> None:
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "dash_exp",
            "-m",
            *SMALL,
            f"run.dir={tmp_path}",
            "algorithm.steps=1",
            "evaluation=none",
            "algorithm=dash,pg",
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    folders = sorted((tmp_path / "cells").iterdir())
    assert [f.name.split("-")[0] for f in folders] == ["dash", "pg"]
    pids = {read_json(f / "provenance.json")["attempts"][0]["pid"] for f in folders}
    assert len(pids) == 2
