"""A sweeper that searches: it asks for two rates, and prints what each came to."""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper


class Searcher(Sweeper):
    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        asked = [[*arguments, f"learner.lr={rate}"] for rate in ("1e-4", "1e-3")]
        print("found", [one.return_value for one in self.launcher.launch(asked, initial_job_idx=0)])


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="searcher",
    node={"_target_": "hydra_plugins.searcher.Searcher"},
    provider="searcher",
)
