"""The verifiers a run uses: in place, or in a pool of processes (maths, programs, reasoning-gym)."""

from __future__ import annotations

import functools
import platform
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from importlib.metadata import version as installed_version
from typing import Literal

from dash_exp.types import Score
from dash_exp.verifiers import CODE_VERSION, VERIFIER_VERSION
from dash_exp.verifiers.code.gold import CodeGold
from dash_exp.verifiers.code.program import complete, find_program
from dash_exp.verifiers.code.sandbox import Confinement, confinement
from dash_exp.verifiers.math.extraction import boxed_or_last, extract
from dash_exp.verifiers.pool import VerifierPool
from dash_exp.verifiers.types import VerifyTask, score

Wanted = Literal["auto", "bwrap", "limits"]

_LASTING = ("correct", "wrong", "unparsed")
"""Outcomes that depend on the answer alone and may be remembered."""


class InlineVerifier:
    """Judges at once in the caller's thread: for judges that cannot hang, such as integers."""

    def __init__(self, judge: Callable[[str, str], Score], name: str = "integer"):
        self._judge = judge
        self._name = name

    @property
    def version(self) -> str:
        return f"{self._name}-{VERIFIER_VERSION}"

    def submit(self, text: str, answer: str) -> Future[Score]:
        """A future that is done already."""
        return _done(self._judge(text, answer))

    def close(self) -> None:
        """Nothing to stop."""


class Remembered:
    """Verdicts by key: equal questions are asked once, even while the first is still being judged.

    Only outcomes that depend on the answer alone are kept: a timeout, a crash or a fault of ours may be
    the machine's doing. `size` bounds how many are kept.
    """

    def __init__(self, size: int):
        self._size = size
        self._kept: OrderedDict[Hashable, Future[Score]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, ask: Callable[[], Future[Score]]) -> Future[Score]:
        """A future of the caller's own on the verdict for `key`, asked for where it is not known."""
        with self._lock:
            shared = self._kept.get(key)
            if shared is None:
                shared = ask()
                self._kept[key] = shared
                while len(self._kept) > self._size:
                    self._kept.popitem(last=False)
            else:
                self._kept.move_to_end(key)
        shared.add_done_callback(lambda done: self._forget_passing(key, done))
        return _copy(shared)

    def _forget_passing(self, key: Hashable, done: Future[Score]) -> None:
        if done.cancelled() or done.result().outcome not in _LASTING:
            with self._lock:
                if self._kept.get(key) is done:
                    del self._kept[key]


class PooledMathVerifier:
    """Judges maths answers in a pool of processes that it owns, and remembers verdicts.

    The answer is found here and judged there, so equal answers of a group are judged once.
    `cache_size` bounds the verdicts remembered.
    """

    def __init__(self, pool: VerifierPool, extraction: str, cache_size: int = 50_000):
        extract("", extraction)  # an unknown mode fails here, not on the first completion
        self._pool = pool
        self._extraction = extraction
        self._known = Remembered(cache_size)

    @property
    def version(self) -> str:
        library = installed_version("math-verify")
        return f"math-{VERIFIER_VERSION}+math-verify-{library}+{self._extraction}"

    def submit(self, text: str, answer: str) -> Future[Score]:
        """A verdict to come on the answer found in `text`."""
        candidate = extract(text, self._extraction)
        if candidate is None:
            return _done(score("no_answer", f"nothing found by {self._extraction}"))
        task = VerifyTask("", "math", "whole", candidate, answer)
        return self._known.get((answer, candidate), lambda: self._pool.submit(task))

    def close(self) -> None:
        """Close the pool."""
        self._pool.close()


class PooledCodeVerifier:
    """Judges programs by the tests of a `CodeGold`, in sandboxed processes that it owns.

    Raises RuntimeError where no confinement is possible at all. `warnings` says what the machine's best
    confinement leaves open. `wanted` names one: `bwrap` or `limits`.
    """

    def __init__(
        self,
        workers: int,
        timeout_s: float,
        memory_mb: int,
        wanted: Wanted = "auto",
        cache_size: int = 50_000,
    ):
        self._sandbox = confinement(wanted)
        self._pool = _host_pool(workers, timeout_s, memory_mb, self._sandbox, "code")
        self._known = Remembered(cache_size)
        self._golds = functools.lru_cache(maxsize=4096)(CodeGold.from_text)

    @property
    def version(self) -> str:
        python = ".".join(platform.python_version_tuple()[:2])
        return f"code-{CODE_VERSION}+python-{python}+{self._sandbox.kind}"

    @property
    def warnings(self) -> tuple[str, ...]:
        return self._sandbox.warnings

    def submit(self, text: str, answer: str) -> Future[Score]:
        """A verdict to come on the program found in `text`."""
        found = find_program(text)
        if not found.strip():
            return _done(score("no_answer", "no program"))
        try:
            gold = self._golds(answer)
            program = complete(found, gold)
        except (ValueError, TypeError, AttributeError) as error:
            return _done(score("verifier_error", f"the gold is broken: {error}"))
        task = VerifyTask("", "code", "", program, answer, gold.timeout_s)
        return self._known.get((answer, program), lambda: self._pool.submit(task))

    def close(self) -> None:
        """Close the pool."""
        self._pool.close()


class PooledGymVerifier:
    """Scores answers by reasoning-gym's own scorers, in the same sandbox as programs: some of those
    scorers evaluate the answer. `extraction`: `answer_tag`, `boxed_or_last` or `whole`."""

    def __init__(
        self,
        workers: int,
        timeout_s: float,
        memory_mb: int,
        extraction: str,
        wanted: Wanted = "auto",
        cache_size: int = 50_000,
    ):
        if extraction not in _GYM_EXTRACTIONS:
            raise ValueError(f"extraction {extraction!r} is not one of {', '.join(_GYM_EXTRACTIONS)}")
        self._extraction = extraction
        self._sandbox = confinement(wanted).with_scratch()
        self._pool = _host_pool(workers, timeout_s, memory_mb, self._sandbox, "reasoning_gym")
        self._known = Remembered(cache_size)

    @property
    def version(self) -> str:
        library = installed_version("reasoning-gym")
        return f"gym-{CODE_VERSION}+reasoning-gym-{library}+{self._extraction}"

    @property
    def warnings(self) -> tuple[str, ...]:
        return self._sandbox.warnings

    def submit(self, text: str, answer: str) -> Future[Score]:
        """A verdict to come on the answer found in `text`; its value is the library's score."""
        found = _GYM_EXTRACTIONS[self._extraction](text)
        if not found:
            return _done(score("no_answer", f"nothing found by {self._extraction}"))
        task = VerifyTask("", "reasoning_gym", "whole", found, answer)
        return self._known.get((answer, found), lambda: self._pool.submit(task))

    def close(self) -> None:
        """Close the pool."""
        self._pool.close()


def answer_tag(text: str) -> str | None:
    """What stands in the last `<answer>...</answer>`, stripped."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end].strip() if start >= 0 else None


_GYM_EXTRACTIONS: Mapping[str, Callable[[str], str | None]] = {
    "answer_tag": answer_tag,
    "boxed_or_last": boxed_or_last,
    "whole": str.strip,
}


def _host_pool(
    workers: int, timeout_s: float, memory_mb: int, sandbox: Confinement, judge: str
) -> VerifierPool:
    return VerifierPool(
        workers,
        timeout_s,
        memory_mb,
        module="dash_exp.verifiers.code.host",
        sandbox=sandbox,
        arguments=(f"--judge={judge}",),
    )


def _done(verdict: Score) -> Future[Score]:
    future: Future[Score] = Future()
    future.set_result(verdict)
    return future


def _copy(shared: Future[Score]) -> Future[Score]:
    """A future of its own for one caller: cancelling it leaves the shared one alone."""
    own: Future[Score] = Future()

    def pass_on(done: Future[Score]) -> None:
        if done.cancelled():
            own.cancel()
        if own.set_running_or_notify_cancel():
            own.set_result(done.result())

    shared.add_done_callback(pass_on)
    return own
