"""What a learner is told, and what it tells: objective, optimization, updates, sums for the metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

from dash_exp.learning.adapters import Adapters


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised per token: surrogate + beta x KL. `temperature` divides the logits, as it does
    in the sampler (1 for text that no sampler drew)."""

    surrogate: str
    clip_low: float
    clip_high: float
    beta: float
    beta_schedule: str
    kl: str
    temperature: float


@dataclass(frozen=True, slots=True)
class Optimization:
    """How the weights move. `adapters`: only these do."""

    lr: float
    schedule: str
    warmup_share: float
    total_updates: int
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    max_grad_norm: float
    precision: str
    freeze_embeddings: bool
    adapters: Adapters | None = None


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """One optimizer update. `skipped`: nothing was accumulated, or (`finite` false) the gradient held an
    infinity or NaN, and nothing moved. `beta`: the KL coefficient it was taken with."""

    grad_norm: float
    lr: float
    beta: float
    skipped: bool
    finite: bool = True


@dataclass(slots=True)
class BatchSums:
    """Sums over tokens since the last `take_sums`, for the metrics of a step: `first/...` at the sampling
    weights, `later/...` after an update on the same batch, `scored/...` in forwards without gradient."""

    values: dict[str, float] = field(default_factory=dict)

    def add(self, which: str, **sums: float) -> None:
        for name, value in sums.items():
            key = f"{which}/{name}"
            self.values[key] = self.values.get(key, 0.0) + value
