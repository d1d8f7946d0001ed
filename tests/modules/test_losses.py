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


@pytest.mark.parametrize("options", [{"z_loss": -1.0}, {"z_loss_kind": "square"}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        NextTokenLoss(**options)
