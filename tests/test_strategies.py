"""The same run on one process and on several: losses, checkpoints that pass from one strategy to another."""

import math
from pathlib import Path

import pytest
import torch

from src.build import CONFIG_DIR, build_model
from src.checkpoints import load_model
from src.components.tensor_parallel import TensorGroup
from src.config import ConfigError
from src.modules.strategies import Fsdp2
from tests.runs import TINY, curve, launch, results, same, tiny_run

WIDE = [o for o in TINY if not o.startswith("trainer=")] + [
    "model.dim=16",
    "trainer.accelerator=cpu",
    "canon.positions=AbCD",
]
MIXERS = {
    "attention": ["model=llama", "canon.positions=ABCD"],
    "gla": ["model=gla"],
    "gdn": ["model=gdn"],
    "mamba2": ["model=mamba2"],
}
STRATEGIES = {
    "ddp": ["trainer=ddp"],
    "fsdp": ["trainer=fsdp"],
}


def several(processes: int) -> list[str]:
    return [f"trainer.devices={processes}"]


@pytest.mark.slow
def test_four_mixers_have_the_same_losses_on_one_and_two_processes(tmp_path):
    """20 steps at an equal global batch, in float32."""
    steps = ["trainer.max_steps=20", "trainer.val_check_interval=20"]
    jobs = [
        (tmp_path / f"{mixer}-{strategy}", [*WIDE, *how, *what, *several(2), *steps])
        for mixer, what in MIXERS.items()
        for strategy, how in STRATEGIES.items()
    ]
    launch(2, jobs, tmp_path)
    for mixer, what in MIXERS.items():
        tiny_run(tmp_path / mixer, "canon.positions=AbCD", *what, *steps)
        for strategy in STRATEGIES:
            for column in ("train/loss", "val/loss"):
                found = curve(tmp_path / f"{mixer}-{strategy}", column)
                assert len(found) == (20 if column == "train/loss" else 1)
                assert found == pytest.approx(curve(tmp_path / mixer, column), abs=1e-5), (mixer, strategy, column)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Eight steps straight on, and a checkpoint of the fourth from every strategy."""
    folder = tmp_path_factory.mktemp("strategies")
    straight = ["model=gdn", "trainer.max_steps=8", "trainer.val_check_interval=4"]
    straight += ["callbacks.checkpoint.every_n_train_steps=4", "callbacks.checkpoint.save_top_k=-1"]
    # Two groups of parameters: the order in which an optimizer numbers them is then not that of the module.
    straight += ["optimizer.no_decay=['*norm*','*canon*']", "optimizer.weight_decay=0.3"]
    tiny_run(folder / "one", "canon.positions=AbCD", *straight)
    kinds = {
        "ddp": ["trainer=ddp"],
        "fsdp": ["trainer=fsdp"],
        "sharded": ["trainer=fsdp", "trainer.strategy.sharded_checkpoints=true"],
    }
    launch(2, [(folder / name, [*WIDE, *how, *straight, *several(2)]) for name, how in kinds.items()], folder)
    return folder, straight


def step4(folder: Path, name: str) -> str:
    return f"ckpt_path={folder / name / 'checkpoints' / 'step00000004.ckpt'}"


def test_every_strategy_writes_the_same_model(checkpoints):
    folder, _ = checkpoints
    ids = torch.randint(21, (2, 9))
    expected = load_model(folder / "one" / "checkpoints" / "step00000004.ckpt")(ids)
    for name in ("ddp", "fsdp", "sharded"):
        net = load_model(folder / name / "checkpoints" / "step00000004.ckpt")
        torch.testing.assert_close(net(ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("processes", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
def test_a_run_goes_on_under_another_strategy_and_number_of_processes(checkpoints, processes, tmp_path):
    folder, straight = checkpoints
    fsdp = ["trainer=fsdp"]
    jobs = {
        "sharded to fsdp": (fsdp, "sharded"),
        "fsdp to fsdp": (fsdp, "fsdp"),
        "ddp to fsdp": (fsdp, "ddp"),
        "fsdp to ddp": (["trainer=ddp"], "fsdp"),
        "sharded to ddp": (["trainer=ddp"], "sharded"),
    }
    launch(
        processes,
        [
            (tmp_path / name, [*WIDE, *how, *straight, *several(processes), step4(folder, start)])
            for name, (how, start) in jobs.items()
        ],
        tmp_path,
    )
    if processes == 1:
        jobs["sharded to one"] = (["trainer=cpu"], "sharded")
        tiny_run(tmp_path / "sharded to one", "canon.positions=AbCD", *straight, step4(folder, "sharded"))
    for name in jobs:
        for column in ("train/loss", "train/grad_norm"):
            expected = curve(folder / "one", column)[4:]
            assert curve(tmp_path / name, column) == pytest.approx(expected, abs=1e-5), (name, column)
        assert curve(tmp_path / name, "val/loss")[-1] == pytest.approx(curve(folder / "one", "val/loss")[-1], abs=1e-5)


@pytest.mark.parametrize("some", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_layouts_change_no_loss(some, tmp_path):
    """Tensor parallelism, hybrid sharding and recomputation, on four processes."""
    steps = ["trainer.max_steps=5", "trainer.val_check_interval=5"]
    attention = ["canon.positions=ABCD", "canon.bias=true"]
    layouts = {
        "hybrid and tensor": ["trainer=fsdp_tp", "trainer.strategy.replicas=2"],
        "recomputed in part": ["trainer=fsdp_tp", "activation_checkpointing=selective"],
        "tensor": ["trainer=fsdp_tp"],
        "four tensors": ["trainer=fsdp_tp", "trainer.strategy.tensor_parallel=4"],
        "hybrid": ["trainer=fsdp", "trainer.strategy.replicas=2"],
        "recomputed": ["trainer=fsdp", "activation_checkpointing=block"],
    }
    layouts = dict(list(layouts.items())[:some])
    jobs = [(tmp_path / name, [*WIDE, *attention, *how, *several(4), *steps]) for name, how in layouts.items()]
    launch(4, jobs, tmp_path)
    metrics = tiny_run(tmp_path / "one", *attention, *steps)
    ids = torch.randint(21, (2, 9))
    for name in layouts:
        for column in ("train/loss", "train/grad_norm", "val/loss"):
            expected = curve(tmp_path / "one", column)
            assert curve(tmp_path / name, column) == pytest.approx(expected, abs=1e-5), (name, column)
        torch.testing.assert_close(
            load_model(tmp_path / name)(ids), load_model(tmp_path / "one")(ids), atol=1e-4, rtol=1e-4
        )
        found = results(tmp_path / name)
        assert found["metrics"] == pytest.approx(metrics, abs=1e-5)
        # Processes that read the same are counted once.
        assert found["intervals"] == results(tmp_path / "one")["intervals"]


EXPERTS = {"experts": ["canon.positions=AbC", "model=moe", "model.feedforward.num_experts=4"]}
EXPERTS["full experts"] = [*EXPERTS["experts"], "model.feedforward.capacity_factor=1.0"]


@pytest.mark.parametrize("what", ["block", "selective"])
@pytest.mark.parametrize("mixer", [*MIXERS, *EXPERTS])
def test_recomputation_changes_no_bit(what, mixer, tmp_path):
    options = [
        "trainer.max_steps=3",
        *(EXPERTS[mixer] if mixer in EXPERTS else ["canon.positions=AbCD", *MIXERS[mixer]]),
    ]
    tiny_run(tmp_path / "kept", *options)
    tiny_run(tmp_path / "again", *options, f"activation_checkpointing={what}")
    a, b = (torch.load(tmp_path / n / "checkpoints" / "final.ckpt", weights_only=True) for n in ("kept", "again"))
    assert same(a["state_dict"], b["state_dict"])
    assert same(a["optimizer_states"], b["optimizer_states"])


@pytest.mark.parametrize("what", ["block", "selective"])
def test_recomputation_keeps_less(what):
    """By what autograd holds on to between forward and backward pass."""

    def kept(net) -> int:
        held: dict[int, int] = {}

        def pack(tensor):
            held[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(torch.randint(50, (4, 64))).sum()
        return sum(held.values())

    options = ["model=llama", "size.depth=6", "canon.positions=ABCD", "model.vocab_size=50"]
    plain, frugal = build_model(options), build_model(options)
    frugal.recompute_blocks(what)
    assert kept(frugal) < (0.2 if what == "block" else 0.7) * kept(plain)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["model=gdn"], "GatedDeltaNet cannot be split"),
        (["model=llama", "model.mixers.T.qk_norm=true"], "qk_norm=true spans all heads"),
        (["model=llama", "position=alibi"], "treats heads differently"),
        (["model=llama", "model.feedforward.hidden_dim=81"], "feedforward.hidden_dim=81 cannot be split"),
    ],
)
def test_what_cannot_be_split_says_so(options, words):
    net = build_model(options, device="meta")
    with pytest.raises(ValueError, match=words):
        net.split_over(TensorGroup(None, 0, 2))  # type: ignore[arg-type]


def test_impossible_layouts_say_so(tmp_path):
    with pytest.raises(ConfigError, match="activation_checkpointing=blok.*did you mean 'block'"):
        tiny_run(tmp_path, "activation_checkpointing=blok")
    with pytest.raises(ConfigError, match="tensor_parallel=0: at least 1"):
        Fsdp2(tensor_parallel=0)
    for strategy in (Fsdp2(replicas=3), Fsdp2(tensor_parallel=3)):
        strategy.parallel_devices = [torch.device("cpu")] * 2
        with pytest.raises(ConfigError, match="=3 does not divide the 2 processes"):
            strategy.setup_environment()


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONFIG_DIR / "model").glob("*.yaml") if p.stem != "base"))
def test_deferred_initialisation_gives_the_same_weights(name):
    """From the meta device, as shards come into being, against building at once: bit for bit."""
    options = [f"model={name}", "canon.positions=AbBC", "model.vocab_size=50"]
    eager, deferred = build_model(options), build_model(options, device="meta")
    assert all(parameter.is_meta for parameter in deferred.parameters())
    if eager.tie_embeddings:
        return  # these are built at once, see modules/parallel.py
    deferred.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in deferred.parameters():
            parameter.fill_(math.nan)
    deferred.init_weights()
    assert same(dict(eager.state_dict()), dict(deferred.state_dict()))
