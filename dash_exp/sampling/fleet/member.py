"""One server of a fleet, from its start to its end: is it up, is it well, does it get on? Torch-free."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiohttp

from dash_exp.errors import Fault, UserError
from dash_exp.sampling.fleet.answers import GarbageError
from dash_exp.sampling.fleet.client import RefusedError, ServerClient
from dash_exp.sampling.fleet.server_process import ServerProcess, ServerSettings
from dash_exp.sampling.fleet.work import Owed
from dash_exp.sampling.transfer.base import ENGINES

State = Literal["starting", "serving", "lost", "gone"]
"""A lost one may be started again; one that is gone may not."""
FAULTS = (OSError, TimeoutError, aiohttp.ClientError, GarbageError)
"""What a call of a broken server raises."""
POLL_S = 0.1
WHERE, KEY_VARIABLE = "cluster.server_urls", "DASH_SERVER_KEY"
MISSED_HEALTH = 3


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds. `start`: until a started server answers. `found`: until one that was started by hand does.
    `stall`: without one token while some are owed.
    `health`: between two questions whether it is well. `answer`: until it answers such a question."""

    start_s: float = 600.0
    found_s: float = 120.0
    stall_s: float = 300.0
    health_s: float = 2.0
    answer_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Needs:
    """What a server that was started by hand must have been started with."""

    vocabulary: int
    longest: int
    dtype: str
    transfer: str

    def unmet(self, url: str, facts: Mapping[str, Any]) -> list[Fault]:
        """`facts`: what it says of itself."""
        found = []
        for name, wanted in (("dtype", self.dtype), ("vocabulary", self.vocabulary)):
            if facts.get(name) != wanted:
                found.append(
                    Fault(
                        WHERE,
                        f"{url} has {name} {facts.get(name)}, this run {wanted}",
                        "start it with the model and sampler of the run",
                    )
                )
        length = int(facts.get("max_model_len", 0))
        if length < self.longest:
            found.append(
                Fault(
                    WHERE,
                    f"{url} takes {length} tokens, this run needs {self.longest}",
                    f"start it with serve.max_model_len={self.longest}",
                )
            )
        if facts.get("transfer") != self.transfer:
            own = next(name for name, engine in ENGINES.items() if engine == self.transfer)
            found.append(
                Fault(
                    WHERE,
                    f"{url} takes weights by {facts.get('transfer')}, not {self.transfer}",
                    f"start it with serve.transfer={own}, or set cluster.transfer",
                )
            )
        return found


@dataclass(eq=False)
class Member:
    """A server and what it owes. `settings` None: it was started by hand and is not ours to start; it has a
    URL, and must meet `needs`."""

    name: str
    settings: ServerSettings | None
    url: str | None = None
    needs: Needs | None = None
    state: State = "starting"
    reason: str = ""
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
        """Start it, if it is ours, and wait until it answers. Raises RuntimeError where its process ends or
        does not answer, UserError where one that was started by hand does not, or does not fit."""
        self.state = "starting"
        if self.settings is not None:
            self.process = ServerProcess(self.settings, key, folder, self.name, command)
        wait_s = patience.found_s if self.settings is None else patience.start_s
        try:
            async with asyncio.timeout(wait_s):
                await self._answering(key, patience)
        except TimeoutError as error:
            if self.settings is not None:
                raise RuntimeError(f"{self.name} did not start within {wait_s:g} s") from error
            hint = "start it with python -m dash_exp.serve (docs/engine.md)"
            raise UserError(Fault(WHERE, f"{self.url} does not answer, {wait_s:g} s long", hint)) from error
        if self.needs is not None:
            await self._check(self.needs)

    async def _answering(self, key: str, patience: Patience) -> None:
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

    async def _check(self, needs: Needs) -> None:
        assert self.client is not None
        try:
            facts = await self.client.facts()
        except (RefusedError, *FAULTS) as error:
            if "401" in str(error):
                raise UserError(Fault(KEY_VARIABLE, f"is not the key of {self.url}")) from error
            what = f"{self.url} was not started with python -m dash_exp.serve: {error}"
            raise UserError(Fault(WHERE, what)) from error
        if faults := needs.unmet(str(self.url), facts):
            raise UserError(faults)

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
