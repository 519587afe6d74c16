"""Servers that were started by hand: they are checked, get the learner's weights, and are left running.
Real processes and HTTP; the servers have no model (fake_server.py). With vLLM: tests/test_serve.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dash_exp.errors import UserError
from dash_exp.sampling.fleet.member import Launch, Member, Needs, ServerProcess
from dash_exp.sampling.fleet.sampler import ServerSampler
from dash_exp.sampling.protocol import arrived
from dash_exp.sampling.transfer import PATH, Transfer
from dash_exp.sampling.transfer.path import FileWeights, PathTransfer
from tests.sampling.server_rig import (
    DECODING,
    FAKE,
    NAMED,
    POLICY,
    ask,
    check,
    fleet_settings,
    server_settings,
    shared,
    until,
)

NEEDS = Needs(config="same", vocabulary=100, longest=64, dtype="float32", transfer=PATH)


class Town:
    """Servers started by hand, and samplers that name them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.servers: list[ServerProcess] = []
        self.guests: list[ServerSampler] = []
        self.events: list[dict[str, Any]] = []

    def server(self, port: int = 0) -> ServerProcess:
        launch = Launch("secret", self.folder, FAKE)
        one = ServerProcess(server_settings(0.01, port=port), launch, f"serve-{len(self.servers)}")
        self.servers.append(one)
        until(lambda: one.url is not None)
        return one

    def guest(
        self,
        key: str = "secret",
        restarts: int = 0,
        tag: str = "-ours",
        transfer: Transfer | None = None,
        needs: Needs = NEEDS,
        urls: list[str] | None = None,
        connect_s: float = 1.0,
    ) -> ServerSampler:
        policy = replace(POLICY, restarts=restarts, connect_s=connect_s)
        urls = urls or [str(s.url) for s in self.servers]
        made = ServerSampler(
            [Member(f"server-{n}", None, url, needs) for n, url in enumerate(urls)],
            lambda: NAMED,
            transfer or shared(),
            fleet_settings(Launch(key, self.folder), policy, tag=tag),
            self.event,
        )
        self.guests.append(made)
        return made

    def event(self, kind: str, start: float, end: float, **more: Any) -> None:
        self.events.append({"kind": kind, **more})


@pytest.fixture
def town(tmp_path: Path) -> Iterator[Town]:
    made = Town(tmp_path)
    yield made
    for guest in made.guests:
        guest.close()
    for server in made.servers:
        server.kill()


def test_they_are_used_and_left_running(town: Town) -> None:
    """One run after another, each with its own weights under its own name."""
    for _ in range(2):
        town.server()
    for tag in ("-first", "-second"):
        guest = town.guest(tag=tag)
        guest.load_weights(0)
        asked = ask(8)
        groups = list(arrived(guest.stream(asked, DECODING)))
        check(groups, asked, f"0{tag}")
        assert {g.origin.worker for g in groups if g.origin} == {"server-0", "server-1"}
        guest.close()
    assert [s.exit_code for s in town.servers] == [None, None]
    assert town.events == []


def test_two_runs_at_one_server_are_noticed(town: Town) -> None:
    """Equal versions, other weights: not one token of the other run's is taken."""
    town.server()
    first, second = town.guest(tag="-first"), town.guest(tag="-second")
    first.load_weights(1)
    second.load_weights(1)
    with pytest.raises(UserError, match=r"tokens of weights \['1-second'\] where 1-first was current"):
        list(first.stream(ask(2), DECODING))


def test_one_that_does_not_fit_cannot_be_reached_or_has_another_key_is_refused(town: Town) -> None:
    town.server()
    for needs, what in (
        (replace(NEEDS, longest=65), r"takes 64 tokens, this run needs 65\n.*serve\.max_model_len=65"),
        (replace(NEEDS, config="other"), "serves another model: its config.json differs"),
        (replace(NEEDS, vocabulary=99), "has vocabulary 100, this run 99"),
        (replace(NEEDS, dtype="bfloat16"), "has dtype float32, this run bfloat16"),
        (replace(NEEDS, transfer="dash_nccl"), r"takes weights by dash_shared.*\n.*serve\.transfer=nccl"),
    ):
        with pytest.raises(UserError, match=what):
            town.guest(needs=needs)
    with pytest.raises(UserError, match="DASH_SERVER_KEY: is not the key of http"):
        town.guest(key="wrong")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9 cannot be reached: .* refused\n.*dash_exp\.serve"):
        town.guest(urls=["http://127.0.0.1:9"], connect_s=100)
    slow = town.server()
    os.kill(slow.process.pid, signal.SIGSTOP)
    with pytest.raises(UserError, match=r"did not answer within 1 s \(it is too slow: no answer in time\)"):
        town.guest(urls=[str(slow.url)])


def test_one_of_our_own_that_is_killed_while_starting_is_started_again(tmp_path: Path) -> None:
    died = tmp_path / "died"
    once = f"[ -e {died} ] || {{ touch {died}; kill -9 $$; }}; exec {FAKE[0]} {FAKE[1]}"
    for command, restarts in ((("sh", "-c", once), 1), (("sh", "-c", "kill -9 $$"), 0)):
        events: list[str] = []
        fleet = fleet_settings(Launch("secret", tmp_path, command), replace(POLICY, restarts=restarts))

        def start(fleet: Any = fleet, events: list[str] = events) -> ServerSampler:
            member = Member("server-0", server_settings())
            return ServerSampler(
                [member], lambda: NAMED, shared(), fleet, lambda *_, **more: events.append(more["what"])
            )

        if restarts:
            start().close()
        else:
            with pytest.raises(
                RuntimeError, match=r"ended with code -9 while starting(.|\n)*not started again"
            ):
                start()
        assert events == ["server killed while starting"]


def test_one_that_is_lost_is_waited_for_and_gets_its_weights_again(town: Town) -> None:
    first = town.server()
    port = int(str(first.url).rpartition(":")[2])
    guest = town.guest(restarts=1, connect_s=30)
    guest.load_weights(3)
    os.killpg(first.process.pid, signal.SIGKILL)
    until(lambda: guest.fleet.members[0].state == "starting")
    town.server(port)
    until(lambda: guest.fleet.members[0].state == "serving")
    asked = ask(4)
    check(list(arrived(guest.stream(asked, DECODING))), asked, "3-ours")


def test_one_that_does_not_come_back_is_waited_for_once(town: Town) -> None:
    """It cannot be started from here, so it is not waited for as often as one of our own is restarted."""
    guest = town.guest(restarts=3, urls=[str(town.server().url)])
    os.killpg(town.servers[0].process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"every server is lost: server-0 at http.*(health checks|Client)"):
        list(guest.stream(ask(2), DECODING))
    guest.close()
    assert len([e for e in town.events if e["what"] == "server did not start again"]) == 1


def test_weights_go_through_a_folder_where_memory_is_not_shared(town: Town, tmp_path: Path) -> None:
    """Complete files under new names, at most two of them; nothing is left when the run ends."""
    for _ in range(2):
        town.server()
    place = tmp_path / "between" / "machines"
    files = FileWeights(place, torch.bfloat16)
    guest = town.guest(transfer=PathTransfer(files))
    for version in range(4):
        guest.load_weights(version)
        asked = ask(4)
        check(list(arrived(guest.stream(asked, DECODING))), asked, f"{version}-ours")
        kept = sorted(p.name for p in files.folder.iterdir() if p.suffix == ".safetensors")
        assert kept == [f"weights-{n}.safetensors" for n in range(max(0, version - 1), version + 1)]
    guest.close()
    assert list(place.iterdir()) == [] and town.events == []
