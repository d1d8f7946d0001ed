"""docs/trust.md, from what the tests have measured: ``python -m tests.trust.page FILE...`` (``make trust``)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PAGE = "docs/trust.md"
MODELS, KERNELS = "tests/components/test_models.py::", "tests/components/kernels/"
RECURRENCES, CONVOLUTION = f"{KERNELS}test_recurrences.py::", f"{KERNELS}test_causal_conv.py::"
UPSTREAM, UPSTREAM_CONVOLUTION = "tests/upstream/test_recurrences.py::", "tests/upstream/test_convolution.py::"

# Column -> the tests that measure it.
MODEL_COLUMNS = {
    "packed = separate": [f"{MODELS}test_packed_equals_separate"],
    "padded = unpadded": [f"{MODELS}test_padding_changes_nothing"],
    "prefill + decode = forward": [
        f"{MODELS}test_one_token_decoding_equals_the_full_forward",
        f"{MODELS}test_prefill_in_pieces_equals_one_prefill",
    ],
    "generation in a batch = alone": [f"{MODELS}test_padded_batch_generation_equals_one_by_one"],
    "chunked = recurrent": [f"{MODELS}test_chunked_equals_recurrent"],
    "bf16": [f"{MODELS}test_bf16_is_close_to_float32"],
    "gradients": [f"{MODELS}test_gradients_are_those_of_the_function"],
    "resume": ["tests/trust/test_matrix.py::test_resuming_is_bit_for_bit"],
    "official logits": ["tests/checkpoints/test_official.py::test_logits_of_the_official_model"],
}
KERNEL_COLUMNS = {
    "documents, padding": [
        *(f"{RECURRENCES}test_documents_and_padding", f"{CONVOLUTION}test_segments_equal_separate_runs"),
        *(f"{UPSTREAM}test_documents_padding_and_a_state", f"{UPSTREAM_CONVOLUTION}test_documents_and_padding"),
    ],
    "pieces = one call": [
        *(
            f"{RECURRENCES}test_calls_that_hand_on_the_state_are_one_call",
            f"{CONVOLUTION}test_any_split_equals_one_call",
        ),
        *(f"{UPSTREAM}test_step_kernels", f"{UPSTREAM_CONVOLUTION}test_state"),
    ],
    "= the equation": [
        *(f"{RECURRENCES}test_every_length", f"{UPSTREAM}test_several_chunks_from_an_initial_state"),
        f"{UPSTREAM_CONVOLUTION}test_one_document",
    ],
    "gradients": [f"{RECURRENCES}test_gradients", f"{UPSTREAM}test_several_chunks_from_an_initial_state"],
    "16 bits": [
        *(f"{RECURRENCES}test_precision", f"{CONVOLUTION}test_half_precision_sums_in_float32"),
        *(f"{UPSTREAM}test_half_precision_with_odd_widths", f"{UPSTREAM_CONVOLUTION}test_strides_and_half_precision"),
    ],
}
# Tests of one backend each: row and column.
FIXED = {
    "tests/components/test_attention.py::test_reference_and_fused_attention_by_hand": (
        "attention: sdpa",
        "= the equation",
    ),
    "tests/components/test_attention.py::test_blocks_equal_the_reference": ("attention: blocks", "documents, padding"),
    "tests/components/test_attention.py::test_documents_continue_over_calls": ("attention: sdpa", "pieces = one call"),
    "tests/components/test_attention.py::test_padding_anywhere_changes_nothing": (
        "attention: sdpa",
        "documents, padding",
    ),
    "tests/components/test_canon.py::test_equals_depthwise_conv1d_plus_input": ("causal_conv: torch", "= the equation"),
    f"{CONVOLUTION}test_cpu_equals_its_twin": ("causal_conv: cpu", "gradients"),
}
# The released models, by the first word of a golden file's name, and what they are called here.
OFFICIAL = {"llama": "llama", "gla5": "gla5", "gdn2": "gdn2", "mamba2": "mamba2"}

HEAD = """# What has been measured

Made by `make trust` from the tests themselves; no number here is typed. A cell is the largest difference that the column's tests have
measured over all of their cases: Canon sets, lengths, documents, paddings. On the CPU; the upstream kernels run there in Triton's
interpreter. `make test` holds every one of them to its tolerance.

## Models: logits of order 1, float32 where nothing else is said

{models}

Chunked = recurrent and gradients are in float64 (outputs and all gradients of the fast kernels against the equations step by step; a
directional derivative against finite differences). bf16 is the relative error of the logits under autocast. Generation counts tokens that
differ, resuming the weights and optimizer moments. Official logits are those of the released code with random weights, which
maintainers have; – where there is no released model of that name, or its files were not at hand.

{model_tests}

## Operations and their backends

{kernels}

In float64 against the recurrence step by step where the backend can, in float32 (relative to the largest number) in the interpreter.
Not measured, because it needs a GPU: `flash_attn`, `causal_conv1d`, fla and mamba-ssm as compiled kernels (`pytest -m gpu`).

{kernel_tests}
"""


def page(measurements: list[dict[str, Any]]) -> str:
    """The page's text."""
    models: dict[str, dict[str, float]] = {}
    kernels: dict[str, dict[str, float]] = {}
    for found in measurements:
        for column, tests in MODEL_COLUMNS.items():
            row = found.get("model") or OFFICIAL.get(str(found.get("golden")).partition("_")[0])
            if found["test"] in tests and row and found.get("dtype", "float32") == "float32":
                _keep(models, row, column, found["difference"])
        if found["test"] in FIXED:
            _keep(kernels, *FIXED[found["test"]], found["difference"])
        for column, tests in KERNEL_COLUMNS.items():
            if found["test"] in tests and found.get("dtype") != "float32":
                row = found.get("backend") or ("causal_conv: fla" if "upstream" in found["test"] else None)
                if row:
                    _keep(kernels, row, column, found["difference"])
    return HEAD.format(
        models=_table("model", MODEL_COLUMNS, models),
        model_tests=_tests(MODEL_COLUMNS),
        kernels=_table("operation: backend", KERNEL_COLUMNS, kernels),
        kernel_tests=_tests({c: tests + [t for t in FIXED if FIXED[t][1] == c] for c, tests in KERNEL_COLUMNS.items()}),
    )


def _keep(rows: dict[str, dict[str, float]], row: str, column: str, difference: float) -> None:
    cells = rows.setdefault(row, {})
    cells[column] = max(cells.get(column, 0.0), difference)


def _table(head: str, columns: dict[str, list[str]], rows: dict[str, dict[str, float]]) -> str:
    lines = [f"| {head} | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for row, cells in sorted(rows.items()):
        shown = (("0" if cells[c] == 0 else f"{cells[c]:.1e}") if c in cells else "–" for c in columns)
        lines.append(f"| `{row}` | {' | '.join(shown)} |")
    return "\n".join(lines)


def _tests(columns: dict[str, list[str]]) -> str:
    return "\n".join(f"- {column}: {', '.join(f'`{test}`' for test in tests)}" for column, tests in columns.items())


if __name__ == "__main__":
    every = [found for path in sys.argv[1:] for found in json.loads(Path(path).read_text())]
    Path(PAGE).write_text(page(every))
    print(f"{PAGE}: {len(every)} measurements")
