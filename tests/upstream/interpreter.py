"""Makes Triton's interpreter run the kernels of fla and mamba-ssm on CPU tensors.

TRITON_INTERPRET=1 alone is not enough for them (Triton 3.6 to 3.8). Call `prepare` before anything imports triton, fla or mamba_ssm; the
environment variable must already be set, for Triton reads it while it is imported. Only float32 and float16 are computed rightly:
bfloat16 is garbage, without an error. Small shapes: a kernel takes seconds for a few hundred tokens.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
from types import SimpleNamespace
from typing import Any

import torch


def prepare() -> None:
    """Changes triton and torch.cuda for the rest of the process."""
    os.environ.setdefault("FLA_CACHE_RESULTS", "0")
    autotuner = importlib.import_module("triton.runtime.autotuner")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    _take_the_first_configuration(autotuner.Autotuner)
    interpreter.FunctionRewriter.ast_transformer = _loops_over_tensors(interpreter.ASTTransformer)()
    _let_one_number_arrays_be_indices(interpreter)
    _pretend_one_device()


def _take_the_first_configuration(tuner: Any) -> None:
    """Without a device nothing can be timed; with one configuration nothing has to be."""
    create = tuner.__init__

    def with_one_configuration(self: Any, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        del self.configs[1:]

    tuner.__init__ = with_one_configuration


def _loops_over_tensors(transformer: type[ast.NodeTransformer]) -> type[ast.NodeTransformer]:
    """Compiled Triton makes a loop variable a tensor, the interpreter an int, on which kernels then call `.to`.

    So each loop over a `range` begins with `variable = variable`: the interpreter turns what is assigned into a tensor.
    """

    class Transformer(transformer):
        def visit_For(self, node: ast.For) -> ast.AST:
            called = node.iter.func if isinstance(node.iter, ast.Call) else None
            if isinstance(called, ast.Name) and called.id == "range" and isinstance(node.target, ast.Name):
                name = node.target.id
                target, value = ast.Name(id=name, ctx=ast.Store()), ast.Name(id=name, ctx=ast.Load())
                node.body.insert(0, ast.Assign(targets=[target], value=value))
            return self.generic_visit(node)

    return Transformer


def _let_one_number_arrays_be_indices(interpreter: Any) -> None:
    """Before Triton 3.8 the interpreter calls int() on arrays of one number and one dimension, which numpy 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)

        def index(self: Any) -> int:
            return int(self.handle.data.item())

        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patched


def _pretend_one_device() -> None:
    """mamba-ssm selects a CUDA device around each launch and asks how many processors it has."""

    def properties(_device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(multi_processor_count=2)

    def device(_device: Any = None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    torch.cuda.device = device  # type: ignore[assignment]
    torch.cuda.get_device_properties = properties  # type: ignore[assignment]
