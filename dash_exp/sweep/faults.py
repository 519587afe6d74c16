"""Faults of the cells of a sweep, each reported once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from dash_exp.errors import Fault, UserError


class FaultCollector:
    """Faults of many cells: each is reported once, with how many cells have it and which.

    A cell is named by its index in `combinations`, the overrides of each cell.
    """

    def __init__(self, combinations: Sequence[Sequence[str]]):
        self._combinations = combinations
        self._seen: dict[Fault, list[int]] = {}
        self._faulty: set[int] = set()

    def add(self, number: int, faults: Iterable[Fault]) -> None:
        for fault in faults:
            self._seen.setdefault(fault, []).append(number)
            self._faulty.add(number)

    def add_all(self, faults: Iterable[Fault]) -> None:
        """Add faults of the sweep as a whole."""
        for fault in faults:
            self._seen.setdefault(fault, []).extend(range(len(self._combinations)))

    def has(self, number: int) -> bool:
        """Whether this cell has a fault."""
        return number in self._faulty

    def raise_if_any(self) -> None:
        """Raises UserError with every fault added, if there is one."""
        if self._seen:
            raise UserError([self._placed(fault, sorted(set(n))) for fault, n in self._seen.items()])

    def _placed(self, fault: Fault, numbers: Sequence[int]) -> Fault:
        total = len(self._combinations)
        if len(numbers) == total:
            return fault
        everywhere = set(self._combinations[0]).intersection(*self._combinations[1:])
        first = [text for text in self._combinations[numbers[0]] if text not in everywhere]
        shared = set(first).intersection(*(self._combinations[number] for number in numbers))
        label = " ".join(text for text in first if text in shared or not shared)
        if len(numbers) > 1:
            label = f"{len(numbers)} of {total} cells, {'all with' if shared else 'first'} {label}"
        return replace(fault, what=f"{fault.what} (in {label})")
