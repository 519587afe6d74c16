"""What a learner is built from, what it reports, and which of its ranks this process is: plain values, no
tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dash_exp.errors import Fault, UserError

LEAST_SCALE, MOST_SCALE, PATIENCE = 2.0**-16, 2.0**16, 1000
"""Bounds of the loss's factor in fp16, and finite gradients in a row after which it is doubled."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised per token: correction x surrogate + beta x KL - entropy bonus. `temperature` divides
    the logits, as it does in the sampler (1 for text that no sampler drew)."""

    surrogate: str
    clip_low: float
    clip_high: float
    beta: float
    beta_schedule: str
    kl: str
    temperature: float
    entropy: float = 0.0
    entropy_schedule: str = "constant"
    correction: str = "none"
    correction_floor: float = 0.0
    correction_cap: float = 2.0


@dataclass(frozen=True, slots=True)
class Adapters:
    """LoRA settings; `seed` draws the random half. Empty `targets`: every linear layer but the output."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Optimization:
    """How the weights move. `adapters`: only these are trained."""

    lr: float
    schedule: str
    warmup_share: float
    total_updates: int
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    max_grad_norm: float
    precision: str
    freeze_embeddings: bool
    adapters: Adapters | None = None


@dataclass(frozen=True, slots=True)
class Forward:
    """How a forward and backward pass is computed; none of it changes a gradient. `vocabulary`: ids of the
    tokenizer (a model may have more rows); `logit_chunk`: rows of logits that exist at once."""

    vocabulary: int
    logit_chunk: int = 512
    gradient_checkpointing: bool = False


@dataclass(frozen=True, slots=True)
class LearnerSpec:
    """Everything that a rank builds its learner from. `folder`: of the model, seen by every rank. `threads`:
    of each rank while it learns on a CPU (None: as they are). `sharding`: `fsdp` or `none`."""

    folder: Path
    objective: Objective
    optimization: Optimization
    forward: Forward
    device: str = "cpu"
    threads: int | None = None
    sharding: str = "none"


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """One optimizer update. `skipped`: nothing was accumulated, or (`finite` false) the gradient held an
    infinity or NaN, and nothing moved. `beta`: the KL coefficient it was taken with."""

    grad_norm: float
    lr: float
    beta: float
    skipped: bool
    finite: bool = True


@dataclass(frozen=True, slots=True)
class LossScale:
    """Factor of the loss, by which gradients are divided again in fp32, so that they stay within the range of
    fp16 (Micikevicius et al. 2018, section 3.2). It starts at 1, since losses are summed and divided by the
    batch only in the update. `finite`: gradients in a row that did not overflow. Not `dynamic`: always 1."""

    value: float = 1.0
    finite: int = 0
    dynamic: bool = False

    @property
    def is_least(self) -> bool:
        """Whether a smaller factor can no longer answer an overflow."""
        return not self.dynamic or self.value <= LEAST_SCALE

    def after(self, finite: bool) -> LossScale:
        """Half of it after an overflow, twice as much after PATIENCE gradients without one."""
        if not self.dynamic:
            return self
        if not finite:
            return replace(self, value=max(LEAST_SCALE, self.value / 2), finite=0)
        if self.finite + 1 < PATIENCE:
            return replace(self, finite=self.finite + 1)
        return replace(self, value=min(MOST_SCALE, self.value * 2), finite=0)


# --- schedules depend on the plan alone: a skipped update counts, an early end changes nothing before it ---


def learning_rate(update: int, plan: Optimization) -> float:
    """The rate of update number `update` (from 0): linear warm-up over a share of the planned updates
    (rounded up), then constant or linear to 0 over the rest."""
    lr, total = plan.lr, plan.total_updates
    warmup = math.ceil(plan.warmup_share * total)
    if update < warmup:
        return lr * (update + 1) / warmup
    if plan.schedule == "constant":
        return lr
    return lr * max(0, total - update) / max(1, total - warmup)


def coefficient(update: int, start: float, schedule: str, total: int) -> float:
    """A weight in update number `update` (from 0): constant, or linear to 0 over the planned updates."""
    return start if schedule == "constant" else start * max(0, total - update) / total


# --- processes that torchrun or srun started ---

START_S = 120.0
"""Ranks may take at least so long to start, to meet, and to load a model, whatever `learner.timeout_s`."""
FIRST_PORT, PORTS = 20_000, 20_000
"""The ranks of a SLURM step meet at a port derived from the numbers of its job and step, so that jobs on one
node use different ones."""


@dataclass(frozen=True, slots=True)
class RankInfo:
    """Rank `rank` of `size`; `local_rank` of `local_size` on its machine. `address`, `port`: rank 0's."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int


def rank_from_environment(environ: Mapping[str, str]) -> RankInfo | None:
    """This process among those that torchrun or srun started; None for a single process. Raises UserError
    where the variables are incomplete or malformed."""
    try:
        if int(environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in environ:
            return RankInfo(
                int(environ["RANK"]),
                int(environ["WORLD_SIZE"]),
                int(environ["LOCAL_RANK"]),
                int(environ["LOCAL_WORLD_SIZE"]),
                environ["MASTER_ADDR"],
                int(environ["MASTER_PORT"]),
            )
        if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environ:
            return _slurm_rank(environ)
    except KeyError as error:
        hint = "start all ranks with torchrun or srun"
        raise UserError(Fault(error.args[0], "is not set, but RANK and WORLD_SIZE are", hint)) from error
    except ValueError as error:
        raise UserError(Fault("environment", f"of torchrun or srun is broken: {error}")) from error
    return None


def _slurm_rank(environ: Mapping[str, str]) -> RankInfo:
    job, step = int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_STEP_ID", "0"))
    each = re.match(r"\d+", environ["SLURM_STEP_TASKS_PER_NODE"])  # "2(x2),1": rank 0 is on the first
    return RankInfo(
        int(environ["SLURM_PROCID"]),
        int(environ["SLURM_STEP_NUM_TASKS"]),
        int(environ["SLURM_LOCALID"]),
        int(each[0]) if each else 1,
        environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"]),
        int(environ.get("MASTER_PORT") or FIRST_PORT + (job + 101 * step) % PORTS),
    )


def first_host(nodes: str) -> str:
    """The first of a SLURM list of nodes: `gpu[03-05,9],other` begins with `gpu03`."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    if not match:
        raise ValueError(f"no list of nodes: {nodes!r}")
    return f"{match[1]}{match[2] or ''}{match[3] or ''}"


def local_ranks(ranks: int, environ: Mapping[str, str]) -> int:
    """How many of the learner's ranks are on this machine."""
    here = rank_from_environment(environ)
    return ranks if here is None else here.local_size
