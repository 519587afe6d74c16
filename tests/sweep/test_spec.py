"""Sweeps as files: what they say is read, and every fault of one is reported at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from dash_exp.errors import UserError
from dash_exp.sweep import spec as specs
from dash_exp.sweep.spec import combinations

COMPLETE = """
claim: DASH is faster.
question: By how much?
feeds: [table_3, figure_1]
times: true
seeds: [0, 1, 2]
overrides: {learner.lr: 1e-4, budget.match: experiment=demo/math_dash}
traces: ["model=smollm2_135m traces.limit=400"]
grid:
  - experiment: [demo/math_dash, demo/math_grpo]
    sampler.streaming: true
    zip: [{algorithm.group_size: [4, 8], algorithm.prompts_per_step: [8, 4]}]
    exclude: [{experiment: demo/math_grpo, algorithm.group_size: 8}]
    include: [{experiment: demo/math_base}]
  - experiment: demo/math_pg
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def faults(folder: Path, text: str) -> str:
    with pytest.raises(UserError) as error:
        specs.load(str(written(folder, text)))
    return str(error.value).replace(str(folder), "")


def test_a_complete_file(tmp_path: Path) -> None:
    path = written(tmp_path, COMPLETE)
    spec = specs.load(str(path))
    assert (spec.name, spec.claim, spec.feeds) == ("mine", "DASH is faster.", ("table_3", "figure_1"))
    assert spec.overrides == ("learner.lr=0.0001", "budget.match='experiment=demo/math_dash'")
    assert spec.traces == (("model=smollm2_135m", "traces.limit=400"),)
    cells = combinations(spec)
    assert len(cells) == 3 * (3 + 1 + 1)  # seeds x (2 x 2 less one, one added, the second block's)
    assert cells[0][2:] == (
        "experiment=demo/math_dash",
        "sampler.streaming=true",
        "algorithm.group_size=4",
        "algorithm.prompts_per_step=8",
        "seed=0",
    )
    assert cells[4][2:] == ("experiment=demo/math_pg", "seed=0", "sampler.streaming=false")
    assert spec.about() == {
        "claim": "DASH is faster.",
        "question": "By how much?",
        "feeds": ["table_3", "figure_1"],
        "times": True,
        "source": str(path),
    }


def test_every_fault_of_a_file_is_reported_at_once(tmp_path: Path) -> None:
    message = faults(
        tmp_path,
        """
claims: DASH is faster.
question: By how much?
feeds: [tabel_3]
times: maybe
seeds: [0, 0]
overrides: [learner.lr=1]
traces: [smollm2_135m]
grid:
  - experiment: []
  - a: [1, 1]
    zip: [{b: [1, 2], c: [1]}, 5]
  - a: [1, 2]
    exclude: [{aa: 1}, {a: 3}, {}]
  - [x]
  - model: [tinny]
""",
    )
    assert message.startswith("dash_exp: 16 problems")  # with those of keys and options, which nothing hides
    for expected in (
        "/mine.yaml: claims: unknown key\n    did you mean 'claim'?",
        "got 'tabel_3'",
        "times: got 'maybe', expected true or false",
        "seeds: got [0, 0], which names one twice",
        "overrides: got ['learner.lr=1'], expected a mapping",
        "traces: got 'smollm2_135m'",
        "grid[0].experiment: has no values, so the grid has no cells",
        "grid[1].a: names 1 twice",
        "grid[1].zip[0]: runs lists of unequal lengths together: {'b': 2, 'c': 1}",
        "grid[1].zip[1]: got 5, expected a mapping",
        "grid[2].exclude[0].aa: is no axis of this block\n    did you mean 'a'?",
        "grid[2].exclude[2]: is empty",
        "grid[2].exclude[1].a: got 3\n    allowed: 1, 2",
        "grid[3]: got ['x'], expected a mapping",
        "\n  a: unknown key",
        "model: unknown option 'tinny'\n    did you mean 'tiny'?",
    ):
        assert expected in message, expected


@pytest.mark.parametrize(
    ("grid", "why"),
    [
        ("{a: [1, 2], exclude: [{a: 1}, {a: 2}]}", "grid: has no cells: all of its comb"),
        ("{}", "names no axis, so it has no cells"),
        ("[]", "grid: is missing"),
        ("5", "expected a list"),
        ("{a: [1], zip: [{a: [2]}]}", "grid.a: is on two axes"),
        ("{a: [1], a: [2]}", "'a' is there twice"),
        ("{zip: [{a: [], b: []}]}", "has no values"),
        ("{a: {b: 1}}", "got a mapping"),
        ("{a: [1], exclude: [{}]}", "would leave out everything"),
    ],
)
def test_a_grid_that_makes_no_sense(tmp_path: Path, grid: str, why: str) -> None:
    head = "claim: c\nquestion: q\nfeeds: [table_1]\nseeds: [0]\n"
    assert why in faults(tmp_path, f"{head}grid: {grid}\n")


def test_what_is_no_sweep_at_all(tmp_path: Path) -> None:
    assert "mine.yaml:3: not valid yaml" in faults(tmp_path, "claim: x\nfeeds: [a\ngrid: }")
    assert "is not a sweep" in faults(tmp_path, "- a\n")
    assert "is not a sweep" in faults(tmp_path, "")
    with pytest.raises(UserError, match=r"is not a file"):
        specs.load(str(tmp_path / "absent.yaml"))
    with pytest.raises(UserError, match=r"did you mean 'table_3'\?"):
        specs.load("tabel_3")
    for seeds in ("[-1]", "[true]", "[1.5]", "3"):
        text = f"claim: c\nquestion: q\nfeeds: [table_1]\nseeds: {seeds}\ngrid: {{a: 1}}\n"
        assert "seeds: got" in faults(tmp_path, text)


def test_own_sweeps_are_found_by_name_and_need_only_a_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweeps").mkdir()
    for name in ("mine", "demo"):
        text = "grid: {algorithm: [dash], seed: [3, 4]}" if name == "mine" else "grid: {algorithm: [pg]}"
        (tmp_path / "sweeps" / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert {"mine", "demo", "table_3"} <= set(specs.names())
    assert combinations(specs.load("mine")) == [("algorithm=dash", f"seed={seed}") for seed in (3, 4)]
    assert capsys.readouterr().err == ""
    assert combinations(specs.load("demo")) == [("algorithm=pg", "seed=0")]
    assert "demo is sweeps/demo.yaml of this folder, not the installed sweep" in capsys.readouterr().err
