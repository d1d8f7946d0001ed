import copy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from src.build import CONFIG_DIR, build_model
from src.components.cache import Cache
from src.components.generation import Decoder, Sampling, _random, choose, generate, left_padded, stream

MODELS = sorted(p.stem for p in (Path(CONFIG_DIR) / "model").glob("*.yaml") if p.stem not in ("base", "llama"))
VARIANTS = [
    ["position=rope", "canon.positions=ABCD"],
    ["position=nope", "canon.positions=AbCD"],
    ["position=alibi"],
    ["position=hard_alibi", "canon.positions=AC"],
    ["model=sliding_window", "model.mixers.W.window=3", "canon.positions=ABCD"],
    ["model=sliding_window", "model.mixers.W.window=3", "model.pattern=WT", "position=alibi"],
]
FAMILIES = [[f"model={model}", f"canon.positions={'ABC' if model.endswith('moe') else 'AbCD'}"] for model in MODELS]
GREEDY, NUCLEUS = Sampling(stop=7, max_new_tokens=10), Sampling(0.9, top_k=6, top_p=0.9, stop=7, max_new_tokens=10)
CASES = [(v, s) for v in VARIANTS for s in (GREEDY, Sampling(1.0, stop=3, max_new_tokens=10), NUCLEUS)]
STREAMED = [case for case in CASES if case[1].temperature != 1] + [(family, GREEDY) for family in FAMILIES]


def case_id(part):
    return " ".join(part) if isinstance(part, list) else f"temperature {part.temperature}"


PROMPTS = [np.array(ids) for ids in ([3, 1, 4, 1, 5], [9], [2, 6, 5], [3, 5, 8, 9, 7, 9, 3, 2, 3], [8, 4])]
STREAMS = [(5, i) for i in range(len(PROMPTS))]


def model(overrides):
    return built(tuple(overrides))


@cache
def built(overrides):
    torch.manual_seed(0)
    net = build_model([*overrides, "model.vocab_size=12", "size.dim=32"]).eval()
    with torch.no_grad():  # large enough for the choice to depend on the whole prompt
        for name, parameter in net.named_parameters():
            if parameter.ndim > 1 and "conv" not in name:
                parameter.mul_(2.0)
    return net


@pytest.fixture(scope="module")
def rope():
    return model(VARIANTS[0])


def one_by_one(net, prompt, settings, key=None):
    """Decoding without batch, padding or cache."""
    ids, found = list(prompt), []
    draws = None if key is None else np.random.Generator(np.random.Philox(np.random.SeedSequence(list(key))))
    with torch.no_grad():
        for _ in range(settings.max_new_tokens):
            logits = net(torch.tensor([ids]))[:, -1]
            noise = None if draws is None else torch.tensor([draws.random()])
            ids.append(int(choose(logits, settings.temperature, noise, settings.top_k, settings.top_p)))
            found.append(float(logits[0].double().log_softmax(-1)[ids[-1]]))
            if ids[-1] == settings.stop:
                break
    return ids[len(prompt) :], found


@pytest.mark.parametrize(("overrides", "settings"), CASES, ids=case_id)
def test_a_padded_batch_writes_what_each_prompt_alone_gives(overrides, settings):
    net = model(overrides)
    keys = STREAMS if settings.temperature else [None] * len(PROMPTS)
    expected = [one_by_one(net, prompt, settings, key) for prompt, key in zip(PROMPTS, keys, strict=True)]
    texts, log_probs = generate(net, PROMPTS, settings, STREAMS if settings.temperature else None, log_probs=True)
    assert [text.tolist() for text in texts] == [text for text, _ in expected]
    for found, (_, wanted) in zip(log_probs, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert len({tuple(text) for text, _ in expected}) > 1


def test_what_is_sampled_does_not_depend_on_the_batch(rope):
    settings = Sampling(temperature=1.0, stop=3, max_new_tokens=20)
    together = generate(rope, PROMPTS, settings, STREAMS)
    assert len({len(text) for text in together}) > 2
    for i, prompt in enumerate(PROMPTS):
        assert np.array_equal(generate(rope, [prompt], settings, [STREAMS[i]])[0], together[i])
    other = generate(rope, PROMPTS, settings, [(6, i) for i in range(len(PROMPTS))])
    assert any(not np.array_equal(a, b) for a, b in zip(together, other, strict=True))


def test_random_numbers_are_what_they_always_were():
    """Published figures depend on the stream of a key and on how it is inverted."""
    logits = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    draws = [_random((3, 2, i)).random() for i in range(4)]
    assert np.round(draws, 6).tolist() == [0.864146, 0.982385, 0.267907, 0.486046]
    cumulative = (logits.double() / 0.7).softmax(-1).cumsum(-1)
    expected = [int((row <= draw * row[-1]).sum()) for row, draw in zip(cumulative, draws, strict=True)]
    assert choose(logits, 0.7, torch.tensor(draws)).tolist() == expected


def test_texts_end_with_stop_or_at_the_limit(rope):
    settings = Sampling(temperature=1.0, stop=3, max_new_tokens=15)
    texts = generate(rope, [[1]] * 200, settings, [(0, i) for i in range(200)])
    assert all(3 not in text[:-1] for text in texts)
    assert all(text[-1] == 3 or len(text) == 15 for text in texts)
    assert len({len(text) for text in texts}) > 3


def test_several_stops_and_sequences(rope):
    streams = [(0, i) for i in range(25)]
    free = generate(rope, [[1]] * 25, Sampling(temperature=1.5, max_new_tokens=20), streams)
    for stop in ([3, [4, 5]], [[2, 2, 1]], [[11, 11], 11]):
        ends = [(end,) if isinstance(end, int) else tuple(end) for end in stop]
        texts = generate(rope, [[1]] * 25, Sampling(temperature=1.5, stop=stop, max_new_tokens=20), streams)
        for text, whole in zip(texts, free, strict=True):
            at = [n for n in range(1, 21) if any(tuple(whole[max(n - len(end), 0) : n]) == end for end in ends)]
            assert text.tolist() == whole[: min(at, default=20)].tolist()
    # What a prompt ends with is no part of the text.
    first = int(generate(rope, [[1, 2]], max_new_tokens=1)[0][0])
    assert len(generate(rope, [[1, 2]], stop=[[2, first]], max_new_tokens=2)[0]) == 2


def test_the_last_token_costs_no_call(rope, monkeypatch):
    calls = []
    forward = type(rope).forward
    monkeypatch.setattr(
        type(rope), "forward", lambda self, ids, **rest: calls.append(ids) or forward(self, ids, **rest)
    )
    generate(rope, PROMPTS, max_new_tokens=4)
    assert [call.shape[1] for call in calls] == [9, 1, 1, 1]


def test_finished_rows_are_let_go(rope, monkeypatch):
    rows = []
    forward = type(rope).forward
    monkeypatch.setattr(
        type(rope), "forward", lambda self, ids, **rest: rows.append(len(ids)) or forward(self, ids, **rest)
    )
    texts = generate(rope, [[1]] * 40, Sampling(1.0, stop=3, max_new_tokens=15), [(0, i) for i in range(40)])
    assert rows == [sum(len(text) > step and 3 not in text[:step] for text in texts) for step in range(len(rows))]
    assert rows[-1] < rows[0]


# ---- choosing


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_follows_the_softmax(temperature):
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0, -30.0]])
    uniform = (torch.arange(100_000) + 0.5) / 100_000
    drawn = choose(logits.expand(100_000, -1), temperature, uniform)
    shares = torch.bincount(drawn, minlength=5) / 100_000
    assert torch.allclose(shares, (logits[0] / temperature).softmax(0), atol=2e-5)


def naive_nucleus(logits, temperature, top_k, top_p):
    """Probabilities of the tokens that remain, one at a time."""
    weights = np.exp(np.array(logits) / temperature)
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))[:top_k]
    kept, mass = [], 0.0
    for i in order:
        if mass >= top_p * sum(weights[order]):
            break
        kept.append(i)
        mass += weights[i]
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(weights))]


@pytest.mark.parametrize("top_k", [None, 1, 3, 6, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.6, 1e-9])
@pytest.mark.parametrize(
    "logits",
    [[0.3, -1.0, 2.0, 0.0, -3.0, 1.9], [0.0] * 6, [1.0, 2.0, 2.0, 2.0, 1.0, -np.inf], [-np.inf, 0, 0, 0, 0, -np.inf]],
    ids=str,
)
def test_top_k_and_top_p_one_token_at_a_time(top_k, top_p, logits):
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    drawn = choose(torch.tensor([logits]).expand(20_000, -1), 0.7, uniform, top_k, top_p)
    shares = torch.bincount(drawn, minlength=6) / 20_000
    np.testing.assert_allclose(shares, naive_nucleus(logits, 0.7, top_k, top_p), atol=1e-4)


def test_of_equally_probable_tokens_the_first_are_kept():
    uniform = torch.rand(2000, dtype=torch.float64)
    assert choose(torch.zeros(2000, 500), 1.0, uniform, top_k=7).unique().tolist() == list(range(7))
    assert choose(torch.zeros(2000, 500), 1.0, uniform, top_p=0.0199).unique().tolist() == list(range(10))


def test_limits_that_limit_nothing_change_no_bit():
    logits, uniform = torch.randn(1000, 30) * 3, torch.rand(1000, dtype=torch.float64)
    plain = choose(logits, 0.9, uniform)
    assert torch.equal(choose(logits, 0.9, uniform, 30, 1.0), plain)
    assert torch.equal(choose(logits, 0.9, uniform, 10_000), plain)
    assert torch.equal(choose(logits, 0.9, uniform, 1), logits.argmax(-1))


def test_the_ends_of_the_unit_interval():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 2)
    ends = torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64)
    assert choose(logits, 1.0, ends).tolist() == [1, 2]
    assert choose(logits, 1.0, ends, top_k=1).tolist() == [1, 1]
    many = torch.randn(500, 50)
    assert (choose(many, 1.0, torch.full((500,), 1.0, dtype=torch.float64)) < 50).all()  # what float32 may round to


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"stop": -1}, "stop=-1"),
        ({"stop": [[]]}, "stop="),
    ],
)
def test_settings_that_make_no_sense_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_settings_without_effect_warn():
    with pytest.warns(UserWarning, match="do nothing at temperature=0"):
        Sampling(top_k=3)


# ---- inputs


def test_padding_is_on_the_left():
    ids, segments = left_padded([np.array([1, 2, 3]), np.array([4])])
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert segments.tolist() == [[0, 0, 0], [-1, -1, 0]]


def test_prompts_may_be_lists_arrays_or_tensors(rope):
    expected = generate(rope, [np.array([1, 2, 3]), np.array([4, 5, 6])], max_new_tokens=5)
    as_tensor = torch.tensor([[1, 2, 3], [4, 5, 6]])
    for prompts in ([[1, 2, 3], (4, 5, 6)], as_tensor, as_tensor.numpy().astype(np.uint16), list(as_tensor.int())):
        assert np.array_equal(generate(rope, prompts, Sampling(max_new_tokens=5)), expected)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "at least one token"),
        ([[1, 2], [12]], "token 12; the model has 0 .. 11"),
        ([[1, -1]], "token -1"),
        ([[0.5]], "integers in one dimension; got float64"),
        ([[[1]]], "integers in one dimension"),
    ],
)
def test_prompts_that_make_no_sense_are_refused(rope, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(rope, prompts, max_new_tokens=3)


def test_nonsense_is_refused(rope):
    for streams in (None, STREAMS[:2]):
        with pytest.raises(ValueError, match="random numbers|one for each"):
            generate(rope, PROMPTS, Sampling(1.0, max_new_tokens=3), streams)
    with pytest.raises(TypeError, match="either settings or temperature"):
        generate(rope, PROMPTS, Sampling(), temperature=0.5)
    assert generate(rope, [], Sampling()) == []
    assert generate(rope, [], Sampling(), log_probs=True) == ([], [])


def test_the_model_is_left_as_it_was(rope):
    rope.train()
    rope.blocks[0].eval()
    before = [module.training for module in rope.modules()]
    generate(rope, PROMPTS, max_new_tokens=2)
    list(stream(rope, [1], max_new_tokens=2))
    assert [module.training for module in rope.modules()] == before
    assert torch.is_grad_enabled()
    rope.eval()


def test_in_bfloat16(rope):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        together = generate(rope, PROMPTS, max_new_tokens=3)
        assert list(stream(rope, PROMPTS[0], max_new_tokens=3)) == together[0].tolist()


def test_compiled_blocks_are_not_compiled_anew_for_every_length():
    from torch._dynamo.testing import CompileCounter

    net, counter = copy.deepcopy(model(VARIANTS[0])), CompileCounter()
    expected = generate(net, PROMPTS, max_new_tokens=5)
    net.compile_blocks(backend=counter)
    for a, b in zip(generate(net, PROMPTS, max_new_tokens=5), expected, strict=True):
        assert np.array_equal(a, b)
    list(stream(net, [1, 2], max_new_tokens=3))
    assert counter.frame_count == 0


# ---- going on


def prefilled(net, tokens):
    with torch.no_grad():
        return net(torch.tensor(tokens), state=net.initial_state())[1]


@pytest.mark.parametrize("overrides", VARIANTS + FAMILIES, ids=" ".join)
def test_a_cache_is_continued_by_prompts_of_unequal_length(overrides):
    net, settings = model(overrides), Sampling(1.0, stop=7, max_new_tokens=10)
    start = [5, 1, 7]
    past = prefilled(net, [start])
    whole = generate(net, [[*start, *prompt] for prompt in PROMPTS], settings, STREAMS)
    for _ in range(2):  # it is left as it was
        texts = generate(net, PROMPTS, settings, STREAMS, cache=past.select([0] * len(PROMPTS)))
        assert [text.tolist() for text in texts] == [text.tolist() for text in whole]
    with pytest.raises(ValueError, match=r"holds 1 rows but ids 5.*state.select"):
        generate(net, PROMPTS, settings, STREAMS, cache=past)


@pytest.mark.parametrize(("overrides", "settings"), STREAMED, ids=case_id)
def test_streaming_writes_what_one_call_writes(overrides, settings, tmp_path):
    net, key = model(overrides), [(1, 2)]
    sampled = settings.temperature > 0
    decoder = Decoder(net, settings, stream=key[0] if sampled else None)
    history: list[int] = []
    for turn, prompt in enumerate(PROMPTS[:3]):
        decoder.feed(prompt)
        text = []
        for token in decoder:
            text.append(token)
            if len(text) == 3:  # mid-way, through a file
                torch.save(decoder.cache.state_dict(), tmp_path / "cache.pt")
        history += prompt.tolist()
        if not sampled or turn == 0:
            expected = generate(net, [history], settings, key)[0].tolist()
            assert text == expected
        if not sampled and len(text) > 3:
            stored = Cache.from_state_dict(torch.load(tmp_path / "cache.pt", weights_only=True))
            assert stored.num_tokens == len(history) + 3
            other = Decoder(net, settings, cache=stored)
            other.feed([4])
            assert other.next() == generate(net, [[*history, *text[:3], 4]], max_new_tokens=1)[0][0]
        history += text
    assert decoder.cache.num_tokens == len(history)


def test_a_turn_ends_and_can_be_gone_beyond(rope):
    decoder = stream(rope, [1], stop=3, max_new_tokens=4)
    text = list(decoder)
    assert decoder.finished
    assert list(decoder) == []
    more = [decoder.next(), decoder.next()]
    assert [*text, *more] == generate(rope, [[1]], max_new_tokens=6)[0].tolist()
    decoder.feed([2])
    assert not decoder.finished


def test_the_random_numbers_of_a_decoder_go_on(rope):
    settings = Sampling(1.0, max_new_tokens=3)
    decoder = stream(rope, [1], settings, key=(4,))
    text = [*decoder, decoder.next(), decoder.next()]
    assert text == generate(rope, [[1]], Sampling(1.0, max_new_tokens=5), [(4,)])[0].tolist()


def test_a_decoder_reads_each_token_once(rope, monkeypatch):
    calls = []
    forward = type(rope).forward
    monkeypatch.setattr(
        type(rope), "forward", lambda self, ids, **rest: calls.append(ids[0].tolist()) or forward(self, ids, **rest)
    )
    decoder = stream(rope, [1, 2], max_new_tokens=3)
    text = list(decoder)
    decoder.feed([5, 6])
    assert calls == [[1, 2], text[:1], text[1:2], [text[2], 5, 6]]
    assert decoder.cache is decoder.cache
    assert len(calls) == 4


def test_decoders_that_cannot_work_say_so(rope):
    with pytest.raises(ValueError, match="random numbers|one for each"):
        Decoder(rope, Sampling(1.0))
    with pytest.raises(ValueError, match="feed at least one token"):
        Decoder(rope).next()
    with pytest.raises(ValueError, match="holds 2 rows"):
        Decoder(rope, cache=prefilled(rope, [[1], [2]]))
    with pytest.raises(ValueError, match="at least one token"):
        Decoder(rope).feed([])


def test_a_seed_is_all_that_sampling_needs(rope):
    """Prompt i has the random numbers of (seed, i)."""
    settings = Sampling(1.0, max_new_tokens=5)
    found = generate(rope, PROMPTS, settings, seed=3)
    assert [list(t) for t in found] == [
        list(t) for t in generate(rope, PROMPTS, settings, [(3, i) for i in range(len(PROMPTS))])
    ]
    assert [list(t) for t in found] != [list(t) for t in generate(rope, PROMPTS, settings, seed=4)]
    with pytest.raises(ValueError, match="give seed=0"):
        generate(rope, PROMPTS, settings, [(3, i) for i in range(len(PROMPTS))], seed=3)
