"""The learner of one process: adds up gradients in fp32, then divides once and updates."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dash_exp.errors import Fault, UserError
from dash_exp.learning import losses
from dash_exp.learning.corrections import correction
from dash_exp.learning.logprobs import Scorer, frozen_copy
from dash_exp.learning.packing import MicroBatch, Packed, pack
from dash_exp.learning.settings import (
    Forward,
    LearnerSpec,
    LossScale,
    Objective,
    Optimization,
    UpdateStats,
    coefficient,
    learning_rate,
)
from dash_exp.learning.weights import Weights, adapters_disabled, add_adapters, merged_weights
from dash_exp.modeling.attention import ATTENTION, varlen_fits
from dash_exp.modeling.source import computing_type, load_model
from dash_exp.record.checkpoint import Snapshot, checksum

DEVICES_FOLDER = Path("/dev")
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class StateFacts:
    """What a rank must know of a snapshot before it receives its tensors. `stored`: the snapshot's key of
    each weight, by the weight's name; `steps`: how often each weight that has moments was moved;
    `loss_scale`: its value and finite gradients."""

    updates: int
    stored: Mapping[str, str]
    steps: Mapping[str, float]
    loss_scale: tuple[float, int] = (1.0, 0)

    @classmethod
    def of(cls, snapshot: Snapshot) -> StateFacts:
        kept = snapshot.optimizer
        stored = {name: f"weights/{name}" for name in snapshot.weights}
        stored |= {key.removeprefix("master/"): key for key in kept if key.startswith("master/")}
        steps = {key.removeprefix("step/"): float(kept[key]) for key in kept if key.startswith("step/")}
        scale = snapshot.state.get("loss_scale", (1.0, 0))  # older ones have none
        return cls(int(snapshot.state["updates"]), stored, steps, (float(scale[0]), int(scale[1])))


class BatchSums:
    """Sums over tokens since the last `take_sums`, for the metrics of a step: `first/...` at the sampling
    weights, `later/...` after an update on the same batch, `scored/...` in forwards without gradient. Tensors
    are added on their device, in double precision, and read once, so no addition waits for the device."""

    def __init__(self) -> None:
        self._numbers: dict[str, float] = {}
        self._tensors: dict[str, Tensor] = {}

    def add(self, which: str, **sums: Tensor | float) -> None:
        for name, value in sums.items():
            key = f"{which}/{name}"
            if isinstance(value, Tensor):
                own = value.double()
                self._tensors[key] = self._tensors[key] + own if key in self._tensors else own
            else:
                self._numbers[key] = self._numbers.get(key, 0.0) + value

    def values(self) -> dict[str, float]:
        """All sums by name; waits for the device."""
        found = torch.stack(list(self._tensors.values())).tolist() if self._tensors else []
        return {**self._numbers, **dict(zip(self._tensors, found, strict=True))}


class Learner:
    """Owns the policy, whose weights move by the sums of its gradients.

    `forward`: how passes are computed; `weights_factory`: makes what keeps the policy's tensors.
    """

    def __init__(
        self,
        model: Any,
        objective: Objective,
        optimization: Optimization,
        forward: Forward,
        weights_factory: Callable[[Scorer, str], Weights] = Weights,
    ):
        self.objective, self.optimization = objective, optimization
        self.model = model.eval()  # dropout is never on: two scorings of a sample are identical
        check_dropout(model)
        if optimization.adapters is not None:
            add_adapters(model, optimization.adapters)
        elif optimization.freeze_embeddings:
            model.get_input_embeddings().weight.requires_grad_(False)
            model.get_output_embeddings().weight.requires_grad_(False)
        scorer = partial(
            Scorer,
            temperature=objective.temperature,
            vocabulary=forward.vocabulary,
            chunk=forward.logit_chunk,
            entropy_gradient=objective.entropy > 0,
        )
        self.reference: Scorer | None = None
        if objective.beta > 0 and optimization.adapters is None:
            # with LoRA the reference is the model with adapters disabled
            self.reference = scorer(frozen_copy(model, computing_type(optimization.precision)))
        if forward.gradient_checkpointing:
            model.train()  # transformers checkpoints in training mode only
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.policy = scorer(model)
        self.weights = weights_factory(self.policy, optimization.precision)
        if self.reference is not None:
            self.weights.attach_reference(self.reference)
        self.masters, self.gradients = self.weights.masters, self.weights.gradients
        for master in self.masters.values():
            master.grad = None
        self.optimizer = torch.optim.AdamW(
            list(self.masters.values()),
            lr=optimization.lr,
            betas=optimization.betas,
            eps=optimization.eps,
            weight_decay=optimization.weight_decay,
            fused=True,
        )
        self.updates = 0
        self.loss_scale = LossScale(dynamic=optimization.precision == "fp16_mixed")
        self.sums = BatchSums()
        self._laid_out: tuple[MicroBatch, Packed] | None = None
        self._varlen = varlen_fits(self.device, next(model.parameters()).dtype)

    @property
    def device(self) -> torch.device:
        return self.weights.device

    def _pack(self, batch: MicroBatch) -> Packed:
        """Lay it out on the device; the last one is kept, since the reference's forward comes before."""
        if self._laid_out is None or self._laid_out[0] is not batch:
            self._laid_out = (batch, pack(batch, self.device, self._varlen))
        return self._laid_out[1]

    @property
    def beta(self) -> float:
        """The KL coefficient of the update that is being accumulated."""
        return self._coefficient(self.objective.beta, self.objective.beta_schedule)

    def _coefficient(self, start: float, schedule: str) -> float:
        return coefficient(self.updates, start, schedule, max(1, self.optimization.total_updates))

    @property
    def lr(self) -> float:
        """The learning rate of the update that is being accumulated."""
        return learning_rate(self.updates, self.optimization)

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch) -> Tensor:
        """Log-probabilities [C] of the current policy, without gradient."""
        packed = self._pack(batch)
        logprobs, entropy = self.policy(packed)
        self.sums.add(
            "scored",
            entropy=entropy.sum(),
            logprob=logprobs.sum(),
            gap=(logprobs - packed.sampler_logprobs).abs().sum(),
            tokens=len(packed.targets),
            completions=len(batch.lengths),
        )
        return logprobs

    @torch.no_grad()
    def reference_logprobs(self, batch: MicroBatch) -> Tensor | None:
        """Log-probabilities [C] of the initial model; None where the objective has no KL term."""
        if self.objective.beta == 0:
            return None
        packed = self._pack(batch)
        if self.reference is not None:
            logprobs: Tensor = self.reference(packed)[0]
            return logprobs
        with adapters_disabled(self.model):
            logprobs = self.policy(packed)[0]
        return logprobs

    def accumulate(
        self, batch: MicroBatch, reference: Tensor | None = None, old: Tensor | None = None
    ) -> Tensor:
        """Forward and backward of one micro-batch, adding to the gradient sums.

        `reference` [C] comes from `reference_logprobs`. `old` [C] are the log-probabilities at the
        sampling weights; None where the current weights are those (the first update of a batch): then the
        current log-probabilities, detached, are used. Returns the log-probabilities [C], detached.
        """
        goal = self.objective
        packed = self._pack(batch)
        logprobs, entropy = self.policy(packed)
        detached = logprobs.detach()
        before = detached if old is None else old.to(detached.device)
        bounds = (goal.clip_low, goal.clip_high)
        loss, clipped = losses.surrogate(goal.surrogate, logprobs, before, packed, bounds)
        which = "first" if old is None else "later"
        if goal.correction != "none":
            weight = self._correction(before, packed)
            loss = loss * weight
            self.sums.add(which, correction=weight.sum())
        if goal.beta > 0:
            assert reference is not None, "an objective with KL needs the reference's log-probabilities"
            penalty = losses.kl_penalty(logprobs, reference.to(detached.device), goal.kl)
            loss = loss + self.beta * penalty
            self.sums.add(which, kl=penalty.detach().sum())
        if goal.entropy > 0:
            loss = loss - self._coefficient(goal.entropy, goal.entropy_schedule) * entropy
        (loss * packed.weights).sum().mul(self.loss_scale.value).backward()
        self.sums.add(
            which,
            entropy=entropy.detach().sum(),
            logprob=detached.sum(),
            clipped=clipped.sum(),
            ratio=torch.exp(detached - before).sum(),
            gap=(detached - packed.sampler_logprobs).abs().sum(),
            tokens=len(packed.targets),
            completions=len(batch.lengths),
            computed=len(packed.input_ids),
        )
        return detached

    def _correction(self, before: Tensor, packed: Packed) -> Tensor:
        goal = self.objective
        bounds = goal.correction_floor, goal.correction_cap
        return correction(before, packed.sampler_logprobs, packed.lengths, goal.correction, *bounds)

    @torch.no_grad()
    def update(self, denominator: float) -> UpdateStats:
        """Divide the gradient sums once, clip by global norm, move the weights, clear the sums.

        Where nothing was accumulated (every completion dropped), or nothing is counted, nothing moves,
        not even by momentum or weight decay; the update still counts for the schedule.
        """
        lr, beta, has_gradient = self.lr, self.beta, self.weights.has_gradient
        self.updates += 1
        self._laid_out = None
        if not has_gradient or denominator == 0:
            has_gradient.clear()
            return UpdateStats(0.0, lr, beta, skipped=True)
        denominator *= self.loss_scale.value
        norm = self.weights.norm() / denominator
        has_gradient.clear()
        self.loss_scale, hopeless = self.loss_scale.after(math.isfinite(norm)), self.loss_scale.is_least
        if not math.isfinite(norm):
            return UpdateStats(norm, lr, beta, skipped=True, finite=not hopeless)
        scale = min(1.0, self.optimization.max_grad_norm / (norm + 1e-6)) / denominator
        for name, master in self.masters.items():
            self.gradients[name] *= scale
            master.grad = self.gradients[name].to(master.dtype)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for master in self.masters.values():
            master.grad = None
        self.weights.copy_masters()
        return UpdateStats(norm, lr, beta, skipped=False)

    def discard(self) -> None:
        """Forget what was accumulated, gradients and metrics alike."""
        self.weights.has_gradient.clear()
        self.sums = BatchSums()
        self._laid_out = None

    def preflight(self, micro_batch: MicroBatch) -> None:
        """Forward and backward beside what the optimizer will need, and forget the gradient. Raises UserError
        when memory runs out: better in the first minute than when the longest samples come."""
        try:
            fresh = not self.optimizer.state
            moments = [torch.empty_like(m) for m in self.masters.values() for _ in range(2) if fresh]
            self.accumulate(micro_batch, self.reference_logprobs(micro_batch))
            del moments
        except RuntimeError as error:  # torch.OutOfMemoryError, or the CPU allocator's plain one
            if not isinstance(error, torch.OutOfMemoryError) and "alloc" not in str(error):
                raise
            tokens = micro_batch.tokens
            what = f"a micro-batch of the longest samples ({tokens} tokens) does not fit into memory"
            hint = "lower it, or set learner.gradient_checkpointing=true or a smaller learner.logit_chunk"
            raise UserError(Fault("learner.micro_batch_tokens", what, hint)) from error
        self.discard()

    def checksums(self) -> dict[str, str]:
        """Checksums of everything that updates move, by name."""
        return {name: checksum(master) for name, master in self.masters.items()}

    def snapshot(self, step: int, *, moments: bool = True, row: Mapping[str, Any] | None = None) -> Snapshot:
        """Complete weights (fp32, adapters merged), optimizer moments and counters, not copied: save before
        the next update. `row` is what the record will say of this step. Sharded: called by all ranks at once,
        complete on rank 0."""
        held, kept = self.weights, dict[str, Tensor]()
        if self.optimization.adapters is not None:
            weights = dict(merged_weights(self.model, torch.float32))
            # merged weights cannot be taken apart again, so the adapters are kept beside them
            kept = {f"master/{name}": master.detach() for name, master in self.masters.items()}
        else:
            weights = {name: held.gather(name, held.exact(name)).float() for name in held.names()}
        for name, master in self.masters.items() if moments else ():
            for key, value in self.optimizer.state.get(master, {}).items():
                kept[f"{key}/{name}"] = value if key == "step" else held.gather(name, value)
        scale = [self.loss_scale.value, self.loss_scale.finite]
        state = {"step": step, "updates": self.updates, "loss_scale": scale, "row": row or {}}
        return Snapshot(weights, kept, state)

    @torch.no_grad()
    def restore(
        self,
        snapshot: Snapshot | None,
        facts: StateFacts | None = None,
        broadcast: Callable[[Tensor], None] = lambda tensor: None,
    ) -> None:
        """Continue from a snapshot of the same model and settings. Of several ranks only rank 0 has it: all
        call this at once with its `facts`, and `broadcast` fills a tensor with rank 0's, one tensor at a
        time."""
        held = self.weights
        if facts is None:
            assert snapshot is not None
            facts = StateFacts.of(snapshot)

        def full(name: str, key: str) -> Tensor:
            tensor = torch.empty(held.shape(name), dtype=torch.float32, device=held.device)
            if snapshot is not None:
                kind, _, weight = key.partition("/")
                tensor.copy_(snapshot.weights[weight] if kind == "weights" else snapshot.optimizer[key])
            broadcast(tensor)
            return tensor

        for name in held.names():
            if name in facts.stored:  # else frozen beneath an adapter, so as it was loaded
                held.load(name, full(name, facts.stored[name]))
        for name, master in self.masters.items():
            if name in facts.steps:
                moments = {key: held.part(name, full(name, f"{key}/{name}")) for key in MOMENTS}
                self.optimizer.state[master] = {
                    "step": torch.tensor(facts.steps[name], dtype=torch.float32, device=master.device),
                    **{key: value.to(master, copy=True) for key, value in moments.items()},
                }
        self.updates = facts.updates
        value, finite = facts.loss_scale
        self.loss_scale = replace(self.loss_scale, value=value, finite=finite)

    def take_sums(self) -> dict[str, float]:
        """The sums since the last call; they start again at 0."""
        sums, self.sums = self.sums.values(), BatchSums()
        if self.device.type == "cuda":
            sums["gpu_peak_mb"] = torch.cuda.max_memory_allocated(self.device) / 2**20
            torch.cuda.reset_peak_memory_stats(self.device)
        return sums


def check_dropout(model: Any) -> None:
    """Raise UserError if the model would drop anything out while training."""
    for name, module in model.named_modules():
        rate = getattr(module, "p", 0.0) if isinstance(module, torch.nn.Dropout) else 0.0
        rate = max(rate, float(getattr(module, "attention_dropout", 0.0) or 0.0))
        if rate > 0:
            raise UserError(Fault("model", f"{name} has dropout {rate}", "set it to 0 in its config.json"))


def load_learner(spec: LearnerSpec, device: torch.device) -> Learner:
    """A learner with the model of a folder."""
    model = load_model(spec.folder, torch.float32, ATTENTION).to(device)
    return Learner(model, spec.objective, spec.optimization, spec.forward)


def listed_gpu() -> str | None:
    """A GPU that the machine lists and that is not hidden from this process; torch may see none."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    return None if hidden else next(map(str, sorted(DEVICES_FOLDER.glob("nvidia[0-9]*"))), None)


def device_of(name: str, local_rank: int | None = None) -> torch.device:
    """The device that `learner.device` means; of several ranks each has a GPU of its own (the only one that
    it sees, where the scheduler shows it no other). Raises UserError where there is none."""
    count = torch.cuda.device_count()
    if name == "auto" and not count and (listed := listed_gpu()):
        what = f"got auto, but torch {torch.__version__} cannot use the GPU {listed} of this machine"
        hint = "install a torch with CUDA that fits its driver, or set learner.device=cpu"
        raise UserError(Fault("learner.device", what, hint))
    device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and device.index is None and local_rank is not None:
        device = torch.device("cuda", local_rank if count > 1 else 0)
    if device.type == "cuda" and (device.index or 0) >= count:
        what = f"got {name!r}, but there are {count} GPUs here"
        hint = "set learner.device=cpu or auto, or fewer learner.ranks"
        raise UserError(Fault("learner.device", what, hint))
    return device
