"""How weights get to servers: what every way has in common. Torch-free."""

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
"""The same by the name that a person gives it."""


class OutdatedError(Exception):
    """Newer weights are being staged: what was to be sent is no longer there."""


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """What every server must hold before it is asked anything. `label`: what a server calls them; `update`:
    what it is told of them, as its transfer wants it."""

    version: int
    label: str
    update: Mapping[str, Any]


class Transfer(Protocol):
    """Weights are staged once, by the learner's thread, and sent to each server, in the fleet's loop; also
    later, to one that was started again, while the learner is at work."""

    engine: str
    """PATH, NCCL or IPC."""
    seconds: dict[str, float]
    """Parts of the last `stage`."""

    def stage(self, weights: Iterable[tuple[str, Tensor]], version: int, label: str) -> Weights:
        """Copy the learner's weights to where they can be sent from, and sum them."""
        ...

    async def send(self, client: ServerClient, weights: Weights) -> None:
        """Bring them into a server. Raises what its client raises, and OutdatedError where others have
        been staged meanwhile."""
        ...

    def forget(self, client: ServerClient) -> None:
        """This server is lost: let go of what connects to it."""
        ...

    def close(self) -> None: ...
