"""Weights in shared memory: readers find what was written, and checksums detect a changed bit."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dash_exp.record import checkpoint
from dash_exp.record.checkpoint import checksum, fingerprints
from dash_exp.sampling.transfer.path import (
    PREFIX,
    SHARED_MEMORY,
    SharedReader,
    SharedWeights,
    lock_folder,
    remove_abandoned,
)
from tests.sampling.fake_server import fingerprint


def named(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 5), "b": (7,), "scalar": (), "c": (2, 4, 3)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_write_is_what_a_reader_finds(dtype: torch.dtype) -> None:
    shared = SharedWeights(dtype)
    try:
        paths: list[Path] = []
        for seed in range(5):
            weights = named(seed)
            path, views = shared.write(weights.items())
            read = load_file(path)
            for name, tensor in weights.items():
                assert torch.equal(read[name], tensor.to(dtype))
                assert checksum(read[name]) == checksum(views[name]) == checksum(tensor.to(dtype))
            paths.append(path)
        assert paths[0] != paths[1] and paths[0] == paths[2] == paths[4]
    finally:
        shared.close()
    assert not shared.folder.exists()


def test_the_file_before_stays_as_it_was() -> None:
    shared = SharedWeights(torch.float32)
    first, second = named(1), named(2)
    before, _ = shared.write(first.items())
    shared.write(second.items())
    assert torch.equal(load_file(before)["a"], first["a"])
    shared.close()


def test_another_set_of_tensors_is_refused() -> None:
    shared = SharedWeights(torch.float32)
    for seed in range(2):
        shared.write(named(seed).items())
    with pytest.raises(AssertionError, match="1 tensors where 4"):
        shared.write([("a", torch.zeros(3, 5))])
    shared.close()


def test_a_reader_that_keeps_files_mapped_sees_every_write() -> None:
    """Files filled again in place, and after them those of another writer."""
    reader = SharedReader(Path(tempfile.gettempdir()) if not SHARED_MEMORY.is_dir() else SHARED_MEMORY)
    for start in (0, 10):
        shared = SharedWeights(torch.bfloat16)
        places = []
        for seed in range(start, start + 5):
            path, _ = shared.write(named(seed).items())
            read = reader.read(path)
            assert {n: t.tolist() for n, t in read.items()} == {
                n: t.to(torch.bfloat16).tolist() for n, t in named(seed).items()
            }
            places.append(read["a"].data_ptr())
        assert places[0] == places[2] == places[4] != places[1]  # mapped once
        shared.close()
    reader.close()


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    reader, path = SharedReader(tmp_path), tmp_path / "weights.safetensors"
    for seed in (1, 2):
        save_file(named(seed), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        assert torch.equal(reader.read(path)["a"], named(seed)["a"])
    elsewhere = SharedReader(tmp_path / "other")
    assert torch.equal(elsewhere.read(path)["a"], named(2)["a"])


@given(st.integers(0, 23), st.integers(0, 31))
def test_one_bit_changes_the_checksum(place: int, bit: int) -> None:
    tensor = torch.arange(24.0).reshape(4, 6)
    other = tensor.clone()
    other.view(-1).view(torch.int32)[place] ^= 1 << bit if bit < 31 else -(1 << 31)
    assert checksum(tensor) != checksum(other)
    assert len(set(fingerprints({"a": tensor, "b": other, "c": other.clone()}).values())) == 2


def test_order_shape_and_type_are_part_of_the_checksum() -> None:
    tensor = torch.arange(24.0)
    others = (tensor, tensor.flip(0), tensor.view(4, 6), tensor.int())
    assert len({checksum(t) for t in others}) == 4
    assert len(set(fingerprints(dict(zip("abcd", others, strict=True))).values())) == 4


def test_a_fingerprint_is_the_same_for_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """And depends on each place, also in a tensor of several parts."""
    monkeypatch.setattr(checkpoint, "PART", 7)
    tensor = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned = tensor.t().contiguous().t()
    swapped = tensor.clone().view(-1)
    swapped[[3, 20]] = swapped[[20, 3]]
    same, other, moved = fingerprints({"a": tensor, "b": turned, "c": swapped.view(6, 4)}).values()
    data = tensor.view(torch.int16).numpy().tobytes()
    assert same == other != moved and same == f"{fingerprint(data, 2, 7):016x}-bfloat16-6x4"
    assert fingerprints({"none": tensor[:0]})["none"].endswith("bfloat16-0x4") and fingerprints({}) == {}


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left, used, new, other = (tmp_path / name for name in (f"{PREFIX}a", f"{PREFIX}b", f"{PREFIX}c", "mine"))
    for folder in (left, used, new, other):
        folder.mkdir()
    lock = lock_folder(used)
    for folder in (left, used, other):
        os.utime(folder, (0, 0))
    remove_abandoned(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{PREFIX}b", f"{PREFIX}c", "mine"]
    assert lock is not None
    lock.release()
