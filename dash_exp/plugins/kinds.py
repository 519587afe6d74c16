"""The kinds of functions that config takes: a protocol of each, with what its parameters hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dash_exp.types import FinishReason, Score

if TYPE_CHECKING:
    from torch import Tensor

Row = Mapping[str, Any]


class Reward(Protocol):
    """Scores a completion: `dataset.verifier`, whose score decides the outcome, and each of
    `dataset.rewards`, whose value is added to it. `fields`: all further fields of the data row. `tokens`: of
    the completion, its end token included. Runs in a worker process, within `verifier.timeout_s`.

    A bool is `correct` (1) or `wrong` (0). A number is the value itself, `correct` from 1 on, else `wrong`. A
    `Score` names both. An exception, NaN and anything else is `verifier_error`, from which nothing is
    learned."""

    def __call__(
        self, *, text: str, answer: str, fields: Row, finish_reason: FinishReason, tokens: int
    ) -> Score | float | bool: ...


class Filter(Protocol):
    """Which completions are learned from (`filter.name`): one bool for each. It declares either `group`, the
    scores of one prompt's completions, or `batch`, those of every prompt of the step; of a batch it returns a
    list for each group. `threshold`, `share`: of config. `seed`: for draws. A score that could not be reached
    is NaN."""

    def __call__(
        self,
        *,
        group: Sequence[float],
        batch: Sequence[Sequence[float]],
        threshold: float,
        share: float | None,
        seed: int,
    ) -> Sequence[bool] | Sequence[Sequence[bool]]: ...


class Advantage(Protocol):
    """How much better each completion is than its baseline (`algorithm.baseline`), before `algorithm.scale`
    divides it (`none` leaves it as it is). It declares either `group` or `batch`, as a filter does, and gets
    finite rewards only: a completion without a reward has advantage 0."""

    def __call__(
        self, *, group: Sequence[float], batch: Sequence[Sequence[float]]
    ) -> Sequence[float] | Sequence[Sequence[float]]: ...


class Surrogate(Protocol):
    """The loss of each token [T] (`algorithm.surrogate`), to be differentiated with respect to `logprobs`
    [T]. `old_logprobs` [T]: at the sampling weights. `lengths` [N]: tokens of each completion, which follow
    each other in T. Nothing is divided here: `algorithm.aggregation` does that."""

    def __call__(
        self,
        *,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        lengths: Tensor,
        clip_low: float,
        clip_high: float,
    ) -> Tensor: ...


class Template(Protocol):
    """The prompt of a row (`dataset.template`): a text, or chat messages (`role`, `content`) for the model's
    chat template. `row`: `id`, `problem`, `answer`, `solution` and all further fields of the data row."""

    def __call__(self, *, row: Row) -> str | Sequence[Mapping[str, str]]: ...


class DatasetLoader(Protocol):
    """The rows of a dataset (`dataset.kind`), each with a problem, an answer and any further fields that JSON
    can hold. `split`: `train`, or `dataset.test_split`; `options`: `dataset.task_options`. The rows are
    part of the cell's id."""

    def __call__(self, *, split: str, options: Row) -> Iterable[Row]: ...


KINDS: dict[str, type] = {
    "reward": Reward,
    "filter": Filter,
    "advantage": Advantage,
    "surrogate": Surrogate,
    "template": Template,
    "loader": DatasetLoader,
}
