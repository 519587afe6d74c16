"""The verifiers a run uses: one that judges in place, one that judges maths in a pool."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from importlib.metadata import version as installed_version

from dash_exp.types import Score
from dash_exp.verifiers import VERIFIER_VERSION
from dash_exp.verifiers.extraction import extract
from dash_exp.verifiers.pool import VerifierPool
from dash_exp.verifiers.protocol import VerifyTask, score

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


class PooledMathVerifier:
    """Judges maths answers in a pool of processes that it owns, and remembers verdicts.

    The answer is found here and judged there, so equal answers of a group are judged once, even
    while the first of them is still being judged. `cache_size` bounds the verdicts remembered.
    """

    def __init__(self, pool: VerifierPool, extraction: str, cache_size: int = 50_000):
        extract("", extraction)  # an unknown mode fails here, not on the first completion
        self._pool = pool
        self._extraction = extraction
        self._cache_size = cache_size
        self._cache: OrderedDict[tuple[str, str], Future[Score]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def version(self) -> str:
        library = installed_version("math-verify")
        return f"math-{VERIFIER_VERSION}+math-verify-{library}+{self._extraction}"

    def submit(self, text: str, answer: str) -> Future[Score]:
        """A verdict to come on the answer found in `text`."""
        candidate = extract(text, self._extraction)
        if candidate is None:
            return _done(score("no_answer", f"nothing found by {self._extraction}"))
        key = (answer, candidate)
        with self._lock:
            shared = self._cache.get(key)
            if shared is None:
                shared = self._pool.submit(VerifyTask("", "math", "whole", candidate, answer))
                self._cache[key] = shared
                while len(self._cache) > self._cache_size:
                    self._cache.popitem(last=False)
            else:
                self._cache.move_to_end(key)
        shared.add_done_callback(lambda done: self._forget_passing(key, done))
        return _copy(shared)

    def close(self) -> None:
        """Close the pool."""
        self._pool.close()

    def _forget_passing(self, key: tuple[str, str], done: Future[Score]) -> None:
        """A timeout or a crash may be the machine's fault: it is not remembered."""
        if done.cancelled() or done.result().outcome not in _LASTING:
            with self._lock:
                if self._cache.get(key) is done:
                    del self._cache[key]


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
