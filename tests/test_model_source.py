"""A model that is made once: complete or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from dash_exp.modeling.source import _make_once

FULL = (
    OSError(errno.ENOSPC, "No space left on device"),
    Exception("No space left on device (os error 28)"),  # tokenizers
    RuntimeError("Error while serializing: IoError(Os { code: 28, kind: StorageFull })"),  # safetensors
)


@pytest.mark.parametrize("error", FULL, ids=["python", "tokenizers", "safetensors"])
def test_a_full_disk_leaves_nothing_half_made(tmp_path: Path, error: Exception) -> None:
    def make(folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise error

    with pytest.raises(OSError, match="No space left") as raised:
        _make_once(tmp_path / "models" / "m", make)
    assert raised.value.errno == errno.ENOSPC
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["m.lock"]
