"""Weights from GPU to GPU, by vLLM's own transfer engines: NCCL between two GPUs, CUDA IPC on one.

The learner keeps a copy of its weights in the servers' type on its GPU, and sends that: so a server that
is started again gets whole weights while the learner goes on. What connects to a server is a group of two,
this process and the server: one that dies takes nothing with it. The servers compare the checksum of every
tensor that arrives (vllm_device.py). Not run on a GPU yet: see docs/engine.md.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from dash_exp.record.checksums import checksum
from dash_exp.sampling.fleet.answers import GarbageError
from dash_exp.sampling.fleet.client import RefusedError, ServerClient
from dash_exp.sampling.transfer.base import IPC, NCCL, OutdatedError, Weights

Result = TypeVar("Result")
INIT, SHUTDOWN = "/init_weight_transfer_engine", "/shutdown_weight_transfer_engine"
BUFFER_BYTES = 256 << 20
"""What is broadcast at a time, at least: two such buffers lie on each GPU meanwhile."""


class Staged:
    """The weights to be sent, on the learner's device. Written while nobody sends."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.tensors: dict[str, Tensor] = {}
        self.current: Weights | None = None
        self._senders = 0
        self._changed = threading.Condition()

    def write(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """From here on nothing is current, until the caller says what is."""
        with self._changed:
            self._changed.wait_for(lambda: self._senders == 0)
            self.current = None
        before, names = set(self.tensors), set[str]()
        for name, tensor in weights:  # one at a time: they may have been gathered or merged for this
            names.add(name)
            if name in before:
                self.tensors[name].copy_(tensor.detach())
            elif not before:
                self.tensors[name] = tensor.detach().to(self.device, self.dtype, copy=True).contiguous()
        if before and names != before:
            raise ValueError(f"{len(names)} tensors where {len(before)} were sent before")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # other streams and processes read them

    @contextmanager
    def borrowed(self, weights: Weights) -> Iterator[Mapping[str, Tensor]]:
        """The tensors of these weights, which stay as they are meanwhile."""
        with self._changed:
            if self.current is not weights:
                raise OutdatedError
            self._senders += 1
        try:
            yield self.tensors
        finally:
            with self._changed:
                self._senders -= 1
                self._changed.notify_all()


class DeviceTransfer:
    """What both ways have in common."""

    def __init__(self, staged: Staged):
        self.staged = staged
        self.seconds: dict[str, float] = {}

    def stage(self, weights: Iterable[tuple[str, Tensor]], version: int, label: str) -> Weights:
        start = time.perf_counter()
        self.staged.write(weights)
        written = time.perf_counter()
        tensors = self.staged.tensors
        update = {
            "names": list(tensors),
            "dtype_names": [str(t.dtype).removeprefix("torch.") for t in tensors.values()],
            "shapes": [list(t.shape) for t in tensors.values()],
            "checksums": {name: checksum(tensor) for name, tensor in tensors.items()},
        }
        self.seconds = {"write": written - start, "checksum": time.perf_counter() - written}
        made = Weights(version, label, update)
        self.staged.current = made
        return made

    def close(self) -> None:
        self.staged.tensors = {}


class Link(Protocol):
    """The learner's end of a group of two."""

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        """All of them, in this order; returns when they have left. May block as long as the server."""
        ...

    def abort(self) -> None:
        """Let go of it, also while `send` waits in another thread."""
        ...


Connect = Callable[[socket.socket, int], Link]
"""Wait at a listening socket for the server to come, and join it. Second: bytes sent at a time."""


class BroadcastTransfer(DeviceTransfer):
    """`NCCL`: the server joins a group with this process, then takes one broadcast after the other while
    its route for updates is held open."""

    engine = NCCL

    def __init__(self, staged: Staged, connect: Connect):
        super().__init__(staged)
        self._connect = connect
        self._links: weakref.WeakKeyDictionary[ServerClient, Link] = weakref.WeakKeyDictionary()
        self._one_at_a_time = asyncio.Lock()

    async def send(self, client: ServerClient, weights: Weights) -> None:
        with self.staged.borrowed(weights) as tensors:
            if client not in self._links:
                self._links[client] = await self._linked(client, tensors)
            link = self._links[client]
            try:
                async with self._one_at_a_time:  # NCCL groups on one GPU must not get in each other's way
                    await client.load(weights.update, weights.label, beside=lambda: sending(link, tensors))
            except BaseException:
                self.forget(client)  # the two ends no longer agree on what comes next
                raise

    async def _linked(self, client: ServerClient, tensors: Mapping[str, Tensor]) -> Link:
        size = max(BUFFER_BYTES, *(t.nbytes for t in tensors.values()))
        listener = socket.create_server((address_towards(client.url), 0))
        host, port = listener.getsockname()[:2]
        info = {
            "master_address": host,
            "master_port": port,
            "rank_offset": 1,
            "world_size": 2,
            "packed": True,
            "packed_buffer_size_bytes": size,
            "packed_num_buffers": 2,
        }
        with suppress(GarbageError, RefusedError):  # a group with a run before this one, or none
            await client.call(SHUTDOWN)
        joining = asyncio.ensure_future(
            _carried_out("joining the server", lambda: self._connect(listener, size))
        )
        try:
            _, link = await asyncio.gather(client.call(INIT, {"init_info": info}), joining)
        except BaseException:
            joining.cancel()
            raise
        return link

    def forget(self, client: ServerClient) -> None:
        link = self._links.pop(client, None)
        if link is not None:
            link.abort()

    def close(self) -> None:
        for client in list(self._links):
            self.forget(client)
        super().close()


class HandleTransfer(DeviceTransfer):
    """`IPC`: the server opens the learner's copy where it lies, on the GPU that both use."""

    engine = IPC

    def __init__(self, staged: Staged, export: Callable[[Mapping[str, Tensor]], str]):
        """`export`: makes handles of tensors, which the server can open, as text."""
        super().__init__(staged)
        self._export = export
        self._known: weakref.WeakSet[ServerClient] = weakref.WeakSet()

    async def send(self, client: ServerClient, weights: Weights) -> None:
        with self.staged.borrowed(weights) as tensors:
            if client not in self._known:
                await client.call(INIT, {"init_info": {"packed": False}})
                self._known.add(client)
            update: dict[str, Any] = {**weights.update, "ipc_handles_pickled": self._export(tensors)}
            await client.load(update, weights.label)

    def forget(self, client: ServerClient) -> None:
        self._known.discard(client)


async def sending(link: Link, tensors: Mapping[str, Tensor]) -> None:
    await _carried_out("sending weights", lambda: link.send(tensors))


async def _carried_out(what: str, work: Callable[[], Result]) -> Result:
    """What `work` gives, from a thread that nobody waits for when this process ends. Raises GarbageError
    for whatever goes wrong there: the server is lost then."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def tell(result: Result | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(GarbageError(f"{what} failed: {type(error).__name__} {error}"))

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except Exception as raised:  # noqa: BLE001  told to whoever waits
            error = raised
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(tell, result, error)

    threading.Thread(target=run, daemon=True, name=what).start()
    return await future


def address_towards(url: str) -> str:
    """This machine's address as a server there sees it."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # no packet is sent
        probe.connect((parts.hostname or "127.0.0.1", parts.port or 80))
        return str(probe.getsockname()[0])
