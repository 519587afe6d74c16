"""The comparison rule against scipy, hand-worked cases, and its own coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.coverage import WORLDS, Case, by_seed, draw
from dash_exp.statistics import comparison, power
from dash_exp.statistics.comparison import compare_runs, compare_scores, share_interval
from dash_exp.statistics.power import Noise

ONE = {0: 0.61, 1: 0.70, 2: 0.66, 3: 0.72}
OTHER = {0: 0.60, 1: 0.66, 2: 0.67, 5: 0.65}
PLAIN = WORLDS[0]


def table(seed: int, shift: float = 0.0, seeds: int = 3, prompts: int = 40) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.clip(rng.random((seeds, prompts)) * 0.5 + shift, 0, 1)


def test_numbers_of_few_runs_are_compared_by_welchs_test() -> None:
    found = compare_runs(ONE, OTHER)
    scipys = stats.ttest_ind(list(ONE.values()), list(OTHER.values()), equal_var=False)
    interval = scipys.confidence_interval()
    assert found.p_value() == pytest.approx(scipys.pvalue)
    assert found.interval() == pytest.approx((interval.low, interval.high))


def test_numbers_of_five_common_seeds_are_paired() -> None:
    one = dict(enumerate((3.0, 4.0, 5.5, 4.0, 6.0))) | {9: 100.0}
    other = dict(enumerate((2.0, 3.5, 5.0, 3.0, 5.0)))
    found = compare_runs(one, other)  # seed 9 has no partner
    scipys = stats.ttest_rel([one[s] for s in other], list(other.values()))
    assert found.p_value() == pytest.approx(scipys.pvalue) and found.seeds == 5
    gaps = np.array([one[s] - other[s] for s in other])
    sides = [
        stats.ttest_1samp(gaps, margin, alternative=side).pvalue
        for margin, side in ((-1.5, "greater"), (1.5, "less"))
    ]
    assert found.p_equivalent(1.5) == pytest.approx(max(sides))
    low, high = found.interval(0.9)
    assert (found.p_equivalent(1.5) < 0.05) == (low > -1.5 and high < 1.5)


@pytest.mark.parametrize("seeds", [3, 6])
def test_scores_by_the_formulas_written_out(seeds: int) -> None:
    a, b = table(1, 0.1, seeds), table(2, 0.0, seeds)
    prompts = a.shape[1]

    def residual(y: np.ndarray) -> float:
        total = 0.0
        for r in range(seeds):
            for p in range(prompts):
                total += (y[r, p] - y[r].mean() - y[:, p].mean() + y.mean()) ** 2
        return total / ((seeds - 1) * (prompts - 1)) / prompts

    d = a.mean(0) - b.mean(0)
    if seeds < 5:
        parts = [a.mean(1).var(ddof=1) / seeds, b.mean(1).var(ddof=1) / seeds]
        rest = residual(a) / seeds + residual(b) / seeds
    else:
        parts = [(a.mean(1) - b.mean(1)).var(ddof=1) / seeds]
        rest = residual(a - b) / seeds
    v = sum(parts) + max(d.var(ddof=1) / prompts - rest, 0)
    df = min(max(v**2 / sum(x**2 / (seeds - 1) for x in parts), seeds - 1), prompts - 1)
    both = stats.t.ppf(0.975, df) * math.sqrt(v)
    alone = stats.t.ppf(0.975, prompts - 1) * math.sqrt(d.var(ddof=1) / prompts)
    found = compare_scores(by_seed(a), by_seed(b))
    assert found.interval() == pytest.approx((d.mean() - max(both, alone), d.mean() + max(both, alone)))
    p = [2 * stats.t.sf(abs(d.mean()) / math.sqrt(v), df)]
    p.append(2 * stats.t.sf(abs(d.mean()) / math.sqrt(d.var(ddof=1) / prompts), prompts - 1))
    assert found.p_value() == pytest.approx(max(p))


def test_p_is_below_alpha_exactly_where_the_interval_excludes_the_null() -> None:
    for i in range(40):
        found = compare_scores(by_seed(table(i, 0.05 * (i % 5))), by_seed(table(100 + i)))
        low, high = found.interval()
        assert (found.p_value() < 0.05) == (not low <= 0 <= high)
        edge = found.interval()[1]
        assert found.p_value(edge) == pytest.approx(0.05)


def test_seeds_that_all_differ_equally_are_not_certain() -> None:
    """The scatter over prompts remains, where a paired t-test over seeds divides by 0."""
    a = np.tile((np.arange(60) % 3 == 0).astype(float), (5, 1))
    b = np.tile((np.arange(60) % 4 == 0).astype(float), (5, 1))
    assert 0.01 < compare_scores(by_seed(a), by_seed(b)).p_value() < 0.9
    same = compare_scores(by_seed(a), by_seed(a))
    assert same.difference == 0 and same.p_value() == 1.0 and same.interval()[1] > 0.01  # no prompt differs


def test_an_untrained_base_adds_no_noise_of_seeds() -> None:
    trained, base = table(1, 0.1), {0: table(2)[0]}
    found = compare_scores(by_seed(trained), base, trained=False)
    own = trained.mean(1).var(ddof=1) / 3
    assert found.seeds == 3 and found.errors[0].variance >= own
    assert found.errors[0].df >= 2


def test_too_few_seeds_conclude_nothing() -> None:
    found = compare_scores(by_seed(table(1)[:2]), by_seed(table(2)))
    assert math.isnan(found.p_value()) and math.isnan(found.interval()[0]) and "2 seeds" in found.note
    assert math.isnan(compare_runs({0: 1.0}, {0: 2.0}).p_equivalent(1.0))
    even = compare_runs(dict.fromkeys(range(5), 30.0), dict.fromkeys(range(5), 60.0))
    assert math.isnan(even.p_value()) and "do not vary" in even.note
    for broken in ({0: math.nan}, {}):
        with pytest.raises(ValueError, match="finite"):
            compare_runs(broken, {0: 1.0})


def test_shares_stay_within_0_and_1_and_are_exact_at_the_ends() -> None:
    for count in (0, 64):
        scores = np.tile((np.arange(64) < count).astype(float), (3, 1))
        exact = stats.binomtest(count, 64).proportion_ci(method="exact")
        assert share_interval(scores) == pytest.approx((exact.low, exact.high))
    for count in (1, 2, 62, 63):
        low, high = share_interval(np.tile((np.arange(64) < count).astype(float), (3, 1)))
        assert 0 <= low < count / 64 < high <= 1
    one_run = (np.arange(100) < 40).astype(float)[None]
    wilson = stats.binomtest(40, 100).proportion_ci(method="wilson")
    assert share_interval(one_run) == pytest.approx((wilson.low, wilson.high), abs=0.002)


def test_holm_by_hand() -> None:
    # sorted 0.005 0.01 0.03 0.04 -> x4, x3, x2, x1 = 0.02 0.03 0.06 0.04 -> monotone 0.02 0.03 0.06 0.06
    assert comparison.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert comparison.holm([0.6, 0.9]) == [1.0, 1.0]
    with_gap = comparison.holm([0.01, math.nan, 0.02])
    assert with_gap[0] == pytest.approx(0.02) and math.isnan(with_gap[1])


def test_looks_share_the_error_probability() -> None:
    assert comparison.sequential_p({3: 0.004}) == pytest.approx(0.04)
    assert comparison.sequential_p({3: 0.5, 8: 0.016, 12: 0.5}) == pytest.approx(0.016 / 0.3)
    assert math.isnan(comparison.sequential_p({4: 0.001}))
    assert sum(comparison.LOOK_WEIGHTS.values()) == pytest.approx(1.0)


def test_intervals_cover_and_looks_are_rarely_wrong() -> None:
    """With the complete table in docs/statistics.md; here one row, coarsely."""
    case, replicates = Case(PLAIN, 0.3, 128), 300
    held, of_share, wrong = 0, 0, 0
    for i in range(replicates):
        a, b = draw(case, 12, np.random.default_rng(i))
        low, high = compare_scores(by_seed(a, 3), by_seed(b, 3)).interval()
        held += low <= 0 <= high
        low, high = share_interval(a[:5])
        of_share += low <= 0.5 <= high
        p = {n: compare_scores(by_seed(a, n), by_seed(b, n)).p_value() for n in (3, 5, 8, 12)}
        wrong += comparison.sequential_p(p) < 0.05
    assert held >= 0.92 * replicates and of_share >= 0.92 * replicates and wrong <= 0.06 * replicates


def test_the_smallest_difference_that_seeds_can_detect() -> None:
    noise = Noise(4.1, 11.0)
    found = [power.detectable(noise, seeds, 256) for seeds in (3, 5, 10)]
    assert found == pytest.approx([13.8, 9.7, 6.0], rel=0.02)
    assert math.isnan(power.detectable(noise, 2, 256))
    # without noise of prompts: the power of a paired t-test, by the noncentral t
    clean = Noise(1.0, 0.0)
    effect = power.detectable(clean, 10, 0)
    reached = stats.nct.sf(stats.t.ppf(0.975, 9), 9, effect / math.sqrt(2 / 10))
    assert reached == pytest.approx(0.8, abs=0.02)


def test_seeds_that_an_effect_needs() -> None:
    noise = Noise(4.1, 11.0)
    needed = power.seeds_needed(noise, 6.0, 256)
    assert needed is not None
    assert power.detectable(noise, needed, 256) < 6.0 <= power.detectable(noise, needed - 1, 256)
    assert power.seeds_needed(noise, 1.0, 256) is None  # 11 / 16 points of prompts' noise alone
    with pytest.raises(ValueError, match="above 0"):
        power.seeds_needed(noise, 0.0, 256)


def test_noise_is_found_again_in_runs_that_have_it() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 0.5, 400)
    tables = [
        shared + rng.normal(0, 0.11, 400) + rng.normal(0, 0.05, (60, 1)) + rng.normal(0, 0.4, (60, 400))
        for _ in range(3)
    ]
    found = power.estimate_noise(tables)
    assert found is not None and found.seeds == pytest.approx(math.hypot(0.05, 0.4 / 20), rel=0.1)
    assert found.prompts == pytest.approx(0.11 * math.sqrt(2), rel=0.1)
    assert power.estimate_noise([tables[0][:1]]) is None
