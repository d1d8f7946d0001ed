"""What only one of the recurrent operations does: gla's two ways to its scores, the delta rule's triangular inverse."""

import pytest
import torch

from src.components.kernels import gated_delta_rule as gdr_file
from src.components.kernels import gla as gla_file
from tests.components.kernels.test_recurrences import Random, close, gla_inputs


@pytest.mark.parametrize(
    ("decay", "fast"),
    [(-0.1, True), (-2.4, True), (-2.6, False), (-60.0, False), (-torch.inf, False), (torch.nan, False)],
)
def test_gla_takes_the_exact_way_only_where_it_must(decay, fast):
    """In a chunk of 32 tokens, 16 of which may decay by exp(-40)."""
    inputs = gla_inputs(Random(0).randn, 1, 32, lambda *shape: torch.full(shape, decay).double())
    chunks = gla_file._by_midpoint(inputs["q"], inputs["k"], inputs["log_decay"], None)
    assert (chunks is not None) == fast


def test_gla_looks_at_values_only_where_that_is_free():
    x = torch.zeros(3)
    assert gla_file._readable(x)
    assert not gla_file._readable(x.to("meta"))
    seen = []
    torch.func.vmap(lambda row: (seen.append(gla_file._readable(row)), row)[1])(x)
    assert seen == [False]


@pytest.mark.parametrize("decay", [-0.05, -1.0])
def test_the_two_ways_of_gla_agree(decay):
    random = Random(0)
    q, k, _, log_decay = gla_inputs(random.randn, 2, 64, lambda *shape: decay * random.randn(*shape).abs()).values()
    runs = torch.tensor([[0] * 64, [0] * 7 + [1] * 30 + [2] * 27])
    one, two = gla_file._by_midpoint(q, k, log_decay, runs), gla_file._by_halves(q, k, log_decay, runs)
    assert one is not None
    assert (one.scores.shape[-1], two.scores.shape[-1]) == (64, 32)
    for half in (0, 1):
        part = slice(32 * half, 32 * half + 32)
        close([one.scores[0, ..., part, part]], [two.scores[half]])


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 64])
def test_the_inverse_by_halves_is_the_inverse(length):
    """Up to rounding, for equal keys too (all entries 1, the worst that beta <= 1 and keys of length 1 can make)."""
    random = torch.randn(3, 2, length, length, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    eye = torch.eye(length, dtype=torch.float64)
    for A in (0.3 * random, torch.ones_like(random)):
        # Only what is below the diagonal counts.
        product = gdr_file._inverse(A) @ (eye + A.tril(-1))
        torch.testing.assert_close(product, eye.expand_as(product), atol=1e-9, rtol=0)


def test_the_inverse_by_halves_has_the_gradient_of_the_inverse():
    A = 0.3 * torch.randn(2, 21, 21, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: gdr_file._inverse(x.tril(-1)), A.requires_grad_())
