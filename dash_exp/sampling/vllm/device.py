"""vLLM's transfers between GPUs, with each tensor checked where it arrives. Never run: it needs a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.weight_transfer.ipc_engine import (
    IPCWeightTransferEngine,
    IPCWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)

from dash_exp.sampling.vllm.receive import checking


@dataclass
class NCCLUpdate(NCCLWeightTransferUpdateInfo):
    """`checksums`: of each tensor, by name."""

    checksums: dict[str, str] = field(default_factory=dict)


@dataclass
class IPCUpdate(IPCWeightTransferUpdateInfo):
    """As above."""

    checksums: dict[str, str] = field(default_factory=dict)


class NCCLTransfer(NCCLWeightTransferEngine):
    """From the learner's GPU to this one."""

    update_info_cls = NCCLUpdate

    def __init__(self, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        self._wanted = {name for name, _ in self.model.named_parameters()}

    def receive_weights(self, update_info: NCCLUpdate) -> None:
        with checking(self, update_info.checksums, self._wanted):
            super().receive_weights(update_info)


class IPCTransfer(IPCWeightTransferEngine):
    """Within the GPU that learner and server share."""

    update_info_cls = IPCUpdate

    def __init__(self, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        self._wanted = {name for name, _ in self.model.named_parameters()}

    def receive_weights(self, update_info: IPCUpdate) -> None:
        with checking(self, update_info.checksums, self._wanted):
            super().receive_weights(update_info)
