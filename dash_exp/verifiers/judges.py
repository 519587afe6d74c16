"""The judges of a run by name: in the caller's thread, or in a pool of worker processes.

What a judge needs is imported when it is made: a run on integers starts no process and imports no sandbox.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING, Literal

from dash_exp import plugins
from dash_exp.errors import Fault, UserError
from dash_exp.plugins import is_reference
from dash_exp.types import Score
from dash_exp.verifiers import CODE_VERSION, VERIFIER_VERSION
from dash_exp.verifiers.math.extract import GYM_EXTRACTORS, MATH_VERIFY, extract
from dash_exp.verifiers.types import NO_FACTS, CodeGold, Facts, Judge, VerifyTask, score

if TYPE_CHECKING:
    from dash_exp.verifiers.code.sandbox import Confinement
    from dash_exp.verifiers.pool import VerifierPool

Wanted = Literal["auto", "bwrap", "limits"]
Prepare = Callable[[str, str], VerifyTask | Score]
"""From a completion and its gold answer: what a pool has to judge, or the verdict where that is known."""


CACHE_SIZE = 50_000
"""Verdicts that a judge remembers."""
_LASTING = ("correct", "wrong", "unparsed")
"""Outcomes that depend only on the answer; a timeout or a crash may be the machine's fault."""
_INTEGER = re.compile(r"-?[0-9]+")
_MAX_DIGITS = 1_000


class Judges:
    """Judges by the names of verifier and extraction, each made on first use. `warnings`: what the ones in
    use report, such as a sandbox that the system lacks."""

    def __init__(self, workers: int, timeout_s: float, memory_mb: int, sandbox: Wanted = "auto"):
        self.workers, self.timeout_s, self.memory_mb, self.sandbox = workers, timeout_s, memory_mb, sandbox
        self._made: dict[tuple[str, ...], Judge] = {}
        self._math_pool: VerifierPool | None = None

    def get(self, verifier: str, extraction: str) -> Judge:
        """Raises UserError where programs cannot be confined at all."""
        key = (verifier, extraction)
        if key not in self._made:
            try:
                self._made[key] = self._make(verifier, extraction)
            except RuntimeError as error:
                raise UserError(Fault("verifier", f"{verifier} cannot be used here: {error}")) from error
        return self._made[key]

    def adding(self, base: Judge, rewards: Sequence[str], factors: Sequence[float]) -> Judge:
        """A judge that adds rewards of the user's own to another's verdicts."""
        if not rewards:
            return base
        names = [plugins.find(text).name.replace(":", ".") for text in rewards]
        weights = dict(zip(names, factors or [1.0] * len(names), strict=True))
        key = (base.version, *rewards, str(weights))
        if key not in self._made:
            own = OwnJudge(self._own_pool(*(f"--reward={text}" for text in rewards)))
            self._made[key] = AddedRewards(base, own, weights)
        return self._made[key]

    def _own_pool(self, *functions: str) -> VerifierPool:
        from dash_exp.verifiers.pool import Program, VerifierPool

        program = Program(arguments=functions, trusted=True)
        return VerifierPool(self.workers, self.timeout_s, self.memory_mb, program)

    def limits(self, verifier: str) -> str:
        """What may turn a verdict into a timeout or a crash."""
        return "" if verifier == "integer" else f"{self.timeout_s:g} s, {self.memory_mb} MB"

    @property
    def warnings(self) -> tuple[str, ...]:
        found = [warning for made in self._made.values() for warning in getattr(made, "warnings", ())]
        return tuple(dict.fromkeys(found))

    def close(self) -> None:
        for made in self._made.values():
            made.close()

    def _make(self, verifier: str, extraction: str) -> Judge:
        if verifier == "integer":
            return InlineJudge(judge_integer)
        if is_reference(verifier):
            return OwnJudge(self._own_pool(f"--verifier={verifier}"), plugins.version(plugins.find(verifier)))
        if verifier == "code":
            return code_judge(self.workers, self.timeout_s, self.memory_mb, self.sandbox, extraction)
        if verifier == "reasoning_gym":
            return gym_judge(self.workers, self.timeout_s, self.memory_mb, extraction, self.sandbox)
        from dash_exp.verifiers.pool import VerifierPool

        if self._math_pool is None:  # shared by all extractions
            self._math_pool = VerifierPool(self.workers, self.timeout_s, self.memory_mb)
        return math_judge(self._math_pool, extraction if verifier == "math" else verifier)


def judge_integer(text: str, answer: str) -> Score:
    """Correct when the first match of `-?[0-9]+` in `text` is the integer `answer`.

    Leading zeros do not matter. A number longer than 1,000 digits is wrong without being read. An
    `answer` that is no integer is a fault of the data: `verifier_error`.
    """
    if not _INTEGER.fullmatch(answer.strip()):
        return score("verifier_error", f"the gold answer {answer[:40]!r} is not an integer")
    match = _INTEGER.search(text)
    if match is None:
        return score("no_answer", "no integer in the text")
    found = match.group()
    if len(found) <= _MAX_DIGITS >= len(answer) and int(found) == int(answer):
        return score("correct")
    return score("wrong", f"found {found[:40]}, expected {answer[:40]}")


class InlineJudge:
    """Judges at once in the caller's thread: for judges that cannot hang, such as integers."""

    def __init__(self, judge: Callable[[str, str], Score], name: str = "integer"):
        self._judge = judge
        self.version = f"{name}-{VERIFIER_VERSION}"

    def submit(self, text: str, answer: str, facts: Facts = NO_FACTS) -> Future[Score]:
        """A future that is done already."""
        return _done(self._judge(text, answer))

    def close(self) -> None:
        """Nothing to stop."""


class PooledJudge:
    """Judges in a pool of processes that it owns, and remembers verdicts.

    `prepare` must be quick whatever the completion: it runs in the process that trains.
    """

    def __init__(
        self,
        pool: VerifierPool,
        prepare: Prepare,
        version: str,
        warnings: tuple[str, ...] = (),
        cache_size: int = CACHE_SIZE,
    ):
        self._pool = pool
        self._prepare = prepare
        self.version, self.warnings = version, warnings
        self._cache = VerdictCache(cache_size)

    def submit(self, text: str, answer: str, facts: Facts = NO_FACTS) -> Future[Score]:
        """The future verdict on the answer found in `text`."""
        task = self._prepare(text, answer)
        if isinstance(task, Score):
            return _done(task)
        key = hashlib.blake2b(f"{answer}\0{task.text}".encode(errors="surrogatepass")).digest()
        return self._cache.get(key, lambda: self._pool.submit(task))

    def close(self) -> None:
        """Close the pool."""
        self._pool.close()


class OwnJudge:
    """Judges by a function of the user's own, in a pool of processes that it owns. Nothing is remembered: it
    may look at more than the text."""

    def __init__(self, pool: VerifierPool, version: str = ""):
        self._pool, self.version = pool, version

    def submit(self, text: str, answer: str, facts: Facts = NO_FACTS) -> Future[Score]:
        return self._pool.submit(VerifyTask(text, json.dumps({"answer": answer, **asdict(facts)})))

    def close(self) -> None:
        """Close the pool."""
        self._pool.close()


class AddedRewards:
    """Adds the values of the user's own rewards, with `weights` by name, to the verdicts of `base`."""

    def __init__(self, base: Judge, own: OwnJudge, weights: Mapping[str, float]):
        self._base, self._own, self._weights = base, own, weights
        self.version = "+".join([base.version, *weights])

    def submit(self, text: str, answer: str, facts: Facts = NO_FACTS) -> Future[Score]:
        """A future of the verdict. `verifier_error` where a reward that is added has no value."""
        base, own = (judge.submit(text, answer, facts) for judge in (self._base, self._own))
        result: Future[Score] = Future()

        def finish(_: Future[Score]) -> None:
            if base.cancelled() or own.cancelled():
                result.cancel()
            if result.set_running_or_notify_cancel():
                result.set_result(self._sum(base.result(), own.result()))

        base.add_done_callback(lambda _: own.add_done_callback(finish))
        return result

    def _sum(self, verdict: Score, own: Score) -> Score:
        if own.outcome != "shown":
            return score("verifier_error", f"dataset.rewards: {own.outcome}, {own.detail}")
        added = sum(self._weights[name] * value for name, value in own.parts.items())
        return replace(verdict, added=added, parts=own.parts)

    def close(self) -> None:
        """Close the rewards' pool; the verifier's belongs to others."""
        self._own.close()


def math_judge(pool: VerifierPool, extraction: str, cache_size: int = CACHE_SIZE) -> PooledJudge:
    """Judges answers to maths problems, found by an extraction, or both found and judged by the library
    alone (`math_verify`). Raises ValueError for an unknown extraction."""
    library = f"math-verify-{installed_version('math-verify')}"
    version = f"{library}+alone-{VERIFIER_VERSION}"
    if extraction != MATH_VERIFY:
        extract("", extraction)  # an unknown mode fails here, not on the first completion
        version = f"math-{VERIFIER_VERSION}+{library}+{extraction}"
    return PooledJudge(pool, _unread(extraction), version, cache_size=cache_size)


def _unread(how: str) -> Prepare:
    """Completions go to the workers as they are: no pattern is matched in the process that trains."""
    return lambda text, answer: VerifyTask(text, answer, how=how)


def code_judge(
    workers: int, timeout_s: float, memory_mb: int, wanted: Wanted = "auto", extraction: str = "program"
) -> PooledJudge:
    """Judges programs by the tests of a `CodeGold`, in sandboxed processes.

    Raises RuntimeError where no confinement is possible at all. The judge's `warnings` say what the
    machine's best confinement leaves open. `wanted` names one: `bwrap` or `limits`. `extraction`: `program`,
    or `last_block` for the paper's rule.
    """
    from dash_exp.verifiers.code.program import candidates, complete, find_program
    from dash_exp.verifiers.code.sandbox import confinement

    read_gold = functools.lru_cache(maxsize=4096)(CodeGold.from_text)

    def prepare(text: str, answer: str) -> VerifyTask | Score:
        try:
            gold = read_gold(answer)
            if extraction == "last_block":
                found: str | list[str] = find_program(text).strip() and complete(find_program(text), gold)
            else:
                found = candidates(text, gold)
            if not found:
                return score("no_answer", "no program")
            return VerifyTask(json.dumps(found), answer, gold.timeout_s)
        except (ValueError, TypeError, AttributeError) as error:
            return score("verifier_error", f"the gold is broken: {error}")

    sandbox = confinement(wanted)
    python = ".".join(platform.python_version_tuple()[:2])
    pool = _sandboxed_pool("code", sandbox, workers, timeout_s, memory_mb)
    version = f"code-{CODE_VERSION}+python-{python}+{sandbox.name}+{extraction}"
    return PooledJudge(pool, prepare, version, sandbox.warnings)


def gym_judge(
    workers: int, timeout_s: float, memory_mb: int, extraction: str, wanted: Wanted = "auto"
) -> PooledJudge:
    """Scores answers by reasoning-gym's own scorers, in the same sandbox as programs: some of those
    scorers evaluate the answer. `extraction`: `answer_tag`, `boxed_or_last` or `whole`."""
    from dash_exp.verifiers.code.sandbox import confinement

    if extraction not in GYM_EXTRACTORS:
        raise ValueError(f"extraction {extraction!r} is not one of {', '.join(GYM_EXTRACTORS)}")
    sandbox = confinement(wanted).with_scratch()
    pool = _sandboxed_pool("reasoning_gym", sandbox, workers, timeout_s, memory_mb)
    library = installed_version("reasoning-gym")
    version = f"gym-{CODE_VERSION}+reasoning-gym-{library}+{extraction}"
    return PooledJudge(pool, _unread(extraction), version, sandbox.warnings)


def _sandboxed_pool(
    judge: str, sandbox: Confinement, workers: int, timeout_s: float, memory_mb: int
) -> VerifierPool:
    from dash_exp.verifiers.pool import Program, VerifierPool

    host = Program("dash_exp.verifiers.code.host", (f"--judge={judge}",), sandbox)
    return VerifierPool(workers, timeout_s, memory_mb, host)


class VerdictCache:
    """Verdicts by key: equal questions are judged once, even while the first is still pending.

    Only outcomes that depend on nothing but the answer are kept, the last `size` of them.
    """

    def __init__(self, size: int):
        self._size = size
        self._kept: OrderedDict[Hashable, Future[Score]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, submit: Callable[[], Future[Score]]) -> Future[Score]:
        """The caller's own future of the verdict for `key`, submitted where it is not known."""
        with self._lock:
            shared = self._kept.get(key)
            if shared is None:
                shared = self._kept[key] = submit()
                while len(self._kept) > self._size:
                    self._kept.popitem(last=False)
            else:
                self._kept.move_to_end(key)
        shared.add_done_callback(lambda done: self._forget_unless_lasting(key, done))
        return _copy(shared)

    def _forget_unless_lasting(self, key: Hashable, done: Future[Score]) -> None:
        if done.cancelled() or done.result().outcome not in _LASTING:
            with self._lock:
                if self._kept.get(key) is done:
                    del self._kept[key]


def _done(verdict: Score) -> Future[Score]:
    future: Future[Score] = Future()
    future.set_result(verdict)
    return future


def _copy(shared: Future[Score]) -> Future[Score]:
    """A future for one caller, who may cancel it without cancelling the shared one."""
    own: Future[Score] = Future()

    def pass_on(done: Future[Score]) -> None:
        if done.cancelled():
            own.cancel()
        if own.set_running_or_notify_cancel():
            own.set_result(done.result())

    shared.add_done_callback(pass_on)
    return own
