"""The learner's end of vLLM's transfers between GPUs: an NCCL group of two, and handles of GPU memory."""

from __future__ import annotations

import base64
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dash_exp.sampling.transfer.device import Connect

BUFFERS = 2


class NCCLLink:
    """Rank 0 of an NCCL group; the server's worker is rank 1."""

    def __init__(self, communicator: Any, device: torch.device, size: int):
        """`size`: bytes broadcast at a time, as the server was told."""
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
        """Raises RuntimeError once it is: aborting lets a sender that waits go on, and the communicator is
        not to be used then."""
        for item in tensors.items():
            if self._aborted.is_set():
                raise RuntimeError("the server was let go of")
            yield item

    def abort(self) -> None:
        self._aborted.set()
        self.communicator.destroy()


def connector(device: torch.device) -> Connect:
    """What makes links from this GPU."""
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
    """What makes handles of tensors on this GPU, one each, by the name that the GPU has everywhere."""
    gpu = str(torch.cuda.get_device_properties(device).uuid)

    def export(tensors: Mapping[str, Tensor]) -> str:
        from torch.multiprocessing.reductions import reduce_tensor

        torch.cuda.ipc_collect()  # what the server has closed since
        handles = [{gpu: reduce_tensor(tensor)[1]} for tensor in tensors.values()]
        return base64.b64encode(pickle.dumps(handles)).decode()

    return export
