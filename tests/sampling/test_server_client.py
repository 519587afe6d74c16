"""Connections to a server that closes unused ones."""

from __future__ import annotations

import asyncio
import time

from dash_exp.sampling.fleet.client import KEEP_S, ServerClient
from dash_exp.sampling.fleet.member import environment
from tests.sampling.server_rig import server_settings

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
PATIENCE_S = KEEP_S + 0.2


def test_no_request_meets_a_server_that_is_closing_the_connection() -> None:
    """The server closes a connection that was unused for a while just when the next request arrives, and
    leaves that one unanswered."""
    connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        used = time.monotonic()
        while head := await reader.readuntil(b"\r\n\r\n"):
            (length,) = (
                int(line.split()[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line
            )
            await reader.readexactly(length)
            if time.monotonic() - used > PATIENCE_S:
                break
            used = time.monotonic()
            writer.write(ANSWER)
            await writer.drain()
        writer.close()

    async def ask() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = ServerClient(f"http://127.0.0.1:{port}", "key", 5.0)
        try:
            for _ in range(2):
                assert await client.generate({"n": 1}) == {}
            assert connections == 1  # kept while it is used
            await asyncio.sleep(PATIENCE_S + 0.1)
            assert await client.generate({"n": 1}) == {}
            assert connections == 2
        finally:
            await client.close()
            server.close()

    asyncio.run(ask())


def test_our_own_servers_keep_connections_longer_than_we_do() -> None:
    settings = server_settings()
    assert int(environment(settings, {})["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"]) >= 10 * KEEP_S
