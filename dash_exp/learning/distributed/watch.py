"""Ranks that torchrun or srun started are watched over a connection that each holds to rank 0: the system
closes it when a process ends, however it ends. Torch-free."""

from __future__ import annotations

import socket
import struct
import time
from contextlib import suppress

from dash_exp.errors import Fault, UserError


class RemoteRank:
    """Rank 0's end of such a connection."""

    def __init__(self, connection: socket.socket):
        self._connection = connection

    def ending(self) -> str | None:
        """How it ended; None while it lives."""
        try:
            alive = self._connection.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:  # nothing to read: that is all it ever says
            return None
        except OSError as error:
            return f"is gone ({error.strerror})"
        return None if alive else "is gone: it has closed its connection"

    def told(self) -> str:
        """What it has said is where torchrun or srun put it."""
        return ""

    def end(self, wait_s: float) -> None:
        """Let it end: wait for its side to close."""
        with suppress(OSError), self._connection:
            self._connection.settimeout(wait_s)
            self._connection.recv(1)


class Door:
    """Where the other ranks knock: a port of this machine."""

    def __init__(self) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=dual)
        self.port = int(self._server.getsockname()[1])

    def receive(self, ranks: int, wait_s: float) -> dict[int, RemoteRank]:
        """Wait for ranks 1 to `ranks` - 1. Raises UserError where some do not come."""
        members: dict[int, RemoteRank] = {}
        deadline = time.monotonic() + wait_s
        with self._server:
            while len(members) < ranks - 1:
                self._server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connection, _ = self._server.accept()
                    connection.settimeout(10)
                    (rank,) = struct.unpack("!I", connection.recv(4, socket.MSG_WAITALL))
                except (TimeoutError, struct.error):
                    if time.monotonic() < deadline:
                        continue  # somebody who is no rank
                    missing = ", ".join(str(r) for r in range(1, ranks) if r not in members)
                    raise UserError(
                        Fault("learner.ranks", f"rank {missing} did not come within {wait_s:g} s")
                    ) from None
                connection.settimeout(None)
                members[rank] = RemoteRank(connection)
        return members


def knock(address: str, port: int, rank: int, wait_s: float) -> socket.socket:
    """Another rank's end, held open for as long as it lives."""
    connection = socket.create_connection((address, port), timeout=wait_s)
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.sendall(struct.pack("!I", rank))
    return connection
