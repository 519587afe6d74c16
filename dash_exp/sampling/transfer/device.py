"""Weights from GPU to GPU by vLLM's own transfer engines: NCCL between two GPUs, CUDA IPC on one.

The learner keeps a copy of its weights in the servers' type on its GPU and sends that, so a restarted server
gets complete weights while the learner goes on. Each server has a group of two, itself and this process, so
one that dies affects no other. Servers compare the checksum of every tensor on arrival (vllm/weights.py). Not
run on a GPU yet: see docs/engine.md.
"""

from __future__ import annotations

import asyncio
import base64
import os
import pickle
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from dash_exp.record.checkpoint import fingerprints
from dash_exp.sampling.fleet.client import InvalidResponseError, RefusedError, ServerClient
from dash_exp.sampling.transfer import IPC, NCCL, OutdatedError, Weights

Result = TypeVar("Result")
INIT, SHUTDOWN = "/init_weight_transfer_engine", "/shutdown_weight_transfer_engine"
BUFFER_BYTES, BUFFERS = 256 << 20, 2
"""Bytes per broadcast, at least, and how many such buffers lie on each GPU meanwhile."""


class Staged:
    """The weights to be sent, on the learner's device. Written only while none are being sent."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.tensors: dict[str, Tensor] = {}
        self.current: Weights | None = None
        self._senders = 0
        self._changed = threading.Condition()

    def write(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """From here on nothing is current, until the caller sets it."""
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
        """The tensors of these weights, which are not overwritten meanwhile."""
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
    """What both transfers between GPUs have in common."""

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
            "checksums": fingerprints(tensors),
        }
        self.seconds = {"write": written - start, "checksum": time.perf_counter() - written}
        staged = Weights(version, label, update)
        self.staged.current = staged
        return staged

    def close(self) -> None:
        self.staged.tensors = {}


class Link(Protocol):
    """The learner's end of a group of two."""

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        """Send all of them, in this order; may block as long as the server does."""
        ...

    def abort(self) -> None:
        """Close it, also while `send` blocks in another thread."""
        ...


Connect = Callable[[socket.socket, int], Link]
"""Wait at a listening socket for the server, and join it. Second: bytes per broadcast."""


class BroadcastTransfer(DeviceTransfer):
    """`NCCL`: the server joins a group with this process, then receives one broadcast after the other while
    the request that updates its weights is open."""

    engine = NCCL

    def __init__(self, staged: Staged, connect: Connect):
        super().__init__(staged)
        self._connect = connect
        self._links: weakref.WeakKeyDictionary[ServerClient, Link] = weakref.WeakKeyDictionary()
        self._one_at_a_time = asyncio.Lock()

    async def send(self, client: ServerClient, weights: Weights) -> None:
        with self.staged.borrowed(weights) as tensors:
            if client not in self._links:
                self._links[client] = await self._join(client, tensors)
            link = self._links[client]
            try:
                async with self._one_at_a_time:  # NCCL groups on one GPU must not run at the same time
                    sending = partial(_in_thread, "sending weights", lambda: link.send(tensors))
                    await client.load(weights.update, weights.label, beside=sending)
            except BaseException:
                self.disconnect(client)  # the two ends no longer agree on what comes next
                raise

    async def _join(self, client: ServerClient, tensors: Mapping[str, Tensor]) -> Link:
        size = max(BUFFER_BYTES, *(t.nbytes for t in tensors.values()))
        listener = socket.create_server((address_towards(client.url), 0))
        host, port = listener.getsockname()[:2]
        group = {"master_address": host, "master_port": port, "rank_offset": 1, "world_size": 2}
        packing = {"packed": True, "packed_buffer_size_bytes": size, "packed_num_buffers": BUFFERS}
        with suppress(InvalidResponseError, RefusedError):  # a group with an earlier run, or none
            await client.call(SHUTDOWN)
        joining = asyncio.ensure_future(
            _in_thread("joining the server", lambda: self._connect(listener, size))
        )
        try:
            _, link = await asyncio.gather(client.call(INIT, {"init_info": group | packing}), joining)
        except BaseException:
            joining.cancel()
            raise
        return link

    def disconnect(self, client: ServerClient) -> None:
        link = self._links.pop(client, None)
        if link is not None:
            link.abort()

    def close(self) -> None:
        for client in list(self._links):
            self.disconnect(client)
        super().close()


class HandleTransfer(DeviceTransfer):
    """`IPC`: the server opens the learner's copy on the GPU that both use."""

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

    def disconnect(self, client: ServerClient) -> None:
        self._known.discard(client)


async def _in_thread(what: str, function: Callable[[], Result]) -> Result:
    """The function's result, from a daemon thread, which does not hold up the end of this process. Raises
    InvalidResponseError for any error: the server is lost then."""
    future: Future[Result] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:  # noqa: BLE001  passed to the waiting coroutine
            future.set_exception(InvalidResponseError(f"{what} failed: {type(error).__name__} {error}"))

    threading.Thread(target=run, daemon=True, name=what).start()
    return await asyncio.wrap_future(future)


def address_towards(url: str) -> str:
    """This machine's address as a server there sees it."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # no packet is sent
        probe.connect((parts.hostname or "127.0.0.1", parts.port or 80))
        return str(probe.getsockname()[0])


class NCCLLink:
    """Rank 0 of an NCCL group; the server's worker is rank 1."""

    def __init__(self, communicator: Any, device: torch.device, size: int):
        """`size`: bytes per broadcast, as announced to the server."""
        self.communicator, self.device, self.size = communicator, device, size
        self._aborted = threading.Event()

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        torch.cuda.set_device(self.device)  # of this thread
        packed_nccl_broadcast_producer(
            iterator=self._until_aborted(tensors),
            group=self.communicator,
            src=0,
            post_iter_func=lambda item: item[1],
            buffer_size_bytes=self.size,
            num_buffers=BUFFERS,
        )

    def _until_aborted(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Raises RuntimeError once aborted: that lets a blocked sender go on, and it must not use the
        communicator then."""
        for item in tensors.items():
            if self._aborted.is_set():
                raise RuntimeError("the link was aborted")
            yield item

    def abort(self) -> None:
        self._aborted.set()
        self.communicator.destroy()


def connector(device: torch.device) -> Connect:
    """A function that makes links from this GPU."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

    def connect(listener: socket.socket, size: int) -> NCCLLink:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup
        from vllm.utils.nccl import unpinned_nccl_env

        torch.cuda.set_device(device)  # of this thread
        host, port = listener.getsockname()[:2]
        group = StatelessProcessGroup.create(host, port, rank=0, world_size=2, listen_socket=listener)
        with unpinned_nccl_env():
            communicator = PyNcclCommunicator(group, device=device)
        if not communicator.available or communicator.disabled:  # its broadcasts would do nothing
            raise RuntimeError("vLLM finds no NCCL library (VLLM_NCCL_SO_PATH names one)")
        return NCCLLink(communicator, device, size)

    return connect


def exporter(device: torch.device) -> Callable[[Mapping[str, Tensor]], str]:
    """A function that makes handles of tensors on this GPU, one each, under the GPU's global name."""
    gpu = str(torch.cuda.get_device_properties(device).uuid)

    def export(tensors: Mapping[str, Tensor]) -> str:
        from torch.multiprocessing.reductions import reduce_tensor

        torch.cuda.ipc_collect()  # what the server has closed since
        handles = [{gpu: reduce_tensor(tensor)[1]} for tensor in tensors.values()]
        return base64.b64encode(pickle.dumps(handles)).decode()

    return export
