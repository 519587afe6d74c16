"""From cells to job arrays: profiles, packing, order, limits. Values computed by hand."""

from __future__ import annotations

from dataclasses import replace
from graphlib import CycleError

import pytest

from dash_exp.config.checks import check
from dash_exp.config.compose import compose, find_faults
from dash_exp.config.schema import changed
from dash_exp.record.manifest import Resources
from dash_exp.sweep.slurm.arrays import Array, demand_of, job_name, parameters, plan_arrays, share_out
from tests.sweep.slurm_helpers import SMALL_JOB, cluster_of, made_up

ONE_GPU = Resources(gpus=1, cpus=8, memory_gb=20, minutes=120)
TWO_NODES = Resources(gpus=16, cpus=128, memory_gb=200, minutes=600, nodes=2, tasks=16)


def sizes(arrays: list[Array]) -> list[int]:
    return [len(array.tasks) for array in arrays]


def test_one_array_per_profile_and_chunks_of_the_largest_size() -> None:
    entries = [*made_up(7), *made_up(3, ONE_GPU, first=100)]
    arrays = plan_arrays("s", entries, cluster_of(), largest=3)
    assert sizes(arrays) == [3, 3, 1, 3]
    assert [a.demand.gpus_per_node for a in arrays] == [0, 0, 0, 1]
    ran = [entry.id for array in arrays for task in array.tasks for entry in task]
    assert ran == [entry.id for entry in entries]
    assert [a.parallel for a in arrays] == [3, 3, 1, 3] and not any(a.behind for a in arrays)


def test_what_jobs_ask_for() -> None:
    """16 ranks on two nodes: 8 on each, of 8 CPUs; a GPU that three cells share gives them its CPUs."""
    two = demand_of(TWO_NODES, cluster_of(), 5)
    assert (two.nodes, two.tasks_per_node, two.cpus_per_task, two.gpus_per_node) == (2, 8, 8, 8)
    assert (two.memory_gb, two.slots) == (200, 1)
    shared = demand_of(ONE_GPU, cluster_of(cells_per_gpu=3), 5)
    assert (shared.slots, shared.gpus_per_node, shared.cpus_per_task, shared.memory_gb) == (3, 1, 8, 60)
    stated = demand_of(ONE_GPU, cluster_of(cells_per_gpu=3, cpus=2), 5)
    assert stated.cpus_per_task == 24
    assert demand_of(ONE_GPU, cluster_of(cells_per_gpu=3), 2).slots == 2  # no more than there are
    large = replace(ONE_GPU, gpus=2)
    assert demand_of(large, cluster_of(cells_per_gpu=3), 5).slots == 1  # not small
    odd = demand_of(Resources(3, 7, 10, 60, nodes=2, tasks=3), cluster_of(), 1)
    assert (odd.tasks_per_node, odd.gpus_per_node, odd.cpus_per_task) == (2, 2, 2)  # 7 CPUs for 2 x 2 tasks


def test_cells_that_share_a_gpu_are_packed() -> None:
    arrays = plan_arrays("s", made_up(5, ONE_GPU), cluster_of(cells_per_gpu=2), largest=1000)
    (array,) = arrays
    assert [len(task) for task in array.tasks] == [2, 2, 1]


def test_arrays_come_after_what_they_need() -> None:
    first = made_up(2)
    second = made_up(1, first=10, needs=(first[0].id,))
    third = made_up(1, first=20, needs=(second[0].id, "beef0000"))
    entries = [*third, *second, *first]
    arrays = plan_arrays("s", entries, cluster_of(), 1000, [*(e.id for e in entries), "beef0000"])
    assert [a.needs for a in arrays] == [(), (first[0].id,), (second[0].id, "beef0000")]
    finished = plan_arrays("s", second, cluster_of(), 1000, [])  # its need is finished: nothing to wait for
    assert [a.needs for a in finished] == [()]


def test_cells_that_wait_for_each_other_are_refused() -> None:
    a, b = made_up(2)
    ring = [replace(a, needs=(b.id,)), replace(b, needs=(a.id,))]
    with pytest.raises(CycleError):
        plan_arrays("s", ring, cluster_of(), 1000, [a.id, b.id])


def test_few_at_a_time_over_all_arrays() -> None:
    """6 + 2 tasks share 4 places: 3 and 1. The dependent array starts after both."""
    many, few = made_up(6), made_up(2, ONE_GPU, first=100)
    late = made_up(1, first=200, needs=(many[0].id,))
    entries = [*many, *few, *late]
    arrays = plan_arrays("s", entries, cluster_of(max_parallel=4), 1000, [e.id for e in entries])
    assert sizes(arrays) == [6, 2, 1]
    assert [a.parallel for a in arrays] == [3, 1, 1]
    assert [a.behind for a in arrays] == [(), (), (0, 1)]


def test_more_arrays_than_may_run_wait_for_one_another() -> None:
    """Five chunks, two at a time: the third after the first, the fourth after the second, ..."""
    arrays = plan_arrays("s", made_up(5), cluster_of(max_parallel=2), largest=1)
    assert [a.behind for a in arrays] == [(), (), (0,), (1,), (2,)]
    assert all(a.parallel == 1 for a in arrays)


def test_shares() -> None:
    assert share_out(4, [6, 2]) == [3, 1]
    assert share_out(100, [6, 2]) == [6, 2]
    assert share_out(1, [5, 5]) == [1, 1]


def test_names_say_what_runs() -> None:
    two = [*made_up(2), *made_up(1, arm="grpo")]
    assert job_name("table_1", [two]) == "table_1-dash+grpo-tiny"
    four = [entry for arm in ("dash", "grpo", "pg", "rloo") for entry in made_up(1, arm=arm)]
    assert job_name("table_1", [four]) == "table_1-4_arms-tiny"
    assert len(job_name("x" * 200, [four])) == 60


def test_parameters_leave_out_what_is_not_set() -> None:
    (array,) = plan_arrays("s", made_up(2), cluster_of(), 1000)
    given = parameters(array, cluster_of(), [])
    assert all(given[k] is None for k in ("account", "partition", "qos", "constraint", "setup", "dependency"))
    assert given["gpus_per_node"] is None  # sites without GPUs refuse even 0
    cluster = cluster_of(account="lab", setup=["module load cuda"], warning_s=300)
    given = parameters(array, cluster, ["12", "13_1"])
    assert given["account"] == "lab" and given["setup"] == ["module load cuda"]
    assert given["dependency"] == "afterany:12:13_1" and given["signal_delay_s"] == 300
    assert given["time"] == SMALL_JOB.minutes and given["mem"] == "1GB"


def test_other_options_of_sbatch_are_passed_on_and_checked() -> None:
    (array,) = plan_arrays("s", made_up(1, ONE_GPU), cluster_of(), 1000)
    made = parameters(array, cluster_of(sbatch={"reservation": "x", "gres": "gpu:a100:1"}), [])
    assert made["additional_parameters"] == {"requeue": True, "reservation": "x", "gres": "gpu:a100:1"}
    assert made["gpus_per_node"] is None and parameters(array, cluster_of(), [])["gpus_per_node"] == 1

    def where(text: str) -> list[str]:
        return [fault.where for fault in find_faults(["cluster=slurm", f"cluster.sbatch={text}"])]

    assert where("{reservation: x, exclude: 'n[1-3]', exclusive: true, nice: 5}") == []
    wrong = "{partition: gpu, --nice: 5, comment: [a], job-name: x, Mem: 3}"
    assert where(wrong) == [
        f"cluster.sbatch.{name}" for name in ("partition", "--nice", "comment", "job-name", "Mem")
    ]
    for value in ("a\nrm -r x", False, None):
        given = changed(compose(["cluster=slurm"]), {"cluster.sbatch": {"comment": value}})
        assert [fault.where for fault in check(given)] == ["cluster.sbatch.comment"]
