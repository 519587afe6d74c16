"""One server of a fleet, from its start to its end: is it up, is it well, does it get on? Torch-free."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import aiohttp

from dash_exp.sampling.answers import Answer, GarbageError
from dash_exp.sampling.protocol import Request
from dash_exp.sampling.server_client import ServerClient
from dash_exp.sampling.server_process import ServerProcess, ServerSettings

State = Literal["starting", "serving", "lost"]
FAULTS = (OSError, TimeoutError, aiohttp.ClientError, GarbageError)
"""What a call of a broken server raises."""
POLL_S = 0.1
MISSED_HEALTH = 3


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds. `start`: until a started server answers. `stall`: without one token while some are owed.
    `health`: between two questions whether it is well. `answer`: until it answers such a question."""

    start_s: float = 600.0
    stall_s: float = 300.0
    health_s: float = 2.0
    answer_s: float = 10.0


@dataclass(eq=False, slots=True)
class Owed:
    """One group on its way: the request, and its completions so far."""

    request: Request
    answers: list[Answer | None]
    work: float
    start: float = 0.0

    @property
    def missing(self) -> list[int]:
        return [i for i, answer in enumerate(self.answers) if answer is None]


@dataclass(eq=False)
class Member:
    """A server and what it owes. `settings` None: it was given by URL and is not ours to start."""

    name: str
    settings: ServerSettings | None
    url: str | None = None
    state: State = "starting"
    process: ServerProcess | None = None
    client: ServerClient | None = None
    owed: dict[int, Owed] = field(default_factory=dict)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    watch: asyncio.Task[None] | None = None
    last_token: float = 0.0

    @property
    def work(self) -> float:
        return sum(one.work for one in self.owed.values())

    @property
    def completions(self) -> int:
        return sum(len(one.missing) for one in self.owed.values())

    async def begin(self, key: str, folder: Path, command: Sequence[str], patience: Patience) -> None:
        """Start it, if it is ours, and wait until it answers. Raises RuntimeError where its process ends."""
        self.state = "starting"
        if self.settings is not None:
            self.process = ServerProcess(self.settings, key, folder, self.name, command)
        while True:
            if self.process is not None:
                if (code := self.process.exit_code) is not None:
                    raise RuntimeError(f"{self.name} ended with code {code}: {self.log_tail()}")
                self.url = self.process.url
            if self.url is not None and self.client is None:
                self.client = ServerClient(self.url, key, patience.answer_s)
            try:
                if self.client is not None and await self.client.healthy():
                    return
            except FAULTS:
                pass
            await asyncio.sleep(POLL_S)

    async def trouble(self, patience: Patience) -> str:
        """Watch it while it serves. Returns when it is not to be relied on any more, and why; empty if it is
        no longer serving anyway."""
        missed, sampled = 0, -1.0
        while True:
            await asyncio.sleep(patience.health_s)
            if self.state != "serving" or self.client is None:
                return ""
            if self.process is not None and self.process.exit_code is not None:
                return f"ended with code {self.process.exit_code}"
            try:
                well, reason = await self.client.healthy(), "it says that it is not well"
                now = await self.client.tokens() if self.owed else sampled
            except FAULTS as error:
                well, now, reason = False, sampled, f"{type(error).__name__} {error}"
            missed = 0 if well else missed + 1
            if missed >= MISSED_HEALTH:
                return f"no sign of life: {reason}"
            if now != sampled or not self.owed:
                sampled, self.last_token = now, time.monotonic()
            elif time.monotonic() - self.last_token > patience.stall_s:
                return f"no token in {patience.stall_s:g} s"

    def log_tail(self) -> str:
        return self.process.log_tail()[-500:] if self.process is not None else ""

    async def put_away(self) -> None:
        """End it, and all that is connected with it."""
        if self.watch is not None and self.watch is not asyncio.current_task():
            self.watch.cancel()
        self.watch = None
        if self.client is not None:
            await self.client.close()
            self.client = None
        if self.process is not None:
            await asyncio.to_thread(self.process.kill)
            self.process = None
