"""One rank of a learner: what each of them does when rank 0 says so, rank 0 included."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dash_exp.errors import Fault, UserError
from dash_exp.learning.agreement import StateFacts, fingerprint, take_state
from dash_exp.learning.distributed.sums import Sums
from dash_exp.learning.learner import Learner
from dash_exp.learning.packing import MicroBatch
from dash_exp.learning.preflight import preflight
from dash_exp.learning.settings import Objective, Optimization, UpdateStats
from dash_exp.modeling.attention import ATTENTION
from dash_exp.modeling.source import load_model
from dash_exp.record.checkpoint import Snapshot, checksum

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Spec:
    """All that a rank needs to build its learner. `folder`: of the model, seen by every rank. `threads`: of
    each rank while it learns on a CPU (None: as many as there are already). `sharding`: `fsdp`, or `none`."""

    folder: Path
    objective: Objective
    optimization: Optimization
    vocabulary: int
    logit_chunk: int
    gradient_checkpointing: bool
    device: str = "cpu"
    threads: int | None = None
    sharding: str = "none"


@dataclass(frozen=True, slots=True)
class Work:
    """A micro-batch to backpropagate, with log-probabilities that are known already."""

    batch: MicroBatch
    reference: Tensor | None
    old: Tensor | None


@dataclass(frozen=True, slots=True)
class Done:
    """Its log-probabilities, and when it was worked on (seconds since the epoch)."""

    logprobs: Tensor
    start: float
    end: float


def make_learner(
    spec: Spec, device: torch.device, links: Sums, local_rank: int
) -> tuple[Learner, dict[str, str]]:
    """A rank's learner, and checksums of the weights that it began with (none where it is alone)."""
    if not spec.folder.is_dir():
        raise UserError(
            Fault(
                "model",
                f"{spec.folder} is not seen by every rank",
                "put model and outputs where all machines of the job see them",
            )
        )
    made = partial(
        Learner,
        objective=spec.objective,
        setting=spec.optimization,
        vocabulary=spec.vocabulary,
        logit_chunk=spec.logit_chunk,
        gradient_checkpointing=spec.gradient_checkpointing,
    )
    if spec.sharding == "none":
        learner = made(load_model(spec.folder, torch.float32, ATTENTION).to(device))
        return learner, fingerprint(learner) if links.width > 1 else {}
    from dash_exp.learning.sharding import Across, Shards

    across = Across.all_ranks(device)

    def load() -> tuple[Learner, dict[str, str]]:
        model = load_model(spec.folder, torch.float32, ATTENTION)  # in CPU memory, then layer by layer
        sums = {name: checksum(parameter) for name, parameter in model.named_parameters()}
        return made(model, hold=partial(Shards, across=across)), sums

    return in_turn(links, local_rank, load)


def in_turn(links: Sums, local_rank: int, work: Callable[[], Made]) -> Made:
    """Work that needs much of a machine's memory: one rank of each machine after the other."""
    here = torch.zeros(links.width)
    here[local_rank] = 1.0
    links.total(here)
    made: list[Made] = []
    for turn in range(int(here.count_nonzero())):
        if turn == local_rank:
            made.append(work())
        links.total(torch.zeros(1))
    return made[0]


def device_of(name: str, local_rank: int | None = None) -> torch.device:
    """The device that `learner.device` means; with several ranks each has a GPU of its own (the only one
    that it sees, where the scheduler shows it no other). Raises UserError where there is none."""
    count = torch.cuda.device_count()
    device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and device.index is None and local_rank is not None:
        device = torch.device("cuda", local_rank if count > 1 else 0)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(
            Fault(
                "learner.device",
                f"got {name!r}, but there are {count} GPUs here",
                "set learner.device=cpu or auto, or fewer learner.ranks",
            )
        )
    return device


class Member:
    """A rank's learner and its links. Every public method is a command (see `perform`)."""

    def __init__(self, links: Sums, local_rank: int | None = None, learner: Learner | None = None):
        self.links, self.local_rank = links, local_rank
        self._learner = learner
        self._threads: int | None = None

    def perform(self, name: str, given: Any) -> Any:
        assert not name.startswith("_"), name
        return getattr(self, name)(given)

    @property
    def learner(self) -> Learner:
        assert self._learner is not None, "the first command is build"
        return self._learner

    @property
    def sharded(self) -> bool:
        return self.learner.weights.sharded

    def build(self, spec: Spec) -> dict[str, str]:
        """Returns checksums, by which ranks may see that they begin with the same weights."""
        device = device_of(spec.device, self.local_rank)
        one_each = device.type == "cuda" and ":" not in spec.device  # NCCL wants a GPU for every rank
        self.links.join(device, "nccl" if one_each else "gloo", default=spec.sharding != "none")
        self._learner, sums = make_learner(spec, device, self.links, self.local_rank or 0)
        self._threads = spec.threads
        return sums

    def reference(self, batch: MicroBatch | None) -> Tensor | None:
        with self._at_work():
            if batch is not None:
                return self._portable(self.learner.reference_logprobs(batch))
            self._accompany("reference")
        return None

    def score(self, batch: MicroBatch | None) -> Tensor | None:
        with self._at_work():
            if batch is not None:
                return self._portable(self.learner.logprobs(batch))
            self._accompany("score")
        return None

    def accumulate(self, work: Work | None) -> Done | None:
        """Nothing to do is an empty micro-batch: it adds nothing to the sums."""
        start = time.time()
        with self._at_work():
            if work is None:
                self._accompany("accumulate")
                return None
            logprobs = self._portable(self.learner.accumulate(work.batch, work.reference, work.old))
        assert logprobs is not None
        return Done(logprobs, start, time.time())

    def _accompany(self, what: str) -> None:
        if self.sharded:
            self.learner.accompany(what)

    def update(self, denominator: float) -> UpdateStats:
        """Sum over the ranks, once; from then on all of them do the same."""
        with self._at_work():
            if self.links.width > 1 and not self.sharded:
                start = time.perf_counter()
                self.learner.weights.add_others(self.links.total)
                self.learner.sums.add("update", reduce_s=time.perf_counter() - start)
            stats: UpdateStats = self.learner.update(denominator)
        return stats

    def take_sums(self, _: None) -> dict[str, float]:
        return self.learner.take_sums()

    def take_state(self, facts: StateFacts, snapshot: Snapshot | None = None) -> None:
        take_state(self.learner, facts, snapshot, self.links.hand_on)

    def snapshot(self, given: tuple[int, bool, Mapping[str, Any] | None]) -> Snapshot | None:
        """Rank 0's holds everything; where weights are sharded, the others put in theirs."""
        step, moments, row = given
        with self.links.guarded():
            made = self.learner.snapshot(step, moments=moments, row=row)
        return made if self.links.rank == 0 else None

    def computed(self, names: Sequence[str]) -> list[tuple[str, Tensor]] | None:
        """Some of the weights that the policy computes with, whole, on rank 0."""
        with self.links.guarded():
            made = [(name, tensor) for name, tensor in self.learner.weights.computed(names)]
        return made if self.links.rank == 0 else None

    def fingerprint(self, _: None) -> dict[str, str]:
        return fingerprint(self.learner)

    def release(self, _: None) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def preflight(self, batch: MicroBatch) -> None:
        with self._at_work():
            preflight(self.learner, batch)

    def _portable(self, tensor: Tensor | None) -> Tensor | None:
        """To be handed to another rank, which has another device."""
        return tensor if tensor is None or self.links.width == 1 else tensor.cpu()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Its share of the processors, while all ranks work; rank 0 has them all when it works alone. What
        breaks between them is told as that."""
        before = torch.get_num_threads()
        wanted = self._threads or before
        if wanted != before:
            torch.set_num_threads(wanted)
        try:
            with self.links.guarded():
                yield
        finally:
            if wanted != before:
                torch.set_num_threads(before)
