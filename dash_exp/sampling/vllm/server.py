"""The process of one vLLM server: `main()`, with its settings as one line of JSON on standard input.

vLLM's own HTTP server, with four additions. The port is chosen when the socket is bound, and written to a
file. Every route but /health requires the key: vLLM guards only the public ones, and those that change
weights are as powerful as a shell. Weights are checked against the learner's checksums on arrival
(weights.py). The server ends when its standard input does, so with the process that started it.
"""

from __future__ import annotations

import hmac
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import dash_exp.sampling.vllm.weights  # noqa: F401  (registers our transfers with vLLM)
from dash_exp.config.model_files import config_hash
from dash_exp.record.folder import write_json
from dash_exp.sampling.fleet.client import FACTS
from dash_exp.sampling.fleet.member import ServerSettings
from dash_exp.sampling.vllm.engine import engine_arguments, executor_arguments

MODULE = "dash_exp.sampling.vllm.server"
END_WAIT_S = 10.0
FACT_NAMES = ("vocabulary", "max_model_len", "max_sequences", "dtype", "transfer")
_OPEN = ("/health",)
_key = ""
_facts: dict[str, Any] = {}
_handles_signals = threading.Event()
"""Set once the server handles signals itself; before, SIGTERM would end it without its children."""


class RequireKey:
    """ASGI middleware: 401 for every request without the key, on any route. It also answers what the server
    was started with."""

    def __init__(self, app: Any):
        self.app = app
        _handles_signals.set()

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN and not _has_key(scope):
            await _reply(send, 401, b"text/plain", b"the key is missing or wrong")
        elif scope["type"] == "http" and scope["path"] == FACTS:
            await _reply(send, 200, b"application/json", json.dumps(_facts).encode())
        elif scope["type"] != "websocket":
            await self.app(scope, receive, send)


async def _reply(send: Any, status: int, kind: bytes, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
    await send({"type": "http.response.body", "body": body})


def _has_key(scope: Mapping[str, Any]) -> bool:
    given = dict(scope["headers"]).get(b"authorization", b"")
    return hmac.compare_digest(given, f"Bearer {_key}".encode())


class Worker:
    """Mixed into vLLM's worker, so that its process imports this module and registers the transfers."""


def command_line(settings: ServerSettings) -> list[str]:
    """vLLM's command line for these settings."""
    flags = {
        **engine_arguments(settings),
        **executor_arguments(),
        "served_model_name": "policy",
        "host": settings.host,
        "port": settings.port,
        "enable_scale_out": True,
        "disable_uvicorn_access_log": True,
        "middleware": f"{MODULE}.{RequireKey.__name__}",
        "worker_extension_cls": f"{MODULE}.{Worker.__name__}",
        "weight_transfer_config": {"backend": settings.transfer},
        "enable_sleep_mode": settings.sleep,
    }
    words: list[str] = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        match value:
            case bool():
                words += [f"--{flag}" if value else f"--no-{flag}"]
            case dict():
                words += [f"--{flag}", json.dumps(value)]
            case list():
                words += [f"--{flag}", *value]
            case _:
                words += [f"--{flag}", str(value)]
    return words


def end_with_stdin() -> None:
    """End the process group when standard input closes: the process that started this one has ended, or wants
    this one to end."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        if _handles_signals.is_set():  # killed at once, vLLM leaves files in shared memory
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))  # of this thread
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            time.sleep(END_WAIT_S)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True, name="end with stdin").start()


def keep_signals_blocked() -> None:
    """A scheduler's signals are blocked in this process and its children by an inherited mask, in which
    Python's tracker of shared memory would unblock SIGTERM when it starts (up to 3.12)."""
    resource_tracker._HAVE_SIGMASK = False  # type: ignore[attr-defined]


def _first_line() -> bytes:
    """The first line of standard input and no more of it: `end_with_stdin` reads what follows."""
    line = b""
    while not line.endswith(b"\n"):
        got = os.read(0, 1)
        if not got:
            sys.exit("no settings on standard input")
        line += got
    return line


async def serve(words: list[str], ready: Path) -> None:
    """Bind, write the port, load the model, answer requests."""
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.launchers.launcher import setup_server
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    validate_parsed_serve_args(args)
    address, socket = setup_server(args, reuse_port=False)
    write_json(ready, {"port": socket.getsockname()[1], "pid": os.getpid()})
    await run_server_worker(address, socket, args)


def main() -> None:
    global _key
    given = json.loads(_first_line())
    _key, ready = given.pop("key"), Path(given.pop("ready"))
    _facts.update({name: given[name] for name in FACT_NAMES}, config=config_hash(Path(given["model"])))
    end_with_stdin()
    keep_signals_blocked()
    import uvloop

    uvloop.run(serve(command_line(ServerSettings(**given)), ready))
