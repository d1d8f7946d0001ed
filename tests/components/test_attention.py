import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen as torch_varlen

from src.components.cache import Growing
from src.components.canon import CanonConfig
from src.components.kernels import BackendUnavailableError, used_backends
from src.components.kernels.registry import forget_backends
from src.components.mixers.attention import Attention
from src.components.position import ALiBi, HardALiBi, NoPE, RoPE

kernels = importlib.import_module("src.components.kernels.attention")
attention = kernels.attention

POSITIONS = [NoPE(), RoPE(), RoPE(heads=0.5, dims=0.5), ALiBi(), HardALiBi()]
any_position = pytest.mark.parametrize(
    "position", POSITIONS, ids=lambda p: f"{type(p).__name__}{getattr(p, 'dims', '')}"
)


def qkv(time=7, keys=7, heads=4, kv_heads=2, width=8, dtype=torch.float32, batch=2):
    make = lambda t, h: torch.randn(batch, t, h, width, dtype=dtype)  # noqa: E731
    return make(time, heads), make(keys, kv_heads), make(keys, kv_heads)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# ---- kernels


def by_hand(q, k, v, window, bias, ids, places):
    """Token by token, head by head."""
    batch, time, heads, width = q.shape
    past, group, out = k.shape[1] - time, heads // k.shape[2], torch.zeros_like(q)
    for b in range(batch):
        for i in range(past, k.shape[1]):
            for h in range(heads):
                seen = [j for j in range(i + 1) if ids[b, i] == ids[b, j]]
                seen = [j for j in seen if window is None or places[b, i] - places[b, j] < window]
                scores = torch.stack([q[b, i - past, h] @ k[b, j, h // group] * width**-0.5 for j in seen])
                if bias is not None:
                    scores += torch.stack([bias((places[b, i] - places[b, j]).view(1, 1))[h, 0, 0] for j in seen])
                out[b, i - past, h] = scores.softmax(0) @ torch.stack([v[b, j, h // group] for j in seen])
    return out


@pytest.mark.parametrize(("time", "keys"), [(7, 7), (1, 7), (3, 7), (1, 1)])
@pytest.mark.parametrize("bias", [None, ALiBi(), HardALiBi()], ids=["none", "alibi", "hard"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("moved", [False, True])
def test_reference_and_fused_attention_by_hand(time, keys, bias, packed, window, moved):
    q, k, v = qkv(time, keys)
    columns = torch.arange(keys).expand(2, -1)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, -1, -1]])[:, -keys:]
    ids = ids if packed else torch.zeros_like(ids)
    places = torch.tensor([[0, 1, 1, 2, 3, 4, 4], [3, 4, 5, 6, 6, 7, 8]])[:, -keys:] if moved else columns
    function = None if bias is None else bias.bias(4)
    options = {
        "window": window,
        "bias": function,
        "segments": (ids[:, -time:], ids) if packed else None,
        "positions": (places[:, -time:], places) if moved else None,
    }
    expected = by_hand(q, k, v, window, function, ids, places)
    for backend in ("auto", "sdpa", "reference"):
        close(attention(q, k, v, **options, backend=backend), expected)


def test_grouped_queries_share_heads_in_order():
    q, k, v = qkv(heads=4, kv_heads=2)
    repeated = attention(q, k.repeat_interleave(2, dim=2), v.repeat_interleave(2, dim=2))
    close(attention(q, k, v), repeated)


@pytest.mark.parametrize("window", [1, 5, 32, 40])
@pytest.mark.parametrize(("time", "keys"), [(200, 200), (161, 161), (160, 200), (7, 200)])
@pytest.mark.parametrize("bias", [None, ALiBi(), HardALiBi()], ids=["none", "alibi", "hard"])
@pytest.mark.parametrize("rows", ["alike", "packed", "padded"])
def test_blocks_equal_the_reference(window, time, keys, bias, rows):
    q, k, v = (x.requires_grad_() for x in qkv(time, keys, dtype=torch.float64))
    ids, places = None, None
    if rows != "alike":
        column = torch.arange(keys).expand(2, -1)
        ids = torch.stack((column[0] // 70, torch.where(column[1] < 30, -1, column[1] // 90)))
    if rows == "padded":  # rows that count differently, as after padding
        places = torch.stack((column[0], (column[1] - 30).clamp(min=0)))
    options = {
        "window": window,
        "bias": None if bias is None else bias.bias(4),
        "segments": None if ids is None else (ids[:, -time:], ids),
        "positions": None if places is None else (places[:, -time:], places),
    }
    found = []
    blocks = kernels._attention.backends["blockwise"].run
    for run in (blocks, lambda *args, **kwargs: attention(*args, **kwargs, backend="reference")):
        y = run(q, k, v, **options)
        found.append([y, *torch.autograd.grad(y.square().sum(), (q, k, v))])
    for a, b in zip(*found, strict=True):
        assert a.isfinite().all()
        close(a, b, 1e-10)


def test_a_short_window_runs_in_blocks_and_what_is_short_does_not():
    forget_backends()
    attention(*qkv(200, 200), window=20)
    assert used_backends()["attention"] == ("blockwise",)
    forget_backends()
    attention(*qkv(100, 100), window=50)
    attention(*qkv(1, 500), window=20)
    attention(*qkv(500, 500))
    assert used_backends()["attention"] == ("sdpa",)


def test_blocks_need_memory_linear_in_time():
    """Counted in the elements of all tensors that operations return."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            self.elements += sum(x.numel() for x in found) if isinstance(found, tuple) else found.numel()
            return found

    counts = []
    for time in (512, 2048):
        x = qkv(time, time, heads=1, kv_heads=1)
        with Count() as count:
            attention(*x, window=32, segments=(torch.zeros(2, time, dtype=torch.int64),) * 2)
        counts.append(count.elements)
    assert counts[1] < 4.2 * counts[0]


@pytest.mark.parametrize("past", [0, 5, 30])
def test_one_token_needs_no_mask(monkeypatch, past):
    monkeypatch.setattr(kernels, "attention_mask", None)
    attention(*qkv(1, past + 1))
    attention(*qkv(1, past + 1), window=4)
    attention(*qkv(6, 6))


def flash(q, k, v, starts_q, starts_k, longest_q, longest_k, *, window_size=(-1, -1), enable_gqa=False):
    """What torch.nn.attention.varlen.varlen_attn computes, on the CPU."""
    assert torch.equal(starts_q, starts_k)
    assert starts_q.dtype == torch.int32
    assert starts_q[-1] == len(q)
    assert longest_q == longest_k == int(starts_q.diff().max())
    assert enable_gqa == (q.shape[1] != k.shape[1])
    assert window_size[1] == 0  # causal
    out = []
    for a, b in zip(starts_q[:-1].tolist(), starts_q[1:].tolist(), strict=True):
        window = None if window_size[0] < 0 else window_size[0] + 1
        out.append(attention(q[None, a:b], k[None, a:b], v[None, a:b], window=window, backend="reference")[0])
    return torch.cat(out)


def older_flash(q, k, v, starts_q, starts_k, longest_q, longest_k, is_causal=False):
    assert is_causal
    assert q.shape == k.shape
    return flash(q, k, v, starts_q, starts_k, longest_q, longest_k, window_size=(-1, 0))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("older", [False, True])
def test_documents_for_flash_attention(monkeypatch, window, older):
    monkeypatch.setattr(torch_varlen, "varlen_attn", older_flash if older else flash)
    options = {"window": None if older else window, "bias": None, "positions": None}
    q, k, v = qkv(7)
    for ids in (None, torch.tensor([[0, 0, 0, 1, 1, 1, 1], [-1, -1, 3, 3, 3, -1, -1]])):
        segments = None if ids is None else (ids, ids)
        y = kernels._attention.backends["varlen"].run(q, k, v, **options, segments=segments)
        expected = attention(q, k, v, window=options["window"], segments=segments, backend="reference")
        real = torch.ones(2, 7, dtype=torch.bool) if ids is None else ids >= 0
        close(y[real], expected[real])
        assert y.isfinite().all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"window": 3}, None),
        ({"window": 3, "older": True}, "knows no window"),
        ({"older": True}, None),
        ({"bias": ALiBi().bias(4)}, "adds nothing to the scores"),
        ({"positions": ()}, "whole sequences only"),
        ({"keys": 9}, "whole sequences only"),
        ({"dtype": torch.float32}, "not float16 or bfloat16"),
        ({"width": 12}, "head width 12"),
        ({"width": 264}, "head width 264"),
        ({"capability": (7, 5)}, "compute capability 8.0"),
        ({"device": "cpu"}, "q is on cpu"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_when_flash_attention_runs(monkeypatch, change, reason):
    case = {"window": None, "bias": None, "positions": None, "keys": 7, "dtype": torch.bfloat16, "width": 8} | change
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: case.get("capability", (9, 0)))
    monkeypatch.setattr(torch_varlen, "varlen_attn", older_flash if case.get("older") else flash)
    device = torch.device(case.get("device", "cuda"))
    q, k = (
        SimpleNamespace(device=device, dtype=case["dtype"], shape=(2, time, 4, case["width"]))
        for time in (7, case["keys"])
    )
    options = {name: case[name] for name in ("window", "bias", "positions")}
    found: Any = kernels._why_not_varlen(q, k, k, **options, segments=None)
    assert found is None if reason is None else reason in found


def test_documents_are_found_once_for_all_layers(monkeypatch):
    ids = torch.tensor([[0, 0, 1], [5, 5, 5]])
    starts, longest = kernels.document_starts(2, 3, ids, ids.device)
    assert (starts.tolist(), longest) == ([0, 2, 3, 6], 3)
    assert kernels.document_starts(2, 3, ids, ids.device)[0] is starts
    ids[1, 2] = 6
    assert kernels.document_starts(2, 3, ids, ids.device)[0].tolist() == [0, 2, 3, 5, 6]
    assert kernels.document_starts(2, 3, ids + 1, ids.device)[0] is not starts


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "varlen"}, BackendUnavailableError, "q is on cpu; use backend .sdpa."),
        ({"backend": "blockwise"}, BackendUnavailableError, "there is no window"),
        ({"backend": "blockwise", "window": 4}, BackendUnavailableError, "not much shorter than the 7 keys"),
        ({"backend": "flash"}, ValueError, "no backend 'flash'"),
        ({"window": 0}, ValueError, "window=0: at least 1"),
    ],
)
def test_what_cannot_run_says_why(options, error, message):
    with pytest.raises(error, match=message):
        attention(*qkv(), **options)
    with pytest.raises(ValueError, match="as many keys as queries"):
        attention(*qkv(7, 6))


# ---- position


@pytest.mark.parametrize("pairing", ["adjacent", "half_split"])
def test_rope_by_hand(pairing):
    """At position 1 the first pair of coordinates turns by 1 radian, the second by theta^(-1/2)."""
    rope = RoPE(theta=100.0, pairing=pairing)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 2, 1, 4)
    turned = rope.rotate(x, x, torch.arange(2))[0][0, :, 0]
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
        turned_q, _ = rope.rotate(q, q, torch.tensor([offset + 3]))
        _, turned_k = rope.rotate(k, k, torch.tensor([offset]))
        scores.append((turned_q * turned_k).sum(-1))
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=1e-5)
    changed = turned_q[0, 0] != q[0, 0]
    heads, dims = int(rope.heads * 4), int(rope.dims * 8)
    assert changed[:heads, :dims].all()
    assert changed.sum() == heads * dims


@any_position
def test_rows_may_have_positions_of_their_own(position):
    q, k, _ = qkv(3, 3)
    places = torch.tensor([[0, 1, 2], [7, 7, 9]])
    together = position.rotate(q, k, places)
    for row in range(2):
        for x, alone in zip(together, position.rotate(q[row : row + 1], k[row : row + 1], places[row]), strict=True):
            assert torch.equal(x[row : row + 1], alone)
    bias = position.bias(4)
    if bias is not None:
        distance = places[:, :, None] - places[:, None, :]
        assert torch.equal(bias(distance), torch.stack([bias(distance[0]), bias(distance[1])]))


def test_alibi_slopes():
    bias = ALiBi().bias(8)(torch.tensor([[2, 1, 0]]))
    assert bias[0, 0].tolist() == [-1.0, -0.5, 0.0]  # 2^-1 per step
    assert bias[7, 0, 0].item() == pytest.approx(-2 * 2.0**-8)


def test_hard_alibi_windows():
    seen = HardALiBi().bias(4)(torch.tensor([[3, 2, 1, 0]]))[:, 0] == 0
    assert seen.tolist() == [[False, False, False, True], [False, False, True, True], [True] * 4, [True] * 4]


# ---- mixer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide dim=32"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"num_heads": 4, "position": RoPE(dims=0.3)}, "position.dims=0.3 of head_dim=8"),
        ({"num_heads": 4, "position": RoPE(heads=0.4)}, "position.heads=0.4"),
        ({"num_heads": 1, "position": HardALiBi()}, "even number of heads"),
        ({"num_heads": 4, "window": 0}, "window=0"),
        (
            {"num_heads": 4, "backend": "fla"},
            "'fla' does not exist; attention has 'auto', 'varlen', 'blockwise', 'sdpa', 'reference'",
        ),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Attention(32, CanonConfig(), **options)


def mixer(position, window=None, canon="B", **options):
    torch.manual_seed(0)
    return Attention(
        32, CanonConfig(canon), num_heads=4, num_kv_heads=2, qk_norm=True, position=position, window=window, **options
    )


@any_position
@pytest.mark.parametrize("window", [None, 1, 3, 8, 50])
def test_decoding_continues_where_prefill_stopped(position, window):
    net = mixer(position, window)
    x = torch.randn(2, 19, 32)
    full, none = net(x)
    assert none is None
    for grad in (False, True):
        state, pieces = {}, []
        with torch.set_grad_enabled(grad):
            for piece in x.split([4, 3, 1, 1, 1, 1, 1, 7], dim=1):
                y, state = net(piece, state=state)
                pieces.append(y)
        close(torch.cat(pieces, dim=1), full)


@pytest.mark.parametrize("backend", ["sdpa", "reference", "auto"])
def test_a_window_is_the_mask_that_it_says(backend):
    """Changing a token changes what the next window - 1 tokens see, and no more."""
    net = mixer(RoPE(), window=6, canon="", backend=backend)
    x = torch.randn(1, 150, 32)
    changed = x.clone()
    changed[:, 40] += 1
    difference = (net(x)[0] - net(changed)[0]).abs().amax(dim=(0, 2))
    assert difference[40:46].min() > 1e-4
    assert difference[:40].max() == difference[46:].max() == 0


CHUNKS = [[[5, 0, 2], [1, 3, 0], [0, 2, 6]], [[1, 1, 1], [2, 0, 1], [4, 3, 2]], [[0, 0, 3], [9, 1, 1], [2, 2, 2]]]


@any_position
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("canon", ["", "B"])
@pytest.mark.parametrize("counts", CHUNKS, ids=str)
@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padding_anywhere_changes_nothing(position, window, canon, counts, side):
    """Three calls of three rows, each with its number of real tokens and padding to make up for it; then four plain steps."""
    net = mixer(position, window, canon)
    steps = 4
    x = [torch.randn(1, sum(call[row] for call in counts) + steps, 32) for row in range(3)]
    state, found, used = {}, [[] for _ in x], [0, 0, 0]
    with torch.no_grad():
        for call in counts:
            time = max(call) + 2
            part, ids = torch.full((3, time, 32), 7.0), torch.full((3, time), -1)
            for row, count in enumerate(call):
                place = {"left": range(time - count, time), "right": range(count), "inside": range(time)}[side]
                place = sorted(torch.randperm(time)[:count].tolist()) if side == "inside" else list(place)
                part[row, place], ids[row, place] = x[row][0, used[row] : used[row] + count], 0
                used[row] += count
            y, state = net(part, segments=ids, state=state)
            assert y.isfinite().all()
            for row in range(3):
                found[row].append(y[row, ids[row] == 0])
        for _ in range(steps):
            y, state = net(torch.cat([x[row][:, used[row] : used[row] + 1] for row in range(3)]), state=state)
            used = [count + 1 for count in used]
            for row in range(3):
                found[row].append(y[row])
        for row in range(3):
            close(torch.cat(found[row]), net(x[row])[0][0])
    if window is not None:
        assert len(state["keys"]) <= window


@pytest.mark.parametrize(
    "ids", [[[0] * 5 + [1] * 4, [0] * 2 + [1] * 7], [[0, 0, 1, 1, -1, -1, 2, 2, 2], [-1] * 3 + [4] * 6]]
)
@pytest.mark.parametrize("window", [None, 3])
def test_documents_continue_over_calls(ids, window):
    net, x, ids = mixer(RoPE(), window), torch.randn(2, 9, 32), torch.tensor(ids)
    full, _ = net(x, segments=ids)
    for sizes in ([9], [1] * 9, [4, 3, 2]):
        state, pieces = {}, []
        with torch.no_grad():
            for part, own in zip(x.split(sizes, 1), ids.split(sizes, 1), strict=True):
                y, state = net(part, segments=own, state=state)
                pieces.append(y)
        close(torch.cat(pieces, 1)[ids >= 0], full[ids >= 0])


@pytest.mark.parametrize(
    ("position", "window"), [(ALiBi(), None), (RoPE(), None), (RoPE(), 3), (HardALiBi(), 3)], ids=str
)
def test_document_numbers_may_come_late(position, window):
    net, x = mixer(position, window), torch.randn(2, 9, 32)
    ids = torch.tensor([[0] * 6 + [1] * 3, [0] * 9])
    full, _ = net(x, segments=ids)
    _, state = net(x[:, :4], state={})
    y, state = net(x[:, 4:], segments=ids[:, 4:], state=state)
    close(y, full[:, 4:])


@pytest.mark.parametrize("numbered", [False, True])
def test_calls_without_tokens_change_nothing(numbered):
    net, x, state, pieces = mixer(RoPE(), window=3), torch.randn(2, 6, 32), {}, []
    for piece in x.split([0, 4, 0, 2], dim=1):
        ids = torch.zeros(piece.shape[:2], dtype=torch.int64) if numbered else None
        y, state = net(piece, segments=ids, state=state)
        pieces.append(y)
    close(torch.cat(pieces, dim=1), net(x)[0])


def test_the_state_of_a_window_is_bounded():
    net = mixer(RoPE(), window=16, canon="")
    assert net.state_size(10) == 2 * 16 * 10
    assert net.state_size(10_000) == net.state_size(16) == 2 * 16 * 16
    with torch.no_grad():
        for chunk, segments in ((1, None), (50, None), (1, torch.zeros(1, 1)), (50, torch.zeros(1, 50))):
            segments = None if segments is None else segments.long()
            state, largest = {}, 0
            for _ in range(60):
                _, state = net(torch.randn(1, chunk, 32), segments=segments, state=state)
                assert len(state["keys"]) == min(state["keys"].total, 16)
                largest = max(largest, state["keys"].nbytes)
            assert isinstance(state["keys"], Growing)
            assert largest <= 3 * 16 * 16 * 4


def test_work_is_that_of_the_window():
    wide, narrow = mixer(RoPE()), mixer(RoPE(), window=10)
    assert wide.flops_per_token(10) == narrow.flops_per_token(10) == narrow.flops_per_token(1000)
    assert wide.flops_per_token(1000) - narrow.flops_per_token(1000) == 4 * 32 * 990


def test_the_state_keeps_keys_and_values_alone():
    """Not the whole projection that they are slices of."""
    net = mixer(NoPE(), canon="")
    with torch.no_grad():
        _, state = net(torch.randn(2, 50, 32), state={})
    assert state["keys"].nbytes == state["values"].nbytes == 2 * 50 * 16 * 4
    assert state["values"].tensor.untyped_storage().nbytes() == 2 * 50 * 16 * 4


def test_the_caller_may_write_to_what_it_gave():
    net, x, ids = mixer(RoPE()), torch.randn(1, 5, 32), torch.zeros(1, 4, dtype=torch.int64)
    _, state = net(x[:, :4], segments=ids, state={})
    expected, _ = net(x[:, 4:], state=state)
    ids.fill_(3)
    assert torch.equal(net(x[:, 4:], state=state)[0], expected)


def test_a_state_of_another_precision_goes_on():
    net, x = mixer(RoPE()), torch.randn(1, 9, 32)
    full, _ = net(x)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, state = net(x[:, :5], state={})
        y, _ = net(x[:, 5:], state=state)
    close(y, full[:, 5:], 5e-2)
