"""The causal convolution as code: which backend runs, threads, processes that fork, compilation."""

import multiprocessing
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from src.components.kernels import BackendUnavailableError, Operation, causal_conv_cpu, used_backends
from tests.components.kernels.test_causal_conv import conv, rand

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------- threads and processes


def big_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight = rand(3, 700, 520, dtype=torch.float32, grad=True), rand(520, 4, dtype=torch.float32, grad=True)
    assert x.numel() > causal_conv_cpu._SERIAL_BELOW
    ids = (torch.arange(700) // 97).expand(3, -1)
    return x, weight, ids, rand(3, 700, 520, seed=1, dtype=torch.float32)


def outputs(x: Tensor, weight: Tensor, ids: Tensor, grad: Tensor) -> list[np.ndarray]:
    y = conv(x, weight, segments=ids, backend="cpu")
    return [t.detach().numpy() for t in (y, *torch.autograd.grad(y, (x, weight), grad))]


def test_same_bits_on_any_number_of_threads(threads, monkeypatch):
    shared = []
    share = causal_conv_cpu._share
    monkeypatch.setattr(causal_conv_cpu, "_share", lambda *args: (shared.append(args[2]), share(*args)))
    case = big_case()
    threads(1)
    alone = outputs(*case)
    for count in (2, 3, 5):
        threads(count)
        for one, many in zip(alone, outputs(*case), strict=True):
            assert np.array_equal(one, many)
    assert shared == [1, 1, 2, 2, 3, 3, 5, 5]


def test_calls_from_several_threads_at_once(threads):
    threads(2)
    case = big_case()
    expected = outputs(*case)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: outputs(*case), range(8)):
            assert all(map(np.array_equal, result, expected))


def test_an_error_in_a_helper_reaches_the_caller():
    main = threading.current_thread()

    def work(begin: int, end: int) -> None:
        if threading.current_thread() is main:
            time.sleep(0.05)
        else:
            raise ArithmeticError("in a helper")

    with pytest.raises(ArithmeticError, match="in a helper"):
        causal_conv_cpu._share(work, 50, 3)


@pytest.mark.parametrize("threads", [1, 2, 3, 70])
@pytest.mark.parametrize("tasks", [1, 2, 50])
def test_each_tile_is_done_once(threads, tasks):
    done = []
    causal_conv_cpu._share(lambda begin, end: done.extend(range(begin, end)), tasks, threads)
    assert sorted(done) == list(range(tasks))


def _in_child(queue, *case: Tensor) -> None:
    sums = [array.sum() for array in outputs(*case)]
    queue.put((sums, any(thread.name.startswith("causal_conv") for thread in threading.enumerate())))


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this platform cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_has_threads_of_its_own(threads):
    threads(2)
    case = big_case()
    case[0].detach().mul(1.0)  # PyTorch's own threads exist before the fork as well
    expected = [array.sum() for array in outputs(*case)]
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(queue, *case), daemon=True)
    child.start()
    child.join(30)
    stuck = child.is_alive()
    if stuck:
        child.kill()
    assert not stuck
    assert child.exitcode == 0
    assert queue.get() == (expected, True)


def test_importing_the_package_does_not_import_numba():
    program = "import sys, src.components.kernels; print([m for m in ('numba', 'fla', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_compiles_without_a_writable_cache(monkeypatch):
    njit = numba.njit

    def read_only(*args, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*args, **options)

    monkeypatch.setattr(numba, "njit", read_only)
    double = causal_conv_cpu._compiled(lambda x: 2 * x)
    assert double(21) == 42


# -------------------------------------------------------------------------------------------------------- registry


def test_unknown_backend_lists_what_exists():
    with pytest.raises(
        ValueError, match=r"no backend 'cuda'; choose one of 'auto', 'fla', 'causal_conv1d', 'cpu', 'torch'"
    ):
        conv(rand(1, 2, 3), rand(3, 4), backend="cuda")


@pytest.mark.parametrize(
    ("x", "weight", "reason"),
    [
        (torch.zeros(1, 2, 3, dtype=torch.bfloat16), torch.zeros(3, 4, dtype=torch.bfloat16), "bfloat16"),
        (torch.zeros(1, 2, 3), torch.zeros(3, 4, dtype=torch.float64), "parameter"),
        (torch.zeros(1, 2, 3, device="meta"), torch.zeros(3, 4, device="meta"), "meta"),
    ],
)
def test_unavailable_backend_says_why_and_auto_goes_on(x, weight, reason):
    with pytest.raises(BackendUnavailableError, match=f"backend 'cpu' cannot run this call: .*{reason}.*use backend"):
        conv(x, weight, backend="cpu")
    assert conv(x, weight).shape == (1, 2, 3)


def test_auto_takes_the_first_that_can_and_is_recorded():
    operation = Operation("test_scan")

    @operation.backend("fast", why_not=lambda x, **_: "x is odd; add one" if x % 2 else None)
    def fast(x, *, offset):
        return "fast", x + offset

    @operation.backend("general", why_not=lambda x, **_: "x is negative; negate it" if x < 0 else None)
    def general(x, *, offset):
        return "general", x + offset

    assert operation("auto", 3, offset=1) == ("general", 4)
    assert operation("auto", 2, offset=1) == ("fast", 3)
    assert operation("general", 2, offset=1) == ("general", 3)
    assert used_backends()["test_scan"] == ("general", "fast")
    with pytest.raises(BackendUnavailableError, match=r"fast: x is odd; add one.*general: x is negative; negate it"):
        operation("auto", -3, offset=1)
    with pytest.raises(BackendUnavailableError, match="backend 'fast' cannot run this call: x is odd; add one"):
        operation("fast", 3, offset=1)
    for taken in ("fast", "auto"):
        with pytest.raises(ValueError, match="taken; registered: 'fast', 'general'"):
            operation.backend(taken)


def test_default_on_the_cpu():
    x, weight = rand(1, 3, 2), rand(2, 4)
    assert torch.equal(conv(x, weight), conv(x, weight, backend="cpu"))
    assert "cpu" in used_backends()["causal_conv"]
