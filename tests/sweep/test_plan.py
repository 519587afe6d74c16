"""A plan: every cell resolved, checked and named; partners, traces, duplicates; all faults at once."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from dash_exp.config.compose import CachingComposer, compose, opened
from dash_exp.errors import UserError
from dash_exp.record import manifest as manifests
from dash_exp.record.identity import freeze, make_cell, read_frozen
from dash_exp.record.manifest import Plan
from dash_exp.sweep import resources
from dash_exp.sweep.plan import SweepOptions, make_plan, plan_spec
from dash_exp.sweep.request import ad_hoc_name, request_of
from dash_exp.sweep.resources import cluster_of, resource_faults, resources_of, split
from dash_exp.sweep.spec import Spec, load, products

pytestmark = pytest.mark.usefixtures("plain_machine")
TINY = ["debug=fast", "cluster.threads=1"]


@pytest.fixture
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No data folder, and no GPU that a plan could see."""
    monkeypatch.delenv("DASH_DATA", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    resources.gpus_here.cache_clear()


def planned(root: Path, *overrides: str, **options: Any) -> Plan:
    return make_plan("mine", products([*TINY, *overrides]), root=root, options=SweepOptions(**options))


def refused(root: Path, *overrides: str, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        planned(root, *overrides, **options)
    return str(error.value)


def single_id(root: Path, *overrides: str) -> str:
    """The id that a run by itself gives these overrides."""
    return make_cell(compose([*TINY, f"run.dir={root}", *overrides]), root / "cache").id


def test_cells_are_those_of_single_runs_and_nothing_is_written(tmp_path: Path) -> None:
    root = tmp_path / "new"
    plan = planned(root, "algorithm=dash,grpo", "seed=0,1", "hydra.launcher.n_jobs=2", "run.force=true")
    assert [c.folder_name.rpartition("-")[0] for c in plan.cells] == [
        "dash-tiny-digits-s0",
        "dash-tiny-digits-s1",
        "grpo-tiny-digits-s0",
        "grpo-tiny-digits-s1",
    ]
    assert not root.exists()
    assert [c.id for c in plan.cells[1:3]] == [
        single_id(root, "algorithm=dash", "seed=1"),
        single_id(root, "algorithm=grpo", "seed=0"),
    ]
    assert plan.cells[1].overrides == ("debug=fast", "algorithm=dash", "seed=1")
    assert (plan.duplicates, plan.waiting, plan.actions) == (0, (), ("cluster.threads=1",))


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=tiny", "seed=3", "learner.lr=1e-3", "hardware=mine"],
        ["algorithm=sft_h", "algorithm.steps=2", "recipe.sft_batch=4", "budget.seconds=9"],
        ["dataset=math_gsm8k", "model=tiny", "sampler.max_new_tokens=${dataset.completion_tokens}"],
        ["learner={lr: 0.25}", "learner.lr=2", "experiment=demo/math_ppo_multi", "seed=${algorithm.steps}"],
        ["learner.lr=2", "learner={lr: 0.25}", "cluster.retries.nan=3", "algorithm=ppo_mini"],
    ],
)
def test_a_config_composed_with_others_equals_hydras_own(overrides: list[str]) -> None:
    with opened():
        composer = CachingComposer()
        composer.compose([text for text in overrides if "seed" not in text])  # the options are kept from here
        assert composer.compose(overrides) == compose(overrides)
        assert composer.compose([]) == compose()


def test_what_cannot_be_composed_is_reported_every_time() -> None:
    with opened():
        composer = CachingComposer()
        for overrides, why in (
            (["algorithm=das"], "did you mean 'dash'"),
            (["algorithm.steps=${nowhere}"], "'nowhere' not found"),
            (["seed=[1"], "cannot read"),
        ):
            for _ in range(2):
                with pytest.raises(UserError, match=why):
                    composer.compose(overrides)
        assert composer.faults_of("seed=1,2")[0].what == "got several values: seed=1,2"
        assert "did you mean 'filter.threshold'" in composer.faults_of("filter.treshold=1")[0].hint
        assert composer.faults_of("filter.threshold=1") == []


def test_the_same_cell_named_twice_is_planned_once(tmp_path: Path) -> None:
    combinations = products([*TINY, "seed=0,0,1", "learner.lr=3e-5"]) + products([*TINY, "seed=1"])
    plan = make_plan("mine", combinations, root=tmp_path)
    assert (len(plan.cells), plan.duplicates) == (2, 2)


def test_a_plan_can_be_made_again_from_what_it_keeps(tmp_path: Path) -> None:
    settings = [
        "cluster=slurm",
        "cluster.partition=gpu",
        "cluster.setup=['module load a',b]",
        "cluster.retries.nan=2",
        "tracking=mlflow",
        "run.progress=plain",
    ]
    plan = planned(tmp_path, "seed=0", "cluster.memory_gb=8,16", "budget.seconds=5", *settings)
    assert {c.resources.memory_gb for c in planned(tmp_path, "cluster.memory_gb=16").cells} == {16}
    assert (len(plan.cells), plan.duplicates) == (1, 1)  # memory makes no other cell
    again = make_plan("mine", [c.overrides for c in plan.cells], root=tmp_path, actions=plan.actions)
    assert [c.id for c in again.cells] == [c.id for c in plan.cells]
    assert [c.resources for c in again.cells] == [c.resources for c in plan.cells]
    folder = plan.cells[0].cell.folder(tmp_path)
    freeze(plan.cells[0].cell.frozen, folder)
    config, composed = read_frozen(folder, plan.actions), compose([*TINY, *settings])
    assert (config.cluster.name, config.cluster.partition, config.cluster.threads) == ("slurm", "gpu", 1)
    assert (config.cluster.setup, config.cluster.retries["nan"]) == (["module load a", "b"], 2)
    assert (config.tracking, config.run.progress) == (composed.tracking, "plain")
    assert config.hardware == "gpu"


def test_partners_are_cells_of_the_sweep_and_come_with_their_machine(tmp_path: Path) -> None:
    plan = planned(tmp_path, "algorithm=ppo_multi,dash", "algorithm.steps=4", "seed=0,1", "budget.match=dash")
    multi0, multi1, dash0, dash1 = plan.cells
    assert (multi0.needs, multi1.needs, dash0.needs) == ((dash0.id,), (dash1.id,), ())
    assert multi0.cell.frozen["budget"]["match"] == dash0.id
    assert dash0.cell.frozen["budget"] == {"seconds": None, "match": None, "unit": "seconds"}
    label = resources.hardware_label(compose(TINY))
    assert {c.cell.frozen["hardware"] for c in plan.cells} == {label} and label.endswith("-1cores")
    steps = ["algorithm.steps=4", f"hardware={label}"]
    assert dash0.id == single_id(tmp_path, "algorithm=dash", *steps)
    named = planned(tmp_path, "algorithm=dash", "budget.match=dash", "hardware=mine", "algorithm.steps=4")
    assert named.cells[0].id == single_id(tmp_path, "algorithm=dash", "hardware=mine", "algorithm.steps=4")


def test_a_partner_outside_the_sweep_must_have_been_frozen(tmp_path: Path) -> None:
    message = refused(tmp_path, "algorithm=ppo_multi,ppo_mini", "seed=0,1", "budget.match=dash")
    assert (
        message.count("its partner is neither in this sweep nor in") == 2
    )  # of four cells, once for each seed
    printed = shlex.split(message.partition("run it first: ")[2].splitlines()[0])
    assert printed[:3] == ["python", "-m", "dash_exp"] and f"run.dir={tmp_path}" in printed
    assert make_cell(compose(printed[3:]), tmp_path / "cache").id == single_id(tmp_path, "algorithm=dash")
    dash = planned(tmp_path, "algorithm=dash").cells[0]
    freeze(dash.cell.frozen, dash.cell.folder(tmp_path))
    plan = planned(tmp_path, "algorithm=ppo_multi", "budget.match=dash")
    assert plan.cells[0].needs == (dash.id,)
    assert f"budget.match={dash.id}" in plan.cells[0].overrides
    assert planned(tmp_path, "algorithm=ppo_multi", f"budget.match={dash.id}").cells[0].id == plan.cells[0].id
    message = refused(tmp_path, "algorithm=ppo_multi", f"budget.match={dash.id}", "seed=1,2")
    assert f"the partner {dash.id} has seed 0, this cell 1 (in seed=1)" in message
    message = refused(tmp_path, "algorithm=ppo_multi", "budget.match=0123abcd")
    assert "there is no cell 0123abcd" in message


def test_faults_of_a_partner_are_reported(tmp_path: Path) -> None:
    assert "its partner 'dahs': algorithm: unknown option 'dahs'" in refused(tmp_path, "budget.match=dahs")
    message = refused(tmp_path, "algorithm=ppo_multi", "budget.match='algorithm=dash algorithm.group_size=1'")
    assert "must be at least 2" in message


def test_every_fault_of_every_cell_is_reported_at_once(tmp_path: Path) -> None:
    message = refused(
        tmp_path,
        "algorithm=dash,das",
        "algorithm.beta=x,0.1",
        "learner.lr=-1",
        "seed=-1,0,1",
        "filter.treshold=1",
        "run.progress=plain,none",
        "cluster.gpus=3",
    )
    assert message.startswith("dash_exp: 7 problems, nothing was started")
    for expected in (
        "algorithm: unknown option 'das' (in 12 of 24 cells, all with algorithm=das)\n    did you mean",
        "algorithm.beta: got 'x' (text), expected a number (in 12 of 24 cells, all with algorithm.beta=x)",
        "filter.treshold: unknown key\n    did you mean 'filter.threshold'?",
        "learner.lr: got -1, must be more than 0 (in 12 of 24 cells, all with algorithm=dash)",
        "seed: got -1, must be at least 0 and at most 9223372036854775807 (in 4 of 24 cells, all with",
        "run.progress: has several values: none, plain",
        "the cell needs 3 GPUs, this machine has 0",
    ):
        assert expected in message, expected


def test_no_cells_and_no_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no cells"):
        make_plan("mine", [], root=tmp_path)
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refused(tmp_path / "file" / "outputs")


def test_an_id_that_another_cell_of_the_pool_has(tmp_path: Path) -> None:
    cell = planned(tmp_path).cells[0]
    (tmp_path / "cells" / f"other-{cell.id}").mkdir(parents=True)
    assert f"has the id of another cell, other-{cell.id}" in refused(tmp_path)
    (tmp_path / "cells" / f"other-{cell.id}").rename(tmp_path / "cells" / cell.folder_name)
    assert planned(tmp_path).cells[0].id == cell.id


def test_cells_wait_for_traces_that_can_be_made(tmp_path: Path) -> None:
    arm = ("algorithm=dash,sft_m", "seed=0,1")
    message = refused(tmp_path, *arm)
    assert "digits-qwen7b_instruct.jsonl is not a file (in 2 of 4 cells, all with algorithm=sft_m)" in message
    traces = [("dataset=digits", "traces.limit=4")]
    plan = planned(tmp_path, *arm, traces=traces)
    path = tmp_path / "traces" / "digits-qwen7b_instruct.jsonl"
    assert len(plan.cells) == 2
    assert [w.overrides[-1] for w in plan.waiting] == ["seed=0", "seed=1"]
    assert {w.traces.path for w in plan.waiting} == {path}
    assert plan.waiting[0].traces.arguments == (*traces[0], "cluster.threads=1", f"run.dir={tmp_path}")
    path.parent.mkdir()
    path.write_text(json.dumps({"id": "x", "solution": "y"}) + "\n")
    done = planned(tmp_path, *arm)
    assert (len(done.cells), done.waiting) == (4, ())
    assert done.cells[:2] == plan.cells
    assert "dash_exp.traces datset=arithmetic: datset: unknown key" in refused(
        tmp_path / "b", *arm, traces=[("datset=arithmetic",)]
    )


def test_where_times_count_cells_belong_to_a_machine(tmp_path: Path) -> None:
    here = resources.hardware_label(compose(TINY))
    assert {c.cell.frozen["hardware"] for c in planned(tmp_path, "seed=0,1", times=True).cells} == {here}
    there = planned(
        tmp_path, "cluster=slurm", "cluster.partition=gpu", "cluster.constraint='a100|h100'", times=True
    )
    assert there.cells[0].cell.frozen["hardware"] == "gpu-a100_h100"
    said = planned(tmp_path, "hardware=mine", times=True)
    assert said.cells[0].cell.frozen["hardware"] == "mine"
    assert planned(tmp_path).cells[0].cell.frozen["hardware"] is None


def test_the_names_of_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("vendor_id : x\nmodel name\t: Quick(R) CPU @ 2.0GHz \nmodel name: other\n")
    assert resources.slug(resources.processor(cpuinfo)) == "Quick_R_CPU_2.0GHz"
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB'\necho 'NVIDIA H100 80GB'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    config = compose(TINY)
    for visible, count in ((None, 2), ("0", 1), ("", 0)):
        resources.gpus_here.cache_clear()
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert len(resources.gpus_here()) == count
        assert (resources.hardware_label(config) == "NVIDIA_H100_80GB") == (count > 0)
        assert resources_of(config).gpus == min(count, 1)
    resources.gpus_here.cache_clear()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "1 GPU, 8 CPU, 8 GB, 1h00m"),
        (["learner.device=cpu"], "0 GPU, 8 CPU, 8 GB, 1h00m"),
        (["cluster.gpus=0", "cluster.cpus=3", "cluster.hours=0.01"], "0 GPU, 3 CPU, 8 GB, 0h01m"),
        (["model=qwen3b"], "1 GPU, 8 CPU, 64 GB, 96h00m"),
        (["sampler=vllm_servers", "sampler.servers=2", "learner.ranks=2"], "4 GPU, 32 CPU, 8 GB, 1h00m"),
        (["sampler=vllm_servers", "sampler.colocated=true"], "1 GPU, 8 CPU, 8 GB, 1h00m"),
        (["sampler=vllm_servers", "cluster.server_urls=['http://x:1']"], "1 GPU, 8 CPU, 8 GB, 1h00m"),
        (["learner.ranks=16", "cluster.memory_gb=12.5"], "2 nodes, 16 GPU, 128 CPU, 13 GB, 1h00m"),
        (["learner.ranks=4", "learner.device='cuda:0'"], "1 GPU, 8 CPU, 8 GB, 1h00m"),
    ],
)
def test_what_a_cell_asks_a_cluster_for(overrides: list[str], expected: str) -> None:
    config = compose([*TINY, "cluster=slurm", *overrides])
    assert str(resources_of(config)) == expected
    assert list(resource_faults(config)) == []
    assert resources_of(config).tasks == (16 if "nodes" in expected else 1)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["sampler=vllm_servers", "sampler.servers=8"], "got 8, but the cell needs 9 GPUs on one node"),
        (["learner.ranks=11", "cluster.gpus_per_node=5"], "3 nodes of 5 GPUs cannot share 11 learners"),
        (["learner.ranks=2", "cluster.gpus=1"], "got 1, but the cell needs 2 GPUs: 2 for its learners"),
        (["learner.ranks=2", "cluster.gpus=2", "cluster=local"], "the cell needs 2 GPUs, this machine has 0"),
    ],
)
def test_what_no_cluster_could_give(overrides: list[str], why: str) -> None:
    cluster = [] if "cluster=local" in overrides else ["cluster=slurm"]
    message = [fault.what for fault in resource_faults(compose([*TINY, *cluster, *overrides]))]
    assert len(message) == 1 and message[0].startswith(why)


def test_a_sweeps_file_is_planned_with_a_command_lines_changes(tmp_path: Path) -> None:
    spec = load("demo_minute")
    plan = plan_spec(spec, root=tmp_path, actions=["cluster.threads=1"], extra=["seed=5", "tracking=mlflow"])
    assert [c.overrides for c in plan.cells] == [
        ("debug=fast", f"algorithm={arm}", "seed=5") for arm in ("dash", "grpo", "ppo_multi")
    ]
    assert plan.actions == ("tracking.mlflow=true", "cluster.threads=1")
    assert plan.about is not None and plan.about["claim"] == spec.claim


def test_names_of_sweeps_from_a_command_line() -> None:
    name = ad_hoc_name(products(["algorithm=dash,grpo", "model=tiny", "seed=0,1", "learner.lr=1e-4"]))
    assert name.startswith("dash+grpo-seed0+1-") and len(name.rpartition("-")[2]) == 8
    same = products(["learner.lr=1e-4", "seed=1,0", "model=tiny", "algorithm=grpo,dash", "run.force=true"])
    assert ad_hoc_name(same).rpartition("-")[2] == name.rpartition("-")[2]
    assert ad_hoc_name(products(["seed=range(0,9)", "experiment=demo/math_dash"])).startswith("9xseed-")
    assert ad_hoc_name(products(["experiment=demo/math_dash"])).startswith("math_dash-")
    assert ad_hoc_name([()]).startswith("sweep-")
    assert len(ad_hoc_name(products([f"algorithm={','.join(f'arm{n}' * 20 for n in range(3))}"]))) <= 100


def test_settings_of_a_launch_are_split_from_those_of_cells() -> None:
    line = [
        "seed=1",
        "cluster=slurm",
        "hydra/launcher=x",
        "hydra.searchpath=[a]",
        "run.dir=b",
        "paths.data=c",
    ]
    assert split(line) == (("seed=1", "hydra.searchpath=[a]"), ("cluster=slurm", "run.dir=b", "paths.data=c"))


def test_data_that_change_make_other_cells(tmp_path: Path) -> None:
    file = tmp_path / "my.jsonl"
    rows = {"id": "a", "problem": "1+1?", "answer": "2"}
    more = ("dataset=gsm8k", f"dataset.path={file}", "evaluation=none")
    assert "is not a file" in refused(tmp_path, *more)
    file.write_text(json.dumps(rows))
    first = planned(tmp_path, *more).cells[0].id
    assert (tmp_path / "cache" / "hashes").is_dir()
    file.write_text(json.dumps({**rows, "answer": "3"}))
    assert planned(tmp_path, *more).cells[0].id != first


def spec_of(folder: Path, **overrides: Any) -> Spec:
    """A sweep's file with one cell and these overrides."""
    path = folder / "mine.yaml"
    values = {
        "claim": "c",
        "question": "q",
        "feeds": ["table_x"],
        "seeds": [0],
        "grid": {"algorithm": ["dash"]},
    }
    path.write_text(json.dumps({**values, "overrides": {"model": "tiny", "debug": "fast", **overrides}}))
    return load(str(path))


@pytest.mark.parametrize(
    ("own", "given", "asked"),
    [
        ({"cluster.cpus": 1, "cluster.gpus": 0}, ["cluster=slurm", "cluster.cpus=2"], ("slurm", 2, 60)),
        ({"cluster.cpus": 1, "cluster.gpus": 0}, ["cluster=slurm"], ("slurm", 1, 60)),
        ({"cluster": "slurm", "cluster.hours": 3}, ["cluster=local", "cluster.cpus=2"], ("local", 2, 180)),
        ({"cluster.hours": 3, "cluster.cpus": 5}, ["cluster={cpus: 2, hours: 2}"], ("local", 2, 120)),
    ],
)
def test_the_command_line_wins_over_the_sweeps_file(
    tmp_path: Path, own: dict[str, Any], given: list[str], asked: tuple[str, int, int]
) -> None:
    plan = plan_spec(spec_of(tmp_path, **own), root=tmp_path / "out", extra=given)
    resources = plan.cells[0].resources
    assert (cluster_of(plan.actions).name, resources.cpus, resources.minutes) == asked


def test_the_command_line_wins_at_the_next_launch_too(tmp_path: Path) -> None:
    root = tmp_path / "out"
    spec = spec_of(tmp_path, **{"cluster.gpus": 0, "cluster.cpus": 1, "cluster.hours": 3})
    manifests.write(plan_spec(spec, root=root, extra=["cluster=slurm", "cluster.cpus=2,3"]), root)
    again = request_of("mine", ["cluster=local", "cluster.cpus=4"], root, None)
    assert {cell.resources.cpus for cell in again.plan.cells} == {4}
    assert (again.cluster.name, again.cluster.hours) == ("local", 3)
    assert all("cluster.cpus" not in text for cell in again.plan.cells for text in cell.overrides)
