"""Several servers as one: every group once, whatever happens to the servers. Real processes and HTTP; the
servers have no model (fake_server.py). With vLLM: test_vllm_servers.py."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from dash_exp.errors import UserError
from dash_exp.sampling.fleet.fleet import Fleet
from dash_exp.sampling.fleet.member import Launch, Member
from dash_exp.sampling.fleet.sampler import Lengths, ServerSampler
from dash_exp.sampling.protocol import arrived
from dash_exp.sampling.transfer import Weights
from dash_exp.types import Completion, Group, Prompt, Request
from tests.sampling.server_rig import (
    DECODING,
    POLICY,
    Rig,
    ask,
    check,
    fleet_settings,
    server_settings,
    shared,
    until,
)


def test_new_weights_reach_every_server_and_name_the_policy(pair: Rig) -> None:
    for version in (3, 4):
        pair.sampler.load_weights(version)
        asked = ask(8)
        groups = list(arrived(pair.sampler.stream(asked, DECODING)))
        check(groups, asked, str(version))
        assert {g.origin.worker for g in groups if g.origin} == {"server-0", "server-1"}
    assert pair.events == []


def test_a_batch_requested_in_waves_keeps_one_wave_in_flight(pair: Rig) -> None:
    """Never more completions than a wave has, nor fewer for long where some of a group are done; the first
    groups finish long before the last is started."""
    pair.sampler.load_weights(1)
    asked = ask(12)
    each = len(asked[0].seeds)
    seen: list[Group] = []
    groups_in_flight = []
    for group in pair.sampler.stream(asked, DECODING, at_once=3):
        assert sum(m.completions for m in pair.members) <= 3 * each
        groups_in_flight.append(sum(len(m.pending) for m in pair.members))
        if group is not None:
            seen.append(group)
    assert max(groups_in_flight) > 3
    check(seen, asked, "1")
    starts = sorted(g.origin.start for g in seen if g.origin)
    assert min(g.origin.end for g in seen if g.origin) < starts[-1]
    for origin in (g.origin for g in seen if g.origin):
        assert origin.start < origin.end


def test_groups_are_assigned_by_expected_cost(pair: Rig) -> None:
    """A prompt of 300 tokens has a server of its own while four of 3 tokens share the other."""
    heavy = Request(0, Prompt("heavy", "t", "", (3,) * 300, ""), (1, 2, 3, 4))
    groups = list(arrived(pair.sampler.stream([heavy, *ask(5)[1:]], DECODING)))
    workers = {g.position: g.origin.worker for g in groups if g.origin}
    assert {workers[n] for n in range(1, 5)} == {"server-0", "server-1"} - {workers[0]}


def test_completions_are_expected_to_be_as_long_as_before() -> None:
    lengths, request = Lengths(), ask(1)[0]
    assert lengths.expected_tokens(request) == 3 + 4 * 1
    completion = Completion((5,) * 7, (-1.0,) * 7, "", "stop", 0)
    lengths.add(Group(0, request.prompt, (completion,) * 4))
    assert lengths.expected_tokens(request) == 3 + 4 * 7
    assert lengths.expected_tokens(ask(2)[1]) == 3 + 4 * 7


def test_the_caller_does_not_wait_while_no_group_is_ready(pair: Rig) -> None:
    assert next(pair.sampler.stream(ask(1), DECODING)) is None


def test_an_update_that_a_killed_process_left_unfinished_is_repeated(pair: Rig) -> None:
    """Its owner was killed between two calls: the server would accept no other update."""
    client = pair.members[0].client
    assert client is not None
    pair.sampler._run(client.call("/start_weight_update"))
    pair.sampler.load_weights(4)
    assert pair.events == [] and pair.post(0, "")["version"] == "4"


def test_a_prompt_that_a_server_refuses_fails_the_run_and_no_server(pair: Rig) -> None:
    session = pair.members[0].client._session  # type: ignore[union-attr]
    session.headers["Authorization"] = "Bearer wrong"  # type: ignore[index]
    with pytest.raises(RuntimeError, match="refuses the prompt"):
        list(pair.sampler.stream(ask(4), DECODING))
    session.headers["Authorization"] = "Bearer secret"  # type: ignore[index]
    assert all(m.state == "serving" for m in pair.members)


BROKEN = {
    "garbage": "answers no JSON",
    "short": "no completion in the response",
    "old": "tokens of weights",
    "dead": r"EngineDeadError|/health reports an error",
    "hang": r"health checks failed|no token for 1\.5 s",  # whichever is noticed first
    "stuck": r"no token for 1\.5 s",
    "refuse": "failed to load weights",
}


def test_broken_servers_are_noticed_and_the_others_take_over(rig: Callable[..., Rig]) -> None:
    """Each server but the last is broken in a way of its own. None outlives the sampler."""
    one = rig(servers=len(BROKEN) + 1, policy=replace(POLICY, stall_s=1.5))
    for number, mode in enumerate(BROKEN):
        if mode == "refuse":
            one.post(number, mode)
    one.sampler.load_weights(1)
    for number, mode in enumerate(BROKEN):
        if mode == "hang":
            one.kill(number, signal.SIGSTOP)
        elif mode != "refuse":
            one.post(number, mode)
    pids = [one.pid(n) for n, m in enumerate(one.members) if m.state == "serving"]
    asked = ask(32)
    check(list(arrived(one.sampler.stream(asked, DECODING))), asked, "1")
    reasons = {f["worker"]: f["reason"] for f in one.of("fault") if f["what"] == "server lost"}
    assert sorted(reasons) == [f"server-{n}" for n in range(len(BROKEN))]
    for number, reason in enumerate(BROKEN.values()):
        assert re.search(reason, reasons[f"server-{number}"])
    assert all(f["groups"] for f in one.of("fault") if "load weights" not in f["reason"])
    one.sampler.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_server_that_ends_is_restarted_with_the_current_weights(rig: Callable[..., Rig]) -> None:
    one = rig(delay=0.1, restarts=1)
    one.sampler.load_weights(2)
    before = one.pid(0)
    asked = ask(8)
    stream = arrived(one.sampler.stream(asked, DECODING))
    time.sleep(0.1)
    one.kill(0)
    groups = list(stream)
    check(groups, asked, "2")
    (fault,) = one.of("fault")
    assert fault["what"] == "server lost" and fault["groups"]
    until(lambda: one.members[0].state == "serving")
    assert one.pid(0) != before
    check(list(arrived(one.sampler.stream(asked, DECODING))), asked, "2")  # nothing older than 2 comes
    assert [(e["worker"], e["version"]) for e in one.of("restart")] == [("server-0", 2)]


def test_colocated_servers_sleep_but_to_sample_and_to_take_weights(rig: Callable[..., Rig]) -> None:
    released: list[list[bool]] = []
    one = rig(
        colocated=True,
        restarts=1,
        release=lambda: released.append([bool(one.post(n, "")["asleep"]) for n in range(2)]),
    )
    asked = ask(8)
    assert [one.post(n, "")["asleep"] for n in range(2)] == [True, True]
    check(list(arrived(one.sampler.stream(asked, DECODING))), asked, "default")
    assert [one.post(n, "")["asleep"] for n in range(2)] == [True, True]
    one.kill(1)  # what is started meanwhile goes to sleep too
    until(lambda: len(one.sampler._events) == 2)
    assert [one.post(n, "")["asleep"] for n in range(2)] == [True, True]
    one.sampler.load_weights(1)
    assert [one.post(n, "")["asleep"] for n in range(2)] == [False, False]
    assert released == [[True, True]] * 2  # before they woke up
    check(list(arrived(one.sampler.stream(asked, DECODING))), asked, "1")


class Talk:
    """A client and a transfer that only record their calls; `meanwhile` runs during a call."""

    def __init__(self, meanwhile: dict[str, Callable[[], None]]):
        self.calls: list[str] = []
        self.meanwhile = meanwhile

    async def call(self, path: str) -> None:
        await self._record(path.partition("?")[0].strip("/"))

    async def send(self, client: Any, weights: Weights) -> None:
        await self._record(weights.label)

    async def _record(self, what: str) -> None:
        self.calls.append(what)
        await asyncio.sleep(0)
        self.meanwhile.pop(what, lambda: None)()


@pytest.mark.parametrize(
    ("asleep", "meanwhile", "expected"),
    [
        (False, {}, ["one"]),
        (True, {}, ["one", "sleep"]),
        (True, {"sleep": (False, "one")}, ["one", "sleep", "wake_up"]),
        (True, {"sleep": (False, "two")}, ["one", "sleep", "wake_up", "two"]),
        (True, {"sleep": (True, "two")}, ["one", "sleep", "wake_up", "two", "sleep"]),
        (False, {"one": (True, "two")}, ["one", "two", "sleep"]),
    ],
)
def test_what_changes_while_a_server_starts_reaches_it(
    asleep: bool, meanwhile: dict[str, tuple[bool, str]], expected: list[str]
) -> None:
    """Others are woken up, or take weights, while it goes to sleep: it ends up in the same state."""

    def becomes(asleep: bool, label: str) -> None:
        fleet.asleep, fleet.weights = asleep, made[label]

    async def ready() -> None:
        member = Member("server-0", None)
        member.client = cast(Any, talk)
        await fleet._until_ready(member)

    made = {label: Weights(1, label, {}) for label in ("one", "two")}
    talk = Talk({what: partial(becomes, *to) for what, to in meanwhile.items()})
    settings = fleet_settings(Launch("", Path()))
    fleet = Fleet([], cast(Any, talk), settings, lambda *what, **more: None)
    becomes(asleep, "one")
    asyncio.run(ready())
    assert talk.calls == expected


def test_all_servers_gone_is_a_clear_failure(rig: Callable[..., Rig]) -> None:
    one = rig(delay=0.05)
    asked = ask(12)
    stream = one.sampler.stream(asked, DECODING)
    next(stream)
    one.kill(0)
    one.kill(1)
    with pytest.raises(UserError, match=r"every server is lost: server-0 at http.*server-1 at http"):
        list(stream)
    with pytest.raises(UserError, match="every server is lost"):
        one.sampler.load_weights(1)


def test_the_last_server_is_waited_for_while_it_starts_again(rig: Callable[..., Rig]) -> None:
    one = rig(servers=1, restarts=1)
    one.kill(0)
    one.sampler.load_weights(5)
    asked = ask(6)
    check(list(arrived(one.sampler.stream(asked, DECODING))), asked, "5")


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "import sys; sys.exit('no such model')")
    with pytest.raises(RuntimeError, match=r"server-0 ended with code 1.*no such model"):
        ServerSampler(
            [Member("server-0", server_settings())],
            list,
            shared(),
            fleet_settings(Launch("k", tmp_path, command)),
            lambda *what, **more: None,
        )


@pytest.mark.long
def test_twenty_random_kills_lose_and_double_nothing(rig: Callable[..., Rig]) -> None:
    """Batch after batch while servers are killed at random moments; new weights before every batch."""
    one = rig(servers=3, delay=0.01, restarts=40)
    stop, kills, chance = threading.Event(), 0, random.Random(0)

    def killer() -> None:
        nonlocal kills
        while not stop.wait(chance.uniform(0.02, 0.25)):
            alive = [n for n, m in enumerate(one.members) if m.state == "serving" and m.process]
            if len(alive) > 1 and kills < 20:
                one.kill(chance.choice(alive))
                kills += 1

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        version = 0
        while kills < 20:
            version += 1
            one.sampler.load_weights(version)
            asked = ask(16, first=version * 10_000)
            check(list(arrived(one.sampler.stream(asked, DECODING))), asked, str(version))
    finally:
        stop.set()
        thread.join()
    until(lambda: all(m.state == "serving" for m in one.members))
    one.sampler.load_weights(version + 1)
    assert kills == 20
    assert len([e for e in one.of("fault") if e["what"] == "server lost"]) == 20
