"""How a vLLM server takes weights: each tensor is checked against the learner's checksum before any of them
is loaded, and none may be missing. Registered with vLLM by name, in the worker's process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from dash_exp.record.checksums import checksum
from dash_exp.sampling.transfer.base import IPC, NCCL, PATH
from dash_exp.sampling.transfer.shared_weights import SharedReader
from dash_exp.sampling.vllm.load import Loader

POLL_S = 0.1


@dataclass
class PathInit(WeightTransferInitInfo):
    """Nothing to agree on."""


@dataclass
class PathUpdate(WeightTransferUpdateInfo):
    """`path`: a safetensors file that both processes can read. `checksums`: of each of its tensors.
    `arrival_s`: how long it may take until the file is seen here."""

    path: str
    checksums: dict[str, str]
    arrival_s: float = 0.0


class PathTransfer(WeightTransferEngine[PathInit, PathUpdate]):
    """Takes the learner's weights from a file."""

    init_info_cls = PathInit
    update_info_cls = PathUpdate

    def __init__(self, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        self._loader = Loader(self.model, self.model_config)
        self._files = SharedReader()

    def init_transfer_engine(self, init_info: PathInit) -> None:
        """Nothing to open."""

    def start_weight_update(self) -> None:
        """Everything happens in one go, below."""

    def finish_weight_update(self) -> None:
        """As above."""

    def shutdown(self) -> None:
        """The shared memory is given back."""
        self._files.close()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """The whole update. Not the base class's, which waits for an accelerator also where there is none."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def receive_weights(self, update_info: PathUpdate) -> None:
        """Raises ValueError for a tensor that is missing, too many, or not what the learner sent, and
        FileNotFoundError where no file is seen."""
        named = self._files.read(arrived(Path(update_info.path), update_info.arrival_s))
        expected = dict(update_info.checksums)
        for name, tensor in named.items():
            check(name, tensor, expected)
        if expected:
            raise ValueError(f"{sorted(expected)} did not arrive")
        self._loader.load(named)


def arrived(path: Path, within_s: float) -> Path:
    """The path, once it is there. Its folders are read anew each time, so that another machine's file is
    seen as soon as the file system shows it."""
    deadline = time.monotonic() + within_s
    while not path.exists() and time.monotonic() < deadline:
        for folder in (path.parent.parent, path.parent):
            if folder.is_dir():
                os.listdir(folder)
        time.sleep(POLL_S)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not seen by this server: does it share that folder?")
    return path


def check(name: str, tensor: Tensor, expected: dict[str, str]) -> None:
    """Take a tensor that has come off what is expected. Raises ValueError where it is another."""
    if checksum(tensor) != expected.pop(name, None):
        raise ValueError(f"{name} is not what the learner sent")


class Checking:
    """Stands for the model while vLLM's own transfers load what arrives: checks it on the way."""

    def __init__(self, model: Any, checksums: Mapping[str, str], wanted: Iterable[str]):
        self.model, self.expected, self.wanted = model, dict(checksums), set(wanted)
        self.loaded: set[str] = set()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = self.model.load_weights(self._checked(weights)) or set()
        self.loaded |= loaded
        return set(loaded)

    def _checked(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            check(name, tensor, self.expected)
            yield name, tensor

    def whole(self) -> None:
        """Raises ValueError where something is missing."""
        if self.expected:
            raise ValueError(f"{sorted(self.expected)} did not arrive")
        if missing := sorted(self.wanted - self.loaded):
            raise ValueError(f"no weights came for {missing}")


@contextmanager
def checking(engine: Any, checksums: Mapping[str, str], wanted: Iterable[str]) -> Iterator[None]:
    """Let an engine of vLLM load through checks. `wanted`: parameters of the model, taken while tied ones are
    one; in an update they are apart. Raises ValueError: the model is broken then, and the learner loses
    the server."""
    model = engine.model
    engine.model = check = Checking(model, checksums, wanted)
    try:
        yield
    finally:
        engine.model = model
    check.whole()


WeightTransferEngineFactory.register_engine(PATH, PathTransfer)
for _name, _class in ((NCCL, "NCCLTransfer"), (IPC, "IPCTransfer")):
    WeightTransferEngineFactory.register_engine(_name, "dash_exp.sampling.vllm.device", _class)
