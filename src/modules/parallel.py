"""How a model is laid out over processes: split, recomputed, compiled, sharded; in this order, which is the only one that works.

Splitting and recomputation change what a block's forward does; compilation takes that as it is; sharding then wraps the compiled block.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.fsdp import fully_shard

from src.components.backbone import Backbone
from src.components.tensor_parallel import TensorGroup
from src.config import ConfigError
from src.modules.strategies import Fsdp2


def lay_out(net: Backbone, strategy: Any, *, recompute: str = "none", compile: bool = False) -> None:
    """Prepares a model for a strategy, in place.

    A model on the meta device gets its weights here, each process its own shard: the same as without a strategy.

    Args:
        net: on the meta device or with its weights.
        strategy: Lightning's, once its processes know each other.
        recompute: ``none``, ``block`` or ``selective``, see ``Backbone.recompute_blocks``.
        compile: each block, by ``torch.compile``.

    Raises:
        ConfigError: this model cannot be laid out so.
    """
    sharded = isinstance(strategy, Fsdp2)
    try:
        if sharded and strategy.tensor_parallel > 1:
            size = strategy.tensor_parallel
            net.split_over(TensorGroup(strategy.tensor_group, strategy.global_rank % size, size))
        if recompute != "none":
            net.recompute_blocks(recompute)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if compile:
        net.compile_blocks()
    if sharded:
        mesh = strategy.sharding_mesh
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
        if any(parameter.is_meta for parameter in net.parameters()):
            net.to_empty(device=strategy.root_device)
            net.init_weights()
    elif any(parameter.is_meta for parameter in net.parameters()):
        raise ConfigError("the model is on the meta device: only trainer=fsdp and its kin give it weights")


def may_be_deferred(model_config: dict[str, Any], strategy: Any) -> bool:
    """Whether a model may be built without memory first: its weights come into being in shards.

    Tied embeddings may not: two names for one tensor become two tensors on the way from the meta device.
    """
    return isinstance(strategy, Fsdp2) and not model_config.get("tie_embeddings", False)
