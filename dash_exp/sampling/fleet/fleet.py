"""Several servers as one: who answers what, who is alive, who holds which weights. Torch-free.

Everything here runs in one event loop, in a thread of its own, beside the learner. A server that dies,
hangs or answers nonsense is *lost*: its unfinished completions go back to the others at once, and it is
started again, within a budget, and gets the current weights before it is asked anything.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from dash_exp.errors import Fault, UserError
from dash_exp.sampling.fleet.answers import BASE_LABEL, question, read_answer
from dash_exp.sampling.fleet.client import RefusedError, ServerClient
from dash_exp.sampling.fleet.delivery import Delivery
from dash_exp.sampling.fleet.member import FAULTS, POLL_S, Member, Patience
from dash_exp.sampling.fleet.server_process import LAUNCH
from dash_exp.sampling.fleet.work import Batch, Owed
from dash_exp.sampling.transfer.base import OutdatedError, Transfer, Weights
from dash_exp.types import Completion, Decoding, Group, Origin, Request

Event = Callable[..., None]
SLEEP, WAKE = "/sleep?level=1", "/wake_up"
"""Level 1: weights go to CPU memory, the cache is given up."""


class Fleet:
    """All methods are coroutines or are called within the loop; `servers.py` is the door for others."""

    def __init__(
        self,
        members: Sequence[Member],
        transfer: Transfer,
        *,
        key: str,
        folder: Path,
        vocabulary: int,
        max_sequences: int,
        decode: Callable[[Sequence[int]], str],
        event: Event,
        restarts: int,
        patience: Patience,
        command: Sequence[str] = LAUNCH,
    ):
        self.members, self.transfer = list(members), transfer
        self.key, self.folder, self.vocabulary = key, folder, vocabulary
        self.max_sequences, self.decode, self.event = max_sequences, decode, event
        self.restarts_left, self.patience, self.command = restarts, patience, command
        self.weights: Weights | None = None
        self.asleep = False
        self.batch: Batch | None = None
        self.changed = asyncio.Condition()
        self.background: set[asyncio.Task[None]] = set()

    # --- members: start, watch, lose, start again ---

    async def start(self) -> None:
        """Start every server, or find it where it is named, and wait until all serve. Raises RuntimeError if
        one cannot be started, UserError if one that is named is not there or does not fit."""
        await asyncio.gather(*(self._begin(m) for m in self.members))

    async def _begin(self, member: Member) -> None:
        try:
            await member.begin(self.key, self.folder, self.command, self.patience)
            await self._until_ready(member)
        except BaseException:
            await self._put_away(member)
            raise
        member.state, member.last_token = "serving", time.monotonic()
        member.watch = asyncio.create_task(self._watch(member))
        await self._tell()

    async def _until_ready(self, member: Member) -> None:
        """Until it holds the weights and sleeps if all do. Both may change meanwhile: then once more."""
        assert member.client is not None
        held: Weights | None = None
        asleep = False
        while held is not self.weights or asleep != self.asleep:
            if asleep and (held is not self.weights or not self.asleep):
                asleep = False
                await member.client.call(WAKE)
            elif held is not self.weights:
                held = await self._sent(member.client)
            else:
                asleep = True
                await member.client.call(SLEEP)

    async def _sent(self, client: ServerClient) -> Weights | None:
        """Send the weights; None if newer ones are on their way here."""
        weights = self.weights
        assert weights is not None
        try:
            await self.transfer.send(client, weights)
        except OutdatedError:
            await asyncio.sleep(POLL_S)
            return None
        return weights

    async def _put_away(self, member: Member) -> None:
        if member.client is not None:
            self.transfer.forget(member.client)
        await member.put_away()

    async def _watch(self, member: Member) -> None:
        if reason := await member.trouble(self.patience):
            await self.lose(member, reason)

    async def lose(self, member: Member, reason: str) -> None:
        """Give its unfinished groups to the others, end it, and start it again if that is allowed."""
        if member.state != "serving":
            return
        member.state, member.reason = "lost", reason
        back = sorted(member.owed)
        now = time.time()
        self.event(
            "fault",
            now,
            now,
            what="server lost",
            worker=member.name,
            reason=reason,
            groups=back,
            log=member.log_tail(),
            restarts_left=self.restarts_left,
        )
        if self.batch is not None:
            self.batch.queue.extendleft(member.owed[p] for p in reversed(back))
        member.owed = {}
        me = asyncio.current_task()
        for task in [t for t in member.tasks if t is not me]:
            task.cancel()
        member.tasks = set()
        self._in_background(self._again(member))
        await self._tell()

    async def _again(self, member: Member) -> None:
        """Start a lost server again, or wait for one that was started by hand, as often as is allowed."""
        await self._put_away(member)
        while self.restarts_left > 0:
            self.restarts_left -= 1
            start = time.time()
            member.state = "starting"
            try:
                await self._begin(member)
            except (RuntimeError, UserError, *FAULTS) as error:
                member.state = "lost"
                self.event(
                    "fault",
                    start,
                    time.time(),
                    what="server did not start again",
                    worker=member.name,
                    reason=str(error),
                )
                if member.settings is not None:
                    continue
                break
            self.event("restart", start, time.time(), worker=member.name, version=self._version)
            return
        member.state = "gone"
        await self._tell()

    def _in_background(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self.background.add(task)
        task.add_done_callback(self.background.discard)

    @property
    def serving(self) -> list[Member]:
        return [m for m in self.members if m.state == "serving"]

    def all_gone(self) -> bool:
        return all(m.state == "gone" for m in self.members)

    def _gone(self) -> UserError:
        reasons = "; ".join(f"{m.name} at {m.url}: {m.reason}" for m in self.members)
        return UserError(Fault("sampler.restarts", f"every server is lost: {reasons}", GONE), KEPT)

    async def _tell(self) -> None:
        """Something changed: whoever waits may look again, and free servers get work."""
        self._assign()
        if self.batch is not None and self.all_gone():
            self.batch.delivery.fail(self._gone())
        async with self.changed:
            self.changed.notify_all()

    # --- weights ---

    @property
    def _version(self) -> int:
        return 0 if self.weights is None else self.weights.version

    async def load(self, weights: Weights) -> int:
        """Every serving server gets these weights, all at once; one that cannot take them is lost. Returns
        how many hold them. Raises UserError when none is left."""
        await self.wake()
        self.weights = weights
        await self._all(lambda client: self.transfer.send(client, weights), "took no weights")
        async with self.changed:
            await self.changed.wait_for(lambda: self.serving or self.all_gone())
        if not self.serving:
            raise self._gone()
        return len(self.serving)

    async def _all(self, call: Callable[[ServerClient], Awaitable[Any]], trouble: str) -> None:
        """The same of every serving server at once; one that fails is lost."""

        async def one(member: Member) -> None:
            assert member.client is not None
            try:
                await call(member.client)
            except (RefusedError, *FAULTS) as error:
                await self.lose(member, f"{trouble}: {type(error).__name__} {error}")

        await asyncio.gather(*(one(m) for m in self.serving))

    async def sleep(self) -> None:
        """Give the GPU's memory to the learner, until `wake`."""
        if not self.asleep:
            self.asleep = True
            await self._all(lambda client: client.call(SLEEP), "did not go to sleep")

    async def wake(self) -> None:
        if self.asleep:
            self.asleep = False
            await self._all(lambda client: client.call(WAKE), "did not wake up")

    # --- sampling ---

    async def sample(
        self,
        requests: Sequence[Request],
        work: Sequence[float],
        decoding: Decoding,
        delivery: Delivery,
        limit: int | None,
    ) -> None:
        """Begin with a batch; its groups come through `delivery`. `work`: what each is expected to cost."""
        await self.wake()
        owed = [Owed(r, [None] * len(r.seeds), w) for r, w in zip(requests, work, strict=True)]
        queue = deque(sorted(owed, key=lambda one: -one.work))
        label = BASE_LABEL if self.weights is None else self.weights.label
        self.batch = Batch(decoding, self._version, label, delivery, queue, limit)
        await self._tell()

    async def abandon(self) -> None:
        """Nobody waits for the rest of this batch."""
        self.batch = None
        for member in self.members:
            for task in member.tasks:
                task.cancel()
            member.tasks, member.owed = set(), {}

    def _assign(self) -> None:
        """Hand groups to servers, the largest first, each to the one with the least work. A limit of groups
        means their completions: whichever are done make room for the next group's."""
        batch, now = self.batch, time.time()
        if batch is None:
            return
        while batch.queue:
            size, whole = len(batch.queue[0].missing), len(batch.queue[0].answers)
            on_way = sum(m.completions for m in self.members)
            if batch.limit is not None and on_way + size > batch.limit * whole:
                return
            room = [m for m in self.serving if not m.owed or m.completions + size <= self.max_sequences]
            if not room:
                return
            self._ask(min(room, key=lambda m: m.work), batch.queue.popleft(), batch, now)

    def _ask(self, member: Member, owed: Owed, batch: Batch, now: float) -> None:
        owed.start, owed.asked = now, owed.asked + 1
        if not member.owed:
            member.last_token = time.monotonic()
        member.owed[owed.request.position] = owed
        for index in owed.missing:
            task = asyncio.create_task(self._complete(member, owed, index, batch))
            member.tasks.add(task)
            task.add_done_callback(member.tasks.discard)

    async def _complete(self, member: Member, owed: Owed, index: int, batch: Batch) -> None:
        assert member.client is not None
        request = owed.request
        asked = question(request.prompt.token_ids, request.seeds[index], batch.decoding)
        try:
            reply = await member.client.generate(asked)
            answer = read_answer(reply, batch.decoding, self.vocabulary, batch.label)
        except RefusedError as error:
            batch.delivery.fail(
                RuntimeError(f"{member.name} refuses the prompt {request.prompt.id}: {error}")
            )
            return
        except FAULTS as error:
            await self.lose(member, f"{type(error).__name__} {error}")
            return
        if batch is not self.batch or member.owed.get(request.position) is not owed:
            return  # it was thought lost, and somebody else was asked
        owed.answers[index], owed.ends[index] = answer, time.time()
        member.last_token = time.monotonic()
        if not owed.missing:
            del member.owed[request.position]
            batch.delivery.put(self._group(member, owed, batch.version))
        self._assign()

    def _group(self, member: Member, owed: Owed, version: int) -> Group:
        completions = tuple(
            Completion(a.token_ids, a.logprobs, self.decode(a.token_ids), a.finish_reason, version)
            for a in owed.answers
            if a is not None
        )
        ends = tuple(owed.ends[index] for index in range(len(completions)))
        origin = Origin(member.name, owed.start, max(ends), ends if owed.asked == 1 else ())
        return Group(owed.request.position, owed.request.prompt, completions, origin)

    async def close(self) -> None:
        await self.abandon()
        for task in list(self.background):
            task.cancel()
        await asyncio.gather(*self.background, return_exceptions=True)
        for member in self.members:
            member.state = "gone"
            await self._put_away(member)


KEPT = "what was recorded is kept"
GONE = "the events of this cell tell more; the same command goes on from the last checkpoint"
