"""`python -m dash_exp` as typed. Most tests call `main` in this process, with a stand-in for training."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dash_exp.__main__ import main
from dash_exp.config.compose import compose
from dash_exp.config.schema import FILTERS, Config
from dash_exp.errors import Fault, UserError

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Shell = Callable[..., Done]


def run_config(config: Config, apart: bool = False) -> int:
    """In place of training: print the cell, then end as the variable of its seed says."""
    parts = (config.algorithm, config.model, config.dataset, config.sampler, config.recipe, config.evaluation)
    print("cell", config.seed, *(part.name for part in parts))
    what = os.environ.get(f"CELL_{config.seed}", "0")
    if what == "refuse":
        raise UserError(Fault("data.jsonl:3", "not valid JSON"))
    if what == "crash":
        raise RuntimeError("a bug")
    return int(what)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """Runs a command line in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("DASH_DATA", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    cell: Any = types.ModuleType("dash_exp.cell.__main__")
    cell.run_config = run_config
    monkeypatch.setitem(sys.modules, "dash_exp.cell.__main__", cell)

    def run(*arguments: str, **variables: str) -> Done:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["dash_exp", *arguments])
        root = logging.getLogger()
        handlers, level = list(root.handlers), root.level
        try:
            code = main()
        except SystemExit as error:
            code = int(error.code or 0)
        finally:  # --info logs everything from then on
            root.handlers[:] = handlers
            root.setLevel(level)
        for name in variables:
            monkeypatch.delenv(name)
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return run


def seeds(done: Done) -> list[str]:
    return [line.split()[1] for line in done.stdout.splitlines()]


def test_cfg_job_prints_the_resolved_config_and_nothing_else(tmp_path: Path) -> None:
    """In a process of its own: nothing else is printed, nothing is written, and torch is not imported."""
    code = (
        "import sys\nfrom dash_exp.__main__ import main\ncode = main()\n"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--cfg", "job", "--resolve", "model=tiny", "seed=3"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert yaml.safe_load(done.stdout) == dataclasses.asdict(compose(["model=tiny", "seed=3"]))
    assert list(tmp_path.iterdir()) == []


def test_help_names_the_commands_the_groups_and_the_common_keys(shell: Shell) -> None:
    done = shell("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for part in (
        "dash_exp trains a small language model",
        "python -m dash_exp -m key=a,b",
        "algorithm: cispo, dapo, dash, dr_grpo, gpg, grpo, gspo, maxrl, no_gf, no_kl,\n  pass_at_k, pg,",
        "model: llama3.2_1b, llama3.2_1b_instruct, llama8b, qwen0.5b, qwen1.5b,\n  qwen3_0.6b,",
        "sampler: hf, vllm",
        "run.force=true",
        'eval "$(dash-exp -sc install=bash)"',
        "algorithm.group_size=8",
        "learner.lr=3e-5",
        "filter.threshold=0.1",
    ):
        assert part in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_config_can_be_shown_where_it_could_not_run(shell: Shell) -> None:
    done = shell("--cfg", "job", "-p", "dataset", "dataset=gsm8k", "dataset.path=absent.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    assert "path: absent.jsonl" in done.stdout
    done = shell("model=tiny", "dataset=gsm8k", "dataset.path=absent.jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    assert "dataset.path: absent.jsonl is not a file" in done.stderr


def test_info_says_which_file_chose_which_option(shell: Shell) -> None:
    done = shell("--info", "defaults", "model=qwen0.5b")
    assert (done.returncode, done.stderr) == (0, "")
    assert "| dataset/math " in done.stdout
    assert "| sampler/vllm " in done.stdout


def test_tab_completion_knows_options_and_keys(shell: Shell) -> None:
    def completed(line: str) -> list[str]:
        return shell("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line))).stdout.split()

    assert completed("dash-exp filter=") == [f"filter={name}" for name in sorted(FILTERS)]
    assert completed("dash-exp algorithm.ste") == ["algorithm.steps="]


def test_wrong_input_gives_one_message_with_every_fault_and_exit_code_2(shell: Shell) -> None:
    done = shell("model=tiny", "checkpoint.evry=3", "algorithm.group_size=1", "filter=nonee", "--steps", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "dash_exp: 5 problems, nothing was started\n"
        "  --steps: unknown flag\n"
        "    settings are written key=value, without dashes; see --help\n"
        "  x: is not key=value\n"
        "    see python -m dash_exp --help\n"
        "  checkpoint.evry: unknown key\n"
        "    did you mean 'checkpoint.every'? (in checkpoint: every, keep, minutes, push_to)\n"
        "  filter: unknown option 'nonee'\n"
        f"    did you mean 'none'? (allowed: {', '.join(sorted(FILTERS))})\n"
        "  algorithm.group_size: got 1, must be at least 2\n"
        "    an advantage compares a completion with the others of its prompt; with a single one it is 0\n"
    )
    assert list(Path.cwd().iterdir()) == []


def test_overrides_on_both_sides_of_a_flag(shell: Shell) -> None:
    done = shell("model=tiny", "-m", "seed=0,1", "algorithm=pg", "hydra/launcher=basic")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[1:3] for line in done.stdout.splitlines()] == [["0", "pg"], ["1", "pg"]]


def test_flags_that_do_not_go_together(shell: Shell) -> None:
    done = shell("-m", "--cfg", "job")
    assert done.returncode == 2
    assert "-m: goes with neither --cfg nor --info" in done.stderr


def test_one_cell_is_run_and_leaves_no_file_of_hydra(shell: Shell) -> None:
    done = shell("experiment=demo/minute", "model=tiny", "seed=5")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "cell 5 dash tiny arithmetic hf small arithmetic\n"
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("what", "code", "says"),
    [("1", 1, ""), ("refuse", 2, "data.jsonl:3: not valid JSON"), ("crash", 1, "a bug"), ("130", 130, "")],
)
def test_the_exit_code_of_one_cell(shell: Shell, what: str, code: int, says: str) -> None:
    done = shell("model=tiny", CELL_0=what)
    assert done.returncode == code
    assert says in done.stderr
    assert ("Traceback" in done.stderr) == (what == "crash")
    assert "HYDRA_FULL_ERROR" not in done.stderr


def test_a_failed_cell_under_a_launcher_of_hydra(shell: Shell) -> None:
    own = ("-m", "hydra/launcher=basic", "model=tiny", "seed=0,1,2")
    done = shell(*own, CELL_0="refuse", CELL_1="1")
    assert (done.returncode, seeds(done)) == (1, ["0", "1", "2"])
    assert "Traceback" not in done.stderr
    done = shell(*own, CELL_1="130")
    assert (done.returncode, seeds(done)) == (130, ["0", "1"])


def test_a_contradiction_stops_a_sweep_before_its_first_cell(shell: Shell) -> None:
    done = shell("-m", "model=tiny", "algorithm=dash,no_gf", "filter=advantage")
    assert (done.returncode, done.stdout) == (2, "")
    assert "filter=advantage contradicts algorithm=no_gf, which" in done.stderr
    assert "filter=none (in algorithm=no_gf)" in done.stderr
    assert list(Path.cwd().iterdir()) == []


def test_an_arm_from_a_folder_of_the_user(shell: Shell, tmp_path: Path) -> None:
    folder = tmp_path / "my conf" / "algorithm"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("defaults: [grpo, _self_]\nname: mine\nbeta: 0.1\n")
    done = shell(f"hydra.searchpath=[file://{folder.parent}]", "algorithm=mine", "model=tiny")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "cell 0 mine tiny arithmetic hf small arithmetic\n"
    done = shell("--config-dir", str(folder.parent), "algorithm=mine", "model=tiny")
    assert (done.returncode, done.stdout[:11]) == (0, "cell 0 mine")


def test_a_config_that_only_hydra_can_compose_is_checked_before_it_runs(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    done = shell("--config-dir", str(tmp_path / "more"), "model=tiny", "algorithm.group_size=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "algorithm.group_size: got 1, must be at least 2" in done.stderr


def test_the_config_of_a_cell_is_checked_once(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from dash_exp.config import compose as composing

    checked: list[int] = []
    monkeypatch.setattr(composing, "check", lambda config: checked.append(config.seed) or [])
    monkeypatch.setattr("dash_exp.__main__.check", lambda config: checked.append(config.seed) or [])
    assert shell("model=tiny", "seed=4").returncode == 0
    assert checked == [4]


# --- sweeps, with a stand-in for each cell's process ----------------------------------------------------

SWEEP = '''
"""As if vllm were installed."""
import importlib.machinery, sys, types
vllm = types.ModuleType("vllm")
vllm.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
sys.modules["vllm"] = vllm
from dash_exp.__main__ import main
sys.exit(main())
'''

CELLS = '''
"""Imported by every Python that is started: the process of a cell prints which it is and ends here."""
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


def sweep(
    folder: Path, *arguments: str, **variables: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """A sweep in a process, and what its cells have printed, in the order in which they were started."""
    (folder / "here").mkdir()
    (folder / "started").mkdir()
    (folder / "sweep.py").write_text(SWEEP)
    (folder / "started" / "sitecustomize.py").write_text(CELLS)
    env = {k: v for k, v in os.environ.items() if k != "DASH_DATA"}
    env |= {"PYTHONPATH": os.pathsep.join([str(folder / "started"), str(ROOT)]), **variables}
    command = [sys.executable, str(folder / "sweep.py"), "-m", *arguments]
    done = subprocess.run(command, cwd=folder / "here", env=env, capture_output=True, text=True, timeout=180)
    files = (folder / "here").glob("outputs/cells/*/output.txt")
    rows = {file: (file.parent / "launch.jsonl").read_text().splitlines() for file in files}
    order = sorted(rows, key=lambda file: json.loads(rows[file][0])["time"])
    return done, [line for file in order for line in file.read_text().splitlines()]


@pytest.mark.long
def test_the_sweep_of_the_paper_as_typed(tmp_path: Path) -> None:
    done, printed = sweep(tmp_path, "algorithm=dash,grpo,ppo_multi", "model=qwen0.5b,qwen1.5b,qwen3b")
    assert (done.returncode, done.stderr) == (0, "")
    assert printed == [
        f"cell 0 {algorithm} {model} math vllm paper math"
        for algorithm in ("dash", "grpo", "ppo_multi")
        for model in ("qwen0.5b", "qwen1.5b", "qwen3b")
    ]
    lines = done.stdout.splitlines()
    table = lines[next(n for n, line in enumerate(lines) if line.startswith("cell ")) : -2]
    assert len(table) == 11 and max(map(len, table)) <= 80
    outputs = {path.name for path in (tmp_path / "here" / "outputs").iterdir()}
    assert outputs == {"cache", "cells", "multirun", "sweeps"}


@pytest.mark.long
def test_a_failed_cell_does_not_stop_a_sweep_but_fails_it(tmp_path: Path) -> None:
    variables = {"CELL_0": "refuse", "CELL_1": "crash", "CELL_2": "130"}
    done, printed = sweep(tmp_path, "model=tiny", "seed=0,1,2,3", **variables)
    assert (done.returncode, done.stderr) == (1, "")
    started = [line.split()[1] for line in printed if line.startswith("cell")]
    # a user's error is not retried, a crash is once, and a signal from outside five times
    assert started == ["0", "1", "1", *["2"] * 6, "3"]
    [counts] = [line for line in done.stdout.splitlines() if line.startswith("4 cells: ")]
    assert set(counts.removeprefix("4 cells: ").split(", ")) == {"2 failed", "1 finished", "1 interrupted"}
    assert "failed (unknown): ended with exit code 1: RuntimeError: a bug" in done.stdout
