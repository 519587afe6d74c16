"""What the learner does on a GPU, counted on the meta device by its real code."""

from __future__ import annotations

import pytest

from benchmarks import gpu_static

PEAKS_GIB = {"0.5b": 12.4, "1.5b": 33.1, "3b": 63.1, "8b": 157.8}
"""Estimated for 16k tokens, checkpointing, logits in chunks of 1,024, with a reference model."""


@pytest.mark.parametrize(
    "name", ["0.5b", *(pytest.param(n, marks=pytest.mark.long) for n in ("1.5b", "3b", "8b"))]
)
def test_a_micro_batch_waits_for_no_gpu_builds_no_mask_and_has_the_expected_peak(name: str) -> None:
    found = gpu_static.count(name)
    assert found.peak_gib == pytest.approx(PEAKS_GIB[name], rel=0.1)
    assert sum(found.syncs.values()) <= 3 and found.mixes == 0 and found.mask_bytes == 0


def test_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the layout of a GPU without that kernel, masks are counted; and a synchronisation is one."""
    import torch

    from dash_exp.learning import learner

    monkeypatch.setattr(learner, "varlen_fits", lambda *_: False)
    monkeypatch.setitem(gpu_static.SHAPES, "0.5b", {**gpu_static.SHAPES["0.5b"], "layers": 1})  # type: ignore[attr-defined]
    assert gpu_static.count("0.5b", tokens=4096).mask_bytes > 4096 * 1792
    with gpu_static.Watch() as watch:
        held = torch.ones(10, device="meta")
        assert float(held.sum()) == 1.0 and watch.live >= 40
    assert sum(watch.syncs.values()) == 1 and watch.kernels == 1


@pytest.mark.long
def test_the_script_of_a_first_gpu_day_runs(capfd: pytest.CaptureFixture[str]) -> None:
    """On CPU with tiny sizes: every row but those that need a GPU or vLLM."""
    from benchmarks import gpu_day

    assert gpu_day.main(["--rehearse"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "attention layouts agree",
        "learner, 32 tokens",
        "learner, mixed tokens",
        "preemptive against historical",
        "killed and resumed",
    ]
