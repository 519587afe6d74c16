"""HTTP to one server: completions, weights, health. Every response is checked."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from dash_exp.sampling.protocol import sampling_parameters
from dash_exp.types import Decoding, FinishReason

GENERATE = "/inference/v1/generate"
FACTS = "/dash_exp/facts"
"""Our own route: what the server was started with."""
BASE_LABEL = "default"
"""vLLM's name for the weights that it read from the model's folder."""
CONTROL_TIMEOUT_S = 300.0
KEEP_S = 2.0
"""How long an unused connection is kept. vLLM closes one after 5 s; a request sent at that very moment would
look like the end of the server."""
TOKENS_METRIC = "vllm:generation_tokens_total"


class InvalidResponseError(ValueError):
    """A server answered, but not with what it was asked for."""


class RefusedError(RuntimeError):
    """The server says that the request itself is wrong; any other server would say the same."""


CALL_ERRORS = (OSError, TimeoutError, aiohttp.ClientError, InvalidResponseError)
"""What a call of a broken server raises."""


def describe(error: BaseException) -> str:
    """An error in words; asyncio's TimeoutError has none of its own."""
    if isinstance(error, TimeoutError) and not str(error):
        return "it is too slow: no answer in time"
    return f"{type(error).__name__} {error}"


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens of one completion, with their log-probabilities."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


def completion_request(prompt: Sequence[int], seed: int, decoding: Decoding) -> dict[str, Any]:
    """The body of a request for one completion of these tokens."""
    return {"token_ids": list(prompt), "sampling_params": sampling_parameters(decoding, seed)}


def parse_completion(body: Any, decoding: Decoding, vocabulary: int, label: str) -> Sampled:
    """The completion in a response. Raises InvalidResponseError where it is not one: sampled with other
    weights than those named `label`, too long, with unknown tokens, or with impossible log-probabilities."""
    try:
        (choice,) = body["choices"]
        ids = tuple(choice["token_ids"])
        entries = choice["logprobs"]["content"]
        logprobs = tuple(float(entry["logprob"]) for entry in entries)
        same = all(entry["token_id"] == token for entry, token in zip(entries, ids, strict=True))
        versions = {str(span["version"]) for span in choice["weight_versions"]}
    except (KeyError, TypeError, ValueError) as error:
        what = f"no completion in the response: {type(error).__name__} {error}"
        raise InvalidResponseError(what) from error
    stopped = bool(ids) and ids[-1] in decoding.stop_ids
    most = decoding.max_new_tokens
    checks = {
        f"{len(ids)} tokens where 1 to {most} were requested": 0 < len(ids) <= most and same,
        "tokens that the tokenizer does not have": all(type(i) is int and 0 <= i < vocabulary for i in ids),
        "impossible log-probabilities": all(math.isfinite(value) and value <= 1e-3 for value in logprobs),
        f"tokens of weights {sorted(versions)} where {label} was current": versions == {label},
        f"it stopped after {len(ids)} tokens without a stop token": stopped or len(ids) == most,
    }
    for what, valid in checks.items():
        if not valid:
            raise InvalidResponseError(what)
    return Sampled(ids, logprobs, "stop" if stopped else "length")


class ServerClient:
    """Calls of one server, from within an event loop. Raises OSError or aiohttp.ClientError where it cannot
    be reached, TimeoutError where it does not answer, InvalidResponseError where the response is not valid,
    and RefusedError where it refuses the request."""

    def __init__(self, url: str, key: str, health_timeout_s: float):
        self.url, self.health_timeout_s = url.rstrip("/"), health_timeout_s
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {key}"},
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_S),
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def close(self) -> None:
        await self._session.close()

    async def generate(self, body: Mapping[str, Any]) -> Any:
        """The response to a completion request, without a time limit."""
        return await self.call(GENERATE, body, None)

    async def load(
        self, update: Mapping[str, Any], label: str, beside: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Load weights, name them, and drop everything cached with earlier ones. `beside`: runs while the
        server loads them."""
        try:
            await self.call("/start_weight_update")
        except InvalidResponseError:  # the process that began an earlier update was killed before its end
            await self.call("/finish_weight_update")
            await self.call("/start_weight_update")
        updating = self.call("/update_weights", {"update_info": update})
        await _gather(updating, *([] if beside is None else [beside()]))
        await self.call("/finish_weight_update", {"weight_version": label})
        reply = await self.call("/reset_prefix_cache")
        if not reply.get("success"):
            raise InvalidResponseError("it did not reset its prefix cache")

    async def facts(self) -> dict[str, Any]:
        """What it was started with."""
        async with asyncio.timeout(self.health_timeout_s), self._session.get(f"{self.url}{FACTS}") as reply:
            facts = await _parse(reply)
        if not isinstance(facts, dict):
            raise InvalidResponseError(f"{FACTS} answers {str(facts)[:80]!r}")
        return facts

    async def healthy(self) -> bool:
        """Whether it is up and its engine is running."""
        timeout = aiohttp.ClientTimeout(total=self.health_timeout_s)
        async with self._session.get(f"{self.url}/health", timeout=timeout) as reply:
            return reply.status == 200

    async def tokens(self) -> float:
        """How many tokens it has sampled since its start."""
        timeout = aiohttp.ClientTimeout(total=self.health_timeout_s)
        async with self._session.get(f"{self.url}/metrics", timeout=timeout) as reply:
            lines = (await reply.text()).splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(TOKENS_METRIC))

    async def call(
        self, path: str, body: Mapping[str, Any] | None = None, timeout_s: float | None = CONTROL_TIMEOUT_S
    ) -> Any:
        """POST to a route."""
        request = self._session.post(f"{self.url}{path}", json=body)
        async with asyncio.timeout(timeout_s), request as reply:
            return await _parse(reply)


async def _gather(*coroutines: Awaitable[Any]) -> None:
    """Run all of them; the first failure cancels the rest."""
    tasks = [asyncio.ensure_future(one) for one in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _parse(reply: aiohttp.ClientResponse) -> Any:
    text = await reply.text(errors="replace")
    if reply.status != 200:
        kind = RefusedError if reply.status in (400, 401, 404, 413, 422) else InvalidResponseError
        raise kind(f"{reply.url.path} answers {reply.status}: {text[:500]}")
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidResponseError(f"{reply.url.path} answers no JSON: {text[:80]!r}") from error
