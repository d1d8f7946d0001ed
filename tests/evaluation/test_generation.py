import numpy as np
import pytest
import torch

from src.build import build_model
from src.datamodules.tasks.base import Generation
from src.evaluation.generation import choose, generate, left_padded

VARIANTS = [
    ["position=rope", "canon.positions=ABCD"],
    ["position=nope", "canon.positions=AbCD"],
    ["position=alibi"],
    ["position=hard_alibi", "canon.positions=AC"],
]
PROMPTS = [np.array(ids) for ids in ([3, 1, 4, 1, 5], [9], [2, 6, 5], [3, 5, 8, 9, 7, 9, 3, 2, 3], [8, 4])]


def model(overrides):
    torch.manual_seed(0)
    net = build_model([*overrides, "model.vocab_size=12", "model.dim=32"]).eval()
    with torch.no_grad():  # large enough for the choice to depend on the whole prompt
        for parameter in net.parameters():
            parameter.mul_(2.0)
    return net


def one_by_one(net, prompt, settings):
    """Greedy decoding without batch, padding or cache."""
    ids = list(prompt)
    for _ in range(settings.max_new_tokens):
        ids.append(int(net(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == settings.stop:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("overrides", VARIANTS, ids=" ".join)
@pytest.mark.parametrize("stop", [0, 7, 11])
def test_batched_greedy_decoding_equals_decoding_one_by_one(overrides, stop):
    net, settings = model(overrides), Generation(stop, 12)
    with torch.no_grad():
        expected = [one_by_one(net, prompt, settings) for prompt in PROMPTS]
    assert [text.tolist() for text in generate(net, PROMPTS, settings)] == expected
    assert len({tuple(text) for text in expected}) > 1


def test_what_is_sampled_does_not_depend_on_the_batch():
    net, settings = model(VARIANTS[0]), Generation(0, 20, temperature=1.0)
    keys = [(5, i) for i in range(len(PROMPTS))]
    together = generate(net, PROMPTS, settings, keys)
    for i, prompt in enumerate(PROMPTS):
        assert np.array_equal(generate(net, [prompt], settings, [keys[i]])[0], together[i])
    other = generate(net, PROMPTS, settings, [(6, i) for i in range(len(PROMPTS))])
    assert any(not np.array_equal(a, b) for a, b in zip(together, other, strict=True))


def test_texts_end_with_stop_or_at_the_limit():
    net = model(VARIANTS[0])
    texts = generate(net, [np.array([1])] * 200, Generation(3, 15, 1.0), [(0, i) for i in range(200)])
    assert all(3 not in text[:-1] for text in texts)
    assert all(text[-1] == 3 or len(text) == 15 for text in texts)
    assert len({len(text) for text in texts}) > 3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_follows_the_softmax(temperature):
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0, -30.0]])
    uniform = (torch.arange(100_000) + 0.5) / 100_000
    drawn = choose(logits.expand(100_000, -1), temperature, uniform)
    shares = torch.bincount(drawn, minlength=5) / 100_000
    assert torch.allclose(shares, (logits[0] / temperature).softmax(0), atol=2e-5)


def test_the_ends_of_the_unit_interval():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 2)
    assert choose(logits, 1.0, torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64)).tolist() == [1, 2]


def test_padding_is_on_the_left():
    ids, segments = left_padded([np.array([1, 2, 3]), np.array([4])])
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert segments.tolist() == [[0, 0, 0], [-1, -1, 0]]


def test_nonsense_is_refused():
    net = model(VARIANTS[0])
    with pytest.raises(ValueError, match="at least one token"):
        generate(net, [np.array([], dtype=np.int64)], Generation(0, 3))
    with pytest.raises(ValueError, match="random stream"):
        generate(net, PROMPTS, Generation(0, 3, 1.0))
    assert generate(net, [], Generation(0, 3)) == []
