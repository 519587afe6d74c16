"""A budget taken from a partner: who it is, waiting for it, its failure, and being cut by it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dash_exp.cell.__main__ import run_config
from dash_exp.config.compose import compose, find_faults, partner_overrides, without_budget
from dash_exp.config.schema import Config, changed
from dash_exp.errors import ExitCode, UserError
from dash_exp.record.folder import Row, read_final, read_json, write_json
from dash_exp.record.identity import cell_id, make_cell
from dash_exp.train.budget import Blocked, check_equal, find_partner, resolve_match, spent_seconds
from tests.conftest import REPOSITORY
from tests.test_run import SMALL

MULTI = ["algorithm=ppo_multi", "algorithm.steps=60"]


def composed(root: Path, *overrides: str) -> Config:
    """A config with its partner resolved, as `python -m dash_exp` does it."""
    everything = [*SMALL, f"run.dir={root}", *overrides]
    return resolve_match(compose(everything), everything, root / "cache")[0]


def folder_of(config: Config, root: Path) -> Path:
    return make_cell(config, root / "cache").folder(root)


def test_who_the_partner_is() -> None:
    own = ["algorithm=ppo_mini", "seed=1", "learner.lr=1e-4", "budget.match=dash"]
    assert partner_overrides("dash", own) == ["seed=1", "learner.lr=1e-4", "algorithm=dash"]
    several = partner_overrides("experiment=demo/x seed=2", [*own, "experiment=demo/y"])
    assert several == ["learner.lr=1e-4", "experiment=demo/x", "seed=2"]
    arm = ["algorithm=ppo_mini", "algorithm.mini_batch=16", "algorithm.steps=9", "algorithm.clip_high=0.3"]
    assert partner_overrides("dash", arm) == ["algorithm.steps=9", "algorithm=dash"]
    assert partner_overrides("learner.lr=1e-5", arm) == [*arm, "learner.lr=1e-5"]


def test_the_partners_id_is_in_the_identity_and_a_cell_is_no_partner_of_itself(tmp_path: Path) -> None:
    dash = compose([*SMALL, f"run.dir={tmp_path}"])
    theirs = make_cell(dash, tmp_path / "cache").id
    multi = composed(tmp_path, *MULTI, 'budget.match="algorithm=dash algorithm.steps=6"')
    assert multi.budget.match == theirs
    other = composed(tmp_path, *MULTI, 'budget.match="algorithm=dash algorithm.steps=5"')
    ids = {make_cell(c, tmp_path / "cache").id for c in (multi, other, without_budget(multi))}
    assert len(ids) == 3
    assert composed(tmp_path, "budget.match=dash").budget.match is None
    assert make_cell(composed(tmp_path, "budget.match=dash"), tmp_path / "cache").id == theirs


def test_a_wrong_partner_is_told_before_anything_starts() -> None:
    def told(text: str) -> str:
        return "\n".join(map(str, find_faults([*SMALL, *MULTI, f"budget.match={text}"])))

    assert "its partner 'dahs': algorithm: unknown option 'dahs'" in told("dahs")
    assert "must be at least 2" in told("'algorithm=dash algorithm.group_size=1'")
    assert find_faults([*SMALL, *MULTI, "budget.match=0123abcd"]) == []
    both = [*SMALL, *MULTI, "budget.match=dash", "budget.seconds=5"]
    assert "a run has one budget" in "\n".join(map(str, find_faults(both)))


def test_blocked_until_the_partner_is_finished_then_cut_at_its_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    match = 'budget.match="algorithm=dash algorithm.steps=6"'
    multi = composed(tmp_path, *MULTI, match, "run.progress=plain")
    folder = folder_of(multi, tmp_path)
    assert run_config(multi) == ExitCode.BLOCKED
    status = read_json(folder / "status.json")
    assert status["state"] == "blocked" and "has not been started" in status["reason"]
    assert f"the cell with the id {multi.budget.match}" in capsys.readouterr().out
    multi = changed(multi, {"run.partner": "python -m dash_exp algorithm=dash"})
    assert run_config(multi) == ExitCode.BLOCKED
    assert "this command again:\n    python -m dash_exp algorithm=dash" in capsys.readouterr().out

    dash = composed(tmp_path)
    assert run_config(dash) == ExitCode.OK
    seconds = spent_seconds(read_final(folder_of(dash, tmp_path), "steps"))
    assert run_config(composed(tmp_path, *MULTI, match)) == ExitCode.OK
    status, steps = read_json(folder / "status.json"), read_final(folder, "steps")
    budget = read_json(folder / "provenance.json")["budget"]
    assert budget["seconds"] == pytest.approx(seconds) and multi.budget.match in budget["match"]
    assert status["state"] == "finished" and status["reason"] == "budget" and status["step"] < 60
    assert spent_seconds(steps) >= seconds > spent_seconds(steps[:-1])
    assert {r["step"] for r in read_final(folder, "evals")} == {0, status["step"]}
    # the schedule runs over the planned updates, never over the budget
    assert [r["optimizer/lr"] for r in steps] == pytest.approx(
        [1e-3 * _linear(r["updates/total"], 180) for r in steps]
    )


def _linear(updates: int, total: int) -> float:
    """Share of the learning rate at the last of so many updates, with a fifth of them as warm-up."""
    warmup = total // 5
    return updates / warmup if updates <= warmup else (total - updates + 1) / (total - warmup)


def test_the_machine_of_the_partner_counts_and_what_was_read_once_stays(tmp_path: Path) -> None:
    dash = composed(tmp_path)
    assert run_config(dash) == ExitCode.OK
    path = folder_of(dash, tmp_path) / "provenance.json"
    match = 'budget.match="algorithm=dash algorithm.steps=6"'
    facts = read_json(path)
    write_json(path, {**facts, "model": {"weights_hash": "x"}})
    with pytest.raises(UserError, match="started from other weights"):
        run_config(composed(tmp_path, *MULTI, match))
    (attempt,) = facts["attempts"]
    moved = {**attempt, "hardware": {**attempt["hardware"], "cpu": "another"}}
    write_json(path, {**facts, "attempts": [attempt, moved]})  # its second attempt was elsewhere
    with pytest.raises(UserError, match="ran on other hardware: cpu 'another' there"):
        run_config(composed(tmp_path, *MULTI, match))
    multi = composed(tmp_path, *MULTI, match)
    folder = folder_of(multi, tmp_path)
    assert read_json(folder / "status.json")["state"] == "failed"
    write_json(folder / "provenance.json", {"budget": {"match": "dash-0", "seconds": 1e-6}, "attempts": []})
    assert run_config(multi) == ExitCode.OK  # its first attempt knew the seconds already
    assert len(read_final(folder, "steps")) == 1


def pretend(pool: Path, state: str, **more: object) -> Path:
    """A partner's folder with nothing but its status and config."""
    folder = pool / "dash-tiny-gsm8k-s0-0123abcd"
    folder.mkdir(parents=True)
    write_json(folder / "status.json", {"state": state, "attempt": 1, "step": 4, **more})
    names = {"model": {"name": "tiny"}, "algorithm": {"name": "dash"}, "dataset": {"name": "gsm8k"}}
    (folder / "config.yaml").write_text(json.dumps({"seed": 0, **names}) + "\n")
    return folder


@pytest.mark.parametrize("state", ["pending", "running"])
def test_an_unfinished_partner_blocks(tmp_path: Path, state: str) -> None:
    pretend(tmp_path / "cells", state)
    config = composed(tmp_path, *MULTI, "budget.match=0123abcd")
    with pytest.raises(Blocked, match=f"{state} \\(step 4\\)"):
        find_partner(config, tmp_path / "cells")


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_failed_partner_fails_the_cell_with_its_reason(tmp_path: Path, state: str) -> None:
    pretend(tmp_path / "cells", state, failure="CUDA out of memory")
    config = composed(tmp_path, *MULTI, "budget.match=0123abcd")
    with pytest.raises(UserError, match=f"{state}: CUDA out of memory"):
        run_config(config)
    status = read_json(folder_of(config, tmp_path) / "status.json")
    assert status["state"] == "failed" and "CUDA out of memory" in status["failure"]


def test_another_seed_model_or_machine_is_refused(tmp_path: Path) -> None:
    folder = pretend(tmp_path / "cells", "finished")
    config = composed(tmp_path, *MULTI, "budget.match=0123abcd", "seed=3")
    with pytest.raises(UserError, match="equal seed, model and hardware"):
        find_partner(config, tmp_path / "cells")
    config = composed(tmp_path, *MULTI, "budget.match=0123abcd")
    with pytest.raises(UserError, match=r"has 0\.0 s of training"):
        find_partner(config, tmp_path / "cells")
    row = {"step": 1, "attempt": 1, "time/step_s": 2.0, "time/evaluate_s": 0.0, "time/checkpoint_s": 0.0}
    (folder / "steps.jsonl").write_text(json.dumps(row) + "\n")
    hardware = {"cpu": "A", "threads": 2, "gpus": []}
    write_json(folder / "provenance.json", {"hardware": hardware, "model": {"weights_hash": "w"}})
    partner = find_partner(config, tmp_path / "cells")
    assert partner.spent == 2.0
    check_equal(partner, hardware, "w")
    check_equal(partner, None, "w")
    with pytest.raises(UserError, match="other weights"):
        check_equal(partner, hardware, "v")
    with pytest.raises(UserError, match="threads 2 there, 1 here"):
        check_equal(partner, {**hardware, "threads": 1}, "w")


def test_a_budget_once_read_needs_its_partner_no_more(tmp_path: Path) -> None:
    """Archiving or running the partner again blocks nobody who has begun."""
    config = composed(tmp_path, *MULTI, "budget.match=0123abcd")
    folder = folder_of(config, tmp_path)
    folder.mkdir(parents=True)
    budget = {"match": "dash-0", "seconds": 1e-6}
    write_json(folder / "provenance.json", {"budget": budget, "attempts": []})
    assert run_config(config) == ExitCode.OK
    assert read_json(folder / "provenance.json")["budget"] == budget


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=demo/math_ppo_multi", "algorithm=ppo_mini"],
        ["experiment=demo/math_ppo_mini"],
        ["experiment=demo/math_ppo_mini", "algorithm.mini_batch=16"],
        ["experiment=demo/math_ppo_multi", "algorithm.passes=2", "algorithm.clip_high=0.3"],
    ],
)
def test_whatever_is_changed_of_a_demo_its_partner_is_the_demo_of_dash(
    tmp_path: Path, overrides: list[str]
) -> None:
    common = ["model=tiny", f"run.dir={tmp_path}"]
    assert find_faults([*common, *overrides]) == []
    config = compose([*common, *overrides])
    config, command = resolve_match(config, [*common, *overrides], tmp_path / "cache")
    dash = make_cell(compose([*common, "experiment=demo/math_dash"]), tmp_path / "cache")
    assert config.budget.match == dash.id
    assert command == [*common, "experiment=demo/math_dash"]


def test_an_id_is_never_taken_for_a_number() -> None:
    assert cell_id("12345678abcdef99") == "2345678a"
    assert cell_id("1234e567e8f00000") == "4e567e8f"
    assert cell_id("0a34e567e8f00000") == "0a34e567"


def test_redone_steps_and_evaluations_are_not_counted() -> None:
    def row(step: int, wall: float) -> Row:
        return {"step": step, "time/step_s": wall, "time/evaluate_s": 0.5, "time/checkpoint_s": 0.25}

    assert spent_seconds([row(1, 2.0), row(2, 1.75)]) == pytest.approx(1.25 + 1.0)


def test_an_arm_with_several_updates_is_cut_between_them(tmp_path: Path) -> None:
    config = composed(tmp_path, *MULTI, "algorithm.passes=50", "budget.seconds=1e-6", "algorithm=ppo_multi")
    assert run_config(config) == ExitCode.OK
    folder = folder_of(config, tmp_path)
    (row,) = read_final(folder, "steps")
    assert row["updates/total"] == row["updates"] + row["updates/skipped"] == 1
    assert read_json(folder / "status.json")["reason"] == "budget"
    assert {r["step"] for r in read_final(folder, "evals")} == {0, 1}


@pytest.mark.parametrize(
    "unit", ["tokens", *(pytest.param(u, marks=pytest.mark.long) for u in ("backpropagated", "updates"))]
)
def test_a_budget_of_tokens_or_updates_ends_with_the_step_that_reaches_it(tmp_path: Path, unit: str) -> None:
    """The same when the run pauses on the way."""
    assert run_config(composed(tmp_path)) == ExitCode.OK
    partner = "algorithm=dash algorithm.steps=6 algorithm.prompts_per_step=4"
    budget = (f'budget.match="{partner}"', f"budget.unit={unit}")
    for until in ("null" if unit == "tokens" else "1", "null"):
        config = composed(
            tmp_path, *MULTI, "algorithm.prompts_per_step=2", *budget, f"run.until_step={until}"
        )
        assert run_config(config) == ExitCode.OK
    key = {"tokens": "tokens/sampled", "backpropagated": "tokens/backpropagated", "updates": "updates"}[unit]
    cells = [folder_of(one, tmp_path) for one in (composed(tmp_path), config)]
    theirs, own = ([row[key] for row in read_final(cell, "steps")] for cell in cells)
    assert sum(own[:-1]) < sum(theirs) <= sum(own) and len(own) < 60
    assert read_json(cells[1] / "provenance.json")["budget"][unit] == sum(theirs)


@pytest.mark.long
def test_one_sweep_holds_both(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "dash_exp",
            "-m",
            *SMALL,
            f"run.dir={tmp_path}",
            "budget.match=dash",
            "algorithm=dash,ppo_multi,ppo_mini",
            "algorithm.group_size=8",
            "run.progress=plain",
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    states = {p.name.split("-")[0]: read_json(p / "status.json") for p in (tmp_path / "cells").iterdir()}
    assert {name: s["state"] for name, s in states.items()} == dict.fromkeys(
        ("dash", "ppo_multi", "ppo_mini"), "finished"
    )
