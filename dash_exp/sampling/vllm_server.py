"""The process of one vLLM server: `main()`, with its settings as one line of JSON on standard input.

vLLM's own HTTP server, with four things added. The port is chosen when the socket is bound, and told
through a file. Every route but /health wants the key: vLLM guards the public ones only, and those that
change weights are as powerful as a shell. Weights come through a file in shared memory, each tensor
checked against the learner's checksum. The server ends when its standard input does, so with the run.
"""

from __future__ import annotations

import hmac
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from dash_exp.checksums import checksum
from dash_exp.record import write_json
from dash_exp.sampling.vllm_parts import repack_output, scheduling

MODULE = "dash_exp.sampling.vllm_server"
SHARED = "dash_shared"
"""Name of the transfer through shared memory."""
END_WAIT_S = 10.0
_OPEN = ("/health",)
_key = ""
_answering = threading.Event()
"""Set once the server handles signals itself; before, SIGTERM would end it without its children."""


class RequireKey:
    """ASGI middleware: 401 for every request without the key, whatever its route."""

    def __init__(self, app: Any):
        self.app = app
        _answering.set()

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN and not _has_key(scope):
            headers = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b"the key is missing or wrong"})
        elif scope["type"] != "websocket":
            await self.app(scope, receive, send)


def _has_key(scope: Mapping[str, Any]) -> bool:
    given = dict(scope["headers"]).get(b"authorization", b"")
    return hmac.compare_digest(given, f"Bearer {_key}".encode())


@dataclass
class SharedInit(WeightTransferInitInfo):
    """Nothing to agree on."""


@dataclass
class SharedUpdate(WeightTransferUpdateInfo):
    """`path`: a safetensors file that both processes can read. `checksums`: of each of its tensors."""

    path: str
    checksums: dict[str, str]


class SharedTransfer(WeightTransferEngine[SharedInit, SharedUpdate]):
    """Takes the learner's weights from a file, in practice in shared memory."""

    init_info_cls = SharedInit
    update_info_cls = SharedUpdate

    def init_transfer_engine(self, init_info: SharedInit) -> None:
        """Nothing to open."""

    def start_weight_update(self) -> None:
        """Everything happens in one go, below."""

    def finish_weight_update(self) -> None:
        """As above."""

    def shutdown(self) -> None:
        """Nothing is held."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """The whole update. Not the base class's, which waits for an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SharedUpdate) -> None:
        """Raises ValueError for a tensor that is missing, too many, or not what the learner sent."""
        initialize_layerwise_reload(self.model)
        loaded = self.model.load_weights(_checked(update_info))
        finalize_layerwise_reload(self.model, self.model_config)
        repack_output(self.model)
        names = {name for name, _ in self.model.named_parameters()}
        if missing := sorted(names - (loaded or set())):
            raise ValueError(f"no weights came for {missing}")


def _checked(update: SharedUpdate) -> Iterator[tuple[str, Tensor]]:
    expected = dict(update.checksums)
    with safe_open(update.path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            tensor = file.get_tensor(name)
            if checksum(tensor) != expected.pop(name, None):
                raise ValueError(f"{name} is not what the learner sent")
            yield name, tensor
    if expected:
        raise ValueError(f"{sorted(expected)} did not arrive")


WeightTransferEngineFactory.register_engine(SHARED, SharedTransfer)


class Worker:
    """Mixed into vLLM's worker, so that its process imports this module and knows the transfer."""


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """vLLM's command line for these settings."""
    extra = {"dash_vocabulary": settings["vocabulary"]}
    words = [
        "--model", settings["model"], "--served-model-name", "policy",
        "--host", settings["host"], "--port", str(settings["port"]),
        "--dtype", settings["dtype"],
        "--max-model-len", str(settings["max_model_len"]), "--max-num-seqs", str(settings["max_sequences"]),
        "--enable-prefix-caching", "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm",
        "--logits-processors", "dash_exp.sampling.vllm_parts:MaskPadding",
        "--additional-config", json.dumps(extra),
        "--enable-scale-out", "--disable-uvicorn-access-log",
        "--middleware", f"{MODULE}.RequireKey", "--worker-extension-cls", f"{MODULE}.Worker",
        "--weight-transfer-config", json.dumps({"backend": settings["transfer"]}),
    ]  # fmt: skip
    for name, value in scheduling(settings["max_model_len"]).items():
        flag = name.replace("_", "-")
        words += [f"--no-{flag}"] if value is False else [f"--{flag}", str(value)]
    if settings["enforce_eager"]:
        words.append("--enforce-eager")
    if settings["sleep"]:
        words.append("--enable-sleep-mode")
    if settings["gpu_memory_utilization"] is not None:
        words += ["--gpu-memory-utilization", str(settings["gpu_memory_utilization"])]
    return words


def end_with_stdin() -> None:
    """Take the whole process group down when standard input closes: whoever started this is gone."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        if _answering.is_set():  # killed at once, vLLM leaves files in shared memory behind
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(END_WAIT_S)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True, name="end with the run").start()


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
    end_with_stdin()
    import uvloop

    uvloop.run(serve(arguments(settings), Path(settings["ready"])))
