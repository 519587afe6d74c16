"""Requests to a server, and which responses are valid."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dash_exp.sampling.fleet.client import InvalidResponseError, Sampled, completion_request, parse_completion
from dash_exp.types import Decoding

DECODING = Decoding(max_new_tokens=4, temperature=0.7, stop_ids=(1, 9), top_p=0.9)


def reply(ids: list[int], version: str = "3", **changes: Any) -> dict[str, Any]:
    content = [{"token_id": token, "logprob": -0.5} for token in ids]
    spans = [{"version": version, "start": 0, "end": len(ids)}]
    choice = {"token_ids": ids, "logprobs": {"content": content}, "weight_versions": spans}
    return {"choices": [choice | changes]}


def test_a_request_holds_tokens_a_seed_and_stop_tokens() -> None:
    asked = completion_request((5, 6), 77, DECODING)
    assert asked["token_ids"] == [5, 6]
    params = asked["sampling_params"]
    assert (params["seed"], params["max_tokens"], params["temperature"], params["top_p"]) == (77, 4, 0.7, 0.9)
    assert (params["stop_token_ids"], params["ignore_eos"]) == ([1, 9], True)


def test_a_completion_stops_at_a_stop_token_or_is_cut() -> None:
    assert parse_completion(reply([5, 6, 9]), DECODING, 100, "3") == Sampled((5, 6, 9), (-0.5,) * 3, "stop")
    assert parse_completion(reply([5, 6, 7, 8]), DECODING, 100, "3").finish_reason == "length"
    assert parse_completion(reply([5, 6, 7, 1]), DECODING, 100, "3").finish_reason == "stop"
    assert parse_completion(reply([1], version="default"), DECODING, 100, "default").token_ids == (1,)


def broken(**entry: Any) -> dict[str, Any]:
    made = copy.deepcopy(reply([5, 9]))
    made["choices"][0]["logprobs"]["content"][0] |= entry
    return made


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (None, "no completion"),
        ({}, "no completion"),
        ({"choices": []}, "no completion"),
        (reply([5, 9], logprobs=None), "no completion"),
        (reply([5, 9], weight_versions=None), "no completion"),
        (reply([]), "0 tokens"),
        (reply([5, 5, 5, 5, 9]), "5 tokens"),
        (reply([5, 6]), "without a stop token"),
        (reply([100, 9]), "tokens that the tokenizer does not have"),
        (reply([-1, 9]), "tokens that the tokenizer does not have"),
        (reply([5, 9], version="2"), "tokens of weights"),
        (reply([5, 9], version="default"), "tokens of weights"),
        (broken(token_id=6), "2 tokens"),
        (broken(logprob=float("nan")), "log-probabilities"),
        (broken(logprob=0.5), "log-probabilities"),
        (broken(logprob="x"), "no completion"),
    ],
)
def test_invalid_responses(given: Any, why: str) -> None:
    with pytest.raises(InvalidResponseError, match=why):
        parse_completion(given, DECODING, 100, "3")
