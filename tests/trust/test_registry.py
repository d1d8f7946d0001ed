"""What a configuration may name: classes of its own section, where the signature wants one, and nothing else."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src.build import compose_config
from src.checkpoints import CheckpointError, load_model, read_checkpoint
from src.checkpoints.io import write_checkpoint
from src.config import ConfigError, check, instantiate, to_plain
from src.config.registry import SECTIONS, class_of
from src.evaluate import evaluate
from src.sweep import sweep
from tests.runs import ROOT, compose_run, main, tiny_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    tiny_run(folder, "canon.positions=AC")
    return folder


def attacks(hit: Path) -> dict[str, dict]:
    """Nodes that did run when a checkpoint with them was opened, and relatives: each leaves a file behind."""
    command = f"touch {hit}"
    partial = {"_target_": "src.components.mixers.attention.Attention", "_partial_": True, "num_heads": 2}
    return {
        "git alias": {"_target_": "src.runs.git._git", "_args_": ["-c", f"alias.x=!{command}", "x"]},
        "a function": {"_target_": "src.support.files.write_text", "path": str(hit), "text": "x"},
        "a re-import": {"_target_": "src.support.files.Path", "_args_": [str(hit)]},
        "a private function": {"_target_": "src.checkpoints.io._remove_files", "path": str(hit)},
        "a loader": {"_target_": "lightning.fabric.utilities.cloud_io._load", "path_or_url": str(hit)},
        "the shell": {"_target_": "os.system", "command": command},
        "the shell, re-imported": {"_target_": "src.support.files.os.system", "command": command},
        "builtins": {"_target_": "builtins.exec", "_args_": [f"open({str(hit)!r}, 'w')"]},
        "a launcher": {"_target_": "src.sweeps.local.Local"},
        "a callback": {"_target_": "src.callbacks.guard.Guard", "folder": str(hit)},
        "another library's class": {"_target_": "subprocess.Popen", "args": command, "shell": True},
        "a class of another section": {"_target_": "src.datamodules.task.TaskDataModule"},
        "a method": {"_target_": "src.components.backbone.Backbone.load_state_dict", "state_dict": {}},
        "hydra's own": {"_target_": "hydra.utils.get_method", "path": "os.system"},
        "a list of arguments": {"_target_": "src.components.canon.CanonConfig", "_args_": ["A"]},
        "a reader of values": {"_target_": "src.components.canon.CanonConfig", "_recursive_": False},
        "a mixer for a number": partial,
    }


PLACES = [
    *(("vocab_size",), ("dim",), ("norm_eps",), ("canon", "positions"), ("mixers", "T", "num_heads"), ("extra",)),
    *(("mixers", "T"), ("feedforward", "hidden_dim"), ("canon",), ("initialization", "std"), ("mixers",)),
]


@pytest.mark.parametrize("name", attacks(Path()))
def test_nothing_in_a_checkpoint_is_run(trained, tmp_path, monkeypatch, name):
    """At any place of the model's configuration, and in its data and loss when it is scored again."""
    monkeypatch.chdir(tmp_path)
    hit = tmp_path / "hit"
    attack = attacks(hit)[name]
    whole = read_checkpoint(trained)
    path = tmp_path / "evil.ckpt"
    scored = compose_run(tmp_path, f"ckpt_path={path}", f"paths.output_dir={tmp_path}", config_name="evaluate")
    opened = []
    for place in [("model", *place) for place in PLACES] + [("data", "window"), ("data", "task"), ("loss", "z_loss")]:
        evil = copy.deepcopy({key: value for key, value in whole.items() if key != "state_dict"})
        node = evil["config"]
        for key in place[:-1]:
            node = node[key]
        if place == ("model", "mixers", "T") and name == "a mixer for a number":
            continue  # it belongs there
        node[place[-1]] = attack
        torch.save(evil | {"state_dict": whole["state_dict"]}, path)
        if place[0] == "model":
            with pytest.raises(CheckpointError, match=r"evil\.ckpt"):
                load_model(path)
        with pytest.raises(ConfigError, match=r"evil\.ckpt"):
            evaluate(scored)
        opened.append(place)
        assert not hit.exists(), place
    assert len(opened) >= len(PLACES) + 2


def test_strings_of_a_checkpoint_are_not_looked_into(trained, tmp_path, monkeypatch):
    """OmegaConf would resolve them: environment variables, and resolvers of this project that build things."""
    monkeypatch.setenv("SECRET", "model")
    whole = dict(read_checkpoint(trained))
    whole["config"] = copy.deepcopy(whole["config"])
    whole["config"]["model"]["canon"]["activation"] = "${oc.env:SECRET}"
    write_checkpoint(whole, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match=r"\$\{oc\.env:SECRET\}"):
        load_model(tmp_path / "evil.ckpt")


def test_an_experiment_runs_nothing_either(tmp_path, monkeypatch, capsys):
    """Not even in a sweep that is only planned."""
    hit = tmp_path / "hit"
    node = f"{{_target_: src.runs.git._git, _args_: [-c, 'alias.x=!touch {hit}', x]}}"
    with pytest.raises(ConfigError, match="loss.z_loss._target_"):
        tiny_run(tmp_path, f"loss.z_loss={node}")
    base = f'overrides=["loss.z_loss={node}"]'.replace("'", "\\'")
    with pytest.raises(SystemExit):
        main(sweep, "sweep", "sweep=results/R3", "dry_run=true", base, f"paths.log_dir={tmp_path}")
    assert not hit.exists()


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_knows_classes_and_its_own_only(section):
    """Of every public thing in every module that a family may name, only classes of the family's base are built."""
    found = SECTIONS[section]
    for target in (
        "src.support.files.write_text",
        "src.support.errors.ConfigError",
        "pathlib.Path",
        "src.runs.git.git_state",
    ):
        with pytest.raises(ConfigError, match="may not be built here"):
            class_of(target, section, found)
    for family in found.families:
        module = __import__(family.package, fromlist=["_"])
        for name, value in vars(module).items():
            try:
                built = class_of(f"{family.package}.{name}", section, found)
            except ConfigError:
                continue
            assert isinstance(built, type)
            assert built is value
            assert not name.startswith("_")


@pytest.mark.parametrize(
    ("section", "node", "said"),
    [
        ("model", 3, "a mapping with _target_"),
        ("model", {"_target_": 3}, "dotted path"),
        ("model", {"_target_": "src.components.mixers.gla.GLA"}, "where a Backbone belongs"),
        ("optimizer", {"_target_": "src.modules.optimizers.AdamW", "lr": 1e-3}, "_partial_: must be true"),
        ("loss", {"_target_": "src.modules.losses.NextTokenLoss", "z_loss": {"_target_": "os.system"}}, "os.system"),
        ("loss", {"_target_": "src.modules.losses.NextTokenLoss", "z_loss": [[[{"_target_": "os.system"}]]]}, "z_loss"),
        ("nothing", {"_target_": "src.modules.losses.NextTokenLoss"}, "nothing can be built here"),
        ("scheduler", {"_target_": "src.modules.schedules.Cosine", 5: 6, "total_steps": 3}, "no such key"),
        (
            "scheduler",
            {"_target_": "src.modules.schedules.Cosine", "total_steps": 3, "_convert_": "all"},
            "no such key",
        ),
    ],
)
def test_what_does_not_fit_is_said(section, node, said):
    with pytest.raises(ConfigError, match=said):
        instantiate(node, section)


def test_a_configuration_that_is_too_deep_is_refused():
    node: dict = {"_target_": "src.modules.losses.NextTokenLoss"}
    for _ in range(5000):
        node = {"_target_": "src.modules.losses.NextTokenLoss", "z_loss": node}
    with pytest.raises(ConfigError):
        check(node, "loss")


def test_what_a_user_may_add_on_the_command_line():
    """Public classes of Lightning's and PyTorch's, each in its section."""
    config = to_plain(compose_config(["+callbacks.lr={_target_: lightning.pytorch.callbacks.LearningRateMonitor}"]))
    check(config["callbacks"], "callbacks")
    sgd = instantiate({"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1}, "optimizer")
    assert isinstance(sgd([torch.nn.Parameter(torch.zeros(1))]), torch.optim.SGD)
    named = {"_target_": "lightning.pytorch.profilers.SimpleProfiler"}
    check({"_target_": "lightning.Trainer", "profiler": named}, "trainer")
    with pytest.raises(ConfigError, match="no object of that class"):
        check({"_target_": "lightning.Trainer", "max_steps": named}, "trainer")


def test_opening_a_checkpoint_imports_nothing_that_it_names(trained, tmp_path):
    whole = dict(read_checkpoint(trained))
    whole["config"] = copy.deepcopy(whole["config"])
    whole["config"]["model"]["norm_eps"] = {"_target_": "antigravity.geohash"}
    write_checkpoint(whole, tmp_path / "evil.ckpt")
    code = f"""
import sys
from src.checkpoints import load_model
try:
    load_model({str(tmp_path / "evil.ckpt")!r})
except ValueError as error:
    print("antigravity" in sys.modules, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith("False checkpoint")


def test_files_that_a_checkpoint_wants_removed_stay(tmp_path):
    """What a run resumed from a stranger's checkpoint removes in time lies in its own folder."""
    from src.callbacks.checkpoints import Checkpoints

    own = tmp_path / "run" / "checkpoints"
    own.mkdir(parents=True)
    (tmp_path / "run" / "link").symlink_to(tmp_path)
    callback = Checkpoints(dirpath=own, monitor="step", filename="step{step:08d}", save_top_k=2, mode="max")

    def removes(path: Path) -> bool:
        return callback._should_remove_checkpoint(None, str(path), str(own / "step00000002.ckpt"))  # type: ignore[arg-type]

    assert removes(own / "step00000001.ckpt")
    for path in (
        own / "..",
        own / ".",
        own,
        own / "..ckpt",
        own / "notes.txt",
        tmp_path / "mine.txt",
        own / ".." / ".." / "mine.txt",
        own / "sub" / "x",
        tmp_path / "run" / "link" / "mine.txt",
    ):
        assert not removes(path)
