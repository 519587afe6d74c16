"""Every file in sweeps/: it is documented, its cells compose and are sound; together they feed the paper."""

from __future__ import annotations

from pathlib import Path

import pytest

from dash_exp.config.compose import conf_dir
from dash_exp.sweep import spec as specs
from dash_exp.sweep.plan import SweepOptions, make_plan, plan_spec
from dash_exp.sweep.spec import combinations, key_of

NAMES = specs.names()
DEMOS = [name for name in NAMES if name.startswith("demo")]
PAPER = [name for name in NAMES if not name.startswith(("demo", "study"))]


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_says_what_it_asks(name: str) -> None:
    lines = (specs.folders()[-1] / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ") and len(lines[0]) > 40
    spec = specs.load(name)
    assert spec.claim.endswith(".") and spec.question.endswith(".") and spec.feeds
    assert len(spec.seeds) >= 3 or name in ("demo", "demo_minute", "study_rates")


def test_every_table_and_figure_is_fed() -> None:
    wanted = {*(f"table_{n}" for n in range(1, 7)), *(f"figure_{n}" for n in (1, 3, 4, 5, 6))}
    for names in (PAPER, DEMOS):
        assert wanted <= {feed for name in names for feed in specs.load(name).feeds}
    assert wanted <= set(PAPER)


@pytest.mark.long
@pytest.mark.parametrize("names", [PAPER, DEMOS], ids=["paper", "demo"])
def test_all_cells_compose_and_are_sound(names: list[str], tmp_path: Path) -> None:
    """All at once, so that each choice of options is composed once."""
    whole = [specs.load(name) for name in names]
    cells = [combination for spec in whole for combination in combinations(spec)]
    traces = [line for spec in whole for line in spec.traces]
    plan = make_plan(
        "all", cells, root=tmp_path, options=SweepOptions(traces=traces), installed=lambda package: True
    )
    assert len(plan.cells) + len(plan.waiting) + plan.duplicates == len(cells)
    arms = {c.cell.name.partition("-")[0] for c in plan.cells}
    assert arms == {path.stem for path in (conf_dir() / "algorithm").iterdir()} - {"sft_m"}
    assert {w.traces.path.parent for w in plan.waiting} == {tmp_path / "traces"}
    by_id = {c.id: c for c in plan.cells}
    # Multi and Mini wait for DASH of their own model, data and seed; filters for No-KL, methods for PG
    for cell in plan.cells:
        _, *rest = cell.cell.name.split("-")
        multi = any(text.startswith("experiment=") and "_ppo_" in text for text in cell.overrides)
        filtered = any(text.startswith("budget.match=") and "no_kl" in text for text in cell.overrides)
        partners = [by_id[need].cell.name.split("-") for need in cell.needs]
        method = any(text.startswith("algorithm=") for text in cell.overrides) and bool(cell.needs)
        expected = {"dash": multi, "no_kl": filtered, "pg": method and not multi and not filtered}
        assert partners == [[name, *rest] for name, wanted in expected.items() if wanted]


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_each_sweep_is_planned_by_itself(name: str, tmp_path: Path) -> None:
    spec = specs.load(name)
    plan = plan_spec(spec, root=tmp_path, installed=lambda package: True)
    assert len(plan.cells) + len(plan.waiting) == len(combinations(spec))
    labels = {c.cell.frozen["hardware"] for c in plan.cells}
    assert len(labels) == 1 and (labels != {None}) == spec.times
    if spec.times:
        said = {key_of(text) for axis in spec.blocks for one in axis.axes for part in one for text in part}
        streaming = {c.cell.frozen["sampler"]["streaming"] for c in plan.cells}
        assert streaming == ({True, False} if "sampler.streaming" in said else {False})


@pytest.mark.long
def test_tables_share_cells(tmp_path: Path) -> None:
    """The usual group and threshold are among those that are tried."""

    def ids(name: str) -> set[str]:
        plan = plan_spec(specs.load(name), root=tmp_path, installed=lambda package: True)
        return {cell.id for cell in plan.cells}

    table, filters = ids("demo_table_3"), ids("demo_filter_threshold")
    assert len(table & filters) == 3 + 3  # DASH and No-GF, three seeds each, in groups of eight
