"""How weights get from the learner to servers: the interface that all transfers share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from dash_exp.sampling.fleet.client import ServerClient

PATH, NCCL, IPC = "dash_shared", "dash_nccl", "dash_ipc"
"""What a server is started with: it reads a file, joins an NCCL group, or opens the learner's GPU memory."""
ENGINES = {"file": PATH, "nccl": NCCL, "ipc": IPC}
"""The same by the names that users type."""


class OutdatedError(Exception):
    """The weights to be sent have been overwritten by newer ones."""


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """A version of the weights that every server must hold before it is asked anything. `label`: its name in
    servers; `update`: what a server is sent about it, in the format of the transfer."""

    version: int
    label: str
    update: Mapping[str, Any]


class Transfer(Protocol):
    """Weights are staged once, by the learner's thread, and sent to each server from the fleet's event loop;
    also later, to a server that was restarted, while the learner is working."""

    engine: str
    """PATH, NCCL or IPC."""
    seconds: dict[str, float]
    """Parts of the last `stage`."""

    def stage(self, weights: Iterable[tuple[str, Tensor]], version: int, label: str) -> Weights:
        """Copy the learner's weights to where they can be sent from, and compute their checksums."""
        ...

    async def send(self, client: ServerClient, weights: Weights) -> None:
        """Load them into a server. Raises what its client raises, and OutdatedError where newer ones have
        been staged."""
        ...

    def disconnect(self, client: ServerClient) -> None:
        """This server is lost: release what connects to it."""
        ...

    def close(self) -> None: ...
