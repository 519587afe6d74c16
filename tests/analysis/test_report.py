"""From folders to a report: what is read, what is left out and said, and that nothing is averaged unasked."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.colors import to_rgb

from analysis import estimates as est
from analysis import quantities, style
from analysis.__main__ import main
from analysis.claims import findings
from analysis.curves import asked, response
from analysis.load import load
from analysis.make import Report, differences, make, write
from analysis.more_tables import reached_by_all, seconds_to
from analysis.variants import repeated, variants
from dash_exp.errors import UserError
from dash_exp.record.folder import write_json
from tests.analysis.folders import CPU, config, make_cell, step_row
from tests.conftest import REPOSITORY

PROMPTS = 40


def verdicts(correct: int) -> list[float]:
    return [1.0] * correct + [0.0] * (PROMPTS - correct)


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    return pair_of_arms(tmp_path)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair_of_arms(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def report(pair: Path) -> Report:
    return make(load([pair]))


def pair_of_arms(tmp_path: Path) -> Path:
    """DASH and GRPO at three seeds: DASH a little better, and four times as fast."""
    for seed in range(3):
        make_cell(
            tmp_path,
            f"dash-smollm2_135m-arithmetic-s{seed}-d000000{seed}",
            config("dash", seed),
            step_s=9.9 + 0.1 * seed,
            before=verdicts(10),
            after=verdicts(30 + seed),
        )
        make_cell(
            tmp_path,
            f"grpo-smollm2_135m-arithmetic-s{seed}-e000000{seed}",
            config("grpo", seed),
            step_s=4 * (10.1 - 0.1 * seed),
            before=verdicts(10),
            after=verdicts(26 + seed),
        )
    return tmp_path


def row_of(text: str, row: str, column: str) -> dict[str, str]:
    return next(r for r in csv.DictReader(io.StringIO(text)) if r["row"] == row and r["column"] == column)


def test_a_table_by_hand(report: Report) -> None:
    text = report.files["tables/table3-arithmetic.csv"].decode()
    time = row_of(text, "DASH", "training time")
    assert (float(time["value"]), time["unit"]) == (
        pytest.approx(40.0 / 60),
        "min",
    )  # 4 x 10 s, no checkpoints
    assert time["paper"] == ""  # of other models on other data
    accuracy = row_of(text, "DASH", "arithmetic")
    assert float(accuracy["value"]) == pytest.approx(100 * (30 + 31 + 32) / 3 / PROMPTS)
    assert (accuracy["n_seeds"], accuracy["n_prompts"]) == ("3", str(PROMPTS))
    assert float(accuracy["delta"]) == pytest.approx(100 * 4 / PROMPTS)
    base = row_of(text, "Base", "arithmetic")
    assert float(base["value"]) == pytest.approx(25.0)


def test_the_papers_values_stand_only_beside_its_own_settings(tmp_path: Path, report: Report) -> None:
    """Same model, data and metric; a twin says in a note what the paper used."""
    for arm in ("dash", "grpo"):
        plain = config(arm, 0, model__name="qwen0.5b", dataset__name="math", dataset__verifier="math")
        make_cell(tmp_path, f"{arm}-m-d-s0-d0000000", plain, after=verdicts(30))
    text = make(load([tmp_path]), pictures=False).files["tables/table3-math.csv"].decode()
    assert float(row_of(text, "DASH", "training time")["paper"]) == pytest.approx(6.6 * 3600)  # shown in s
    assert row_of(text, "DASH", "arithmetic")["paper"] == ""  # not an evaluation set of the paper
    twin = next(t for t in report.tables if t.id == "table3-arithmetic")
    assert not twin.has_paper and any("Qwen2.5-0.5B on MATH" in note for note in twin.notes)


def test_every_recipe_is_in_a_table(outputs: Path) -> None:
    """RLOO, and DASH at another threshold, are in no table of the paper."""
    make_cell(outputs, "rloo-smollm2_135m-arithmetic-s0-f0000001", config("rloo", 0), after=verdicts(20))
    make_cell(
        outputs,
        "dash-smollm2_135m-arithmetic-s0-f0000000",
        config("dash", 0, filter__threshold=0.6),
        after=verdicts(24),
    )
    report = make(load([outputs]), pictures=False)
    text = report.files["tables/recipes-arithmetic.csv"].decode()
    assert float(row_of(text, "RLOO", "arithmetic")["value"]) == pytest.approx(50.0)
    second = row_of(text, "DASH (threshold 0.6)", "arithmetic")
    assert float(second["delta"]) == pytest.approx(100 * (24 - 31) / PROMPTS)  # to the mean of the first DASH
    table = next(t for t in report.tables if t.id == "recipes-arithmetic")
    assert any("DASH (threshold 0.1)" in note for note in table.notes)


def test_what_sweeps_feed_is_made(report: Report) -> None:
    """A sweep names tables and figures that there are; these two arms make some of them."""
    named = {
        feed
        for path in (REPOSITORY / "sweeps").glob("*.yaml")
        for feed in yaml.safe_load(path.read_text())["feeds"]
    }
    known = {f"table_{n}" for n in range(1, 7)} | {f"figure_{n}" for n in range(1, 7)}
    assert named <= known | {"table_recipes", "table_state"}
    made = {t.id.partition("-")[0] for t in report.tables}
    assert {"table3", "recipes", "state"} <= made


def test_claims_are_decided_by_intervals(outputs: Path) -> None:
    records = load([outputs])
    reported = {f.claim: f for f in findings(records, variants(records))}
    faster = reported["DASH needs less training time than GRPO."]
    assert faster.verdict == "supported" and faster.effect.value == pytest.approx(4.0)
    same = reported["DASH loses no accuracy against GRPO (within 3 points)."]
    assert same.verdict != "supported"  # ten points better is not the same


def test_pass_at_k_is_claimed_about_only_where_there_are_many_samples(tmp_path: Path) -> None:
    """Of 16 samples RL makes 12 correct where the base model has 2: another pass@1, the same pass@16."""
    for number, samples in ((0, 16), (1, 8)):
        for seed in range(3):
            base, rl = ([[1.0] * n + [0.0] * (samples - n)] * PROMPTS for n in (2, samples * 3 // 4))
            plain = config("dash", seed, model__name=f"model{number}")
            make_cell(
                tmp_path, f"dash-m{number}-d-s{seed}-d00000{number}{seed}", plain, before=base, after=rl
            )
    records = load([tmp_path])
    found = findings(records, variants(records))
    same = [(f.unit, f.effect.value) for f in found if f.claim.startswith("RL does not change pass@k")]
    assert same == [("points on arithmetic, pass@16", 0.0)]
    improved = [f.effect.value for f in found if f.claim == "On-policy RL improves the base model."]
    assert improved == pytest.approx([100 * (12 - 2) / 16, 100 * (6 - 2) / 8])


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    make_cell(tmp_path, "dash-m-d-s0-d0000000", config("dash"), after=verdicts(30))
    make_cell(tmp_path, "grpo-m-d-s0-e0000000", config("grpo"), step_s=40.0, after=verdicts(10))
    records = load([tmp_path])
    reported = findings(records, variants(records))
    assert reported and {f.verdict for f in reported} == {"undecided"}
    assert all("1 seed" in f.effect.note for f in reported)


def test_times_of_different_hardware_are_not_mixed(outputs: Path) -> None:
    make_cell(
        outputs,
        "dash-smollm2_135m-arithmetic-s3-d0000003",
        config("dash", 3),
        step_s=1.0,
        after=verdicts(30),
        hardware={**CPU, "cpu": "Faster CPU"},
    )
    records = load([outputs])
    dash = next(v for v in variants(records) if v.arm == "dash")
    found = quantities.time_of(records, dash)
    assert math.isnan(found.value) and "different hardware" in found.note
    text = make(records, pictures=False).files["tables/table3-arithmetic.csv"].decode()
    assert row_of(text, "GRPO", "training time")["value"] == ""  # beside it there would be a wrong comparison


def test_settings_that_differ_are_not_averaged(outputs: Path) -> None:
    make_cell(
        outputs,
        "dash-smollm2_135m-arithmetic-s0-f0000000",
        config("dash", 0, filter__threshold=0.6),
        after=verdicts(20),
    )
    labels = {v.label: len(v.cells) for v in variants(load([outputs])) if v.arm == "dash"}
    assert labels == {"DASH (threshold 0.1)": 3, "DASH (threshold 0.6)": 1}


def test_variants_of_one_arm_differ_in_every_picture(tmp_path: Path) -> None:
    """Three thresholds: three colours from light to dark, dashes, markers and labels, in the order of the
    numbers, and a picture of what the threshold changes."""
    for number, threshold in enumerate((1.0, 0.5, 10.0)):
        plain = config("dash", 0, filter__threshold=threshold)
        make_cell(tmp_path, f"dash-m-d-s0-d{number:07}", plain, after=verdicts(20 + number))
    records = load([tmp_path])
    found = variants(records)
    assert [v.label for v in found] == [f"DASH (threshold {t})" for t in (0.5, 1.0, 10.0)]
    for look in (style.colour_of, style.mark_of, lambda v: str(style.line_of(v)["linestyle"])):
        assert len({look(v) for v in found}) == 3
    lightness = [sum(to_rgb(style.colour_of(v))) for v in found]
    assert lightness == sorted(lightness, reverse=True)
    (picture,) = response(records, found)
    assert picture.drawn.axes[0].get_xlabel() == "threshold"


def test_files_of_other_content_are_other_recipes(tmp_path: Path) -> None:
    """Two models by path, two data files of one name, one data file that was changed, and a cell that has
    not begun: what files hold decides, and labels say what differs."""

    def cell(number: int, weights: str, data: str | None, **changed: str) -> None:
        plain = config("dash", number % 3, **changed)
        folder = make_cell(tmp_path, f"dash-m-d-s{number % 3}-d{number:07}", plain, after=verdicts(30))
        path = folder / "provenance.json"
        known = json.loads(path.read_text())
        if data is None:
            path.unlink()
        else:
            datasets = {"training": data, "arithmetic": "e" * 64}
            write_json(path, known | {"model": {"weights_hash": weights}, "datasets": datasets})

    one, two = {"model__path": "/a/first"}, {"model__path": "/a/second"}
    for number in range(3):
        cell(number, "1" * 64, "a" * 64, **one, dataset__path="/x/mine.jsonl")
        cell(10 + number, "2" * 64, "a" * 64, **two, dataset__path="/x/mine.jsonl")
        cell(20 + number, "2" * 64, "a" * 64, **two, dataset__path="/moved/mine.jsonl")
        cell(30 + number, "1" * 64, "b" * 64, **one, dataset__path="/x/mine.jsonl")  # the file was changed
        cell(40 + number, "1" * 64, "c" * 64, **one, dataset__path="/x/other.jsonl")
    cell(51, "", None, **one, dataset__path="/x/other.jsonl")
    found = variants(load([tmp_path]))
    assert {(v.model, v.label): len(v.cells) for v in found} == {
        ("first", "DASH (data mine.jsonl aaaaaaaa)"): 3,
        ("first", "DASH (data mine.jsonl bbbbbbbb)"): 3,
        ("first", "DASH (data other.jsonl cccccccc)"): 3,
        ("second", "DASH"): 3,
    }


def test_an_older_record_lacks_keys_and_is_the_same_recipe(outputs: Path) -> None:
    newer = config("dash", 3)
    newer["sampler"]["waves"] = 4
    make_cell(outputs, "dash-smollm2_135m-arithmetic-s3-d0000003", newer, after=verdicts(30))
    dash = [v for v in variants(load([outputs])) if v.arm == "dash"]
    assert [len(v.cells) for v in dash] == [4]


def test_the_same_seed_twice_counts_once(outputs: Path) -> None:
    make_cell(
        outputs, "dash-smollm2_135m-arithmetic-s0-f0000000", config("dash", 0), rewards=(0.1,), state="failed"
    )
    records = load([outputs])
    found = variants(records)
    dash = next(v for v in found if v.arm == "dash")
    assert dash.seeds == (0, 1, 2) and dash.cells[0].endswith("d0000000")  # the finished one
    assert [p.where for p in repeated(records, found)] == ["dash-smollm2_135m-arithmetic-s0-f0000000"]


def test_torn_lines_and_redone_steps(outputs: Path) -> None:
    folder = outputs / "cells" / "dash-smollm2_135m-arithmetic-s0-d0000000"
    with (folder / "steps.jsonl").open("a") as stream:
        stream.write('{"attempt": 1, "step": 5, "rew\n')
        stream.write(json.dumps({"attempt": 2, **step_row(4, 0.5, 20.0)}) + "\n")
        stream.write(json.dumps({"attempt": 2, **step_row(5, 0.9, 20.0)}) + "\n")  # beyond the end
    records = load([outputs])
    rows = quantities.steps_of(records, folder.name)
    assert list(rows["step"]) == [1, 2, 3, 4]
    assert rows["reward/mean"].iloc[-1] == 0.5
    assert any("1 damaged line" in p.what for p in records.problems)


def test_what_is_missing_is_listed(outputs: Path) -> None:
    sweep = outputs / "sweeps" / "pair"
    sweep.mkdir(parents=True)
    names = [f"dash-smollm2_135m-arithmetic-s{s}-d000000{s}" for s in range(4)]
    write_json(
        sweep / "manifest.json",
        {"format": 1, "name": "pair", "cells": [{"folder": n} for n in names], "waiting": []},
    )
    records = load([sweep])
    assert len(records.cells) == 3
    assert [(p.where, "not there" in p.what) for p in records.problems] == [(names[3], True)]
    assert records.cells["sweeps"].iloc[0] == ("pair",)


def test_equal_ids_with_different_content_are_refused(outputs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_cell(other, "dash-smollm2_135m-arithmetic-s0-d0000000", config("dash", 0, algorithm__beta=0.0))
    with pytest.raises(UserError, match="two different cells"):
        load([outputs, other])


def test_the_same_data_give_the_same_bytes(report: Report, pair: Path, tmp_path: Path) -> None:
    again = make(load([shutil.copytree(pair, tmp_path / "elsewhere")]))
    wrong = [name for name, data in report.files.items() if again.files[name] != data]
    assert wrong == [] and again.files.keys() == report.files.keys()


def test_check_fails_when_a_table_no_longer_follows(
    outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    write(make(load([outputs]), pictures=False), out)
    assert main([str(outputs), "--out", str(out), "--check"]) == 0
    table = out / "tables" / "table3-arithmetic.csv"
    table.write_text(table.read_text().replace("77.5", "97.5"))
    capsys.readouterr()
    assert main([str(outputs), "--out", str(out), "--check"]) == 1
    assert "tables/table3-arithmetic.csv does not follow" in capsys.readouterr().out


def test_a_second_writing_touches_nothing(outputs: Path, tmp_path: Path) -> None:
    report, out = make(load([outputs]), pictures=False), tmp_path / "report"
    write(report, out)
    times = {p: os.stat(p).st_mtime_ns for p in out.rglob("*") if p.is_file()}
    write(report, out)
    assert times == {p: os.stat(p).st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert differences(report, out) == []


def test_the_page_stands_alone(report: Report) -> None:
    text = report.files["report.html"].decode()
    assert "http://" not in text and "https://" not in text and "<script" not in text
    assert 'name="viewport"' in text
    assert text.count("data:image/png;base64,") >= 4


@pytest.mark.parametrize("state", ["running", "failed", "interrupted"])
def test_an_unfinished_cell_is_reported_and_not_averaged(outputs: Path, state: str) -> None:
    make_cell(
        outputs, "dash-smollm2_135m-arithmetic-s3-d0000003", config("dash", 3), rewards=(0.1,), state=state
    )
    records = load([outputs])
    dash = next(v for v in variants(records) if v.arm == "dash")
    assert quantities.time_of(records, dash).n_seeds == 3
    assert any(state in p.what for p in records.problems)


@pytest.mark.parametrize(
    ("make_place", "reported"),
    [(lambda p: p / "nowhere", "is not a folder"), (lambda p: p, "holds no cells")],
)
def test_a_place_without_cells_is_refused(
    tmp_path: Path, make_place: object, reported: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = make_place(tmp_path)  # type: ignore[operator]
    assert main([str(place), "--out", str(tmp_path / "report")]) == 2
    assert reported in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_a_reward_that_is_no_number_is_reported_and_left_out(outputs: Path) -> None:
    """Of three, the mean over what is there; the step itself is left out of means over seeds."""
    folder = outputs / "cells" / "dash-smollm2_135m-arithmetic-s0-d0000000"
    rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    rows[1]["reward/mean"] = None
    rows[2]["reward/mean"] = math.nan  # json of other programs; ours writes null
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = load([outputs])
    assert [(p.where, p.what) for p in records.problems] == [
        (folder.name, "reward/mean is no number at 2 of 4 steps, first at step 2; left out of curves")
    ]
    dash = next(v for v in variants(records) if v.arm == "dash")
    table = quantities.curve(records, dash.cells, "reward/mean")
    assert list(table.dropna().index) == [1, 4]
    make(records)


def test_a_metric_no_cell_has_is_refused_with_the_nearest(
    outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    asked = ["--metric", "reward/meen", "--metric", "lenght/mean_tokens", "--metric", "reward/mean"]
    assert main([str(outputs), "--out", str(out), *asked]) == 2
    reported = capsys.readouterr().err
    assert "2 problems" in reported and "'reward/mean'" in reported and "'length/mean_tokens'" in reported
    assert not out.exists()


def test_any_metric_is_drawn_when_asked_for(report: Report, pair: Path) -> None:
    records = load([pair])
    (drawn,) = asked(records, variants(records), ["reward/mean", "reward/mean"])
    assert drawn.id == "metric-reward-mean-smollm2_135m-arithmetic"
    assert f"figures/{drawn.id}.png" not in report.files


def test_a_suspended_run_says_what_its_times_leave_out(outputs: Path) -> None:
    folder = outputs / "cells" / "dash-smollm2_135m-arithmetic-s0-d0000000"
    rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    rows[2]["time/suspended_s"] = 65.2
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = load([outputs]).problems
    assert [(p.where, p.what) for p in problems] == [
        (folder.name, "was suspended for 1m05s, which its times leave out")
    ]


def test_different_hardware_is_a_thing_left_out(outputs: Path, tmp_path: Path) -> None:
    make_cell(
        outputs,
        "dash-smollm2_135m-arithmetic-s3-d0000003",
        config("dash", 3),
        step_s=1.0,
        after=verdicts(30),
        hardware={**CPU, "cpu": "Faster CPU"},
    )
    reported = make(load([outputs]), pictures=False).problems
    assert any(p.where == "table3-arithmetic, training time" and "DASH" in p.what for p in reported)
    assert main([str(outputs), "--out", str(tmp_path / "report"), "--strict"]) == 1


def test_more_k_than_samples_is_a_missing_value_with_its_reason(tmp_path: Path) -> None:
    """Code is shown as pass@1 and pass@8; here each prompt was answered once."""
    for seed in range(3):
        for arm, correct in (("dash", 30), ("grpo", 20)):
            make_cell(
                tmp_path,
                f"{arm}-m-arithmetic-s{seed}-{arm[0]}000000{seed}",
                config(arm, seed, dataset__verifier="code"),
                after=verdicts(correct),
            )
    report = make(load([tmp_path]), pictures=False)
    text = report.files["tables/table4-arithmetic.csv"].decode()
    assert float(row_of(text, "DASH", "arithmetic pass@1")["value"]) == 75.0
    assert row_of(text, "DASH", "arithmetic pass@8")["value"] == ""
    assert any("k is more than the 1 samples" in p.what for p in report.problems)


def test_torn_verdicts_are_counted_below_the_table(outputs: Path) -> None:
    folder = outputs / "cells" / "dash-smollm2_135m-arithmetic-s0-d0000000"
    with (folder / "eval_samples.jsonl").open("a") as stream:
        stream.write('{"attempt": 1, "step": 4, "data\n')
    text = make(load([outputs]), pictures=False).files["tables/table3-arithmetic.md"].decode()
    assert f"{folder.name}/eval_samples.jsonl: 1 damaged lines left out" in text


def test_the_target_is_what_every_run_of_the_baseline_reached(tmp_path: Path) -> None:
    """Means of five steps: GRPO's best are 0.46 and 0.36, so the target is 0.36. DASH takes 10 s a step and
    is there after its fifth; GRPO's second run needs its sixth, at 40 s a step."""
    rewards = {
        ("grpo", 0): (0.1, 0.2, 0.6, 0.7, 0.7, 0.0),
        ("grpo", 1): (0.3, 0.3, 0.3, 0.4, 0.4, 0.4),
        ("dash", 0): (0.5,) * 6,
        ("dash", 1): (0.1,) * 6,
    }
    for (arm, seed), curve in rewards.items():
        make_cell(
            tmp_path,
            f"{arm}-m-arithmetic-s{seed}-{arm[0]}000000{seed}",
            config(arm, seed),
            rewards=curve,
            step_s=10.0 if arm == "dash" else 40.0,
        )
    records = load([tmp_path])
    found = {v.arm: v for v in variants(records)}
    assert reached_by_all(records, found["grpo"]) == 0.36
    times = {arm: [seconds_to(records, c, 0.36) for c in v.cells] for arm, v in found.items()}
    assert times["grpo"] == [5 * 40.0, 6 * 40.0]
    assert times["dash"][0] == 50.0 and math.isnan(times["dash"][1])
    path = tmp_path / "cells" / "grpo-m-arithmetic-s1-g0000001" / "steps.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["reward/mean"] = None  # no number; its time has passed all the same
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert seconds_to(load([tmp_path]), path.parent.name, 0.36) == 6 * 40.0
    report = make(records, pictures=False)
    assert any("NA for DASH: not every run reached 0.36" in p.what for p in report.problems)


def test_analysis_imports_no_torch() -> None:
    code = "import sys, analysis.make, analysis.live, analysis.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_live_shows_a_line_per_run(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["live", str(outputs), "--once"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "6 finished" in lines[0] and "left" not in lines[0]
    assert sum("DASH" in line and "4/4" in line for line in lines) == 3
    model = "a-model-whose-name-is-longer-than-its-column"
    plain = config("dash", 3, model__name=model, algorithm__steps=10)
    make_cell(outputs, "dash-long-arithmetic-s3-d0000003", plain, step_s=9.0, state="running")
    ids = [{"folder": folder.name} for folder in (outputs / "cells").iterdir()]
    (outputs / "sweeps" / "mine").mkdir(parents=True)
    write_json(outputs / "sweeps" / "mine" / "manifest.json", {"name": "mine", "cells": ids})
    assert main(["live", str(outputs / "sweeps" / "mine"), "--once"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("mine: 6 finished, 1 running, about 1m00s left")
    assert model in "".join(line[:30].strip() for line in text.splitlines())


HOSTILE = [
    "<script>alert(1)</script>",
    "../../../<script>alert(1)</script>$x",
    "=HYPERLINK(1)",
    r"\input{/etc/passwd}%$&_#{}~^",
    'a" onload="alert(1)',
    "| a | b |",
    "&#60;script>",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_from_records_are_only_ever_text(tmp_path: Path, name: str) -> None:
    """Of models and datasets, in every form of a report, and never a path outside of it."""
    for seed in range(2):
        for arm in ("dash", "grpo"):
            plain = config(arm, seed, model__name=name, dataset__name=name)
            make_cell(tmp_path, f"{arm}-m-d-s{seed}-d000000{seed}", plain, after=verdicts(20))
    records = load([tmp_path / "cells" / p.name for p in (tmp_path / "cells").iterdir()])
    report = make(records, pictures=name.startswith(".."))
    out = tmp_path / "a" / "b" / "report"
    write(report, out)
    written = {p for p in tmp_path.rglob("*") if p.is_file() and "cells" not in p.parts}
    assert written and all(out in p.parents for p in written)
    for path in written:
        text = path.read_text(errors="replace") if path.suffix in (".html", ".tex", ".csv", ".md") else ""
        if path.suffix == ".html":
            assert "<script" not in text and 'onload="alert' not in text, path
            assert "&#60;script" not in text, path
        if path.suffix == ".tex":
            assert r"\input" not in text, path
        if path.suffix == ".csv":
            cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
            assert not any(c.startswith(("=", "@")) for c in cells), path
        if path.suffix == ".md":
            widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
            assert len(widths) == 1 and "<script" not in text, path


def test_a_policy_that_stays_the_same_is_stable_whatever_prompts_it_meets(tmp_path: Path) -> None:
    """Sampled rewards swing with the prompts; accuracy on the fixed set does not move."""
    rng = np.random.default_rng(0)
    folder = make_cell(
        tmp_path, "dash-m-d-s0-d0000000", config("dash"), rewards=rng.random(20), after=verdicts(20)
    )
    evals = [
        {"step": s, "dataset": "arithmetic", "metric": "accuracy", "value": 0.5, "n": PROMPTS, "attempt": 1}
        for s in range(0, 20, 2)
    ]
    (folder / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evals))
    records = load([tmp_path])
    assert est.instability(records.steps["reward/mean"].to_numpy()) > 0.2
    (cell,) = records.cells.index
    assert est.instability(quantities.policy_curve(records, cell)) == pytest.approx(0.0, abs=1e-12)


def test_kept_records_make_the_same_tables(pair: Path, tmp_path: Path) -> None:
    for cell in (pair / "cells").iterdir():
        (cell / "samples.jsonl").write_text("what was sampled\n")
    kept = tmp_path / "kept"
    assert main([str(pair), "--keep", str(kept)]) == 0
    assert not list(kept.rglob("samples.jsonl"))
    assert main([str(pair), "--keep", str(kept)]) == 2, "nothing is written over"
    before, after = (make(load([place]), pictures=False).files for place in (pair, kept))
    csvs = [name for name in before if name.endswith(".csv")]
    assert csvs
    assert {name: after[name] for name in csvs} == {name: before[name] for name in csvs}


def test_the_tables_of_the_findings_follow_from_the_bundled_study() -> None:
    """And so do the verdicts that the page counts."""
    study = REPOSITORY / "analysis/data/study"
    assert main([str(study), "--out", str(REPOSITORY / "docs/study"), "--check"]) == 0
    records = load([study])
    found = findings(records, variants(records))
    page = (REPOSITORY / "docs/findings.md").read_text(encoding="utf-8")
    decided = [one for one in found if one.verdict != "undecided"]
    assert f"The {len(found)} claims are one family" in page and len(decided) == 7
    for one in found:
        effect = one.effect
        low, high = (f"{value:.1f}" for value in (effect.low, effect.high))
        rows = [line for line in page.splitlines() if line.startswith(f"| {one.claim} |")]
        assert any(one.verdict in line and low in line and high in line for line in rows), one.claim
