"""The protocol of vLLM's transfers between GPUs, with servers that speak it over a plain socket
(fake_server.py): joining during the request to join, sending during the request to update, and disconnecting
servers that hang. What needs a GPU is marked so, and has never been run."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dash_exp.sampling.protocol import arrived
from dash_exp.sampling.transfer import OutdatedError
from dash_exp.sampling.transfer.device import (
    BroadcastTransfer,
    HandleTransfer,
    NCCLLink,
    Staged,
    address_towards,
)
from tests.sampling.server_rig import DECODING, Rig, ask, check, until

UPDATE = ["start_weight_update", "update_weights", "finish_weight_update", "reset_prefix_cache"]
JOIN = ["shutdown_weight_transfer_engine", "init_weight_transfer_engine"]


class Wire:
    """A socket in place of an NCCL group of two: blocks both sides as NCCL does."""

    made: list[Wire]

    def __init__(self, listener: socket.socket, size: int):
        self.size, self.aborted = size, False
        self.connection, _ = listener.accept()
        self.hang = threading.Event()
        listener.close()

    def send(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            self.connection.sendall(tensor.contiguous().view(torch.uint8).numpy().tobytes())

    def abort(self) -> None:
        self.aborted = True
        self.connection.close()


def broadcast(dtype: torch.dtype = torch.float32) -> tuple[BroadcastTransfer, list[Wire]]:
    made: list[Wire] = []

    def connect(listener: socket.socket, size: int) -> Wire:
        made.append(Wire(listener, size))
        return made[-1]

    return BroadcastTransfer(Staged(dtype, torch.device("cpu")), connect), made


def calls(one: Rig, number: int) -> list[str]:
    return list(one.post(number, "")["calls"])


def test_a_group_for_each_server_then_one_broadcast_for_each_update(rig: Callable[..., Rig]) -> None:
    transfer, wires = broadcast()
    one = rig(transfer=transfer)
    for version in (1, 2):
        one.sampler.load_weights(version)
        asked = ask(6)
        check(list(arrived(one.sampler.stream(asked, DECODING))), asked, str(version))
    assert [calls(one, n) for n in range(2)] == [[*JOIN, *UPDATE, *UPDATE]] * 2
    assert len(wires) == 2 and all(wire.size >= 256 << 20 for wire in wires)
    assert one.events == [] and one.sampler.sync_seconds.keys() == {"write", "checksum", "load"}


def test_what_arrives_is_checked(rig: Callable[..., Rig]) -> None:
    """Other bytes than were summed: the server says so, and is lost."""
    transfer, wires = broadcast()
    one = rig(transfer=transfer)
    one.sampler.load_weights(1)
    wires[0].send = lambda tensors: Wire.send(wires[0], {n: t + 1 for n, t in tensors.items()})  # type: ignore[method-assign]
    one.sampler.load_weights(2)
    (fault,) = one.of("fault")
    assert "not the weights that were sent" in fault["reason"]
    assert wires[0].aborted and not wires[1].aborted
    asked = ask(4)
    check(list(arrived(one.sampler.stream(asked, DECODING))), asked, "2")


def test_a_server_that_dies_in_a_broadcast_is_disconnected_and_joined_again(rig: Callable[..., Rig]) -> None:
    transfer, wires = broadcast()
    one = rig(restarts=1, transfer=transfer)
    one.sampler.load_weights(1)
    one.post(0, "late")
    one.sampler.load_weights(2)
    assert any(wire.aborted for wire in wires)
    until(lambda: all(m.state == "serving" for m in one.members))
    assert len(wires) == 3
    one.sampler.load_weights(3)
    asked = ask(8)
    groups = list(arrived(one.sampler.stream(asked, DECODING)))
    check(groups, asked, "3")
    assert {g.origin.worker for g in groups if g.origin} == {"server-0", "server-1"}


def test_handles_of_the_learners_copy_are_passed(rig: Callable[..., Rig]) -> None:
    def export(tensors: Mapping[str, torch.Tensor]) -> str:
        return "handles of " + ",".join(tensors)

    transfer = HandleTransfer(Staged(torch.float32, torch.device("cpu")), export)
    one = rig(servers=1, colocated=True, transfer=transfer)
    for version in (1, 2):
        one.sampler.load_weights(version)
        asked = ask(4)
        check(list(arrived(one.sampler.stream(asked, DECODING))), asked, str(version))
    assert calls(one, 0) == ["init_weight_transfer_engine", *UPDATE, *UPDATE]
    assert one.events == []


def test_a_complete_copy_is_sent_while_the_learner_goes_on() -> None:
    staged = Staged(torch.bfloat16, torch.device("cpu"))
    weight = torch.arange(4.0)
    transfer = HandleTransfer(staged, str)
    first = transfer.stage([("w", weight)], 1, "1")
    weight += 1  # an update of the learner
    with staged.borrowed(first) as tensors:
        assert tensors["w"].tolist() == [0, 1, 2, 3]
        waiting = threading.Thread(target=lambda: transfer.stage([("w", weight)], 2, "2"))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive() and tensors["w"].tolist() == [0, 1, 2, 3]
    waiting.join(5)
    assert staged.tensors["w"].tolist() == [1, 2, 3, 4] and staged.tensors["w"].dtype == torch.bfloat16
    with pytest.raises(OutdatedError), staged.borrowed(first):
        pass
    with pytest.raises(ValueError, match="2 tensors where 1"):
        transfer.stage([("w", weight), ("v", weight)], 3, "3")


def test_weights_are_staged_one_at_a_time() -> None:
    """Gathered or merged for this, all of them together would be the model once more."""
    alive: list[int] = []

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        seen: list[weakref.ref[torch.Tensor]] = []
        for n in range(4):
            alive.append(sum(one() is not None for one in seen))
            tensor = torch.full((3,), float(n))
            seen.append(weakref.ref(tensor))
            pair = (f"w{n}", tensor)
            del tensor
            yield pair
            del pair

    staged = Staged(torch.float32, torch.device("cpu"))
    for _ in range(2):
        staged.write(gathered())
    assert max(alive) <= 1
    assert [t.tolist() for t in staged.tensors.values()] == [[float(n)] * 3 for n in range(4)]


def test_a_server_starts_its_update_when_it_is_its_turn(rig: Callable[..., Rig]) -> None:
    """Else servers that wait behind one that hangs would be lost together with it."""
    transfer, _ = broadcast()
    one = rig(transfer=transfer)
    one.sampler.load_weights(1)
    loop, lock = one.sampler._loop, transfer._one_at_a_time
    asyncio.run_coroutine_threadsafe(lock.acquire(), loop).result()
    loading = threading.Thread(target=lambda: one.sampler.load_weights(2))
    loading.start()
    time.sleep(0.5)
    assert [calls(one, n) for n in range(2)] == [[*JOIN, *UPDATE]] * 2
    loop.call_soon_threadsafe(lock.release)
    loading.join()
    assert [calls(one, n) for n in range(2)] == [[*JOIN, *UPDATE, *UPDATE]] * 2


def test_nothing_is_sent_after_a_link_is_aborted() -> None:
    """Aborting NCCL's communicator lets a sender that waits in it go on: it must not use it again."""
    done: list[str] = []
    link = NCCLLink(SimpleNamespace(destroy=lambda: done.append("destroyed")), torch.device("cpu"), 8)
    tensors = link._until_aborted({"a": torch.ones(1), "b": torch.ones(1)})
    assert next(tensors)[0] == "a"
    link.abort()
    with pytest.raises(RuntimeError, match="aborted"):
        next(tensors)
    assert done == ["destroyed"]


def test_the_address_that_a_server_sees() -> None:
    assert address_towards("http://127.0.0.1:8000") == "127.0.0.1"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", ["nccl", "ipc", "shared"])
def test_weights_reach_a_real_server_on_a_gpu(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Never run yet. After updates, also one by a server that was started again, log-probabilities are those
    of the learner."""
    from dash_exp.config.compose import compose
    from dash_exp.modeling.attention import ATTENTION
    from dash_exp.modeling.source import load_model
    from dash_exp.train.build_servers import make_servers
    from dash_exp.train.parts import Policy
    from tests.sampling.test_vllm import FREE, SEEN, learner_gap

    if kind == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    config = compose(
        [
            f"model.path={tiny_folder}",
            "sampler=vllm_servers",
            "learner.device=cuda",
            "sampler.dtype=float32",
            f"cluster.transfer={kind}",
            f"sampler.colocated={str(kind != 'nccl').lower()}",
            f"sampler.gpu_memory_utilization={0.8 if kind == 'nccl' else 0.3}",
        ]
    )
    model = load_model(tiny_folder, torch.float32, ATTENTION).to("cuda")
    policy = Policy(
        tiny_folder,
        SEEN,
        str,
        64,
        model=lambda: None,
        weights=model.named_parameters,
        release=torch.cuda.empty_cache,
    )
    sampler = make_servers(config, policy, tmp_path)
    (member,) = sampler.fleet.members
    try:
        for version in (1, 2):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.02 * torch.randn_like(parameter)
            sampler.load_weights(version)
            asked = ask(8)
            groups = list(arrived(sampler.stream(asked, FREE)))
            assert learner_gap(model, groups, 1.0).abs().mean() < 0.01
            assert member.process is not None
            os.killpg(member.process.process.pid, signal.SIGKILL)
            until(lambda: member.state == "starting")
            until(lambda: member.state == "serving", 300)
    finally:
        sampler.close()
