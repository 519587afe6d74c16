"""Hostile programs: no score, bounded time, nothing left running, nothing changed, in each confinement."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from code_fixtures import CONFINEMENTS, WORKERS, descendants, verifier_in
from hostile_programs import HOSTILE, LOOKING, RIGHT, TESTS, Hostile

from dash_exp.verifiers.code.confine import filter_supported, landlock_supported
from dash_exp.verifiers.judges import PooledJudge, Wanted
from dash_exp.verifiers.types import CodeGold

TIMEOUT_S = 0.4
GENEROUS_S = 60.0
GOLD = CodeGold(TESTS, "f").to_text()
PROCESSES = {"bwrap": 5, "limits": 3}
"""Of one idle worker: bubblewrap twice, then host, examiner and the next candidate."""


@pytest.fixture(scope="module")
def canary() -> Iterator[Path]:
    """A folder that anybody may write to, as far as its permissions go; pytest's own is private."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        (folder / "canary").write_text("alive")
        (folder / "canary").chmod(0o666)
        yield folder


def every_program_in_each_confinement() -> Iterator[object]:
    """For `make test` every second program in one confinement; with the long tests all in both."""
    for first, kind in enumerate(CONFINEMENTS):
        for number, name in enumerate(HOSTILE, first):
            yield pytest.param(kind, name, id=f"{kind}-{name}", marks=[pytest.mark.long] * bool(number % 4))


@pytest.fixture(scope="module")
def judge(request: pytest.FixtureRequest) -> Iterator[tuple[Wanted, PooledJudge]]:
    os.environ["DASH_SECRET"] = "hunter2"
    try:
        before = descendants()
        with verifier_in(request.param, TIMEOUT_S) as verifier:
            yield request.param, verifier
        assert descendants() <= before
    finally:
        del os.environ["DASH_SECRET"]


def state_of(folder: Path) -> list[tuple[str, bytes, int, int]]:
    files = [(path, path.stat()) for path in sorted(folder.rglob("*"))]
    return [(p.name, p.read_bytes(), status.st_mode, status.st_mtime_ns) for p, status in files]


def skip_unpromised(kind: Wanted, needs: str) -> None:
    """What this confinement does not promise on this machine."""
    if needs == "filter" and not filter_supported():
        pytest.skip("not promised without a filter of system calls, which is written for x86-64 alone")
    if needs == "bwrap" and kind == "limits":
        pytest.skip("not promised without bubblewrap: other processes can be seen")
    if needs == "hides" and kind == "limits" and not landlock_supported():
        pytest.skip("not promised without bubblewrap and Landlock: files can be read")
    if needs == "user" and kind == "limits" and os.geteuid() != 0:
        pytest.skip("not promised without bubblewrap to an ordinary user: the program is that user")


def the_right_one_passes(verifier: PooledJudge, name: str) -> bool:
    """On a busy machine perhaps not within the short limit at the first try."""
    tries = (verifier.submit(RIGHT + f"# after {name}, {i}", GOLD).result(GENEROUS_S) for i in range(3))
    return any(verdict.outcome == "correct" for verdict in tries)


@pytest.mark.parametrize(("judge", "name"), every_program_in_each_confinement(), indirect=["judge"])
def test_hostile_programs(judge: tuple[Wanted, PooledJudge], canary: Path, name: str) -> None:
    kind, verifier = judge
    hostile = HOSTILE[name]
    skip_unpromised(kind, hostile.needs)
    before = state_of(canary)
    start = time.monotonic()
    verdict = verifier.submit(completion(hostile, canary), GOLD).result(GENEROUS_S)
    elapsed = time.monotonic() - start
    assert verdict.value == 0.0, verdict
    assert verdict.outcome in (*hostile.outcomes, "timeout"), verdict  # on a busy machine
    assert verdict.detail
    assert elapsed < TIMEOUT_S + 8
    assert state_of(canary) == before
    assert the_right_one_passes(verifier, name)
    assert settles(WORKERS * PROCESSES[kind])


def completion(hostile: Hostile, canary: Path) -> str:
    source = hostile.source.replace("@CANARY@", str(canary)).replace("@PARENT@", str(os.getpid()))
    return f"```python\n{source}\n```"


@pytest.mark.parametrize("judge", CONFINEMENTS, indirect=True)
def test_programs_that_look_around(judge: tuple[Wanted, PooledJudge], canary: Path) -> None:
    kind, verifier = judge
    if kind == "limits" and not landlock_supported():
        pytest.skip("not promised without bubblewrap and Landlock: files can be read")
    before = state_of(canary)
    verdicts = {name: verifier.submit(completion(one, canary), GOLD) for name, one in LOOKING.items()}
    for name, verdict in verdicts.items():
        assert verdict.result(GENEROUS_S).outcome in (*LOOKING[name].outcomes, "timeout"), (name, verdict)
    assert state_of(canary) == before
    assert the_right_one_passes(verifier, "all that look around")


def settles(count: int) -> bool:
    """Whether no more than `count` processes are left, once each worker has its next candidate."""
    patience = time.monotonic() + 10
    quiet = 0
    while quiet < 3 and time.monotonic() < patience:
        time.sleep(0.01)
        quiet = quiet + 1 if len(descendants()) <= count else 0
    return quiet == 3


@pytest.mark.parametrize("judge", CONFINEMENTS, indirect=True)
def test_the_right_program_scores(judge: tuple[Wanted, PooledJudge]) -> None:
    """What every attack is after: the plain answer scores."""
    assert the_right_one_passes(judge[1], "all")
