"""The records that travel through a training step, each wrapping the one before it.

Axis legend, used in names and docstrings everywhere:
P prompts of a step, G completions of one prompt (a group), N completions, T tokens, V vocabulary.
A name ends in the axes of its value: `rewards_G` is one reward per completion of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]
"""`stop`: the completion ended by itself (an end token or a stop token); `length`: it was cut."""

Outcome = Literal[
    "correct", "wrong", "no_answer", "unparsed", "timeout", "crashed", "verifier_error", "shown"
]
"""What a verifier found. `verifier_error` means that our own code failed: never a silent 0. `shown`: a
demonstration, which nobody judges."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as the model sees it. `task` names its dataset. `answer` is gold, for the verifier only: the
    answer's text, or a JSON document where more is needed (`verifiers/types.py`). `fields`: the other fields
    of the row as JSON, where a function of the user's own may read them."""

    id: str
    task: str
    text: str
    token_ids: tuple[int, ...]
    answer: str
    fields: str = "{}"


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer. `token_ids` and `logprobs` have one entry per sampled token, the end
    token included; nothing is padded. `logprobs` are log-probabilities of the sampled tokens under
    the distribution they were drawn from (logits divided by the temperature, cut where top_p is below 1,
    then log-softmax)."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    policy_version: int

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"{len(self.token_ids)} tokens but {len(self.logprobs)} log-probabilities")
        if not self.token_ids:
            raise ValueError("a completion has at least one token")


@dataclass(frozen=True, slots=True)
class Origin:
    """Which engine sampled a group, and when (seconds since the epoch)."""

    worker: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Group:
    """All G completions of one prompt. `position` is the prompt's place in the step's batch. `origin`:
    where several engines sample; None where there is only one to name."""

    position: int
    prompt: Prompt
    completions: tuple[Completion, ...]
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """A verdict: its value, what was found, and a short reason for a person to read. `parts`: the values of
    `dataset.rewards` by name; `added`: what they change the reward by."""

    value: float
    outcome: Outcome
    detail: str = ""
    added: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.detail.isascii():  # a program can raise half a character, which no file can hold
            object.__setattr__(self, "detail", self.detail.encode(errors="backslashreplace").decode())


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group with one score per completion."""

    group: Group
    scores: tuple[Score, ...]

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.group.completions):
            raise ValueError(f"{len(self.group.completions)} completions but {len(self.scores)} scores")


@dataclass(frozen=True, slots=True)
class AdvantagedGroup:
    """A scored group with one advantage per completion, and which of them are learned from. `masked`: those
    that are not because they were cut (`algorithm.mask_truncated`), whatever the filter says. `penalties`: of
    overlong completions. `rewards`: what advantages were computed from. `seen`: what the filter looked at.
    All are empty where an arm has no such thing; `rewards` and `seen` are then the verifier's scores."""

    scored: ScoredGroup
    advantages: tuple[float, ...]
    kept: tuple[bool, ...]
    masked: tuple[bool, ...] = ()
    penalties: tuple[float, ...] = ()
    rewards: tuple[float, ...] = ()
    seen: tuple[float, ...] = ()

    @property
    def group(self) -> Group:
        return self.scored.group


@dataclass(frozen=True, slots=True)
class Decoding:
    """How tokens are drawn. Temperature 0 is greedy. `stop_ids` end a completion and belong to it.
    `top_p` below 1 is for evaluation and traces only: a training arm never cuts the distribution. The
    log-probabilities of completions are then those of the cut distribution, renormalised."""

    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    top_p: float = 1.0

    @property
    def scale(self) -> float:
        """What logits are divided by; 1 when greedy, so that log-probabilities stay defined."""
        return self.temperature if self.temperature > 0 else 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to be answered `len(seeds)` times; `position` is its place in the step's batch."""

    position: int
    prompt: Prompt
    seeds: tuple[int, ...]
