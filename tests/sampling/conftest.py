"""Fixtures of several files here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dash_exp.sampling.transfer import Transfer
from tests.sampling.server_rig import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(
        servers: int = 2,
        delay: float = 0.01,
        restarts: int = 0,
        transfer: Transfer | None = None,
        **more: Any,
    ) -> Rig:
        made.append(Rig(tmp_path / f"logs{len(made)}", servers, delay, restarts, transfer, **more))
        return made[-1]

    yield make
    for one in made:
        one.sampler.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Two servers for the tests of a module that break none."""
    one = Rig(tmp_path_factory.mktemp("pair"), servers=2, delay=0.02, restarts=0, transfer=None)
    yield one
    one.sampler.close()
