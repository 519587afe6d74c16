"""A program that answers as a vLLM server does, without a model: real process, real port, real HTTP.

Tokens are a function of the seed and of the weights' name. POST /fake {"mode": ...} breaks it: `hang`
(answers nothing more), `garbage` (no JSON), `short` (a completion without its log-probabilities), `old`
(tokens of other weights), `refuse` (takes no weights), `dead` (its engine died), `late` (dies in the middle
of a broadcast).

Started with the transfer `dash_nccl` it takes weights as vLLM does, but over a plain socket instead of NCCL:
it joins the learner during the request to join, and reads what is sent during the request to update.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import sys
import threading
from pathlib import Path
from typing import Any

from aiohttp import web

NEW_TOKENS = 5
SIZES = {"float32": 4, "bfloat16": 2}


def tokens_of(seed: int, version: str) -> list[int]:
    """The completion of a seed: up to NEW_TOKENS letters, then the stop token 1."""
    digest = hashlib.sha256(f"{seed} {version}".encode()).digest()
    return [2 + byte % 90 for byte in digest[: 1 + digest[0] % NEW_TOKENS]] + [1]


def fingerprint(data: bytes, size: int, part: int = 1 << 22) -> int:
    """The hash of a tensor with numbers of `size` bytes, number by number: each times an odd factor of its
    place, each part's sum times that of the part's number, modulo 2^64."""
    mask, total = 2**64 - 1, 0
    for place in range(len(data) // size):
        number = int.from_bytes(data[place * size : (place + 1) * size], "little", signed=True)
        total += number * odd(place % part) * odd(place // part)
    return total & mask


def odd(place: int) -> int:
    mixed, mask = (place + 1) * 0x9E3779B97F4A7C15, 2**64 - 1
    mixed = (mixed ^ (signed(mixed) >> 29)) * 0xBF58476D1CE4E5B9
    return (mixed ^ (signed(mixed) >> 32)) & mask | 1


def signed(number: int) -> int:
    """As a 64-bit number with a sign, whose shifts repeat the sign."""
    return (number + 2**63) % 2**64 - 2**63


class Fake:
    def __init__(self, settings: dict[str, Any]):
        self.key, self.settings = settings["key"], settings
        self.active = False
        self.calls: list[str] = []
        self.group: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.delay = float(str(settings["model"]).partition("delay=")[2] or 0)
        self.asleep = False
        self.version, self.mode, self.tokens, self.asked = "default", "", 0, 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/health":
            if self.mode == "hang":
                await asyncio.sleep(3600)
            return web.Response(status=503 if self.mode == "dead" else 200)
        if request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.Response(status=401)
        body = await request.json() if request.can_read_body else {}
        route = request.path.strip("/").replace("/", "_")
        if "weight" in route or route == "reset_prefix_cache":
            self.calls.append(route)
        return await getattr(self, f"do_{route}")(body)  # type: ignore[no-any-return]

    async def do_fake(self, body: dict[str, str]) -> web.Response:
        self.mode = body["mode"]
        known = {"asked": self.asked, "asleep": self.asleep, "calls": self.calls, "version": self.version}
        return web.json_response(known)

    async def do_dash_exp_facts(self, body: object) -> web.Response:
        names = ("vocabulary", "max_model_len", "max_sequences", "dtype", "transfer")
        return web.json_response({name: self.settings[name] for name in names} | {"config": "same"})

    async def do_metrics(self, body: object) -> web.Response:
        return web.Response(text=f'vllm:generation_tokens_total{{engine="0"}} {self.tokens}\n')

    async def do_inference_v1_generate(self, body: dict[str, dict[str, int]]) -> web.Response:
        version = "7777" if self.mode == "old" else self.version
        ids = tokens_of(body["sampling_params"]["seed"], version)
        self.asked += 1
        if self.asleep:
            return web.Response(status=500, text="asleep")
        await asyncio.sleep(self.delay * len(ids))
        if self.mode in ("hang", "stuck"):
            await asyncio.sleep(3600)
        if self.mode == "dead":
            return web.Response(status=500, text="EngineDeadError")
        if self.mode == "garbage":
            return web.Response(text="<html>")
        self.tokens += len(ids)
        content = [{"token_id": i, "logprob": -1.5} for i in ids]
        spans = [{"version": version, "start": 0, "end": len(ids)}]
        choice = {"token_ids": ids, "logprobs": {"content": content}, "weight_versions": spans}
        if self.mode == "short":
            content.pop()
        return web.json_response({"choices": [choice]})

    async def do_start_weight_update(self, body: object) -> web.Response:
        if self.active:
            return web.Response(status=500, text="a weight update is already active")
        self.active = True
        return web.json_response({})

    async def do_shutdown_weight_transfer_engine(self, body: object) -> web.Response:
        return web.json_response({})

    async def do_init_weight_transfer_engine(self, body: dict[str, dict[str, Any]]) -> web.Response:
        info = body["init_info"]
        if self.settings["transfer"] == "dash_nccl":
            assert (info["rank_offset"], info["world_size"], info["packed"]) == (1, 2, True)
            self.group = await asyncio.open_connection(info["master_address"], info["master_port"])
        return web.json_response({})

    async def do_sleep(self, body: object) -> web.Response:
        self.asleep = True
        return web.json_response({})

    async def do_wake_up(self, body: object) -> web.Response:
        self.asleep = False
        return web.json_response({})

    async def do_update_weights(self, body: dict[str, dict[str, Any]]) -> web.Response:
        info, taken = body["update_info"], False
        if self.settings["transfer"] == "dash_shared":
            taken = Path(info["path"]).exists()
        elif self.settings["transfer"] == "dash_nccl" and self.active:
            taken = await self.receive(info)
        elif self.settings["transfer"] == "dash_ipc":
            taken = info["ipc_handles_pickled"] == "handles of " + ",".join(info["names"])
        if self.mode == "refuse" or not taken or self.asleep:
            self.active = False
            return web.Response(status=500, text="these are not the weights that were sent")
        return web.json_response({})

    async def receive(self, info: dict[str, Any]) -> bool:
        """Read each tensor as it is announced; whether all are what their checksums say."""
        assert self.group is not None
        complete = True
        for name, kind, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            data = await self.group[0].readexactly(SIZES[kind] * math.prod(shape))
            size = "x".join(map(str, shape))
            complete &= info["checksums"][name] == f"{fingerprint(data, SIZES[kind]):016x}-{kind}-{size}"
            if self.mode == "late":
                os._exit(1)
        return complete

    async def do_finish_weight_update(self, body: dict[str, str]) -> web.Response:
        self.active = False
        self.version = body.get("weight_version", self.version)
        return web.json_response({})

    async def do_reset_prefix_cache(self, body: object) -> web.Response:
        return web.json_response({"success": True})


async def main() -> None:
    settings = json.loads(sys.stdin.readline())

    def end() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=end, daemon=True).start()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", Fake(settings).answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, settings["host"], settings["port"])
    await site.start()
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    ready = Path(settings["ready"])
    ready.with_suffix(".new").write_text(json.dumps({"port": port}))
    ready.with_suffix(".new").replace(ready)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
