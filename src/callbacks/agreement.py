"""All ranks must run the same configuration.

Launchers that start ranks by re-running the command line can give each rank a configuration of its own (a random
sweeper, a resolver that reads the clock), and training then averages gradients of different experiments without a word. Every
rank compares hashes before the first step.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from src.config import ConfigError


class ConfigAgreement(Callback):
    """Stops the run, on every rank, when the ranks' configurations differ."""

    config_name = "config_agreement"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gathers the hashes."""
        if trainer.world_size == 1:
            return
        own = getattr(pl_module, "config_hash", None)
        everyone: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(everyone, own)
        print(f"rank {trainer.global_rank}: config {own}", flush=True)
        if len(set(everyone)) > 1:
            raise ConfigError(
                f"the ranks run different configurations (hashes {', '.join(map(str, everyone))}); a sweep with a random sampler "
                "under a launcher that re-runs the command line does this. Start one process group per job"
            )
