"""The command that predicts step times, and where it reads curves: files and records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dash_exp.capacity.__main__ import main, parse
from dash_exp.capacity.curves import curves_of, read_cells, read_curves
from dash_exp.capacity.model import Setting, predict_batch, wave_choices
from dash_exp.errors import UserError

FOUND = {
    "decode": [[1, 50.0], [8, 200.0], [32, 400.0]],
    "prefill_tokens_per_s": 1000.0,
    "learner_tokens_per_s": 300.0,
    "lengths": [[5, 9, 7, 16], [16, 16, 12, 3]],
    "cap": 16,
    "prompt_tokens": 29.0,
    "optimizer_s": 0.1,
    "sync_s": 0.5,
    "setting": {"prompts": 8, "group": 4, "waves": 4, "streaming": True, "micro_batch_tokens": 256},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "curves.json"
    path.write_text(json.dumps({"rows": {"curves": {"curves": FOUND}}}))
    return path


def test_the_command_predicts_what_was_measured_and_what_is_asked(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"curves={file}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines[1:-1])  # the first names the file
    found = json.loads(lines[-1])
    assert found["setting"]["prompts"] == 8 and found["setting"]["tokens"] == 16
    assert found["recommended_waves"] in wave_choices(8)
    assert found["step_s"] >= found["step_s_at_recommended_waves"] > 0.6
    assert main([f"curves={file}", "prompts=64", "group=4", "tokens=512", "kept=0.6", "gpus=8"]) == 0
    other = capsys.readouterr().out
    assert all(len(line) <= 80 for line in other.splitlines()[1:-1])
    summary = json.loads(other.splitlines()[-1])
    assert [s["servers"] + s["learners"] for s in summary["splits"]] == [8] * 7
    assert summary["splits"][0]["step_s"] == pytest.approx(summary["step_s"])
    assert "note:" in other  # 512 tokens, and more learners, were not measured


def test_every_fault_of_the_command_at_once(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["server=2", "kept=2", "tokens=0", "streaming=maybe", "prompts", "gpus=4", "learners=1"]
    with pytest.raises(UserError) as error:
        parse([*wrong, f"cell={file.parent}", f"curves={file}"])
    where = [f.where for f in error.value.faults]
    assert where == ["server", "kept", "tokens", "streaming", "prompts", "curves", "gpus"]
    for text in (
        "did you mean 'servers'",
        "between 0 and 1",
        "1 or more",
        "true or false",
        "not key=value",
        "both curves= and cell=",
        "leave them out",
    ):
        assert text in str(error.value), text
    for arguments, text in (
        ([], "neither curves= nor cell="),
        (["curves="], "must be a path"),
        (["curves=nowhere.json"], "cannot read nowhere.json"),
        (["curves=a,b"], "got 2 files"),
        ([f"curves={file}", "call=3"], "does not divide"),
    ):
        assert main(arguments) == 2
        assert text in capsys.readouterr().err
    assert main(["--help"]) == 0 and "curves=<json>" in capsys.readouterr().out


def test_every_fault_of_a_file_at_once() -> None:
    broken = {**FOUND, "decode": [[1, 0]], "lengths": [[]], "cap": "many", "sync_s": -1}
    with pytest.raises(UserError) as error:
        curves_of(broken)
    assert [f.where for f in error.value.faults] == [
        "curves.decode",
        "curves.lengths",
        "curves.cap",
        "curves.sync_s",
    ]
    with pytest.raises(UserError, match="above it"):
        curves_of({**FOUND, "cap": 15})
    with pytest.raises(UserError, match="no curves"):
        curves_of({"rows": {}})


def test_curves_of_a_file(file: Path) -> None:
    measured = read_curves(file)
    assert measured.curves.decode.seconds(8) == pytest.approx(8 / 200)
    assert measured.setting == Setting(
        prompts=8, group=4, waves=4, streaming=True, tokens=16, micro_batch_tokens=256
    )
    assert measured.notes == ()


def write_cell(folder: Path, learner: dict[str, Any], more: dict[str, float]) -> None:
    """A record of two steps of 2 prompts x 2 completions of 3, 5, 8 and 4 tokens, the second group kept."""
    config = {
        "algorithm": {"prompts_per_step": 2, "group_size": 2},
        "sampler": {
            "name": "hf",
            "max_new_tokens": 8,
            "schedule": "preemptive",
            "servers": 1,
            "waves": 1,
            "streaming": True,
            "prompts_per_call": 1,
            "max_sequences": 64,
        },
        "learner": {"micro_batch_tokens": 128, **learner},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    times = {
        "sample": 4.0,
        "verify": 0.1,
        "logprob": 0.5,
        "backprop": 1.5,
        "optimizer": 0.2,
        "sync": 0.3,
        "other": 0.01,
    }
    row = {
        "tokens/computed": 40,
        "completions/forwarded": 2,
        "tokens/forwarded": 12,
        "filter/kept_share": 0.5,
        **{f"time/{k}_s": v for k, v in times.items()},
        **more,
    }
    rows = [{**row, "step": n, "attempt": 1} for n in (1, 2)]
    (folder / "steps.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    samples = [
        {"step": n, "attempt": 1, "prompt": p, "index": i, "tokens": t}
        for n in (1, 2)
        for p, own in (("a", (3, 5)), ("b", (8, 4)))
        for i, t in enumerate(own)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in samples))


def test_curves_of_a_record(tmp_path: Path) -> None:
    """Step 2: all 20 tokens at once, 8 decode steps, so 2.5 sequences; 4 s of sampling: 5 tokens a second.
    Of the kept group 8 + 4 tokens, 10 of them inputs; 40 inputs computed, so its prompt has 30; 40 inputs in
    0.5 + 1.5 s."""
    write_cell(tmp_path, {}, {})
    measured = read_cells([tmp_path])
    assert measured.curves.decode.points == ((2.5, pytest.approx(2.5 / 5)),)
    assert measured.curves.lengths == ((3, 5), (8, 4))
    assert measured.curves.learner_tokens_per_s == pytest.approx(20.0)
    assert measured.curves.prompt_tokens == 30
    assert (measured.curves.optimizer_s, measured.curves.sync_s) == (0.2, 0.3)
    assert measured.curves.other_s == pytest.approx(0.11)
    assert measured.setting.kept == 0.5 and not measured.setting.streaming
    assert "one point" in measured.notes[0]
    p = predict_batch(measured.curves, measured.setting, measured.curves.lengths)
    assert p.sampling_s == pytest.approx(4.0)


def test_the_reduction_of_a_record_is_converted_to_two_learners(tmp_path: Path) -> None:
    """Of 4 learners 0.15 s, so 0.1 s over two; it is a part of the optimizer's 0.2 s."""
    write_cell(tmp_path, {"ranks": 4}, {"time/reduce_s": 0.15})
    measured = read_cells([tmp_path])
    assert measured.curves.reduce_s == pytest.approx(0.1)
    assert measured.curves.optimizer_s == pytest.approx(0.05)
    assert measured.curves.learner_tokens_per_s == pytest.approx(5.0)
    p = predict_batch(measured.curves, measured.setting, measured.curves.lengths)
    assert p.reduce_s + p.optimizer_s == pytest.approx(0.2)


def test_waves_of_a_record_are_those_of_its_steps(tmp_path: Path) -> None:
    """In two waves a group of 5 decode steps, then one of 8; all at once 8: more sequences in fewer steps."""
    found = {}
    for waves in (1, 2):
        own = tmp_path / str(waves)
        own.mkdir()
        write_cell(own, {}, {"sampler/waves": waves})
        config = json.loads((own / "config.yaml").read_text())
        config["sampler"].update(name="vllm_servers", waves=None)
        (own / "config.yaml").write_text(json.dumps(config))
        rows = [
            {"kind": "sample", "step": n, "attempt": 1, "start": 10.0 * n, "end": 10.0 * n + 4}
            for n in (1, 2)
        ]
        (own / "events.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        found[waves] = read_cells([own])
        assert found[waves].setting.waves == waves
        assert found[waves].setting.streaming
    config["algorithm"]["passes"] = 2  # several updates: nothing is learned from before all is sampled
    (own / "config.yaml").write_text(json.dumps(config))
    assert not read_cells([own]).setting.streaming
    ((one, _),), ((two, _),) = (found[w].curves.decode.points for w in (1, 2))
    assert (one, two) == (pytest.approx(20 / 8), pytest.approx(20 / 13))


def test_a_folder_that_is_no_cell(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a cell"):
        read_cells([tmp_path])
