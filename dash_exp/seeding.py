"""Random numbers that depend on what they are for, never on what ran before.

A resumed run, a run with another batch order, and another arm with the same seed all draw the same
numbers for the same (run seed, purpose, step, prompt, sample), which pairs arms and makes resume exact.
"""

from __future__ import annotations

import hashlib

import numpy as np


def seed_for(run_seed: int, purpose: str, *where: int | str) -> int:
    """A 63-bit seed from the run's seed, a purpose and a place, e.g. `(step, prompt id, index)`."""
    text = "\x1f".join([str(run_seed), purpose, *map(str, where)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def uniforms(seed: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1), float64, from a counter-based generator."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def permutation(seed: int, count: int) -> np.ndarray:
    """A random order of `range(count)`, shape [count]."""
    return np.random.Generator(np.random.Philox(key=seed)).permutation(count)
