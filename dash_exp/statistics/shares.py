"""Statistics shared by training and analysis: pass@k and intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased probability that k of n samples, drawn without replacement, contain a correct one:
    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, eq. 1). NaN when k > n: it cannot be estimated."""
    if not 0 <= correct <= n or k < 1:
        raise ValueError(f"need 0 <= correct <= n and k >= 1, got n={n}, correct={correct}, k={k}")
    if k > n:
        return math.nan
    if n - correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


def wilson_interval(successes: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a share; (nan, nan) for n = 0 (Wilson 1927)."""
    if n == 0:
        return math.nan, math.nan
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(
    values_per_prompt: Sequence[float], seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean by resampling prompts (never samples); nan for fewer than 2."""
    values = np.asarray(values_per_prompt, dtype=float)
    if len(values) < 2:
        return math.nan, math.nan
    draws = np.random.Generator(np.random.Philox(key=seed)).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
