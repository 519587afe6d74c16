"""`python -m dash_exp` as typed: real processes, with a stand-in where training would begin."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dash_exp.config.compose import compose

ROOT = Path(__file__).resolve().parents[2]

STAND_IN = '''
"""The real command line, with dash_exp.cell replaced by one that prints the cell it is given."""
import importlib.machinery, os, sys, types

cell = types.ModuleType("dash_exp.cell")

def run_config(config, apart=False):
    print("cell", config.seed, config.algorithm.name, config.model.name, config.dataset.name,
          config.sampler.name, config.recipe.name, config.evaluation.name, flush=True)
    what = os.environ.get("CELL_%d" % config.seed, "0")
    if what == "refuse":
        from dash_exp.errors import Fault, UserError
        raise UserError(Fault("data.jsonl:3", "not valid JSON"))
    if what == "crash":
        raise RuntimeError("a bug")
    return int(what)

cell.run_config = run_config
sys.modules["dash_exp.cell"] = cell
vllm = types.ModuleType("vllm")  # as if installed
vllm.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
sys.modules["vllm"] = vllm
from dash_exp.__main__ import main
code = main()
assert "torch" not in sys.modules
sys.exit(code)
'''


SWEEP_STAND_IN = '''
"""Imported by every Python that is started: the process of a cell ends here, having said which it is."""
import os, sys

if sys.orig_argv[1:3] == ["-m", "dash_exp.cell"]:
    import json, pathlib, time, yaml

    folder = pathlib.Path(sys.orig_argv[3])
    c = yaml.safe_load((folder / "config.yaml").read_text())
    names = (c[part]["name"] for part in ("algorithm", "model", "dataset", "sampler", "recipe", "evaluation"))
    print("cell", c["seed"], *names, *sys.orig_argv[4:], flush=True)
    what = os.environ.get("CELL_%d" % c["seed"], "0")
    if what == "crash":
        print("RuntimeError: a bug", flush=True)
    if what == "0":
        status = {"state": "finished", "attempt": 1, "step": 0, "heartbeat": time.time()}
        (folder / "status.json").write_text(json.dumps(status))
    os._exit({"refuse": 2, "crash": 1}.get(what) or int(what))
'''


class Shell:
    """An empty working directory, and commands run in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "here").mkdir()
        (folder / "stand_in.py").write_text(STAND_IN)
        (folder / "sweep.py").write_text(STAND_IN.replace('sys.modules["dash_exp.cell"] = cell', ""))
        (folder / "started").mkdir()
        (folder / "started" / "sitecustomize.py").write_text(SWEEP_STAND_IN)

    def real(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self._run([sys.executable, "-m", "dash_exp", *arguments], variables)

    def stand_in(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self._run([sys.executable, str(self.folder / "stand_in.py"), *arguments], variables)

    def sweep(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """A sweep, with the process of each cell replaced."""
        path = os.pathsep.join([str(self.folder / "started"), str(ROOT)])
        command = [sys.executable, str(self.folder / "sweep.py"), "-m", *arguments]
        return self._run(command, {"PYTHONPATH": path, **variables})

    def said(self) -> list[str]:
        """What the cells of sweeps have said, in the order in which they were started."""
        files = (self.folder / "here").glob("outputs/cells/*/output.txt")
        rows = {file: (file.parent / "launch.jsonl").read_text().splitlines() for file in files}
        order = sorted(rows, key=lambda file: json.loads(rows[file][0])["time"])
        return [line for file in order for line in file.read_text().splitlines()]

    def _run(self, command: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if k not in ("DASH_DATA", "HYDRA_FULL_ERROR")}
        env = {**inherited, "PYTHONPATH": str(ROOT), **variables}
        return subprocess.run(
            command, cwd=self.folder / "here", env=env, capture_output=True, text=True, timeout=60
        )

    def left(self) -> list[str]:
        """Everything in the working directory."""
        here = self.folder / "here"
        return sorted(str(path.relative_to(here)) for path in here.rglob("*"))


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_cfg_job_prints_the_resolved_config_and_nothing_else(shell: Shell) -> None:
    done = shell.real("--cfg", "job", "--resolve", "model=tiny", "seed=3")
    assert (done.returncode, done.stderr) == (0, "")
    expected = dataclasses.asdict(compose(["model=tiny", "seed=3"]))
    expected["paths"]["data"] = None
    assert yaml.safe_load(done.stdout) == expected
    assert shell.left() == []


def test_help_tells_what_it_is_the_commands_the_groups_and_common_keys(shell: Shell) -> None:
    done = shell.real("--help")
    assert (done.returncode, done.stderr) == (0, "")
    text = done.stdout
    for part in (
        "dash_exp trains a small language model",
        "python -m dash_exp -m key=a,b",
        "algorithm: dash, dr_grpo, grpo, no_gf, no_kl, pg, ppo_mini, ppo_multi, rloo, sft_h, sft_m",
        "model: llama8b, qwen0.5b, qwen1.5b, qwen3b, qwen7b_instruct, smollm2_135m, tiny",
        "sampler: hf, vllm",
        "run.force=true",
        'eval "$(dash-exp -sc install=bash)"',
    ):
        assert part in text
    for key in ("algorithm.group_size=8", "learner.lr=3e-5", "filter.threshold=0.1"):
        assert key in text


def test_a_config_can_be_shown_where_it_could_not_run(shell: Shell) -> None:
    done = shell.real("--cfg", "job", "-p", "dataset", "dataset=gsm8k", "dataset.path=absent.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    assert "path: absent.jsonl" in done.stdout
    done = shell.real("model=tiny", "dataset=gsm8k", "dataset.path=absent.jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    assert "dataset.path: absent.jsonl is not a file" in done.stderr


def test_info_says_who_chose_what(shell: Shell) -> None:
    done = shell.real("--info", "defaults", "model=qwen0.5b")
    assert (done.returncode, done.stderr) == (0, "")
    assert "| dataset/math " in done.stdout
    assert "| sampler/vllm " in done.stdout


def test_tab_completion_knows_options_and_keys(shell: Shell) -> None:
    def completed(line: str) -> list[str]:
        done = shell.real("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
        return done.stdout.split()

    assert completed("dash-exp filter=") == [
        "filter=advantage",
        "filter=none",
        "filter=zero_variance",
    ]
    assert completed("dash-exp algorithm.ste") == ["algorithm.steps="]


def test_wrong_input_gives_one_message_with_every_fault_and_exit_code_2(shell: Shell) -> None:
    done = shell.real(
        "model=tiny", "checkpoint.evry=3", "algorithm.group_size=1", "filter=nonee", "--steps", "x"
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "dash_exp: 5 problems, nothing was started\n"
        "  --steps: unknown flag\n"
        "    settings are written key=value, without dashes; see --help\n"
        "  x: is not key=value\n"
        "    see python -m dash_exp --help\n"
        "  checkpoint.evry: unknown key\n"
        "    did you mean 'checkpoint.every'? (in checkpoint: every, keep)\n"
        "  filter: unknown option 'nonee'\n"
        "    did you mean 'none'? (allowed: advantage, none, zero_variance)\n"
        "  algorithm.group_size: got 1, must be at least 2\n"
        "    an advantage compares a completion with others of its prompt: alone it is always 0\n"
    )
    assert shell.left() == []


def test_overrides_on_both_sides_of_a_flag(shell: Shell) -> None:
    done = shell.stand_in("model=tiny", "-m", "seed=0,1", "algorithm=pg", "hydra/launcher=basic")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[1:3] for line in done.stdout.splitlines()] == [["0", "pg"], ["1", "pg"]]


def test_flags_that_do_not_go_together(shell: Shell) -> None:
    done = shell.real("-m", "--cfg", "job")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "-m: goes with neither --cfg nor --info" in done.stderr


def test_one_cell_is_run_and_leaves_nothing_of_hydras(shell: Shell) -> None:
    done = shell.stand_in("experiment=demo/minute", "model=tiny", "seed=5")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "cell 5 dash tiny arithmetic hf small arithmetic\n"
    assert shell.left() == []


@pytest.mark.long
def test_the_papers_sweep_as_typed(shell: Shell) -> None:
    done = shell.sweep("algorithm=dash,grpo,ppo_multi", "model=qwen0.5b,qwen1.5b,qwen3b")
    assert (done.returncode, done.stderr) == (0, "")
    assert shell.said() == [
        f"cell 0 {algorithm} {model} math vllm paper math"
        for algorithm in ("dash", "grpo", "ppo_multi")
        for model in ("qwen0.5b", "qwen1.5b", "qwen3b")
    ]
    lines = done.stdout.splitlines()
    table = lines[next(n for n, line in enumerate(lines) if line.startswith("cell ")) : -2]
    assert len(table) == 11 and max(map(len, table)) <= 80
    below = {path.split("/")[1] for path in shell.left() if "/" in path}
    assert below == {"cache", "cells", "multirun", "sweeps"}


@pytest.mark.parametrize(
    ("what", "code", "says"),
    [
        ("1", 1, ""),
        ("refuse", 2, "data.jsonl:3: not valid JSON"),
        ("crash", 1, "a bug"),
        ("130", 130, ""),
    ],
)
def test_the_exit_code_of_one_cell(shell: Shell, what: str, code: int, says: str) -> None:
    done = shell.stand_in("model=tiny", CELL_0=what)
    assert done.returncode == code
    assert says in done.stderr
    assert ("Traceback" in done.stderr) == (what == "crash")
    assert "HYDRA_FULL_ERROR" not in done.stderr


def test_a_failed_cell_does_not_stop_a_sweep_but_fails_it(shell: Shell) -> None:
    done = shell.sweep("model=tiny", "seed=0,1,2,3", CELL_0="refuse", CELL_1="crash", CELL_2="130")
    assert (done.returncode, done.stderr) == (1, "")
    assert [line.split()[1] for line in shell.said() if line.startswith("cell")] == [
        "0",  # the user has to mend it: once
        "1",
        "1",  # once more
        "2",
        "2",
        "2",
        "2",
        "2",
        "2",  # five times more: somebody's signal is no fault of the cell
        "3",
    ]
    assert "4 cells: 2 failed, 1 finished, 1 interrupted" in done.stdout
    assert "failed (unknown): ended with exit code 1: RuntimeError: a bug" in done.stdout


def test_a_failed_cell_under_hydras_own_launcher(shell: Shell) -> None:
    own = ("-m", "hydra/launcher=basic", "model=tiny", "seed=0,1,2")
    done = shell.stand_in(*own, CELL_0="refuse", CELL_1="1")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["0", "1", "2"]
    done = shell.stand_in(*own, CELL_1="130")
    assert done.returncode == 130
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["0", "1"]


def test_a_contradiction_stops_the_whole_sweep_before_its_first_cell(shell: Shell) -> None:
    done = shell.stand_in("-m", "model=tiny", "algorithm=dash,no_gf", "filter=advantage")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        "filter=advantage contradicts algorithm=no_gf, which is defined with filter=none "
        "(in algorithm=no_gf)" in done.stderr
    )
    assert shell.left() == []


def test_an_arm_of_ones_own_from_outside(shell: Shell) -> None:
    folder = shell.folder / "my conf" / "algorithm"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("defaults: [grpo, _self_]\nname: mine\nbeta: 0.1\n")
    done = shell.stand_in(f"hydra.searchpath=[file://{folder.parent}]", "algorithm=mine", "model=tiny")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "cell 0 mine tiny arithmetic hf small arithmetic\n"
    done = shell.stand_in("--config-dir", str(folder.parent), "algorithm=mine", "model=tiny")
    assert (done.returncode, done.stdout[:11]) == (0, "cell 0 mine")


def test_a_config_that_is_wrong_only_when_it_runs_is_still_refused(shell: Shell) -> None:
    # with --config-dir the early check is left out: Hydra alone knows that folder
    (shell.folder / "more").mkdir()
    done = shell.stand_in("--config-dir", str(shell.folder / "more"), "model=tiny", "algorithm.group_size=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "algorithm.group_size: got 1, must be at least 2" in done.stderr
