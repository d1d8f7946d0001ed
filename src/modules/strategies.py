"""Lightning strategies with defaults that mean what their names say."""

from __future__ import annotations

from lightning.pytorch.strategies import ModelParallelStrategy


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism over all processes, of all nodes.

    Lightning's ``ModelParallelStrategy`` would by default shard over nodes only and split tensors over the devices of each.

    Args:
        save_distributed_checkpoint: shards in a folder instead of one file.
    """

    def __init__(self, save_distributed_checkpoint: bool = False):
        super().__init__(
            data_parallel_size="auto", tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint
        )

    def setup_environment(self) -> None:
        """Takes the number of processes, known only now, as the data-parallel size."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
