"""What of a sweep a cluster would refuse, or let wait for ever, is found before anything is queued."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dash_exp.record.manifest import Entry, Resources
from dash_exp.sweep.slurm.arrays import find_faults, gpus_of, minutes_of
from tests.sweep.slurm_helpers import SMALL_JOB, FakeSlurm, cluster_of, made_up

pytest_plugins = ["tests.sweep.slurm_fixtures"]


def found_in(entries: list[Entry], **settings: object) -> list[str]:
    return [f"{f.where}: {f.what} | {f.hint}" for f in find_faults(entries, cluster_of(**settings))]


def test_a_sweep_that_fits_has_no_fault(fake_slurm: FakeSlurm) -> None:
    two_nodes = Resources(4, 16, 12, 24 * 60, nodes=2, tasks=4)
    assert found_in([*made_up(2), *made_up(1, two_nodes, first=10)]) == []


def test_no_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (fault,) = found_in(made_up(1))
    assert fault.startswith("cluster: sbatch, srun, squeue, scontrol not found on PATH")
    assert "cluster=local" in fault


def test_a_controller_that_is_down(fake_slurm: FakeSlurm) -> None:
    fake_slurm.set(silent=["sinfo"])
    assert found_in(made_up(1)) == ["cluster: SLURM does not answer | sinfo says more; is its controller up?"]


def test_all_unknown_names_at_once_with_the_nearest(fake_slurm: FakeSlurm) -> None:
    fake_slurm.set(account=["root", "physics"], qos=["normal", "high"])
    found = found_in(made_up(1), partition="mian", account="phisics", qos="hihg")
    assert [fault.split(":")[0] for fault in found] == ["cluster.partition", "cluster.account", "cluster.qos"]
    for fault, name in zip(found, ["main", "physics", "high"], strict=True):
        assert f"did you mean {name!r}" in fault


def test_what_accounting_does_not_know_is_no_fault(fake_slurm: FakeSlurm) -> None:
    fake_slurm.set(silent=["sacctmgr"])
    assert found_in(made_up(1), account="any", qos="any") == []


def test_an_account_of_other_users(fake_slurm: FakeSlurm) -> None:
    fake_slurm.set(account=["root", "physics"])
    fake_slurm.set(**{"account of mine": ["physics"]})
    assert found_in(made_up(1), account="root") == []  # nobody enforces it
    fake_slurm.set(config={"AccountingStorageEnforce": "associations,limits"})
    (fault,) = found_in(made_up(1), account="root")
    assert fault.startswith("cluster.account: got 'root', which you may not use")


def test_more_than_the_partition_has(fake_slurm: FakeSlurm) -> None:
    """Nodes of `main`: 8 CPUs, 15.6 GB, 2 GPUs. One fault per profile and kind, with how many cells."""
    large = Resources(gpus=4, cpus=16, memory_gb=32, minutes=3 * 24 * 60)
    found = found_in([*made_up(3, large), *made_up(1)])
    folder = made_up(1, large)[0].folder
    assert found == [
        f"cluster.gpus: asks for 4 GPUs of a node (for {folder} and 2 more) | partition main has at most 2",
        f"cluster.cpus: asks for 16 CPUs of a node (for {folder} and 2 more) | partition main has at most 8",
        f"cluster.memory_gb: asks for 32 GB of memory of a node (for {folder} and 2 more)"
        " | partition main has at most 15.62",
        f"cluster.hours: asks for 72 hours (for {folder} and 2 more)"
        " | partition main allows 24; a cell goes on in a new job where one ended",
    ]


def test_several_partitions_need_one_that_fits(fake_slurm: FakeSlurm) -> None:
    """The partition that lacks least is reported."""
    fake_slurm.set(sinfo=["debug|30:00|1|4|8000|(null)|(null)", "main*|2:00:00|2|8|16000|gpu:2|(null)"])
    one_gpu = Resources(gpus=1, cpus=1, memory_gb=1, minutes=60)
    assert found_in(made_up(1, one_gpu), partition="debug,main") == []
    found = found_in(made_up(1, one_gpu), partition="debug")
    assert [fault.split(":")[0] for fault in found] == ["cluster.gpus", "cluster.hours"]
    (fault,) = found_in(made_up(1, replace(one_gpu, gpus=3)), partition="debug,main")
    assert fault.endswith("partition main has at most 2")


def test_no_node_has_all_of_it_or_too_few_do(fake_slurm: FakeSlurm) -> None:
    fake_slurm.set(sinfo=["p*|infinite|1|64|4000|(null)|(null)", "p*|infinite|1|4|4000|gpu:a100:4(S:0-1)|x"])
    (fault,) = found_in(made_up(1, Resources(gpus=1, cpus=32, memory_gb=1, minutes=60)))
    assert "asks for 1 nodes of 1 GPUs, 32 CPUs and 1 GB each" in fault and "has 0 so large" in fault
    (fault,) = found_in(made_up(1, Resources(gpus=8, cpus=8, memory_gb=1, minutes=60, nodes=2, tasks=8)))
    assert "asks for 2 nodes" in fault and "has 1 so large" in fault


def test_unknown_memory_is_not_compared(fake_slurm: FakeSlurm) -> None:
    fake_slurm.set(sinfo=["p*|infinite|1|64|1|(null)|(null)"])
    assert found_in(made_up(1, replace(SMALL_JOB, memory_gb=500))) == []


def test_features_and_no_default_partition(fake_slurm: FakeSlurm) -> None:
    assert found_in(made_up(1), constraint="a100&fast|a100*2") == []
    (fault,) = found_in(made_up(1), constraint="a100&fats")
    assert fault.startswith("cluster.constraint: got 'fats'") and "did you mean 'fast'" in fault
    fake_slurm.set(sinfo=["p|infinite|1|64|4000|(null)|(null)"])
    (fault,) = found_in(made_up(1))
    assert fault == "cluster.partition: is not set, and this cluster has no default | allowed: p"


def test_a_warning_longer_than_the_job(fake_slurm: FakeSlurm) -> None:
    (fault,) = found_in(made_up(1, replace(SMALL_JOB, minutes=2)), warning_s=120)
    assert fault.startswith("cluster.warning_s: got 120 s before the end of jobs of 2 min")


def test_limits_and_gpus_as_slurm_writes_them() -> None:
    assert [minutes_of(t) for t in ("1-02:03:00", "2:00:00", "30:00", "1:30")] == [1563, 120, 30, 1.5]
    assert minutes_of("infinite") == float("inf")
    assert [gpus_of(t) for t in ("(null)", "gpu:2", "gpu:0")] == [0, 2, 0]
    assert gpus_of("gpu:a100:4(S:0-1),gpu:2,shard:8") == 6
