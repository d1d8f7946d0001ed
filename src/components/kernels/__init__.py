"""Operations with several implementations, and the registry that chooses between them.

Each operation is one file with a plain PyTorch twin to read and check against; faster backends stand beside it. This
is the only package that imports third-party kernels, and it does so when one is first used.
"""

from src.components.kernels.causal_conv import ConvState, causal_conv, causal_conv_state
from src.components.kernels.registry import AUTO, BackendUnavailableError, Operation, used_backends

__all__ = [
    "AUTO",
    "BackendUnavailableError",
    "ConvState",
    "Operation",
    "causal_conv",
    "causal_conv_state",
    "used_backends",
]
