"""The learner of a run, over one rank or several: rounds of micro-batches in, one update out.

    reference_logprobs(round), logprobs(round), accumulate(round)   one micro-batch a rank, at the same time
    update(denominator)      gradient sums added over the ranks once, then the same update on every rank
    take_sums()              the ranks' sums for the metrics, added

Rank 0 is the process that samples, judges and records. With one rank nothing is sent anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from dash_exp.learning.agreement import BUCKET, facts_of
from dash_exp.learning.distributed.links import Alone, Links
from dash_exp.learning.distributed.member import Done, Member, Spec, Work
from dash_exp.learning.learner import Learner
from dash_exp.learning.packing import MicroBatch
from dash_exp.learning.rounds import Round
from dash_exp.learning.settings import UpdateStats
from dash_exp.learning.weights import Weights
from dash_exp.record.checkpoint import Snapshot

LARGEST = ("gpu_peak_mb", "update/reduce_s")
"""Of these sums the largest rank's counts."""


class ParallelLearner:
    """Rank 0's view of all ranks."""

    def __init__(self, member: Member, links: Links):
        self.member, self.links, self.width = member, links, links.width
        self.workers = ["learner"] if self.width == 1 else [f"learner-{n}" for n in range(self.width)]

    @classmethod
    def of(cls, spec: Spec, links: Links, local_rank: int | None = None) -> ParallelLearner:
        """Build every rank's learner; they begin equal, which is checked."""
        made = cls(Member(links, local_rank), links)
        compare(made._all("build", spec))
        return made

    @classmethod
    def alone(cls, learner: Learner) -> ParallelLearner:
        links = Alone()
        return cls(Member(links, learner=learner), links)

    @property
    def local(self) -> Learner:
        """Rank 0's own learner: its weights are everybody's."""
        return self.member.learner

    @property
    def updates(self) -> int:
        return self.local.updates

    def reference_logprobs(self, ready: Round) -> list[Tensor | None]:
        """Of each micro-batch under the initial model; None where the objective has no KL term."""
        if self.local.objective.beta == 0:
            return [None] * len(ready)
        return self._each("reference", ready)[: len(ready)]

    def logprobs(self, ready: Round) -> list[Tensor]:
        return self._each("score", ready)[: len(ready)]

    def accumulate(
        self, ready: Round, references: Sequence[Tensor | None], old: Sequence[Tensor | None] | None = None
    ) -> list[Done]:
        """Forward and backward of each micro-batch on a rank of its own; see `Learner.accumulate`."""
        before = [None] * len(ready) if old is None else old
        work = [Work(*one) for one in zip(ready, references, before, strict=True)]
        return self._each("accumulate", work)[: len(ready)]

    def update(self, denominator: float) -> UpdateStats:
        first, *others = self._all("update", denominator)
        for rank, stats in enumerate(others, 1):
            if repr(stats) != repr(first):  # NaN is no reason to disagree
                raise RuntimeError(f"ranks made different updates: rank 0 {first}, rank {rank} {stats}")
        made: UpdateStats = first
        return made

    def take_sums(self) -> dict[str, float]:
        """Sums over all ranks since the last call."""
        sums: dict[str, float] = {}
        for own in self._all("take_sums", None):
            for name, value in own.items():
                known = sums.get(name, 0.0)
                sums[name] = max(known, value) if name in LARGEST else known + value
        return sums

    @property
    def sharded(self) -> bool:
        return self.member.sharded

    def compute_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights the policy computes with, whole, by name, for a sampler that holds its own."""
        if not self.sharded:
            yield from self.local.weights.computed()
            return
        for names in in_parts(self.local.weights):
            yield from self._all("computed", names)[0]

    def snapshot(self, step: int, *, moments: bool = True, row: Mapping[str, Any] | None = None) -> Snapshot:
        """See `Learner.snapshot`; taken only where all ranks hold the same weights."""
        self.check_equal()
        if not self.sharded:
            return self.local.snapshot(step, moments=moments, row=row)
        made: Snapshot = self._all("snapshot", (step, moments, row))[0]
        return made

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot, on every rank; it may come from any number of ranks, sharded or not."""
        facts = facts_of(snapshot)
        self.links.call("take_state", [facts] * self.width, lambda: self.member.take_state(facts, snapshot))
        self.check_equal()

    def release(self) -> None:
        """Give memory back that GPUs hold for nothing, to others that want it."""
        self._all("release", None)

    def preflight(self, batch: MicroBatch) -> None:
        """Raises UserError where the largest micro-batch does not fit on some rank."""
        self._all("preflight", batch)

    def check_equal(self) -> None:
        """Raises RuntimeError where ranks hold different weights. Sharded, no two of them hold the same."""
        if self.width > 1 and not self.sharded:
            compare(self._all("fingerprint", None))

    def close(self) -> None:
        self.links.close()

    def _all(self, name: str, given: Any) -> list[Any]:
        """The same for every rank."""
        return self.links.call(name, [given] * self.width, lambda: self.member.perform(name, given))

    def _each(self, name: str, given: Sequence[Any]) -> list[Any]:
        """For every rank its own; None, an empty micro-batch, for those that there is nothing for."""
        each = [*given, *[None] * (self.width - len(given))]
        return self.links.call(name, each, lambda: self.member.perform(name, each[0]))


def compare(found: Sequence[Mapping[str, str]]) -> None:
    """Raises RuntimeError where the checksums of some rank are not those of rank 0."""
    first, *others = found
    for rank, sums in enumerate(others, 1):
        different = [name for name in first if sums.get(name) != first[name]]
        if different:
            raise RuntimeError(
                f"ranks 0 and {rank} hold different weights: {len(different)} tensors of {len(first)}, "
                f"the first of them {different[0]}"
            )


def in_parts(weights: Weights, size: int = BUCKET) -> Iterator[list[str]]:
    """The names of all tensors, some at a time: up to `size` numbers, or a larger one alone."""
    waiting: list[str] = []
    numbers = 0
    for name in weights.names():
        own = weights.shape(name).numel()
        if waiting and numbers + own > size:
            yield waiting
            waiting, numbers = [], 0
        waiting.append(name)
        numbers += own
    yield waiting
