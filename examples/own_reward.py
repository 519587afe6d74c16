r"""Rewards. `score` judges, and decides what is correct; the others are added to its value in training:

python -m dash_exp debug=fast dataset.verifier=own_reward:score \
    'dataset.rewards=[own_reward:brevity,own_reward:starts_with_digit]' 'dataset.reward_weights=[0.1,0.5]'
"""

import re

from dash_exp.plugins import Score


def score(text: str, answer: str) -> Score:
    """Correct if the answer is among the numbers of the text; less where it is not the first."""
    numbers = re.findall(r"\d+", text)
    if not numbers:
        return Score(0.0, "no_answer")
    if answer not in numbers:
        return Score(0.0, "wrong", f"found {', '.join(numbers[:5])}")
    return Score(1.0 if numbers[0] == answer else 0.5, "correct")


def brevity(tokens: int, finish_reason: str) -> float:
    """From 0 down to -1 at 24 tokens; -1 for a completion that was cut."""
    return -1.0 if finish_reason == "length" else -min(1.0, tokens / 24)


def starts_with_digit(text: str) -> bool:
    return text[:1].isdigit()
