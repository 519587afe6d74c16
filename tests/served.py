"""A server as it is thought of in the capacity model, decode step by decode step: another way to write what
`capacity/sampling.py` does event by event, with the end of each completion."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from dash_exp.types import Completion, Group, Origin, Prompt


def served(
    lengths: Sequence[Sequence[int]],
    step_s: Callable[[int], float],
    prompt_s: float,
    *,
    at_once: int,
    prompt_tokens: int = 20,
    start: float = 1e9,
    worker: str = "server-0",
) -> list[Group]:
    """Groups of these lengths. `step_s`: of a decode step by its sequences; `prompt_s`: of a prompt, which
    holds up all others; `at_once`: completions."""
    now, queue = start, deque(range(len(lengths)))
    left: dict[tuple[int, int], int] = {}
    begun: dict[int, float] = {}
    ends: dict[tuple[int, int], float] = {}
    while queue or left:
        came = now
        while queue and len(left) + len(lengths[queue[0]]) <= at_once:
            group = queue.popleft()
            begun[group] = came
            left.update({(group, n): tokens for n, tokens in enumerate(lengths[group])})
            now += prompt_s
        now += step_s(len(left))
        for one in list(left):
            left[one] -= 1
            if left[one] == 0:
                del left[one]
                ends[one] = now
    return [
        Group(
            g,
            Prompt(str(g), "t", "", (3,) * prompt_tokens, ""),
            tuple(Completion((5,) * n, (-1.0,) * n, "", "stop", 0) for n in own),
            Origin(
                worker,
                begun[g],
                max(ends[g, n] for n in range(len(own))),
                tuple(ends[g, n] for n in range(len(own))),
            ),
        )
        for g, own in enumerate(lengths)
    ]
