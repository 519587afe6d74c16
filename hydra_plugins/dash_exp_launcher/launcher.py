"""`hydra/launcher=dash_exp`: passes the combinations of `-m` to dash_exp.sweep.request.

Hydra imports every plugin at every start, so nothing else is imported before a sweep is launched.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class DashLauncher(Launcher):
    """`n_jobs`: cells at once on this machine. `wait`: stay until SLURM has run them all."""

    def __init__(self, n_jobs: int = 1, wait: bool = False):
        self.n_jobs, self.wait = n_jobs, wait
        self.config: DictConfig | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run the cells. Each returns the number that a sweeper which searches may maximise
        (`dash_exp.record.metrics.objective`). Ends this program where one failed or a signal came, after all
        that could be run."""
        from dash_exp.sweep.request import launch_multirun

        assert self.config is not None
        code, values = launch_multirun(self.config, job_overrides, initial_job_idx, self.n_jobs, self.wait)
        if code:
            sys.exit(code)
        found = [JobReturn(overrides=list(one), status=JobStatus.COMPLETED) for one in job_overrides]
        for one, value in zip(found, values, strict=True):
            one.return_value = value
        return found
