"""Which process this is among those that torchrun or srun started: read from the environment. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dash_exp.errors import Fault, UserError

FIRST_PORT, PORTS = 20_000, 20_000
"""Where the ranks of a SLURM step meet: a port that follows from the numbers of its job and step, so that
jobs that share a node meet apart."""


@dataclass(frozen=True, slots=True)
class Place:
    """Rank `rank` of `size`; `local_rank` of `local_size` on its machine. `address`, `port`: rank 0's."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int


def placed(environ: Mapping[str, str]) -> Place | None:
    """This process's place; None where it was started alone (a world of one is alone too). Raises UserError
    where the environment says so only in part."""
    try:
        if int(environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in environ:
            return Place(
                int(environ["RANK"]),
                int(environ["WORLD_SIZE"]),
                int(environ["LOCAL_RANK"]),
                int(environ["LOCAL_WORLD_SIZE"]),
                environ["MASTER_ADDR"],
                int(environ["MASTER_PORT"]),
            )
        if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environ:
            return _in_slurm(environ)
    except KeyError as error:
        raise UserError(
            Fault(
                error.args[0],
                "is not set, but RANK and WORLD_SIZE are",
                "start all ranks with torchrun or srun",
            )
        ) from error
    except ValueError as error:
        raise UserError(Fault("environment", f"of torchrun or srun is broken: {error}")) from error
    return None


def _in_slurm(environ: Mapping[str, str]) -> Place:
    job, step = int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_STEP_ID", "0"))
    each = re.match(r"\d+", environ["SLURM_STEP_TASKS_PER_NODE"])  # "2(x2),1": rank 0 is on the first
    return Place(
        int(environ["SLURM_PROCID"]),
        int(environ["SLURM_STEP_NUM_TASKS"]),
        int(environ["SLURM_LOCALID"]),
        int(each[0]) if each else 1,
        environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"]),
        int(environ.get("MASTER_PORT") or FIRST_PORT + (job + 101 * step) % PORTS),
    )


def first_host(nodes: str) -> str:
    """The first of a SLURM list of nodes: `gpu[03-05,9],other` is led by `gpu03`."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    if not found:
        raise ValueError(f"no list of nodes: {nodes!r}")
    return f"{found[1]}{found[2] or ''}{found[3] or ''}"


def local_ranks(ranks: int, environ: Mapping[str, str]) -> int:
    """How many of the learner's ranks are on this machine."""
    place = placed(environ)
    return ranks if place is None else place.local_size
