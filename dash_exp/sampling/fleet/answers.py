"""What is asked of a server, and what it must answer: JSON both ways, checked. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dash_exp.types import Decoding, FinishReason

GENERATE = "/inference/v1/generate"
FACTS = "/dash_exp/facts"
"""Our own route: what the server was started with."""
BASE_LABEL = "default"
"""What vLLM calls the weights that it read from the model's folder."""


class GarbageError(ValueError):
    """A server answered, but not what it was asked for."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The tokens of one completion, with their log-probabilities."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


def question(prompt: Sequence[int], seed: int, decoding: Decoding) -> dict[str, Any]:
    """The request for one completion of these tokens."""
    return {
        "token_ids": list(prompt),
        "sampling_params": {
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "seed": seed,
            "logprobs": 0,
            "stop_token_ids": list(decoding.stop_ids),
            "ignore_eos": True,  # what ends a completion is said by the line above, and by nothing else
            "detokenize": False,
        },
    }


def read_answer(reply: Any, decoding: Decoding, vocabulary: int, label: str) -> Answer:
    """The completion in a server's reply. Raises GarbageError where it is none: of other weights than those
    called `label`, too long, with tokens that do not exist, or log-probabilities that are none."""
    try:
        (choice,) = reply["choices"]
        ids = tuple(choice["token_ids"])
        entries = choice["logprobs"]["content"]
        logprobs = tuple(float(entry["logprob"]) for entry in entries)
        same = all(entry["token_id"] == token for entry, token in zip(entries, ids, strict=True))
        versions = {str(span["version"]) for span in choice["weight_versions"]}
    except (KeyError, TypeError, ValueError) as error:
        raise GarbageError(f"no completion in its reply: {type(error).__name__} {error}") from error
    if not ids or len(ids) > decoding.max_new_tokens or not same:
        raise GarbageError(f"{len(ids)} tokens where 1 to {decoding.max_new_tokens} were asked for")
    if any(type(token) is not int or not 0 <= token < vocabulary for token in ids):
        raise GarbageError("tokens that the tokenizer does not have")
    if any(not math.isfinite(value) or value > 1e-3 for value in logprobs):
        raise GarbageError("log-probabilities that are none")
    if versions != {label}:
        raise GarbageError(f"tokens of weights {sorted(versions)} where {label} was current")
    stopped = ids[-1] in decoding.stop_ids
    if not stopped and len(ids) < decoding.max_new_tokens:
        raise GarbageError(f"it stopped after {len(ids)} tokens without a stop token")
    return Answer(ids, logprobs, "stop" if stopped else "length")
