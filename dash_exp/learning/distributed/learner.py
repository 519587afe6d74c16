"""A learner over several ranks: `DistributedLearner`, on rank 0, and `Worker`, one rank of it.

    reference_logprobs(round), logprobs(round), accumulate(round)   one micro-batch a rank, at the same time
    update(denominator)      gradients summed over the ranks once, then the same update on every rank
    take_sums()              the ranks' sums for the metrics, added

Rank 0 is the process that samples, judges and records.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from dash_exp.errors import Fault, UserError
from dash_exp.learning.distributed.communicator import Communicator, Coordinator
from dash_exp.learning.learner import Learner, StateFacts, device_of, load_learner
from dash_exp.learning.packing import MicroBatch, empty_micro_batch, pack
from dash_exp.learning.rounds import MicroBatchResult, Round
from dash_exp.learning.settings import LearnerSpec, UpdateStats
from dash_exp.learning.weights import BUCKET, Weights
from dash_exp.modeling.attention import ATTENTION
from dash_exp.modeling.source import load_model
from dash_exp.record.checkpoint import Snapshot, checksum

Result = TypeVar("Result")
Work = tuple[MicroBatch, Tensor | None, Tensor | None]
"""A micro-batch to backpropagate, its reference and its old log-probabilities, where they are known."""
LARGEST = ("gpu_peak_mb", "update/reduce_s")
"""Of these sums the largest of all ranks counts."""


class Worker:
    """A rank's learner and communicator. Every public method is a command of rank 0, which runs it too."""

    def __init__(self, communicator: Communicator, local_rank: int | None = None):
        self.communicator, self.local_rank = communicator, local_rank
        self._learner: Learner | None = None
        self._threads: int | None = None

    def run(self, command: str, argument: Any) -> Any:
        assert not command.startswith("_"), command
        return getattr(self, command)(argument)

    @property
    def learner(self) -> Learner:
        assert self._learner is not None, "the first command is build"
        return self._learner

    def build(self, spec: LearnerSpec) -> dict[str, str]:
        """Load the learner; returns checksums of its weights, which must be those of the other ranks."""
        device = device_of(spec.device, self.local_rank)
        one_each = device.type == "cuda" and ":" not in spec.device  # NCCL wants a GPU for every rank
        backend = "nccl" if one_each else "gloo"
        self.communicator.connect(device, backend, default=spec.sharding != "none")
        if not spec.folder.is_dir():
            hint = "put model and outputs where all machines of the job see them"
            raise UserError(Fault("model", f"{spec.folder} is not seen by every rank", hint))
        self._threads = spec.threads
        if spec.sharding == "none":
            self._learner = load_learner(spec, device)
            return self._learner.checksums()
        self._learner, sums = in_turn(
            self.communicator, self.local_rank or 0, lambda: load_shards(spec, device)
        )
        return sums

    def reference_logprobs(self, batch: MicroBatch | None) -> Tensor | None:
        with self._working():
            if batch is not None:
                return self._portable(self.learner.reference_logprobs(batch))
            self._run_dummy_forward(self.learner.reference)
        return None

    def logprobs(self, batch: MicroBatch | None) -> Tensor | None:
        with self._working():
            if batch is not None:
                return self._portable(self.learner.logprobs(batch))
            self._run_dummy_forward(self.learner.policy)
        return None

    def accumulate(self, work: Work | None) -> MicroBatchResult | None:
        start = time.time()
        with self._working():
            if work is None:
                self._run_dummy_forward(self.learner.policy, backward=True)
                return None
            logprobs = self._portable(self.learner.accumulate(*work))
        assert logprobs is not None
        return MicroBatchResult(logprobs, start, time.time())

    def _run_dummy_forward(self, scorer: Any, backward: bool = False) -> None:
        """Take part in a gathering without a micro-batch, as every rank must with sharded weights:
        compute one token of weight 0, which adds nothing."""
        if not self.learner.weights.sharded:
            return
        with torch.set_grad_enabled(backward):
            logprobs = scorer(pack(empty_micro_batch(), self.learner.device))[0]
            if backward:
                (0.0 * logprobs).sum().backward()

    def update(self, denominator: float) -> UpdateStats:
        """Sum the gradients over the ranks, once; then all ranks make the same update."""
        with self._working():
            if not self.learner.weights.sharded:
                start = time.perf_counter()
                self.learner.weights.all_reduce_gradients(self.communicator.all_reduce)
                self.learner.sums.add("update", reduce_s=time.perf_counter() - start)
            return self.learner.update(denominator)  # type: ignore[no-any-return]

    def take_sums(self, _: None) -> dict[str, float]:
        return self.learner.take_sums()

    def restore(self, facts: StateFacts, snapshot: Snapshot | None = None) -> None:
        self.learner.restore(snapshot, facts, self.communicator.broadcast)

    def snapshot(self, args: tuple[int, bool, Mapping[str, Any] | None]) -> Snapshot | None:
        """Complete on rank 0; where weights are sharded, the others send their part."""
        step, moments, row = args
        with self.communicator.collective_errors():
            snapshot = self.learner.snapshot(step, moments=moments, row=row)
        return snapshot if self.communicator.rank == 0 else None

    def gather_weights(self, names: Sequence[str]) -> list[tuple[str, Tensor]] | None:
        """Some of the weights that the policy computes with, complete, on rank 0."""
        with self.communicator.collective_errors():
            weights = list(self.learner.weights.iter_weights(names))
        return weights if self.communicator.rank == 0 else None

    def checksums(self, _: None) -> dict[str, str]:
        return self.learner.checksums()

    def release(self, _: None) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def preflight(self, batch: MicroBatch) -> None:
        with self._working():
            self.learner.preflight(batch)

    def _portable(self, tensor: Tensor | None) -> Tensor | None:
        """Copy to the CPU, to be sent to another rank, which has another device."""
        return None if tensor is None else tensor.cpu()

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Use only this rank's share of the processors: all ranks work. Rank 0 samples with all of them."""
        before = torch.get_num_threads()
        wanted = self._threads or before
        if wanted != before:
            torch.set_num_threads(wanted)
        try:
            with self.communicator.collective_errors():
                yield
        finally:
            if wanted != before:
                torch.set_num_threads(before)


def load_shards(spec: LearnerSpec, device: torch.device) -> tuple[Learner, dict[str, str]]:
    """A learner that keeps this rank's part of the model of a folder, and checksums of what was read."""
    from dash_exp.learning.distributed.sharding import Across, Shards

    model = load_model(spec.folder, torch.float32, ATTENTION)  # in CPU memory, then layer by layer
    sums = {name: checksum(parameter) for name, parameter in model.named_parameters()}
    weights_factory = partial(Shards, across=Across.all_ranks(device))
    return Learner(model, spec.objective, spec.optimization, spec.forward, weights_factory), sums


def in_turn(communicator: Communicator, local_rank: int, work: Callable[[], Result]) -> Result:
    """Work that needs much of a machine's memory: one rank of each machine after the other."""
    here = torch.zeros(communicator.size)
    here[local_rank] = 1.0
    communicator.all_reduce(here)
    results: list[Result] = []
    for turn in range(int(here.count_nonzero())):
        if turn == local_rank:
            results.append(work())
        communicator.all_reduce(torch.zeros(1))
    return results[0]


class DistributedLearner:
    """The learner of all ranks, on rank 0; see `RoundLearner`."""

    def __init__(self, spec: LearnerSpec, coordinator: Coordinator, local_rank: int | None = None):
        """Build every rank's learner. Raises RuntimeError where they begin with different weights."""
        self.coordinator, self.width = coordinator, coordinator.size
        self.workers = tuple(f"learner-{n}" for n in range(self.width))
        self.worker = Worker(coordinator, local_rank)
        compare(self._all("build", spec))
        self.local = self.worker.learner
        self.sharded = self.local.weights.sharded

    @property
    def updates(self) -> int:
        return self.local.updates

    def reference_logprobs(self, ready: Round) -> list[Tensor | None]:
        """Log-probabilities of each micro-batch under the initial model; None without a KL term."""
        if self.local.objective.beta == 0:
            return [None] * len(ready)
        return self._each("reference_logprobs", ready)

    def logprobs(self, ready: Round) -> list[Tensor]:
        """Log-probabilities of each micro-batch under the current policy."""
        return self._each("logprobs", ready)

    def accumulate(
        self, ready: Round, references: Sequence[Tensor | None], old: Sequence[Tensor | None] | None = None
    ) -> list[MicroBatchResult]:
        """Forward and backward of each micro-batch on a rank of its own; see `Learner.accumulate`."""
        before = [None] * len(ready) if old is None else old
        return self._each("accumulate", list(zip(ready, references, before, strict=True)))

    def update(self, denominator: float) -> UpdateStats:
        """The update that all ranks made. Raises RuntimeError where one made another."""
        first, *others = self._all("update", denominator)
        for rank, other in enumerate(others, 1):
            if repr(other) != repr(first):  # NaN != NaN, so compare reprs
                raise RuntimeError(f"ranks made different updates: rank 0 {first}, rank {rank} {other}")
        stats: UpdateStats = first
        return stats

    def take_sums(self) -> dict[str, float]:
        """Sums over all ranks since the last call."""
        sums: dict[str, float] = {}
        for rank_sums in self._all("take_sums", None):
            for name, value in rank_sums.items():
                known = sums.get(name, 0.0)
                sums[name] = max(known, value) if name in LARGEST else known + value
        return sums

    def compute_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that the policy computes with, complete, by name, for a sampler with its own copy."""
        if not self.sharded:
            yield from self.local.weights.iter_weights()
            return
        for names in in_parts(self.local.weights):
            yield from self._all("gather_weights", names)[0]

    def snapshot(self, step: int, *, moments: bool = True, row: Mapping[str, Any] | None = None) -> Snapshot:
        """See `Learner.snapshot`; taken only where all ranks hold the same weights."""
        self.check_equal()
        if not self.sharded:
            return self.local.snapshot(step, moments=moments, row=row)
        snapshot: Snapshot = self._all("snapshot", (step, moments, row))[0]
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot, on every rank; it may be of any number of ranks, sharded or not."""
        facts = StateFacts.of(snapshot)
        self.coordinator.call("restore", [facts] * self.width, lambda: self.worker.restore(facts, snapshot))
        self.check_equal()

    def release(self) -> None:
        """Free GPU memory that is cached but unused, for other processes."""
        self._all("release", None)

    def preflight(self, micro_batch: MicroBatch) -> None:
        """Raises UserError where the largest micro-batch does not fit on some rank."""
        self._all("preflight", micro_batch)

    def check_equal(self) -> None:
        """Raises RuntimeError where ranks hold different weights. Sharded, no two of them hold the same."""
        if not self.sharded:
            compare(self._all("checksums", None))

    def _all(self, command: str, argument: Any) -> list[Any]:
        """Run a command with the same argument on every rank."""
        return self.coordinator.call(
            command, [argument] * self.width, lambda: self.worker.run(command, argument)
        )

    def _each(self, command: str, arguments: Sequence[Any]) -> list[Any]:
        """Run a command with an argument for each rank; None for those that get no micro-batch."""
        each = [*arguments, *[None] * (self.width - len(arguments))]
        results = self.coordinator.call(command, each, lambda: self.worker.run(command, each[0]))
        return results[: len(arguments)]


def compare(checksums: Sequence[Mapping[str, str]]) -> None:
    """Raises RuntimeError where the checksums of some rank are not those of rank 0."""
    first, *others = checksums
    for rank, sums in enumerate(others, 1):
        different = [name for name in first if sums.get(name) != first[name]]
        if different:
            raise RuntimeError(
                f"ranks 0 and {rank} hold different weights: {len(different)} tensors of {len(first)}, "
                f"the first of them {different[0]}"
            )


def in_parts(weights: Weights, size: int = BUCKET) -> Iterator[list[str]]:
    """The names of all tensors, some at a time: up to `size` numbers, or a larger one by itself."""
    part: list[str] = []
    numbers = 0
    for name in weights.names():
        count = weights.shape(name).numel()
        if part and numbers + count > size:
            yield part
            part, numbers = [], 0
        part.append(name)
        numbers += count
    yield part
