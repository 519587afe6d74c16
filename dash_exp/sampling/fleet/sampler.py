"""`sampler=vllm_servers`: one large batch over H servers, groups handed on as they finish.

The paper's preemptive sampling (arXiv 2505.17218): all completions of a step are asked for at once, wait
in CPU memory (delivery.py), and are taken group by group. The door to the fleet (fleet.py), which lives in
a thread of its own; nothing else is shared between the threads but the store and the events.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from dash_exp.sampling.fleet.delivery import Delivery
from dash_exp.sampling.fleet.fleet import Fleet
from dash_exp.sampling.fleet.member import Member, Patience
from dash_exp.sampling.fleet.server_process import LAUNCH
from dash_exp.sampling.transfer.base import Transfer
from dash_exp.types import Decoding, Group, Request

Result = TypeVar("Result")
TICK_S = 0.005
"""How long the learner waits for a group before it may look after something else."""


class ServerSampler:
    """Samples with servers that hold copies of the learner's weights."""

    def __init__(
        self,
        members: Sequence[Member],
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        transfer: Transfer,
        *,
        key: str,
        folder: Path,
        vocabulary: int,
        max_sequences: int,
        decode: Callable[[Sequence[int]], str],
        restarts: int,
        patience: Patience,
        in_order: bool,
        colocated: bool,
        event: Callable[..., None],
        command: Sequence[str] = LAUNCH,
        tag: str = "",
        release: Callable[[], None] = lambda: None,
    ):
        """`folder`: for logs. `tag`: put to the names of weights, where others may bring theirs to the same
        servers. `in_order`: ask in the batch's order, not the longest first. `colocated`: the
        servers sleep while they have nothing to sample; `release`: the learner gives memory back that it has
        no use for, called before they wake up. `event`: the recorder's, called in the thread that samples."""
        self.weights, self.in_order, self.colocated, self.release = weights, in_order, colocated, release
        self.policy_version = 0
        self.lengths = Lengths()
        self._event, self._events = event, deque[tuple[tuple[Any, ...], dict[str, Any]]]()
        self._transfer, self._tag = transfer, tag
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fleet", daemon=True)
        self._thread.start()
        self.sync_seconds: dict[str, float] = {}
        try:
            self.fleet = self._run(
                self._make(
                    members,
                    transfer=transfer,
                    key=key,
                    folder=folder,
                    vocabulary=vocabulary,
                    max_sequences=max_sequences,
                    decode=decode,
                    event=self._note,
                    restarts=restarts,
                    patience=patience,
                    command=command,
                )
            )
            self._run(self.fleet.start())
            if colocated:
                self._run(self.fleet.sleep())
        except BaseException:
            self.close()
            raise

    @staticmethod
    async def _make(members: Sequence[Member], **more: Any) -> Fleet:
        return Fleet(members, **more)  # within the loop

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _note(self, *what: Any, **more: Any) -> None:
        self._events.append((what, more))

    def _tell_events(self) -> None:
        while self._events:
            what, more = self._events.popleft()
            self._event(*what, **more)

    def load_weights(self, version: int) -> None:
        """Hand the learner's weights to every server, and wait until all that serve hold them."""
        weights = self._transfer.stage(self.weights(), version, f"{version}{self._tag}")
        staged = time.perf_counter()
        if self.colocated:
            self.release()
        try:
            self._run(self.fleet.load(weights))
        finally:
            self._tell_events()
        self.sync_seconds = {**self._transfer.seconds, "load": time.perf_counter() - staged}
        self.policy_version = version

    def stream(
        self, requests: Sequence[Request], decoding: Decoding, at_once: int | None = None
    ) -> Iterator[Group | None]:
        """Each group once, as it finishes; None while none is there."""
        delivery = Delivery(r.position for r in requests)
        if self.colocated:
            self.release()
        work = [0.0 if self.in_order else self.lengths.work(r) for r in requests]
        self._run(self.fleet.sample(requests, work, decoding, delivery, at_once))
        left = len(requests)
        try:
            while left:
                group = delivery.take(TICK_S)
                self._tell_events()
                if group is not None:
                    left -= 1
                    self.lengths.add(group)
                yield group
        finally:
            self._run(self.fleet.abandon())
            if self.colocated:
                self._run(self.fleet.sleep())
            self._tell_events()

    def close(self) -> None:
        """End the servers that were started here."""
        if self._loop.is_running():
            if hasattr(self, "fleet"):
                self._run(self.fleet.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(30)
            self._loop.close()
        self._transfer.close()
        self._tell_events()


class Lengths:
    """How long completions are likely to be: of the same prompt when it was asked before, else of all."""

    def __init__(self) -> None:
        self._of: dict[tuple[str, str], float] = {}
        self._sum = self._count = 0.0

    def add(self, group: Group) -> None:
        lengths = [len(c.token_ids) for c in group.completions]
        self._of[group.prompt.task, group.prompt.id] = sum(lengths) / len(lengths)
        self._sum, self._count = self._sum + sum(lengths), self._count + len(lengths)

    def work(self, request: Request) -> float:
        """Tokens that this request is expected to cost; its prompt is computed once."""
        mean = self._sum / self._count if self._count else 1.0
        own = self._of.get((request.prompt.task, request.prompt.id), mean)
        return len(request.prompt.token_ids) + len(request.seeds) * own
