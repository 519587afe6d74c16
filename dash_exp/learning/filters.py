"""Which completions are worth a backward pass. Pure functions, torch-free.

A filter sees the advantages of one group, computed once, and says which to keep. Dropped completions
are never forwarded (unless `filter.kl=keep` owes them a KL term).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Filter = Callable[[Sequence[float]], tuple[bool, ...]]


def keep_all(advantages_G: Sequence[float]) -> tuple[bool, ...]:
    """No filter."""
    return (True,) * len(advantages_G)


def keep_varied(advantages_G: Sequence[float]) -> tuple[bool, ...]:
    """Drop a group whose advantages are all 0, that is, whose rewards are all equal."""
    return (any(a != 0.0 for a in advantages_G),) * len(advantages_G)


def keep_large(threshold: float) -> Filter:
    """The paper's gradient filter: keep |A| > threshold (DASH, section 3)."""

    def keep(advantages_G: Sequence[float]) -> tuple[bool, ...]:
        return tuple(abs(a) > threshold for a in advantages_G)

    return keep


def make_filter(name: str, threshold: float) -> Filter:
    """The filter an option names: `none`, `zero_variance` or `advantage`."""
    if name == "advantage":
        return keep_large(threshold)
    return {"none": keep_all, "zero_variance": keep_varied}[name]
