import pytest
import torch
import torch.nn.functional as F

from src.modules.losses import NextTokenLoss

LOGITS, TARGETS = torch.randn(6, 9) * 3, torch.randint(9, (6,))
NLL = F.cross_entropy(LOGITS, TARGETS, reduction="none")


def test_plain():
    loss, nll = NextTokenLoss()(LOGITS, TARGETS)
    assert torch.equal(loss, NLL)
    assert torch.equal(nll, NLL)


def test_z_loss_penalises_the_normaliser():
    loss, nll = NextTokenLoss(z_loss=0.1)(LOGITS, TARGETS)
    torch.testing.assert_close(loss, NLL + 0.1 * LOGITS.exp().sum(-1).log() ** 2)
    assert torch.equal(nll, NLL)


def test_the_release_s_z_loss_squares_the_nll():
    loss, _ = NextTokenLoss(z_loss=1e-4, z_loss_kind="nll_squared")(LOGITS, TARGETS)
    torch.testing.assert_close(loss, NLL + 1e-4 * NLL**2)


def test_bf16_logits_are_scored_in_float32():
    loss, _ = NextTokenLoss()(LOGITS.bfloat16(), TARGETS)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(LOGITS.bfloat16().float(), TARGETS, reduction="none"))


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"z_loss": 0.1, "z_loss_kind": "nll_squared"}])
@pytest.mark.parametrize("fused", ["auto", True, "torch", "full"])
def test_of_features_is_the_sum(options, fused):
    loss = NextTokenLoss(fused=fused, **options)
    h, weight = torch.randn(6, 4), torch.randn(9, 4)
    expected, _ = loss(h @ weight.T, TARGETS)
    found, right = loss.of_features(h, weight, TARGETS)
    torch.testing.assert_close(found, expected.sum())
    assert right == ((h @ weight.T).argmax(dim=-1) == TARGETS).sum()


@pytest.mark.parametrize(
    ("fused", "cpu", "gpu"),
    [
        ("auto", [False, False, True], [False, True, True]),
        (True, [True] * 3, [True] * 3),
        ("torch", [True] * 3, [True] * 3),
        (False, [False] * 3, [False] * 3),
    ],
)
def test_when_the_loss_is_fused(fused, cpu, gpu):
    """2^24 logits of a small vocabulary; a few logits of a large one; one logit more than 2^24."""
    loss, sizes = NextTokenLoss(fused=fused), [(2**16, 2**8), (1, 2**14), (2**24 + 1, 1)]
    assert [loss.is_fused(n, v, torch.device("cpu")) for n, v in sizes] == cpu
    assert [loss.is_fused(n, v, torch.device("cuda")) for n, v in sizes] == gpu


@pytest.mark.parametrize("options", [{"z_loss": -1.0}, {"z_loss_kind": "square"}, {"fused": "fast"}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        NextTokenLoss(**options)
