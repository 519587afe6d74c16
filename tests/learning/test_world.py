"""Where a process stands among those that torchrun or srun started."""

from __future__ import annotations

import pytest

from dash_exp.cell.__main__ import run_config
from dash_exp.config.schema import Config, changed
from dash_exp.errors import UserError
from dash_exp.learning.settings import RankInfo, first_host, local_ranks, rank_from_environment

pytest_plugins = ["tests.config.config_fixtures"]

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "here",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[03-05]",
}


def test_torchrun() -> None:
    assert rank_from_environment(TORCHRUN) == RankInfo(3, 4, 1, 2, "here", 29500)
    assert local_ranks(4, TORCHRUN) == 2


def test_srun() -> None:
    # port: 20000 + (70001 + 101 x 2) mod 20000 = 20000 + 10203
    assert rank_from_environment(SRUN) == RankInfo(3, 5, 1, 2, "gpu03", 30203)
    chosen = {**SRUN, "MASTER_ADDR": "there", "MASTER_PORT": "5"}
    assert rank_from_environment(chosen) == RankInfo(3, 5, 1, 2, "there", 5)


@pytest.mark.parametrize(
    "environ", [{}, {"WORLD_SIZE": "1", "RANK": "0"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}]
)
def test_alone(environ: dict[str, str]) -> None:
    """A batch script that asked for four tasks and has started none of them with srun is alone."""
    assert rank_from_environment(environ) is None
    assert local_ranks(4, environ) == 4


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("one", "one"),
        ("one,two", "one"),
        ("n[1-3]", "n1"),
        ("n[07,9-12],m1", "n07"),
        ("a-b-[2-3]-x", "a-b-2-x"),
    ],
)
def test_first_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_an_environment_that_says_half() -> None:
    with pytest.raises(UserError, match="MASTER_ADDR: is not set, but RANK and WORLD_SIZE are"):
        rank_from_environment({k: v for k, v in TORCHRUN.items() if k != "MASTER_ADDR"})
    with pytest.raises(UserError, match="of torchrun or srun is broken"):
        rank_from_environment({**TORCHRUN, "RANK": "three"})


def test_another_number_of_processes_than_ranks(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    config = changed(config, {"learner.ranks": 2})
    with pytest.raises(UserError, match="got 2, but 4 processes were started together"):
        run_config(config)
    config = changed(config, {"learner.ranks": 4})
    with pytest.raises(UserError, match="the ranks of one cell, not a sweep"):
        run_config(config, apart=True)
