"""Several servers as one: every group once, whatever happens to the servers. Real processes and HTTP; the
servers have no model (fake_server.py). With vLLM: test_vllm_servers.py."""

from __future__ import annotations

import asyncio
import os
import random
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
from dash_exp.sampling.fleet.sampler import ServerSampler
from dash_exp.sampling.protocol import arrived
from dash_exp.sampling.transfer import Weights
from dash_exp.types import Group, Prompt, Request
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


def test_every_group_once_from_every_server(rig: Callable[..., Rig]) -> None:
    one = rig(servers=3)
    asked = ask(24)
    groups = list(arrived(one.sampler.stream(asked, DECODING)))
    check(groups, asked, "default")
    assert {g.origin.worker for g in groups if g.origin} == {"server-0", "server-1", "server-2"}
    assert one.events == []


def test_new_weights_reach_every_server_and_name_the_policy(rig: Callable[..., Rig]) -> None:
    one = rig()
    one.sampler.load_weights(3)
    asked = ask(8)
    groups = list(arrived(one.sampler.stream(asked, DECODING)))
    check(groups, asked, "3")
    assert len({g.origin.worker for g in groups if g.origin}) == 2


def test_a_batch_asked_for_in_parts_comes_bit_by_bit(rig: Callable[..., Rig]) -> None:
    """At most so many groups' completions are on their way, not less for long where some of a group are done
    and others are not; the first arrive long before the last is asked for."""
    one = rig(delay=0.02)
    asked = ask(12)
    each = len(asked[0].seeds)
    stream = one.sampler.stream(asked, DECODING, at_once=3)
    seen: list[Group] = []
    groups_on_way = []
    for group in stream:
        assert sum(m.completions for m in one.members) <= 3 * each
        groups_on_way.append(sum(len(m.pending) for m in one.members))
        if group is not None:
            seen.append(group)
    assert max(groups_on_way) > 3
    check(seen, asked, "default")
    starts = sorted(g.origin.start for g in seen if g.origin)
    assert min(g.origin.end for g in seen if g.origin) < starts[-1]
    for origin in (g.origin for g in seen if g.origin):
        assert origin.start < min(origin.ends) <= max(origin.ends) == origin.end
        assert len(origin.ends) == each


def test_work_is_spread_by_what_it_is_expected_to_cost(rig: Callable[..., Rig]) -> None:
    """A prompt of 300 tokens has a server of its own while four of 3 tokens share the other; and a prompt
    whose completions were long before counts as long."""
    one = rig()
    heavy = Request(0, Prompt("heavy", "t", "", (3,) * 300, ""), (1, 2, 3, 4))
    groups = list(arrived(one.sampler.stream([heavy, *ask(5)[1:]], DECODING)))
    workers = {g.position: g.origin.worker for g in groups if g.origin}
    assert {workers[n] for n in range(1, 5)} == {"server-0", "server-1"} - {workers[0]}
    lengths = one.sampler.lengths
    before = lengths.expected_tokens(ask(1)[0])
    lengths.add(Group(0, ask(1)[0].prompt, (groups[0].completions[0],) * 4))
    assert lengths.expected_tokens(ask(1)[0]) == 3 + 4 * len(groups[0].completions[0].token_ids) != before


def test_the_caller_is_not_held_up_while_nothing_is_there(rig: Callable[..., Rig]) -> None:
    one = rig(delay=0.1)
    stream = one.sampler.stream(ask(1), DECODING)
    assert next(stream) is None


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("garbage", "answers no JSON"),
        ("short", "no completion in the response"),
        ("old", "tokens of weights"),
        ("dead", "EngineDeadError"),
        ("hang", "health checks failed"),
        ("stuck", "no token for 1.5 s"),
    ],
)
def test_a_broken_server_is_noticed_and_the_others_do_its_work(
    rig: Callable[..., Rig], mode: str, reason: str
) -> None:
    one = rig(policy=replace(POLICY, stall_s=1.5 if mode == "stuck" else 60))
    if mode == "hang":
        one.kill(0, signal.SIGSTOP)
    else:
        one.tell(0, mode)
    asked = ask(12)
    groups = list(arrived(one.sampler.stream(asked, DECODING)))
    check(groups, asked, "default")
    (fault,) = one.of("fault")
    assert (fault["what"], fault["worker"]) == ("server lost", "server-0")
    assert reason in fault["reason"] and fault["groups"]


def test_a_server_that_ends_is_started_again_with_the_current_weights(rig: Callable[..., Rig]) -> None:
    one = rig(restarts=1)
    one.sampler.load_weights(2)
    before = one.pid(0)
    one.kill(0)
    asked = ask(12)
    check(list(arrived(one.sampler.stream(asked, DECODING))), asked, "2")
    until(lambda: one.members[0].state == "serving")
    assert one.pid(0) != before
    check(list(arrived(one.sampler.stream(asked, DECODING))), asked, "2")  # nothing older than 2 comes
    assert [e["what"] for e in one.of("fault")] == ["server lost"]
    assert [(e["worker"], e["version"]) for e in one.of("restart")] == [("server-0", 2)]


def test_a_server_that_takes_no_weights_is_not_asked(rig: Callable[..., Rig]) -> None:
    one = rig()
    one.tell(1, "refuse")
    one.sampler.load_weights(1)
    asked = ask(8)
    groups = list(arrived(one.sampler.stream(asked, DECODING)))
    check(groups, asked, "1")
    assert {g.origin.worker for g in groups if g.origin} == {"server-0"}
    assert "failed to load weights" in one.of("fault")[0]["reason"]


def test_ends_are_not_told_of_a_group_that_another_server_was_asked_for(rig: Callable[..., Rig]) -> None:
    """Also where none of its completions was done there: how long it took tells nothing of this server."""
    one = rig(delay=0.2)
    asked = ask(8)
    stream = arrived(one.sampler.stream(asked, DECODING))
    time.sleep(0.1)
    one.kill(0)
    groups = list(stream)
    check(groups, asked, "default")
    (fault,) = one.of("fault")
    for group in groups:
        assert group.origin is not None
        assert (group.origin.ends == ()) == (group.position in fault["groups"])
    assert fault["groups"]


def test_colocated_servers_sleep_but_to_sample_and_to_take_weights(rig: Callable[..., Rig]) -> None:
    released: list[list[bool]] = []
    one = rig(
        colocated=True,
        restarts=1,
        release=lambda: released.append([bool(one.tell(n, "")["asleep"]) for n in range(2)]),
    )
    asked = ask(8)
    assert [one.tell(n, "")["asleep"] for n in range(2)] == [True, True]
    check(list(arrived(one.sampler.stream(asked, DECODING))), asked, "default")
    assert [one.tell(n, "")["asleep"] for n in range(2)] == [True, True]
    one.kill(1)  # what is started meanwhile goes to sleep too
    until(lambda: len(one.sampler._events) == 2)
    assert [one.tell(n, "")["asleep"] for n in range(2)] == [True, True]
    one.sampler.load_weights(1)
    assert [one.tell(n, "")["asleep"] for n in range(2)] == [False, False]
    assert released == [[True, True]] * 2  # before they woke up
    check(list(arrived(one.sampler.stream(asked, DECODING))), asked, "1")


class Talk:
    """A client and a transfer that only remember what they were told; `meanwhile` happens during a call."""

    def __init__(self, meanwhile: dict[str, Callable[[], None]]):
        self.told: list[str] = []
        self.meanwhile = meanwhile

    async def call(self, path: str) -> None:
        await self._say(path.partition("?")[0].strip("/"))

    async def send(self, client: Any, weights: Weights) -> None:
        await self._say(weights.label)

    async def _say(self, what: str) -> None:
        self.told.append(what)
        await asyncio.sleep(0)
        self.meanwhile.pop(what, lambda: None)()


@pytest.mark.parametrize(
    ("asleep", "meanwhile", "told"),
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
    asleep: bool, meanwhile: dict[str, tuple[bool, str]], told: list[str]
) -> None:
    """Others are woken up, or take weights, while it is told to sleep: it serves as they do."""

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
    assert talk.told == told


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


def test_a_prompt_that_a_server_refuses_fails_the_run_and_no_server(rig: Callable[..., Rig]) -> None:
    one = rig()
    one.members[0].client._session.headers["Authorization"] = "Bearer wrong"  # type: ignore[union-attr, index]
    with pytest.raises(RuntimeError, match="refuses the prompt"):
        list(one.sampler.stream(ask(4), DECODING))
    assert all(m.state == "serving" for m in one.members)


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


def test_an_update_that_somebody_left_unfinished_is_made_good(rig: Callable[..., Rig]) -> None:
    """Who began it was killed between two calls: the server would take no other one."""
    one = rig(servers=1)
    client = one.members[0].client
    assert client is not None
    one.sampler._run(client.call("/start_weight_update"))
    one.sampler.load_weights(4)
    assert one.events == [] and one.tell(0, "")["version"] == "4"


def test_servers_do_not_outlive_the_sampler(rig: Callable[..., Rig]) -> None:
    one = rig()
    pids = [one.pid(0), one.pid(1)]
    one.sampler.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


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
