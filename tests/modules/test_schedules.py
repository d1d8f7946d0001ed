import math

import pytest
from torch.optim.optimizer import register_optimizer_step_pre_hook

from src.modules.schedules import WSD, Constant, Cosine, Linear
from tests.runs import tiny_run

TOTAL, WARMUP = 100, 10


def test_first_update_has_rate_zero_and_warm_up_is_linear():
    for schedule in (Cosine(TOTAL, WARMUP, 0.1), Linear(TOTAL, WARMUP), Constant(TOTAL, WARMUP), WSD(TOTAL, WARMUP)):
        assert [schedule(s) for s in (0, 1, 5)] == [0.0, 0.1, 0.5]
        assert schedule(WARMUP) == 1.0


def test_cosine_is_the_official_formula():
    schedule, r = Cosine(TOTAL, WARMUP, 0.01), 0.01
    for s in (10, 37, 55, 99):
        assert schedule(s) == pytest.approx(r + 0.5 * (1 - r) * (1 + math.cos(math.pi * (s - 10) / 90)))
    assert schedule(100) == schedule(10_000) == pytest.approx(r)


def test_linear_ends_at_its_ratio():
    assert [Linear(TOTAL, 0, 0.0)(s) for s in (0, 50, 100, 120)] == [1.0, 0.5, 0.0, 0.0]


def test_constant_stays():
    assert Constant(TOTAL, 0)(99) == 1.0


def test_wsd_decays_harmonically_in_the_last_tenth():
    schedule = WSD(TOTAL, WARMUP, min_ratio=0.1)
    assert schedule(89) == schedule(90) == 1.0
    assert schedule(95) == pytest.approx(1 / (0.5 / 0.1 + 0.5))
    assert schedule(100) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Cosine(0), "total_steps=0"),
        (lambda: Cosine(10, -1), "warmup_steps=-1"),
        (lambda: Cosine(10, 0, 1.5), "min_ratio=1.5"),
        (lambda: WSD(10, 0, 0.0), "harmonic decay"),
        (lambda: WSD(10, 0, 0.1, 0.0), "decay_share=0.0"),
    ],
)
def test_impossible_schedules_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_learning_rate_itself_follows_the_schedule(tmp_path):
    """A schedule handed to Lightning under a wrong key is ignored without an error; so look at the rate of each update."""
    rates: list[float] = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        tiny_run(tmp_path, "trainer.max_steps=8", "scheduler.warmup_steps=4", "optimizer.lr=0.5", "test=false")
    finally:
        hook.remove()
    assert rates == pytest.approx([0.5 * Cosine(8, 4, 0.1)(s) for s in range(8)])
