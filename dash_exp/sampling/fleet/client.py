"""HTTP to one server: questions, weights, health. Torch-free."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import aiohttp

from dash_exp.sampling.fleet.answers import FACTS, GENERATE, GarbageError

CONTROL_TIMEOUT_S = 300.0
KEEP_S = 2.0
"""How long an unused connection is kept. vLLM closes one after 5 s: a question sent at that very moment would
look like the end of the server."""
TOKENS_METRIC = "vllm:generation_tokens_total"


class RefusedError(RuntimeError):
    """The server says that the question itself is wrong: another one would say the same."""


class ServerClient:
    """Calls of one server, from within an event loop. Raises OSError or aiohttp.ClientError where it
    cannot be reached, TimeoutError where it does not answer, GarbageError where it answers nonsense."""

    def __init__(self, url: str, key: str, answer_s: float):
        """`answer_s`: seconds in which it says whether it is well."""
        self.url, self.answer_s = url.rstrip("/"), answer_s
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {key}"},
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_S),
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def close(self) -> None:
        await self._session.close()

    async def generate(self, question: Mapping[str, Any]) -> Any:
        """The reply to a question, as long as it takes."""
        return await self._post(GENERATE, question, None)

    async def load(
        self,
        update: Mapping[str, Any],
        label: str,
        beside: Callable[[], Awaitable[None]] | None = None,
        timeout_s: float = CONTROL_TIMEOUT_S,
    ) -> None:
        """Put weights in, give them their name, and forget all that was computed with earlier ones.
        `beside`: what is to be done while the server takes them."""
        try:
            await self._post("/start_weight_update", None, timeout_s)
        except GarbageError:  # who began an update before was killed in the middle of it
            await self._post("/finish_weight_update", None, timeout_s)
            await self._post("/start_weight_update", None, timeout_s)
        await _together(
            self._post("/update_weights", {"update_info": update}, timeout_s),
            *([] if beside is None else [beside()]),
        )
        await self._post("/finish_weight_update", {"weight_version": label}, timeout_s)
        reply = await self._post("/reset_prefix_cache", None, timeout_s)
        if not reply.get("success"):
            raise GarbageError("it kept its prefix cache")

    async def facts(self) -> dict[str, Any]:
        """What it was started with."""
        facts = await self._get(FACTS, self.answer_s)
        if not isinstance(facts, dict):
            raise GarbageError(f"{FACTS} answers {str(facts)[:80]!r}")
        return facts

    async def call(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Any other route that takes a POST."""
        return await self._post(path, body, CONTROL_TIMEOUT_S)

    async def version(self) -> str:
        """Of the weights that it holds."""
        return str((await self._get("/weight_info", CONTROL_TIMEOUT_S))["weight_version"])

    async def healthy(self) -> bool:
        """Whether it is up. An engine that has died makes it say no."""
        timeout = aiohttp.ClientTimeout(total=self.answer_s)
        async with self._session.get(f"{self.url}/health", timeout=timeout) as reply:
            return reply.status == 200

    async def tokens(self) -> float:
        """How many it has sampled since it was started."""
        timeout = aiohttp.ClientTimeout(total=self.answer_s)
        async with self._session.get(f"{self.url}/metrics", timeout=timeout) as reply:
            lines = (await reply.text()).splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(TOKENS_METRIC))

    async def _get(self, path: str, timeout_s: float) -> Any:
        async with asyncio.timeout(timeout_s), self._session.get(f"{self.url}{path}") as reply:
            return await _content(reply)

    async def _post(self, path: str, body: Mapping[str, Any] | None, timeout_s: float | None) -> Any:
        async with (
            asyncio.timeout(timeout_s),
            self._session.post(f"{self.url}{path}", json=body) as reply,
        ):
            return await _content(reply)


async def _together(*work: Awaitable[Any]) -> None:
    """All of it; the first failure ends the rest."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _content(reply: aiohttp.ClientResponse) -> Any:
    text = await reply.text(errors="replace")
    if reply.status in (400, 401, 404, 413, 422):
        raise RefusedError(f"{reply.url.path} answers {reply.status}: {text[:500]}")
    if reply.status != 200:
        raise GarbageError(f"{reply.url.path} answers {reply.status}: {text[:500]}")
    try:
        return json.loads(text)
    except ValueError as error:
        raise GarbageError(f"{reply.url.path} answers something else than JSON: {text[:80]!r}") from error
