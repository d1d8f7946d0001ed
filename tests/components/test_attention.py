import pytest
import torch

from src.components.canon import CanonConfig
from src.components.kernels.attention import attention, attention_reference
from src.components.mixers.attention import Attention
from src.components.position import ALiBi, HardALiBi, NoPE, RoPE


def qkv(time=7, keys=7, heads=4, kv_heads=2, width=8, dtype=torch.float32):
    make = lambda t, h: torch.randn(2, t, h, width, dtype=dtype)  # noqa: E731
    return make(time, heads), make(keys, kv_heads), make(keys, kv_heads)


@pytest.mark.parametrize(("time", "keys"), [(7, 7), (1, 7), (3, 7), (1, 1)])
@pytest.mark.parametrize("bias", [None, ALiBi(), HardALiBi()], ids=["none", "alibi", "hard"])
@pytest.mark.parametrize("packed", [False, True])
def test_fused_attention_equals_the_equation(time, keys, bias, packed):
    q, k, v = qkv(time, keys)
    key_segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1][-keys:]]).expand(2, -1)
    options = {
        "bias": None if bias is None else bias.bias(4, time, keys, q.device),
        "segments": (key_segments[:, -time:], key_segments) if packed else None,
    }
    torch.testing.assert_close(
        attention(q, k, v, **options), attention_reference(q, k, v, **options), atol=1e-5, rtol=1e-5
    )


def test_grouped_queries_share_heads_in_order():
    q, k, v = qkv(heads=4, kv_heads=2)
    repeated = attention(q, k.repeat_interleave(2, dim=2), v.repeat_interleave(2, dim=2))
    torch.testing.assert_close(attention(q, k, v), repeated)


@pytest.mark.parametrize("pairing", ["adjacent", "half_split"])
def test_rope_by_hand(pairing):
    """At position 1 the first pair of coordinates turns by 1 radian, the second by theta^(-1/2)."""
    rope = RoPE(theta=100.0, pairing=pairing)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 2, 1, 4)
    turned = rope.rotate(x, x, offset=0)[0][0, :, 0]
    assert turned[0].tolist() == [1.0, 2.0, 3.0, 4.0]
    pairs = {"adjacent": [(0, 1), (2, 3)], "half_split": [(0, 2), (1, 3)]}[pairing]
    for (i, j), angle in zip(pairs, torch.tensor([1.0, 0.1]), strict=True):
        a, b = x[0, 1, 0, i], x[0, 1, 0, j]
        torch.testing.assert_close(turned[1, i], a * angle.cos() - b * angle.sin())
        torch.testing.assert_close(turned[1, j], a * angle.sin() + b * angle.cos())


@pytest.mark.parametrize("rope", [RoPE(), RoPE(heads=0.5, dims=0.5), RoPE(heads=0.25), RoPE(dims=0.25)], ids=str)
def test_scores_depend_on_distance_only_and_the_rest_is_untouched(rope):
    q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)
    scores = []
    for offset in (0, 5):
        turned_q, _ = rope.rotate(q, q, offset + 3)
        _, turned_k = rope.rotate(k, k, offset)
        scores.append((turned_q * turned_k).sum(-1))
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=1e-5)
    changed = turned_q[0, 0] != q[0, 0]
    heads, dims = int(rope.heads * 4), int(rope.dims * 8)
    assert changed[:heads, :dims].all()
    assert changed.sum() == heads * dims


def test_alibi_slopes():
    bias = ALiBi().bias(8, 3, 3, torch.device("cpu"))
    assert bias[0, 2].tolist() == [-1.0, -0.5, 0.0]  # 2^-1 per step
    assert bias[7, 2, 0].item() == pytest.approx(-2 * 2.0**-8)


def test_hard_alibi_windows():
    bias = HardALiBi().bias(4, 4, 4, torch.device("cpu"))
    seen = bias[:, 3] == 0
    assert seen.tolist() == [[False, False, False, True], [False, False, True, True], [True] * 4, [True] * 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide dim=32"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"num_heads": 4, "position": RoPE(dims=0.3)}, "position.dims=0.3 of head_dim=8"),
        ({"num_heads": 4, "position": RoPE(heads=0.4)}, "position.heads=0.4"),
        ({"num_heads": 1, "position": HardALiBi()}, "even number of heads"),
    ],
)
def test_impossible_heads_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Attention(32, CanonConfig(), **options)


@pytest.mark.parametrize(
    "position", [NoPE(), RoPE(heads=0.5, dims=0.5), ALiBi(), HardALiBi()], ids=lambda p: type(p).__name__
)
def test_decoding_continues_where_prefill_stopped(position):
    mixer = Attention(32, CanonConfig("B"), num_heads=4, num_kv_heads=2, qk_norm=True, position=position)
    x = torch.randn(2, 9, 32)
    full, none = mixer(x)
    assert none is None
    state, pieces = {}, []
    for piece in (x[:, :4], x[:, 4:7], x[:, 7:8], x[:, 8:]):
        y, state = mixer(piece, state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=1e-5, rtol=1e-5)
