"""A printed command can be pasted into a shell, and runs what it says."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from dash_exp.config.compose import compose, find_faults
from dash_exp.config.overrides import quoted, unreadable
from dash_exp.record.identity import make_cell
from dash_exp.text import format_command
from dash_exp.train.display import Display, next_lines

OVERRIDES = (
    ["model=tiny", "debug=fast", "seed=3"],
    ["model=tiny", "algorithm=grpo", "debug=fast", "+dataset.fields.my=[a,b]"],
    ["model=tiny", "debug=fast", "model.name='it\\'s'", "filter.threshold=0.2", "run.progress=none"],
    [
        "model=tiny",
        "dataset.name='a b, c'",
        "dataset.stop=['#', '$(x)']",
        "budget.seconds=9",
        "algorithm.beta=0.5",
    ],
    ["experiment=demo/minute", "model=tiny", "cluster.setup=['module load a', 'export B=\"$C\"']"],
)


def parsed(line: str) -> list[str]:
    words = shlex.split(line.strip().removeprefix("next"), comments=True)
    assert words[:3] == ["python", "-m", "dash_exp"]
    return words[3:]


@pytest.mark.parametrize("overrides", OVERRIDES, ids=range(len(OVERRIDES)))
def test_a_runs_commands_continue_it_and_keep_everything_else(tmp_path: Path, overrides: list[str]) -> None:
    root = tmp_path / "it's $HOME"
    own = [*overrides, f"run.dir={quoted(str(root))}"]
    config = compose(own)
    cell = make_cell(config, tmp_path / "cache")
    command = format_command("dash_exp", *own)
    again = Display(1, "none", command).goes_on("here").splitlines()[-1]
    same = compose(parsed(again))
    assert (same.run.dir, make_cell(same, tmp_path / "cache").id) == (str(root), cell.id)
    lines = next_lines(cell.folder(root), command)
    seed, arm = (compose(parsed(line)) for line in lines)
    assert (seed.seed, seed.run.dir, seed.model) == (config.seed + 1, str(root), config.model)
    assert arm.algorithm.name == ("dash" if config.algorithm.name == "grpo" else "grpo")
    assert (arm.seed, arm.run.dir, arm.dataset) == (config.seed, str(root), config.dataset)
    assert find_faults(parsed(lines[1])) == []


@pytest.mark.parametrize("value", ["a[b", "it's, so", 'say "x"=1', "{a", "\\", "a:b]"])
def test_the_hint_for_a_value_with_quotes_is_valid(value: str) -> None:
    hint = unreadable(f"dataset.name={value}", "why").hint
    (word,) = shlex.split(hint.partition("in quotes: ")[2])
    assert compose(["model=tiny", word]).dataset.name == value
