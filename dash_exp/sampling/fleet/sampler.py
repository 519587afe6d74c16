"""`sampler=vllm_servers`: one large batch on H servers, groups yielded as they finish.

The paper's preemptive sampling (arXiv 2505.17218): all completions of a step are requested at once, finished
groups wait in CPU memory, and the learner takes them one by one. `ServerSampler` is the interface to the
fleet (fleet.py), which runs in a thread of its own; the threads share only the queue of groups and the
events.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty
from typing import Any, TypeVar

from torch import Tensor

from dash_exp.errors import Fault, UserError
from dash_exp.sampling.fleet.fleet import Finished, Fleet, FleetSettings
from dash_exp.sampling.fleet.member import Member
from dash_exp.sampling.transfer import Transfer
from dash_exp.types import Decoding, Group, Request

Result = TypeVar("Result")
TICK_S = 0.005
"""How long the learner waits for a group before it may do other work."""


class ServerSampler:
    """Samples with servers that hold copies of the learner's weights."""

    def __init__(
        self,
        members: Sequence[Member],
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        transfer: Transfer,
        settings: FleetSettings,
        event: Callable[..., None],
        release: Callable[[], None] = lambda: None,
    ):
        """`event`: the recorder's, called in the thread that samples. `release`: frees memory that the
        learner holds but does not use; called before colocated servers wake up."""
        self.weights, self.settings, self.release = weights, settings, release
        self.policy_version = 0
        self.lengths = Lengths()
        self.sync_seconds: dict[str, float] = {}
        self._event, self._events = event, deque[tuple[tuple[Any, ...], dict[str, Any]]]()
        self._transfer = transfer
        self.fleet = Fleet(members, transfer, settings, self._queue_event)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fleet", daemon=True)
        self._thread.start()
        try:
            self._run(self.fleet.start())
            if settings.colocated:
                self._run(self.fleet.sleep())
        except BaseException:
            self.close()
            raise

    def _run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _queue_event(self, *what: Any, **more: Any) -> None:
        self._events.append((what, more))

    def _record_events(self) -> None:
        while self._events:
            what, more = self._events.popleft()
            self._event(*what, **more)

    def load_weights(self, version: int) -> None:
        """Send the learner's weights to every server, and wait until all that serve hold them."""
        weights = self._transfer.stage(self.weights(), version, f"{version}{self.settings.tag}")
        staged = time.perf_counter()
        if self.settings.colocated:
            self.release()
        try:
            self._run(self.fleet.load(weights))
        finally:
            self._record_events()
        self.sync_seconds = {**self._transfer.seconds, "load": time.perf_counter() - staged}
        self.policy_version = version

    def stream(
        self, requests: Sequence[Request], decoding: Decoding, at_once: int | None = None
    ) -> Iterator[Group | None]:
        """Each group once, as it finishes; None while none is ready."""
        finished: Finished = Finished()
        if self.settings.colocated:
            self.release()
        costs = [0.0 if self.settings.in_order else self.lengths.expected_tokens(r) for r in requests]
        self._run(self.fleet.sample(requests, costs, decoding, finished, at_once))
        left = len(requests)
        try:
            while left:
                group = _next(finished)
                self._record_events()
                if group is not None:
                    left -= 1
                    self.lengths.add(group)
                yield group
        finally:
            self._run(self.fleet.abandon())
            if self.settings.colocated:
                self._run(self.fleet.sleep())
            self._record_events()

    def close(self) -> None:
        """End the servers that were started here."""
        if self._loop.is_running():
            self._run(self.fleet.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(30)
            self._loop.close()
        self._transfer.close()
        self._record_events()


def _next(finished: Finished) -> Group | None:
    """The next group; None if none is ready soon. Raises what the fleet reports."""
    try:
        found = finished.get(timeout=TICK_S)
    except Empty:
        return None
    if isinstance(found, Exception):
        raise found
    return found


class Lengths:
    """How long completions are likely to be: as for the same prompt before, else as for all prompts."""

    def __init__(self) -> None:
        self._of: dict[tuple[str, str], float] = {}
        self._sum = self._count = 0.0

    def add(self, group: Group) -> None:
        lengths = [len(c.token_ids) for c in group.completions]
        self._of[group.prompt.task, group.prompt.id] = sum(lengths) / len(lengths)
        self._sum, self._count = self._sum + sum(lengths), self._count + len(lengths)

    def expected_tokens(self, request: Request) -> float:
        """Tokens that a server computes for this request; its prompt is computed once."""
        mean = self._sum / self._count if self._count else 1.0
        own = self._of.get((request.prompt.task, request.prompt.id), mean)
        return len(request.prompt.token_ids) + len(request.seeds) * own


@dataclass(frozen=True, slots=True)
class Processors:
    """`servers`: the processors of each server. `learner`: its number of threads."""

    servers: tuple[tuple[int, ...], ...]
    learner: int


def processors(available: Sequence[int], servers: int, each: int | None, overlapped: bool) -> Processors:
    """Split this machine's processors among servers and learner. While both work at the same time
    (`overlapped`) the learner gets half of them; else both use all. `each`: processors of a server, if set.

    Two multi-threaded programs on the same processors wait for each other at every matrix product, so servers
    are bound to the last ones, and only to as many as there are.
    """
    count = len(available)
    if each is None:
        each = max(1, (count // 2 if overlapped else count) // servers)
    taken = [
        tuple(available[-1 - (n % count)] for n in range(i * each, (i + 1) * each)) for i in range(servers)
    ]
    free = count - servers * each if overlapped else count
    return Processors(tuple(tuple(sorted(set(cores))) for cores in taken), max(1, free))


def gpus(count: int, servers: int, learners: Sequence[int], colocated: bool = False) -> tuple[str, ...]:
    """The GPU of each server, by its CUDA index among `count`; `learners`: those of the learner's ranks.
    `colocated`: the learner's come first and serve both, and servers sleep while the learner works.

    Raises UserError where there are too few.
    """
    others = [n for n in range(count) if n not in learners]
    free = [str(n) for n in ([*learners, *others] if colocated else others)]
    if len(free) < servers:
        what = f"got {servers}, but beside the {len(learners)} of the learner there are {len(free)} GPUs here"
        hint = f"allowed: 1 to {len(free)}; or " if free else ""
        hint += "share with sampler.colocated=true, or name servers elsewhere in cluster.server_urls"
        raise UserError(Fault("sampler.servers", what, hint))
    return tuple(free[:servers])
