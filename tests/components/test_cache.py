from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from src.build import CONFIG_DIR, build_model
from src.components.cache import Cache, Growing
from src.components.kernels.causal_conv import ConvState
from src.components.kernels.recurrence import RecurrentState

MODELS = sorted(p.stem for p in (Path(CONFIG_DIR) / "model").glob("*.yaml") if p.stem != "base")


@pytest.fixture(scope="module", params=MODELS)
def net(request):
    canon = "ABC" if request.param.endswith("moe") else "ABCD"
    return build_model([f"model={request.param}", f"canon.positions={canon}", "model.vocab_size=20"]).eval()


def ids(batch, time, seed=0):
    return torch.randint(20, (batch, time), generator=torch.Generator().manual_seed(seed))


def filled(net, batch=2, time=7, padded=True):
    """A cache after a prefill, and a few tokens to continue with."""
    segments = torch.zeros(batch, time, dtype=torch.int64)
    segments[0, :2] = -1
    with torch.no_grad():
        _, cache = net(ids(batch, time), segments=segments if padded else None, state=net.initial_state())
    return cache


def after(net, cache, tokens):
    with torch.no_grad():
        return net(tokens, state=cache)[0]


# ---- growing histories


def numbers(*shape):
    return torch.arange(float(torch.tensor(shape).prod())).view(shape)


def test_histories_grow_and_leave_the_shorter_one_as_it_was():
    x = numbers(2, 40, 3)
    with torch.no_grad():
        histories = [Growing.of(x[:, :1].clone())]
        for t in range(1, 40):
            histories.append(histories[-1].append(x[:, t : t + 1]))
        for t, history in enumerate(histories):
            assert (len(history), history.total) == (t + 1, t + 1)
            assert torch.equal(history.tensor, x[:, : t + 1])


def test_a_history_has_as_many_continuations_as_one_likes():
    x = numbers(1, 10, 1)
    with torch.no_grad():
        start = Growing.of(x[:, :2].clone()).append(x[:, 2:3])  # has room for more
        assert start.nbytes > start.tensor.nbytes
        first = start.append(x[:, 3:4])
        second = start.append(x[:, 7:8])
        third = first.append(x[:, 4:5])
        again = start.append(x[:, 9:10])
    assert first.tensor.flatten().tolist() == [0, 1, 2, 3]
    assert second.tensor.flatten().tolist() == [0, 1, 2, 7]
    assert third.tensor.flatten().tolist() == [0, 1, 2, 3, 4]
    assert again.tensor.flatten().tolist() == [0, 1, 2, 9]
    assert start.tensor.flatten().tolist() == [0, 1, 2]
    assert first._buffer is start._buffer
    assert second._buffer is not start._buffer


def test_tokens_one_by_one_cost_few_copies():
    with torch.no_grad():
        history, buffers = Growing.of(torch.zeros(1, 1, 4)), []
        for _ in range(5000):
            history = history.append(torch.ones(1, 1, 4))
            if not buffers or history._buffer is not buffers[-1]:
                buffers.append(history._buffer)
    assert len(buffers) == 13  # 2, 4, ..., 8192
    assert sum(buffer.tensor.shape[1] for buffer in buffers) < 4 * 5000
    assert history.nbytes <= 2 * history.tensor.nbytes


def test_the_last_columns():
    x = numbers(1, 100, 2)
    with torch.no_grad():
        history = Growing.of(x.clone()).last(5)
        assert history.nbytes == 5 * 2 * 4  # the long one is let go
        sizes = set()
        for t in range(50):
            history = history.append(x[:, t : t + 1]).last(5)
            assert torch.equal(history.tensor[:, -min(t + 1, 5) :], x[:, max(t - 4, 0) : t + 1])
            assert (len(history), history.total) == (5, 101 + t)
            sizes.add(history.nbytes)
    assert max(sizes) <= 3 * 5 * 2 * 4
    assert len(history.last(9)) == 5


def test_gradients_flow_through_a_history():
    x, y = (torch.randn(1, 1, 3, requires_grad=True) for _ in range(2))
    with torch.no_grad():
        start = Growing.of(torch.randn(1, 4, 3)).append(torch.randn(1, 1, 3))  # has room for three more
    history = start.append(x)
    loss = history.tensor.square().sum()
    with torch.no_grad():
        history.append(y)  # must not write to what is still to be differentiated
        start.append(y)
    other = history.append(y)
    (loss + other.tensor.square().sum()).backward()
    torch.testing.assert_close(x.grad, 4 * x)
    torch.testing.assert_close(y.grad, 2 * y)
    assert not other.map(torch.Tensor.detach).tensor.requires_grad


def test_inference_mode_and_back():
    with torch.inference_mode():
        start = Growing.of(numbers(1, 4, 1)).append(numbers(1, 1, 1))
    with torch.no_grad():
        history = start.append(numbers(1, 1, 1))
    assert history.tensor.flatten().tolist() == [0, 1, 2, 3, 0, 0]


def test_a_history_keeps_its_precision():
    with torch.no_grad():
        history = Growing.of(torch.zeros(1, 1, 1, dtype=torch.bfloat16)).append(torch.ones(1, 1, 1))
    assert history.tensor.dtype == torch.bfloat16


# ---- the cache of every model


@pytest.mark.parametrize("padded", [False, True])
def test_rows_are_kept_reordered_and_repeated(net, padded):
    cache, more = filled(net, 3, padded=padded), ids(3, 2, seed=1)
    together = after(net, cache, more)
    for rows in ([2, 0], torch.tensor([1, 1, 1, 0]), torch.tensor([False, True, True])):
        chosen = cache.select(rows)
        kept = torch.as_tensor(rows)
        kept = kept.nonzero().flatten() if kept.dtype == torch.bool else kept
        assert chosen.batch_size == len(kept)
        torch.testing.assert_close(after(net, chosen, more[kept]), together[kept], atol=1e-5, rtol=1e-5)
        if padded:
            assert isinstance(chosen.num_tokens, torch.Tensor)
            assert chosen.num_tokens.tolist() == [[5, 7, 7][row] for row in kept]
        else:
            assert chosen.num_tokens == 7
    assert torch.equal(after(net, cache, more), together)


def test_two_continuations_of_one_past(net):
    cache = filled(net)
    with torch.no_grad():
        _, longer = net(ids(2, 1, seed=1), state=cache)  # what has room now has room for one
        expected = after(net, longer, ids(2, 3, seed=2))
        after(net, longer, ids(2, 3, seed=3))
        after(net, cache, ids(2, 3, seed=4))
        assert torch.equal(after(net, longer, ids(2, 3, seed=2)), expected)


def test_a_cache_is_stored_and_read_back(net, tmp_path):
    for cache in (net.initial_state(), filled(net), filled(net, padded=False)):
        torch.save(cache.state_dict(), tmp_path / "cache.pt")
        restored = Cache.from_state_dict(torch.load(tmp_path / "cache.pt", weights_only=True))
        assert repr(restored.num_tokens) == repr(cache.num_tokens)
        with torch.no_grad():
            (a, cache), (b, restored) = (net(ids(2, 3, seed=1), state=state) for state in (cache, restored))
            assert torch.equal(a, b)
            assert torch.equal(after(net, cache, ids(2, 1)), after(net, restored, ids(2, 1)))


def test_what_is_stored_has_no_spare_room(net, tmp_path):
    cache = filled(net, time=30)
    for _ in range(3):
        with torch.no_grad():
            _, cache = net(ids(2, 1), state=cache)
    torch.save(cache.state_dict(), tmp_path / "cache.pt")
    tensors = [x for x in cache.state_dict().values() if isinstance(x, torch.Tensor)]
    assert (tmp_path / "cache.pt").stat().st_size < sum(x.nbytes for x in tensors) + 1500 * (len(tensors) + 3)


def test_numbers_held_are_those_of_the_formula(net):
    for time in (3, 10):
        cache = filled(net, 2, time, padded=False)
        floats = [
            x.numel() for x in cache.state_dict().values() if isinstance(x, torch.Tensor) and x.is_floating_point()
        ]
        # A convolution's state begins full of zeros.
        assert sum(floats) == cache.numel() == 2 * net.state_size(time)
        assert cache.nbytes >= 4 * cache.numel()


def test_gradients_through_the_cache_and_cut_off(net):
    _, cache = net(ids(2, 4), state=net.initial_state())
    for state, reaches in ((cache, True), (cache.detach(), False)):
        logits, _ = net(ids(2, 1, seed=1), state=state)
        grad = torch.autograd.grad(logits.sum(), net.embedding.weight, retain_graph=True)[0]
        used = set(ids(2, 1, seed=1).flatten().tolist())
        before = [token for token in ids(2, 4).flatten().tolist() if token not in used]
        assert bool(grad[before].any()) == reaches


def test_a_cache_is_a_list_of_its_blocks(net):
    cache = filled(net)
    assert len(cache) == len(list(cache)) == net.depth
    assert cache[0] is next(iter(cache))
    assert cache  # an empty one counts as well
    assert net.initial_state()
    assert "num_tokens=tensor([5, 7])" in repr(cache)


def test_another_device(net):
    moved = filled(net).to("meta")
    tensors = [x for x in moved.state_dict().values() if isinstance(x, torch.Tensor)]
    assert {x.device.type for x in tensors} == {"meta"}


# ---- anything else


class Unknown(NamedTuple):
    tensor: torch.Tensor


def test_what_mixers_may_keep_in_it():
    conv = ConvState(torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64))
    memory = RecurrentState(torch.randn(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64))
    block = {"plain": torch.randn(2, 5), "mixer": {"A": conv, "memory": memory, "steps": 3, "empty": {}}}
    cache = Cache([block, {}], 4)
    stored = cache.state_dict()
    assert "0.mixer.A:ConvState.inputs" in stored
    restored = Cache.from_state_dict(stored)
    assert isinstance(restored[0]["mixer"]["A"], ConvState)
    assert isinstance(restored[0]["mixer"]["memory"], RecurrentState)
    assert torch.equal(restored[0]["mixer"]["memory"].memory, memory.memory)
    assert restored[0]["mixer"]["steps"] == 3
    assert restored[1] == {}
    assert cache.select([1])[0]["mixer"]["A"].inputs.shape == (1, 3, 4)
    for bad, message in ((Unknown(torch.zeros(1)), "0.x: cannot store Unknown"), ([1], "0.x: cannot store list")):
        with pytest.raises(TypeError, match=message):
            Cache([{"x": bad}]).state_dict()
    with pytest.raises(TypeError, match=r"cannot store the name 'a\.b'"):
        Cache([{"a.b": torch.zeros(1)}]).state_dict()
    for nonsense in ({}, {"num_blocks": 1, "num_tokens": 0, "0.x:Unknown.tensor": 1}, {"num_blocks": 1}):
        with pytest.raises(ValueError, match="not a stored cache"):
            Cache.from_state_dict(nonsense)


@pytest.mark.parametrize(
    "changes",
    [
        *({"num_blocks": value} for value in (10**9, -1, True, 1.5, "1", None, torch.tensor(1))),
        *(
            {"num_tokens": value}
            for value in (-1, None, "4", 1.5, torch.tensor([-1]), torch.zeros(2), torch.zeros(1, 1))
        ),
        *({name: 1} for name in ("-1.x", "x.y", "2.x", "0", "", "9" * 5000 + ".x", "0" + ".a" * 50_000)),
        {3: 1},
        {"0.x": torch.zeros(1), "0.x.y": torch.zeros(1)},
        {"0.x:Growing.tensor": 3, "0.x:Growing.total": 3},
        {"0.x:Growing.tensor": torch.zeros(1, 5), "0.x:Growing.total": -3},
        {"0.x:Growing": 3},
        {"0.x:ConvState.inputs": 1, "0.x:ConvState.segments": 2},
        {"0.x:Growing.tensor": torch.zeros(1, 1).expand(1, 2**30), "0.x:Growing.total": 2**30},
    ],
)
def test_a_stored_cache_that_a_stranger_made_is_refused_before_it_takes_memory(changes):
    with pytest.raises(ValueError, match="not a stored cache"):
        Cache.from_state_dict({"num_blocks": 1, "num_tokens": 0} | changes)


def test_what_shares_memory_counts_once():
    x = torch.zeros(1, 100)
    assert Cache([{"a": x[:, :50], "b": x[:, 50:]}]).nbytes == 400


def test_a_cache_of_another_model_or_batch_is_refused():
    net = build_model(["model=llama", "model.vocab_size=20"])
    cache = filled(net)
    with pytest.raises(ValueError, match="state has 1 blocks but the model 2"):
        net(ids(2, 1), state=Cache([cache[0]]))
    with pytest.raises(ValueError, match=r"holds 2 rows but ids 3.*state.select"):
        net(ids(3, 1), state=cache)
    with pytest.raises(IndexError):
        cache.select([2])
