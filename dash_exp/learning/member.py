"""One rank of a learner: what each of them does when rank 0 says so, rank 0 included."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dash_exp.errors import Fault, UserError
from dash_exp.learning.agreement import fingerprint, share_state
from dash_exp.learning.learner import Learner
from dash_exp.learning.links import Sums
from dash_exp.learning.packing import MicroBatch
from dash_exp.learning.preflight import preflight
from dash_exp.learning.settings import Objective, Optimization, UpdateStats
from dash_exp.modeling.attention import ATTENTION
from dash_exp.modeling.source import load_model


@dataclass(frozen=True, slots=True)
class Spec:
    """All that a rank needs to build its learner. `folder`: of the model, seen by every rank. `threads`: of
    each rank while it learns on a CPU (None: as many as there are already)."""

    folder: Path
    objective: Objective
    optimization: Optimization
    vocabulary: int
    logit_chunk: int
    gradient_checkpointing: bool
    device: str = "cpu"
    threads: int | None = None


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


def make_learner(spec: Spec, device: torch.device) -> Learner:
    if not spec.folder.is_dir():
        raise UserError(Fault("model", f"{spec.folder} is not seen by every rank",
                              "put model and outputs where all machines of the job see them"))  # fmt: skip
    model = load_model(spec.folder, torch.float32, ATTENTION).to(device)
    return Learner(
        model, spec.objective, spec.optimization, vocabulary=spec.vocabulary, logit_chunk=spec.logit_chunk,
        gradient_checkpointing=spec.gradient_checkpointing,
    )  # fmt: skip


def device_of(name: str, local_rank: int | None = None) -> torch.device:
    """The device that `learner.device` means; with several ranks each has a GPU of its own (the only one
    that it sees, where the scheduler shows it no other). Raises UserError where there is none."""
    count = torch.cuda.device_count()
    device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and device.index is None and local_rank is not None:
        device = torch.device("cuda", local_rank if count > 1 else 0)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(
            Fault("learner.device", f"got {name!r}, but there are {count} GPUs here",
                  "set learner.device=cpu or auto, or fewer learner.ranks")
        )  # fmt: skip
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

    def build(self, spec: Spec) -> None:
        device = device_of(spec.device, self.local_rank)
        one_each = device.type == "cuda" and ":" not in spec.device  # NCCL wants a GPU for every rank
        self.links.join(device, "nccl" if one_each else "gloo")
        self._learner, self._threads = make_learner(spec, device), spec.threads

    def reference(self, batch: MicroBatch | None) -> Tensor | None:
        if batch is None:
            return None
        with self._own_threads():
            return self._portable(self.learner.reference_logprobs(batch))

    def score(self, batch: MicroBatch | None) -> Tensor | None:
        if batch is None:
            return None
        with self._own_threads():
            return self._portable(self.learner.logprobs(batch))

    def accumulate(self, work: Work | None) -> Done | None:
        """Nothing to do is an empty micro-batch: it adds nothing to the sums."""
        if work is None:
            return None
        start = time.time()
        with self._own_threads():
            logprobs = self._portable(self.learner.accumulate(work.batch, work.reference, work.old))
        assert logprobs is not None
        return Done(logprobs, start, time.time())

    def update(self, denominator: float) -> UpdateStats:
        """Sum over the ranks, once; from then on all of them do the same."""
        with self._own_threads():
            if self.links.width > 1:
                self.learner.sum_gradients(self.links.total)
            stats: UpdateStats = self.learner.update(denominator)
        return stats

    def take_sums(self, _: None) -> dict[str, float]:
        return self.learner.take_sums()

    def take_state(self, facts: dict[str, Any]) -> None:
        share_state(self.learner, facts, self.links.hand_on)

    def fingerprint(self, _: None) -> dict[str, str]:
        return fingerprint(self.learner)

    def preflight(self, batch: MicroBatch) -> None:
        with self._own_threads():
            preflight(self.learner, batch)

    def _portable(self, tensor: Tensor | None) -> Tensor | None:
        """To be handed to another rank, which has another device."""
        return tensor if tensor is None or self.links.width == 1 else tensor.cpu()

    @contextmanager
    def _own_threads(self) -> Iterator[None]:
        """Its share of the processors, while all ranks work; rank 0 has them all when it works alone."""
        before = torch.get_num_threads()
        wanted = self._threads or before
        if wanted != before:
            torch.set_num_threads(wanted)
        try:
            yield
        finally:
            if wanted != before:
                torch.set_num_threads(before)
