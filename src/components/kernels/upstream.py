"""Fused kernels by others: which packages are here, how to get them, and whether they can run a call.

fla-core (https://github.com/fla-org/flash-linear-attention), mamba-ssm (https://github.com/state-spaces/mamba) and
causal-conv1d (https://github.com/Dao-AILab/causal-conv1d) are optional. Nothing of them is imported until a kernel is
called for the first time: `why_not` looks only where a package lies. docs/kernels.md says what installs and runs where.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo


class Package(NamedTuple):
    """How to find a package, and how to get it."""

    modules: tuple[str, ...]  # all must be there
    distribution: str
    oldest: tuple[int, ...]
    install: str


FLA = "fla"
MAMBA = "mamba_ssm"
CAUSAL_CONV1D = "causal_conv1d"

_PACKAGES = {
    FLA: Package(("fla", "triton"), "fla-core", (0, 5, 2), "pip install -e '.[gpu]'"),
    MAMBA: Package(
        ("mamba_ssm", "triton", "einops"),
        "mamba-ssm",
        (2, 3),
        "MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE "
        "pip install --no-deps --no-build-isolation mamba-ssm==2.3.2.post1",
    ),
    CAUSAL_CONV1D: Package(
        ("causal_conv1d", "causal_conv1d_cuda"),
        "causal-conv1d",
        (1, 5),
        "pip install --no-build-isolation causal-conv1d (it compiles CUDA code)",
    ),
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile calls the function once, while tracing, and takes the answer for a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as torch.compiler.assume_constant_result does
    return function


# Under torch.compile the function runs as it is, between two graphs: tracing Triton kernels that choose their own launch
# parameters fails or slows down. The public torch.compiler.disable would import all of torch._dynamo right here.
opaque = _disable_dynamo


@_constant
def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors (environment variable TRITON_INTERPRET)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@_constant
def missing(package: str) -> str | None:
    """None if a package ("fla", "mamba_ssm", "causal_conv1d") is here and new enough, else what to do about it."""
    return _missing(package)


@functools.cache
def _missing(package: str) -> str | None:
    wanted = _PACKAGES[package]
    for module in wanted.modules:
        if module not in sys.modules and importlib.util.find_spec(module) is None:
            return f"{module} is not installed; {wanted.install}"
    found = installed_version(wanted.distribution)
    if found and found < wanted.oldest:
        versions = [".".join(map(str, version)) for version in (found, wanted.oldest)]
        return f"{wanted.distribution} {versions[0]} is too old, {versions[1]} is needed; {wanted.install}"
    return None


def installed_version(distribution: str) -> tuple[int, ...]:
    """Leading numbers of a distribution's version; empty if it has no metadata (a folder on PYTHONPATH)."""
    try:
        return _numbers(importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return ()


def _numbers(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split("+", maxsplit=1)[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


@functools.cache
def load(module: str, name: str) -> Callable[..., Any]:
    """A function of an upstream package, imported at the first call (seconds)."""
    if module.startswith(MAMBA):
        _stand_in_for_mamba()
    return getattr(importlib.import_module(module), name)


def _stand_in_for_mamba() -> None:
    """Makes `mamba_ssm.ops.triton` importable without the package's own __init__.

    That one imports Mamba-1's compiled CUDA extension and transformers, of which the Triton kernels need neither.
    """
    if MAMBA in sys.modules:
        return
    spec = importlib.util.find_spec(MAMBA)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(str(missing(MAMBA)), name=MAMBA)
    package = types.ModuleType(MAMBA)
    package.__path__, package.__spec__ = list(spec.submodule_search_locations), spec
    sys.modules[MAMBA] = package


def why_not(package: str, *tensors: Tensor | None) -> str | None:
    """Why kernels of a package cannot take these tensors, and what to change; None if they can.

    They want plain float32, bfloat16 or float16 tensors on a CUDA device, or on the CPU if Triton's interpreter is on.
    Integer tensors and None pass.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    interpreter = interpreted() and package != CAUSAL_CONV1D
    if not interpreter and not given[0].is_cuda:
        return f"the tensors are on {given[0].device.type} and its kernels need a CUDA device"
    reason = missing(package)
    if reason is not None:
        return reason
    for tensor in given:
        if tensor.is_floating_point() and tensor.dtype not in _DTYPES:
            return f"it computes in float32 or 16 bits and a tensor is {tensor.dtype}; cast it"
        if interpreter and tensor.dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly, without an error; use float32"
        # Fake, distributed and otherwise wrapped tensors have no memory of their own that a kernel could read.
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"it takes plain tensors only, not {type(tensor).__name__}"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "torch.func transforms cannot see through it"
    return None


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will want a backward pass through a function of these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def hopper_advice(*tensors: Tensor | None) -> str | None:
    """None unless fla's gated chunk backward is refused here (issue 640 of fla): Hopper with Triton 3.4.0 to 3.7.0.

    These versions miscompile `chunk_bwd_dqkwg`, and fla raises in the backward pass of chunk_gated_delta_rule and
    chunk_simple_gla rather than return wrong gradients. Their forward pass is right.
    """
    if not needs_gradient(*tensors):
        return None
    device = next(tensor.device for tensor in tensors if tensor is not None)
    if device.type != "cuda" or not _miscompiles(device.index):
        return None
    version = ".".join(map(str, _triton_version()))
    return f"its backward pass is refused on Hopper GPUs with Triton {version} (fla issue 640); pip install 'triton>=3.7.1'"


@_constant
def _miscompiles(index: int | None) -> bool:
    return _capability(index)[0] == 9 and (3, 4) <= _triton_version() < (3, 7, 1)


def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _triton_version() -> tuple[int, ...]:
    # Of the module rather than of its metadata: another Triton may stand first on PYTHONPATH.
    return _numbers(importlib.import_module("triton").__version__)
