"""Lightning strategies with defaults that mean what their names say, and limits on how long a dead process is waited for.

    Ddp      a copy of the model in every process
    Fsdp2    weights, gradients and optimizer state sharded over processes (torch.distributed.fsdp.fully_shard)

Both say which part of a batch a process reads: with tensor parallelism, several read the same.
"""

from __future__ import annotations

import os
import pickle
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from src.checkpoints.description import META, METADATA, OPTIMIZER, WEIGHTS
from src.checkpoints.integrity import SUMS
from src.checkpoints.optimizer_state import named, numbered
from src.checkpoints.plain import load_plain
from src.checkpoints.sharded import checksums, restore
from src.config import ConfigError, RunError
from src.support.files import PART

TIMEOUT_MINUTES = 30.0


def _timeout(minutes: float) -> timedelta:
    if minutes <= 0:
        raise ConfigError(f"trainer.strategy.timeout_minutes={minutes}: positive")
    return timedelta(minutes=minutes)


class Ddp(DDPStrategy):
    """Data parallelism: every process has the whole model, gradients are averaged.

    Args:
        timeout_minutes: how long a process waits for the others in one exchange. One that has *died* is noticed within a minute
            (``callbacks/heartbeat.py``); this is for those that hang.
    """

    config_name = "ddp"

    def __init__(self, timeout_minutes: float = TIMEOUT_MINUTES):
        super().__init__(gradient_as_bucket_view=True, timeout=_timeout(timeout_minutes))


class Fsdp2(ModelParallelStrategy):
    """Fully sharded data parallelism over all processes of all nodes, each block a unit.

    Lightning's ``ModelParallelStrategy`` would by default shard over nodes only and split tensors over the devices of each.

    Args:
        sharded_checkpoints: every process writes its own shard into a folder; else one file, which opens under every strategy.
        replicas: copies of the sharded model (hybrid sharding): with as many as there are nodes, weights travel within a
            node only and gradients alone between nodes.
        tensor_parallel: neighbouring processes that read the same data and compute a share of the heads and hidden units each. What
            they store stays sharded over all processes, so checkpoints know nothing of it.
        timeout_minutes: as in ``Ddp``.

    Raises:
        ConfigError: at the start, when the numbers do not divide the number of processes.
    """

    config_name = "fsdp2"

    def __init__(
        self,
        sharded_checkpoints: bool = False,
        replicas: int = 1,
        tensor_parallel: int = 1,
        timeout_minutes: float = TIMEOUT_MINUTES,
    ):
        for name, value in (("replicas", replicas), ("tensor_parallel", tensor_parallel)):
            if value < 1:
                raise ConfigError(f"trainer.strategy.{name}={value}: at least 1")
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=sharded_checkpoints,
            timeout=_timeout(timeout_minutes),
        )
        self.replicas, self.tensor_parallel = replicas, tensor_parallel
        self.tensor_group: Any = None

    def setup_environment(self) -> None:
        """Arranges the processes, whose number is known only now: replicas x shards, and groups that split tensors."""
        world = self.num_nodes * self.num_processes
        for name, value in (("replicas", self.replicas), ("tensor_parallel", self.tensor_parallel)):
            if world % value:
                raise ConfigError(f"trainer.strategy.{name}={value} does not divide the {world} processes of this run")
        self._data_parallel_size = world
        super().setup_environment()
        device = self.root_device.type
        if self.replicas > 1:
            shape = (self.replicas, world // self.replicas)
            self._device_mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
        if self.tensor_parallel > 1:
            shape = (world // self.tensor_parallel, self.tensor_parallel)
            self.tensor_group = init_device_mesh(device, shape, mesh_dim_names=("data", "tensor")).get_group("tensor")

    @property
    def sharding_mesh(self) -> DeviceMesh:
        """Over which ``fully_shard`` shards: one-dimensional, or replicas x shards."""
        return self.device_mesh if self.replicas > 1 else self.device_mesh["data_parallel"]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Of samplers that Lightning would add; ours know their share."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """By parameter name in shards; in one file numbered as a plain optimizer numbers its parameters, group by group.

        Lightning's own numbering follows the order of the module's parameters, which is another one as soon as there are two groups:
        a run under DDP would then continue with the momenta of other parameters.
        """
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        options = StateDictOptions(full_state_dict=not self._save_distributed_checkpoint, cpu_offload=True)
        assert self.model is not None
        state = get_optimizer_state_dict(self.model, plain, options=options)
        return state if self._save_distributed_checkpoint or not state else numbered(state)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Writes shards into a folder of another name that is renamed once it is whole; a single file as other strategies do."""
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(filepath))
        part = path.with_name(path.name + PART)
        if self.is_global_zero:
            shutil.rmtree(part, ignore_errors=True)
        self.barrier()
        super().save_checkpoint(checkpoint, part, storage_options)
        own = checksums(part, [shard.name for shard in part.glob(f"__{self.global_rank}_*")])
        everyone: list[str] = [""] * self.world_size
        torch.distributed.all_gather_object(everyone, own)
        if self.is_global_zero:
            (part / SUMS).write_text(checksums(part, [META, METADATA]) + "".join(everyone))
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            os.replace(part, path)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a folder of shards, of any number, or a single file of any strategy."""
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            return self._load_shards(path)
        checkpoint = dict(self.checkpoint_io.load_checkpoint(path, weights_only=weights_only))
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, strict=True)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            set_optimizer_state_dict(
                self.model, optimizer, named(state, self.model.named_parameters(), optimizer), options=options
            )
        return checkpoint

    def _load_shards(self, folder: Path) -> dict[str, Any]:
        """Lightning's own reading, except that nothing is unpickled on the way (``checkpoints/sharded.py``).

        Raises:
            RunError: something in the folder is neither a tensor nor plain data, or it is damaged.
        """
        try:
            return self._read_shards(folder)
        except pickle.UnpicklingError as error:
            raise RunError(
                f"checkpoint {folder} cannot be opened as plain data: {str(error).splitlines()[0]}"
            ) from error

    def _read_shards(self, folder: Path) -> dict[str, Any]:
        assert self.model is not None
        model = {WEIGHTS: get_model_state_dict(self.model)}
        restore(model, folder)
        self.model.load_state_dict(model[WEIGHTS])
        for number, optimizer in enumerate(self.optimizers):
            state = {f"{OPTIMIZER}{number}": get_optimizer_state_dict(self.model, optimizer)}
            restore(state, folder)
            options = StateDictOptions(cpu_offload=True)
            set_optimizer_state_dict(self.model, optimizer, state[f"{OPTIMIZER}{number}"], options=options)
        return load_plain(folder / META)
