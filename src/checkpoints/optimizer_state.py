"""An optimizer's state by parameter name, as shards hold it, and by number, as ``Optimizer.state_dict`` does.

The numbers run through the optimizer's groups, one after another: another order than the module's as soon as there are two groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def numbered(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state keyed by parameter name, keyed by number.

    Raises:
        ValueError: a name is none: anybody may have written it, and what is no text may take for ever to be looked up.
    """
    if not all(isinstance(name, str) for group in state["param_groups"] for name in group["params"]):
        raise ValueError("the 'params' of an optimizer are no names of parameters")
    number = {name: i for i, name in enumerate(chain.from_iterable(g["params"] for g in state["param_groups"]))}
    groups = [group | {"params": [number[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {number[name]: value for name, value in state["state"].items()}, "param_groups": groups}


def named(
    state: Mapping[str, Any], named_parameters: Iterable[tuple[str, Tensor]], optimizer: Optimizer
) -> dict[str, Any]:
    """The inverse of ``numbered``, for an optimizer of these parameters."""
    name_of = {id(parameter): name for name, parameter in named_parameters}
    names = [[name_of[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    flat = list(chain.from_iterable(names))
    groups = [group | {"params": own} for group, own in zip(state["param_groups"], names, strict=True)]
    return {"state": {flat[int(i)]: _copied(value) for i, value in state["state"].items()}, "param_groups": groups}


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    # What is read from a mapped file must not be what the optimizer then updates.
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
