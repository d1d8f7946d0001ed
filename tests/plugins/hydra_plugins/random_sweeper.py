"""A Hydra sweeper that draws the learning rate anew in every process, as a sampler without a fixed seed does."""

import random
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class RandomSweeper(Sweeper):
    def __init__(self, jobs: int):
        self.jobs = jobs
        self.launcher: Any = None
        self.config: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from hydra.core.plugins import Plugins

        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        source = random.SystemRandom()
        batch = [[*arguments, f"optimizer.lr={source.uniform(1e-4, 1e-2):.9f}"] for _ in range(self.jobs)]
        returned: list[JobReturn] = list(self.launcher.launch(batch, initial_job_idx=0))
        for job in returned:
            _ = job.return_value  # raises what the job raised
        return returned


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="random",
    node={"_target_": "hydra_plugins.random_sweeper.RandomSweeper", "jobs": 2},
    provider="random_sweeper",
)
