"""The process of one vLLM server: `main()`, with its settings as one line of JSON on standard input.

vLLM's own HTTP server, with four things added. The port is chosen when the socket is bound, and told
through a file. Every route but /health wants the key: vLLM guards the public ones only, and those that
change weights are as powerful as a shell. Weights are checked against the learner's checksums where they
arrive (vllm_receive.py). The server ends when its standard input does, so with whoever started it.
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

import dash_exp.sampling.vllm.receive  # noqa: F401  (registers our transfers with vLLM)
from dash_exp.record.folder import write_json
from dash_exp.sampling.fleet.answers import FACTS
from dash_exp.sampling.vllm.executor import patient
from dash_exp.sampling.vllm.group import shared_prompts
from dash_exp.sampling.vllm.parts import scheduling

MODULE = "dash_exp.sampling.vllm.server"
END_WAIT_S = 10.0
TOLD = ("vocabulary", "max_model_len", "max_sequences", "dtype", "transfer")
_OPEN = ("/health",)
_key = ""
_facts: dict[str, Any] = {}
_answering = threading.Event()
"""Set once the server handles signals itself; before, SIGTERM would end it without its children."""


class RequireKey:
    """ASGI middleware: 401 for every request without the key, whatever its route. It also answers what the
    server was started with."""

    def __init__(self, app: Any):
        self.app = app
        _answering.set()

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
    """Mixed into vLLM's worker, so that its process imports this module and knows the transfer."""


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """vLLM's command line for these settings."""
    extra = {"dash_vocabulary": settings["vocabulary"]}
    words = [
        "--model",
        settings["model"],
        "--served-model-name",
        "policy",
        "--host",
        settings["host"],
        "--port",
        str(settings["port"]),
        "--dtype",
        settings["dtype"],
        "--max-model-len",
        str(settings["max_model_len"]),
        "--max-num-seqs",
        str(settings["max_sequences"]),
        "--enable-prefix-caching",
        "--logprobs-mode",
        "processed_logprobs",
        "--generation-config",
        "vllm",
        "--logits-processors",
        "dash_exp.sampling.vllm.parts:MaskPadding",
        "--additional-config",
        json.dumps(extra),
        "--enable-scale-out",
        "--disable-uvicorn-access-log",
        "--middleware",
        f"{MODULE}.RequireKey",
        "--worker-extension-cls",
        f"{MODULE}.Worker",
        "--weight-transfer-config",
        json.dumps({"backend": settings["transfer"]}),
    ]
    more = {**scheduling(settings["max_model_len"]), **shared_prompts(), **patient()}
    for name, value in more.items():
        flag = name.replace("_", "-")
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        words += [f"--no-{flag}"] if value is False else [f"--{flag}", text]
    if settings["enforce_eager"]:
        words.append("--enforce-eager")
    if settings["sleep"]:
        words.append("--enable-sleep-mode")
    if settings["gpu_memory_utilization"] is not None:
        words += ["--gpu-memory-utilization", str(settings["gpu_memory_utilization"])]
    return words


def end_with_stdin() -> None:
    """Take the whole process group down when standard input closes: whoever started this is gone, or wants
    an end of it."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        if _answering.is_set():  # killed at once, vLLM leaves files in shared memory behind
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))  # of this thread
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            time.sleep(END_WAIT_S)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True, name="end with the run").start()


def stay_deaf() -> None:
    """A scheduler's signals are kept from this process and its children by a mask (signals.sheltered), of
    which Python's tracker of shared memory would let SIGTERM through when it is started (up to 3.12)."""
    resource_tracker._HAVE_SIGMASK = False  # type: ignore[attr-defined]


def _first_line() -> bytes:
    """The first line of standard input, and no more of it: `end_with_stdin` reads what follows."""
    line = b""
    while not line.endswith(b"\n"):
        got = os.read(0, 1)
        if not got:
            sys.exit("no settings on standard input")
        line += got
    return line


async def serve(words: list[str], ready: Path) -> None:
    """Bind, tell the port, load the model, answer."""
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
    settings = json.loads(_first_line())
    _key = settings["key"]
    _facts.update({name: settings[name] for name in TOLD})
    end_with_stdin()
    stay_deaf()
    import uvloop

    uvloop.run(serve(arguments(settings), Path(settings["ready"])))
