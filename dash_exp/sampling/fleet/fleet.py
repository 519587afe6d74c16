"""Several servers as one: which requests go where, which servers are up, which weights they hold.

Everything here runs in one event loop, in a thread of its own, beside the learner. A server that ends, hangs
or sends invalid responses is *lost*: its unfinished completions go back to the others at once, and it is
restarted, within a budget, and gets the current weights before it is asked anything.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from dash_exp.errors import Fault, UserError
from dash_exp.sampling.fleet.client import (
    BASE_LABEL,
    CALL_ERRORS,
    RefusedError,
    ServerClient,
    completion_request,
    describe,
    parse_completion,
)
from dash_exp.sampling.fleet.member import POLL_S, Launch, Member, Pending, RestartPolicy, ServerKilledError
from dash_exp.sampling.transfer import OutdatedError, Transfer, Weights
from dash_exp.types import Completion, Decoding, Group, Origin, Request

Finished = SimpleQueue[Group | Exception]
"""Groups in the order in which they finish; an exception means that no more will come."""
SLEEP, WAKE = "/sleep?level=1", "/wake_up"
"""Level 1: weights move to CPU memory, the cache is dropped."""
KEPT = "what was recorded is kept"
GONE = "the events of this cell say more; the same command resumes from the last checkpoint"


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """How a fleet samples. `max_sequences`: completions that a server decodes at once. `in_order`: groups are
    started in the batch's order, else the most expensive first. `colocated`: servers sleep while they have
    nothing to sample. `tag`: appended to the names of weights, where other runs may use the same servers."""

    vocabulary: int
    max_sequences: int
    decode: Callable[[Sequence[int]], str]
    launch: Launch
    policy: RestartPolicy
    in_order: bool = False
    colocated: bool = False
    tag: str = ""


@dataclass(eq=False)
class Batch:
    """What is being sampled now. `label`: the servers' name for the weights of `version`. `limit`: at most
    the completions of this many groups are in flight, over all servers."""

    decoding: Decoding
    version: int
    label: str
    finished: Finished
    queue: deque[Pending]
    limit: int | None


class Fleet:
    """All methods run within the event loop; `ServerSampler` is the interface for other threads."""

    def __init__(
        self,
        members: Sequence[Member],
        transfer: Transfer,
        settings: FleetSettings,
        event: Callable[..., None],
    ):
        self.members, self.transfer = list(members), transfer
        self.settings, self.event = settings, event
        self.restarts_left = settings.policy.restarts
        self.weights: Weights | None = None
        self.asleep = False
        self.batch: Batch | None = None
        self.changed = asyncio.Condition()
        self.background: set[asyncio.Task[None]] = set()

    # --- members: start, watch, lose, restart ---

    async def start(self) -> None:
        """Start or reach every server, and wait until all serve. Raises RuntimeError if one cannot be
        started, UserError if one that is named cannot be reached or does not fit."""
        await asyncio.gather(*(self._start_first(m) for m in self.members))

    async def _start_first(self, member: Member) -> None:
        """Start a server for the first time; again, within the budget of restarts, where it was killed."""
        while True:
            start = time.time()
            try:
                return await self._start(member, first=True)
            except ServerKilledError as error:
                more = {"reason": str(error), "restarts_left": self.restarts_left}
                self._record_fault(member, "server killed while starting", start, **more)
                if self.restarts_left == 0:
                    raise RuntimeError(f"{error}\nnot started again: no sampler.restarts left") from error
                self.restarts_left -= 1

    async def _start(self, member: Member, first: bool = False) -> None:
        try:
            await member.start(self.settings.launch, self.settings.policy, first)
            await self._until_ready(member)
        except BaseException:
            await self._stop(member)
            raise
        member.state, member.last_token = "serving", time.monotonic()
        member.watch = asyncio.create_task(self._watch(member))
        await self._notify()

    async def _until_ready(self, member: Member) -> None:
        """Until it holds the current weights, and sleeps if the fleet does; both may change meanwhile."""
        assert member.client is not None
        held: Weights | None = None
        asleep = False
        while held is not self.weights or asleep != self.asleep:
            if asleep and (held is not self.weights or not self.asleep):
                asleep = False
                await member.client.call(WAKE)
            elif held is not self.weights:
                held = await self._send_weights(member.client)
            else:
                asleep = True
                await member.client.call(SLEEP)

    async def _send_weights(self, client: ServerClient) -> Weights | None:
        """The weights that were sent; None if newer ones are being staged."""
        weights = self.weights
        assert weights is not None
        try:
            await self.transfer.send(client, weights)
        except OutdatedError:
            await asyncio.sleep(POLL_S)
            return None
        return weights

    async def _stop(self, member: Member) -> None:
        if member.client is not None:
            self.transfer.disconnect(member.client)
        await member.stop()

    async def _watch(self, member: Member) -> None:
        if reason := await member.wait_for_failure(self.settings.policy):
            await self.lose(member, reason)

    async def lose(self, member: Member, reason: str) -> None:
        """Give its unfinished groups to the others, end it, and restart it if that is allowed."""
        if member.state != "serving":
            return
        member.state, member.reason = "lost", reason
        groups = sorted(member.pending)
        more = {"groups": groups, "log": member.log_tail(), "restarts_left": self.restarts_left}
        self._record_fault(member, "server lost", time.time(), reason=reason, **more)
        if self.batch is not None:
            self.batch.queue.extendleft(member.pending[p] for p in reversed(groups))
        self._cancel_requests(member)
        restart = asyncio.create_task(self._restart(member))
        self.background.add(restart)
        restart.add_done_callback(self.background.discard)
        await self._notify()

    def _record_fault(self, member: Member, what: str, start: float, **more: Any) -> None:
        self.event("fault", start, time.time(), what=what, worker=member.name, **more)

    @staticmethod
    def _cancel_requests(member: Member) -> None:
        current = asyncio.current_task()
        for task in member.tasks:
            if task is not current:
                task.cancel()
        member.tasks, member.pending = set(), {}

    async def _restart(self, member: Member) -> None:
        """Restart a lost server as often as is allowed; one that was started by hand is waited for once."""
        await self._stop(member)
        while self.restarts_left > 0:
            self.restarts_left -= 1
            start = time.time()
            member.state = "starting"
            try:
                await self._start(member)
            except (RuntimeError, UserError, *CALL_ERRORS) as error:
                member.state = "lost"
                self._record_fault(member, "server did not start again", start, reason=describe(error))
                if member.settings is None:
                    break
                continue
            self.event("restart", start, time.time(), worker=member.name, version=self._version)
            return
        member.state = "gone"
        await self._notify()

    @property
    def serving(self) -> list[Member]:
        return [m for m in self.members if m.state == "serving"]

    def all_gone(self) -> bool:
        return all(m.state == "gone" for m in self.members)

    def _gone(self) -> UserError:
        reasons = "; ".join(f"{m.name} at {m.url}: {m.reason}" for m in self.members)
        return UserError(Fault("sampler.restarts", f"every server is lost: {reasons}", GONE), KEPT)

    async def _notify(self) -> None:
        """The state of a server changed: assign requests, and wake the tasks that wait for it."""
        self._assign()
        if self.batch is not None and self.all_gone():
            self.batch.finished.put(self._gone())
        async with self.changed:
            self.changed.notify_all()

    # --- weights ---

    @property
    def _version(self) -> int:
        return 0 if self.weights is None else self.weights.version

    async def load(self, weights: Weights) -> int:
        """Load these weights into every serving server, all at once; one that fails is lost. Returns how many
        hold them. Raises UserError when none is left."""
        await self.wake()
        self.weights = weights
        await self._call_all(lambda client: self.transfer.send(client, weights), "failed to load weights")
        async with self.changed:
            await self.changed.wait_for(lambda: self.serving or self.all_gone())
        if not self.serving:
            raise self._gone()
        return len(self.serving)

    async def _call_all(self, call: Callable[[ServerClient], Awaitable[Any]], failure: str) -> None:
        """The same call of every serving server at once; one that fails is lost."""

        async def one(member: Member) -> None:
            assert member.client is not None
            try:
                await call(member.client)
            except (RefusedError, *CALL_ERRORS) as error:
                await self.lose(member, f"{failure}: {describe(error)}")

        await asyncio.gather(*(one(m) for m in self.serving))

    async def sleep(self) -> None:
        """Free the GPU's memory for the learner, until `wake`."""
        if not self.asleep:
            self.asleep = True
            await self._call_all(lambda client: client.call(SLEEP), "failed to go to sleep")

    async def wake(self) -> None:
        if self.asleep:
            self.asleep = False
            await self._call_all(lambda client: client.call(WAKE), "failed to wake up")

    # --- sampling ---

    async def sample(
        self,
        requests: Sequence[Request],
        costs: Sequence[float],
        decoding: Decoding,
        finished: Finished,
        limit: int | None,
    ) -> None:
        """Start a batch; its groups are put into `finished`. `costs`: tokens that each is expected to
        take."""
        await self.wake()
        pending = [Pending(r, [None] * len(r.seeds), cost) for r, cost in zip(requests, costs, strict=True)]
        queue = deque(sorted(pending, key=lambda one: -one.cost))
        label = BASE_LABEL if self.weights is None else self.weights.label
        self.batch = Batch(decoding, self._version, label, finished, queue, limit)
        await self._notify()

    async def abandon(self) -> None:
        """Cancel the rest of this batch."""
        self.batch = None
        for member in self.members:
            self._cancel_requests(member)

    def _assign(self) -> None:
        """Send groups to servers, each to the one with the lowest cost pending. A limit of groups counts
        their completions: a new group starts as soon as enough of any have finished."""
        batch, now = self.batch, time.time()
        if batch is None:
            return
        while batch.queue:
            size, full = len(batch.queue[0].missing), len(batch.queue[0].sampled)
            in_flight = sum(m.completions for m in self.members)
            if batch.limit is not None and in_flight + size > batch.limit * full:
                return
            most = self.settings.max_sequences
            free = [m for m in self.serving if not m.pending or m.completions + size <= most]
            if not free:
                return
            self._submit(min(free, key=lambda m: m.cost), batch.queue.popleft(), batch, now)

    def _submit(self, member: Member, pending: Pending, batch: Batch, now: float) -> None:
        pending.start = now
        if not member.pending:
            member.last_token = time.monotonic()
        member.pending[pending.request.position] = pending
        for index in pending.missing:
            task = asyncio.create_task(self._complete(member, pending, index, batch))
            member.tasks.add(task)
            task.add_done_callback(member.tasks.discard)

    async def _complete(self, member: Member, pending: Pending, index: int, batch: Batch) -> None:
        assert member.client is not None
        request = pending.request
        body = completion_request(request.prompt.token_ids, request.seeds[index], batch.decoding)
        try:
            reply = await member.client.generate(body)
            sampled = parse_completion(reply, batch.decoding, self.settings.vocabulary, batch.label)
        except RefusedError as error:
            batch.finished.put(RuntimeError(f"{member.name} refuses the prompt {request.prompt.id}: {error}"))
            return
        except CALL_ERRORS as error:
            await self.lose(member, describe(error))
            return
        if batch is not self.batch or member.pending.get(request.position) is not pending:
            return  # the server was taken for lost, and the request went to another one
        pending.sampled[index] = sampled
        member.last_token = time.monotonic()
        if not pending.missing:
            del member.pending[request.position]
            batch.finished.put(self._group(member, pending, batch.version))
        self._assign()

    def _group(self, member: Member, pending: Pending, version: int) -> Group:
        decode = self.settings.decode
        completions = tuple(
            Completion(s.token_ids, s.logprobs, decode(s.token_ids), s.finish_reason, version)
            for s in pending.sampled
            if s is not None
        )
        origin = Origin(member.name, pending.start, time.time())
        return Group(pending.request.position, pending.request.prompt, completions, origin)

    async def close(self) -> None:
        await self.abandon()
        for task in list(self.background):
            task.cancel()
        await asyncio.gather(*self.background, return_exceptions=True)
        for member in self.members:
            member.state = "gone"
            await self._stop(member)
