"""What a program must not find in its own process: expected values of its tests, and of verdicts before
it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from code_fixtures import skip_without

from dash_exp.verifiers.code import sandbox
from dash_exp.verifiers.judges import PooledJudge, code_judge
from dash_exp.verifiers.types import CodeGold

NEEDLE, CONTROL = "expected-9c41f07e2b5d", "control-5e8a61c3d0f7"
GENEROUS_S = 60.0
SANDBOXES = ("bwrap", "limits", "limits without Landlock")
TESTS = """
def assertion(out, exp):
    assert out == exp, f"out: {out}, exp: {exp}"
assertion(f(3), NEEDLE)
"""
SCANNER = """
import ctypes, gc, os, sys

def hidden(text):
    return bytes(255 - c for c in text)

NEEDLE, CONTROL = @NEEDLE@, @CONTROL@  # each byte subtracted from 255, else they would be found here
shown = [hidden(CONTROL).decode()]

def in_memory(secret):
    "Whether the bytes lie in any readable part of the address space; they are put together nowhere here."
    first = hidden(secret[:7])
    for line in open('/proc/self/maps'):
        words = line.split()
        if 'r' not in words[1] or words[-1].startswith('[v'):
            continue
        low, high = (int(n, 16) for n in words[0].split('-'))
        for start in range(low, high, 2**20):
            data = ctypes.string_at(start, min(2**20 + 64, high - start))
            at = data.find(first)
            while at >= 0:
                if hidden(data[at : at + len(secret)]) == secret:
                    return True
                at = data.find(first, at + 1)
    return False

def in_objects(secret):
    "Whether any text that can be reached from a frame, a module or the collector's objects contains it."
    def holds(value):
        data = value.encode(errors='replace') if type(value) is str else value
        first = hidden(secret[:7])
        return type(data) is bytes and first in data and any(
            hidden(data[at : at + len(secret)]) == secret for at in range(len(data))
        )
    frames, frame = [], sys._getframe()
    while frame:
        frames += [frame.f_locals, frame.f_globals]
        frame = frame.f_back
    for owner in [*frames, *gc.get_objects()]:
        if any(map(holds, gc.get_referents(owner))):
            return True
    return False

def scan(secret):
    return [name for name, look in (('memory', in_memory), ('objects', in_objects)) if look(secret)]

loading = scan(NEEDLE)

def f(x):
    return scan(CONTROL), loading, scan(NEEDLE)
"""


def scanner() -> str:
    text = SCANNER
    for name, secret in (("@NEEDLE@", NEEDLE), ("@CONTROL@", CONTROL)):
        text = text.replace(name, repr(bytes(255 - c for c in secret.encode())))
    return text


@pytest.fixture(params=SANDBOXES)
def judge(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[PooledJudge]:
    wanted, _, without = request.param.partition(" ")
    skip_without(wanted)
    if without:
        monkeypatch.setattr(sandbox, "landlock_supported", lambda: False)
    shared = code_judge(1, 30.0, 2048, wanted)
    yield shared
    shared.close()


def test_no_expected_value_is_in_the_memory_of_a_program(judge: PooledJudge) -> None:
    """The value stands in the tests and the verdict before it, and in its own tests."""
    gold = CodeGold(TESTS.replace("NEEDLE", repr(NEEDLE)), "f").to_text()
    before = judge.submit("def f(x): return 0", gold).result(GENEROUS_S)
    assert NEEDLE in before.detail
    own = f"kept = {NEEDLE!r}\nassert f(1) == (['memory', 'objects'], [], []), f(1)"
    verdict = judge.submit(scanner(), CodeGold(own, "f").to_text()).result(GENEROUS_S)
    assert verdict.outcome == "correct", verdict
