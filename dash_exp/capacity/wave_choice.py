"""In how many waves batches are sampled, chosen by the capacity model from the run's own steps. Torch-free.

Few waves fill the servers, many let the learner begin sooner; which is better depends on lengths, prompts,
filter and machine. Two steps are trials, then the number with the shortest predicted step is taken, and what
steps really took corrects what is predicted of their number: sampling and learning may hinder each other.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dash_exp.capacity.fit import Served, by_server, fit_speed, prefill_rate, undisturbed
from dash_exp.capacity.model import Curves, Setting, predict_batch, wave_choices
from dash_exp.capacity.sampling import Lengths
from dash_exp.types import AdvantagedGroup, Group

BEGIN = 4
"""Waves of a run's first step, whose time does not count, for it is slower than others; and of every step
where waves may not be chosen."""
TRIALS = (1, 4)
"""All sequences at once, then some: how long a decode step takes with many and with few."""
EVERY_STEP, THEN_EVERY = 8, 8
"""So many steps are looked at, each, and later every eighth, and the first of every other number. A look at
16 x 8 completions of up to 64 tokens takes 0.04 s, at 128 x 16 up to 0.4 s (a core of a Xeon)."""
REMEMBERED = 3
"""Last steps whose lengths are predicted, and of a number of waves that correct it, by their median."""
LEARNING = ("logprob", "backprop")
BOTH_SIDES = ("sample", "verify", *LEARNING)
"""Phases of the ledger in which sampling and learning pass; the others come after them, however many
waves."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A step: what its servers took, its lengths in the order in which groups were begun, the mean prompt,
    and of the learner: the share of completions that it was given, its input tokens, its seconds."""

    served: tuple[Served, ...]
    lengths: Lengths
    prompt_tokens: float
    given: float
    computed: float
    learning_s: float


def seen_in(groups: Sequence[Group], row: Mapping[str, float]) -> Seen:
    begun = sorted(groups, key=lambda g: (g.origin.start if g.origin else 0.0, g.position))
    return Seen(
        served=by_server(groups),
        lengths=tuple(tuple(len(c.token_ids) for c in g.completions) for g in begun),
        prompt_tokens=statistics.fmean(len(g.prompt.token_ids) for g in groups),
        given=row["completions/forwarded"] / row["completions/sampled"],
        computed=row["tokens/computed"],
        learning_s=seconds(row, LEARNING),
    )


def seconds(row: Mapping[str, float], phases: Sequence[str]) -> float:
    return sum(row[f"time/{name}_s"] for name in phases)


class WaveChoice:
    """Learns from one step after the other; `waves` is what to take for the next."""

    def __init__(self, setting: Setting):
        """`setting`: batch, servers and learners; its lengths, filter share and waves are the run's own."""
        self.setting = setting
        self.choices = wave_choices(setting.call or setting.prompts)
        self.waves = self._of(BEGIN)
        self._steps = 0
        self._latest: dict[int, Seen] = {}
        self._last: deque[Seen] = deque(maxlen=REMEMBERED)
        self._ratios: dict[int, deque[float]] = {}

    def _of(self, wanted: int) -> int:
        """The nearest choice that is not larger."""
        return max(w for w in self.choices if w <= wanted)

    def note(self, groups: Sequence[AdvantagedGroup], row: Mapping[str, float]) -> None:
        """A step with `waves` is done: its groups, and its row of the record. One in which servers were lost,
        or nothing was learned, tells nothing."""
        sampled = [g.group for g in groups]
        if len(self.choices) == 1 or not row["tokens/computed"] or not undisturbed(sampled):
            return
        self._steps += 1
        if self._steps > EVERY_STEP and self._steps % THEN_EVERY and self.waves in self._ratios:
            return
        if self._steps > 1:
            seen = seen_in(sampled, row)
            self._latest[self.waves] = seen
            self._last.append(seen)
            curves = self._curves()
            ratio = seconds(row, BOTH_SIDES) / self._predicted(curves, self.waves, seen)
            self._ratios.setdefault(self.waves, deque(maxlen=REMEMBERED)).append(ratio)
        if self._steps <= len(TRIALS):
            self.waves = self._of(TRIALS[self._steps - 1])
        else:
            self.waves = self._best(curves)

    def _best(self, curves: Curves) -> int:
        """With the shortest step, the least of equals, for the lengths of the last ones. What was never tried
        is thought to be predicted as well as the best of what was."""
        known = {w: statistics.median(ratios) for w, ratios in self._ratios.items()}
        least = min(known.values())

        def expected(waves: int) -> float:
            each = [self._predicted(curves, waves, seen) for seen in self._last]
            return statistics.fmean(each) * known.get(waves, least)

        return min(self.choices, key=lambda w: (expected(w), w))

    def _predicted(self, curves: Curves, waves: int, seen: Seen) -> float:
        """Seconds of both sides for the very lengths of this step."""
        setting = replace(self.setting, waves=waves, kept=seen.given, streaming=True)
        return predict_batch(curves, setting, seen.lengths).step_s

    def _curves(self) -> Curves:
        """Servers as in the latest step of every number of waves tried, the learner as in the last steps."""
        speed = fit_speed([served for one in self._latest.values() for served in one.served])
        prompt = statistics.fmean(one.prompt_tokens for one in self._last)
        rate = sum(one.computed for one in self._last) / sum(one.learning_s for one in self._last)
        return Curves(
            decode=speed.decode,
            prefill_tokens_per_s=prefill_rate(speed),
            learner_tokens_per_s=rate / self.setting.learners,
            lengths=self._last[-1].lengths,
            cap=self.setting.tokens,
            prompt_tokens=round(prompt),
        )
