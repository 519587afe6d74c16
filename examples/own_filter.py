"""Filters. `keep_extremes` looks at one group, `keep_hardest` at all groups of a step:

python -m dash_exp debug=fast filter.name=own_filter:keep_extremes
"""

from collections.abc import Sequence


def keep_extremes(group: Sequence[float]) -> list[bool]:
    """The best and the worst of a group; nothing where all are equal."""
    low, high = min(group), max(group)
    return [low < high and score in (low, high) for score in group]


def keep_hardest(batch: Sequence[Sequence[float]], share: float | None) -> list[list[bool]]:
    """The `filter.share` of groups with the lowest mean above 0."""
    means = [sum(group) / len(group) for group in batch]
    solved = sorted(mean for mean in means if mean > 0)
    limit = solved[int((share or 0.5) * (len(solved) - 1))] if solved else 0.0
    return [[0 < mean <= limit] * len(group) for mean, group in zip(means, batch, strict=True)]
