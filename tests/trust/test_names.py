"""What names a run, a job and a checkpoint outlives refactoring: declared names, and what differs from the defaults."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import pytest
import torch

from src.checkpoints import load_model, read_checkpoint
from src.config import ConfigError, experiment_hash, to_plain
from src.config.identity import defaults_of, described
from src.config.names import declared_in, former_paths, name_of
from src.config.records import hash_of as hash_of_run
from src.config.registry import SECTIONS, class_of, imported, section_of
from src.runs.runs import Run
from src.runs.schema import IDENTITY
from src.sweeps.former import INDEX, recognised
from src.sweeps.jobs import is_finished
from src.sweeps.plan import Job, Sweep
from src.training.run import run
from tests.runs import ROOT, compose_run, results

FIXTURES = ROOT / "tests" / "fixtures" / "identity"
FORMER = "5ffd29e2f130"  # the name of a job of version 0.1.0
KNOWN = json.loads((FIXTURES / "hashes.json").read_text())
TASK = [
    *("data=depo_small", "data.window=64", "data.batch_size=4", "data.eval_batch_size=4", "data.val_windows=6"),
    *("data.test_windows=6", "size=tiny", "size.dim=16", "trainer=cpu", "trainer.max_steps=4"),
    *("trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "scheduler.warmup_steps=1"),
    "callbacks.checkpoint.every_n_train_steps=2",
]
VARIANT = ["model=gla", "size.gla.num_heads=2", "size.attention.hidden_dim=16", "canon.positions=AbCD", "position=nope"]


def hash_of(folder: Path, *words: str) -> str:
    return experiment_hash(to_plain(compose_run(folder, *words, "paths.output_dir=here")))


# ---- one form --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", KNOWN, ids=[" ".join(k["words"]) or "default" for k in KNOWN])
def test_hashes_stay_as_they_are(tmp_path, known):
    """Of what version 0.1.0 wrote down, and of what the same words mean today. Never edit one: old jobs would be lost."""
    assert experiment_hash(known["config"]) == known["hash"]
    assert hash_of(tmp_path, *known["words"]) == known["hash"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["canon.positions=DCbA"], ["canon.positions=AbCD"]),
        (["canon.kernel_size=8", "canon.init=normal"], ["canon.positions=''"]),
        (["canon.positions=b", "canon.kernel_size=8", "model=gla"], ["canon.positions=b", "model=gla"]),
        (["model=gdn", "position=rope"], ["model=gdn", "position=nope"]),
        (["optimizer.weight_decay=1"], ["optimizer.weight_decay=1.0"]),
        (["trainer.gradient_clip_val=1"], ["trainer.gradient_clip_val=1.0"]),
        (["model=hybrid", "model.pattern=G"], ["model=hybrid", "model.pattern=G", "model.mixers.T.window=8"]),
        (["optimizer._target_=adamw"], ["optimizer._target_=src.modules.optimizers.AdamW"]),
        (["optimizer.betas=[0.9,0.98]"], []),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else None,
)
def test_the_same_computation_has_one_name(tmp_path, one, other):
    assert hash_of(tmp_path, *one) == hash_of(tmp_path, *other)


@pytest.mark.parametrize(
    "words",
    [
        ["canon.positions=A"],
        ["seed=7"],
        ["optimizer.lr=2e-3"],
        ["test=false"],
        ["model.norm_eps=1e-6"],
        ["data.isolate=true"],
        ["optimizer._target_=torch.optim.AdamW"],
        ["model=gdn"],
        ["position=nope"],
    ],
    ids=" ".join,
)
def test_another_computation_has_another_name(tmp_path, words):
    assert hash_of(tmp_path, *words) != hash_of(tmp_path)


def test_true_is_not_one():
    section: dict[str, Any] = {"_target_": "next_token_loss", "z_loss": False}
    assert described({"loss": section, "trainer": {}}) != described({"loss": section | {"z_loss": 0.0}, "trainer": {}})


# ---- declared names --------------------------------------------------------------------------------------------------


def own_classes() -> dict[str, type[Any]]:
    """Every public class of this project that some section may name, by its dotted path."""
    found = {}
    families = {family for section in SECTIONS.values() for family in section.families if family.package[:4] == "src."}
    for family in families:
        package = import_module(family.package)
        inside = walk_packages(getattr(package, "__path__", []), family.package + ".")
        for module in [package, *(import_module(m.name) for m in inside)]:
            for name, made in vars(module).items():
                public = inspect.isclass(made) and not name.startswith("_") and not inspect.isabstract(made)
                if public and made.__module__ == module.__name__ and issubclass(made, imported(family.base)):
                    found[f"{made.__module__}.{name}"] = made
    return found


def test_every_class_has_declared_a_name():
    """Checkpoints would hold its path otherwise, and break when it moves."""
    bases = {
        "src.components.mixers.linear.LinearMixer",
        "src.modules.schedules.Schedule",
    }  # which nobody asks for by themselves
    unnamed = [path for path, made in own_classes().items() if "config_name" not in vars(made) and path not in bases]
    assert not unnamed, f"declare config_name in {unnamed}"
    found = declared_in("src")
    assert {
        found[name_of(made)] for path, made in own_classes().items() if path not in bases
    } == own_classes().keys() - bases


def test_former_paths_mean_what_they_meant():
    """A class that is put where another one stood must not take its checkpoints over."""
    found = declared_in("src")
    for path, name in former_paths().items():
        assert name in found, f"{name!r} is in checkpoints of earlier versions, and no class declares it any more"
        module, _, called = path.rpartition(".")
        try:
            there = getattr(import_module(module), called, None)
        except ImportError:
            continue
        assert there is None or name_of(there) == name


def test_a_name_and_a_path_mean_the_same_class():
    for target in ("gla", "src.components.mixers.gla.GLA"):
        assert class_of(target, "model.mixers.G", section_of("model")) is class_of("gla", "model", section_of("model"))
    with pytest.raises(ConfigError, match=r"model\._target_='glaa' does not exist; did you mean 'gla'"):
        class_of("glaa", "model", section_of("model"))
    with pytest.raises(ConfigError, match="does not exist"):  # of another section
        class_of("adamw", "model", section_of("model"))


def test_two_classes_of_one_name_are_refused(tmp_path, monkeypatch):
    (tmp_path / "twice.py").write_text('class A:\n    config_name = "a"\n\n\nclass B:\n    config_name = "a"\n')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"twice.B and twice.A both declare config_name = 'a'"):
        declared_in("twice")


def test_defaults_stay_as_they_are():
    """What is left at its default is not in the hash: with another default, runs of before and after would bear one name.

    A new class or option is added to the file; a line that is there is never edited.
    """
    frozen = json.loads((FIXTURES / "defaults.json").read_text())
    counted = {
        n: p for n, p in declared_in("src").items() if p.split(".")[1] in ("components", "datamodules", "modules")
    }
    now = {
        name: _written(defaults_of(imported(path)))
        for name, path in {**counted, "guard": declared_in("src")["guard"]}.items()
    }
    assert now == frozen


def _written(defaults: dict[str, Any]) -> dict[str, Any]:
    plain = (int, float, str, bool, type(None), list, tuple)
    return json.loads(json.dumps({k: v if isinstance(v, plain) else repr(v) for k, v in defaults.items()}))


# ---- what earlier versions have left ---------------------------------------------------------------------------------


@pytest.fixture
def former_jobs(tmp_path) -> Path:
    return Path(shutil.copytree(FIXTURES / "jobs", tmp_path / "jobs"))


def plan(**changes: Any) -> list[Job]:
    parts: dict[str, Any] = {"tasks": {"Depo": TASK}, "variants": {"GLA + Canon": VARIANT}, "axes": {"seed": [1]}}
    return Sweep(**{"title": "jobs of an earlier version", **parts, **changes}).jobs()


def test_finished_jobs_of_an_earlier_version_stay_finished(former_jobs):
    jobs = plan(axes={"seed": [1, 2]})
    mine, other = recognised(jobs, former_jobs)
    assert mine.name != FORMER
    assert mine.folder(former_jobs).name == FORMER
    assert is_finished(mine, former_jobs)
    assert other.former is None
    assert not is_finished(other, former_jobs)
    assert json.loads((former_jobs / INDEX).read_text()) == {FORMER: mine.name}
    (former_jobs / FORMER / "config.yaml").unlink()  # read once
    assert recognised(jobs, former_jobs) == [mine, other]


def test_an_unfinished_or_edited_job_of_an_earlier_version_is_no_other_job(former_jobs):
    record = former_jobs / FORMER / "run.json"
    record.write_text(record.read_text().replace('"finished"', '"interrupted"'))
    assert recognised(plan(), former_jobs)[0].former is None
    record.write_text(record.read_text().replace('"interrupted"', '"finished"'))
    written = former_jobs / FORMER / "config.yaml"
    written.write_text(written.read_text().replace("lr: 0.001", "lr: 0.002"))
    assert recognised(plan(), former_jobs)[0].former is None


def test_a_finished_run_of_an_earlier_version_is_not_run_again(former_jobs, caplog):
    folder = former_jobs / FORMER
    before = results(folder)
    with caplog.at_level("INFO"):
        run(compose_run(folder, *TASK, *VARIANT, "seed=1", "ckpt_path=auto"))
    assert "has finished before" in caplog.text
    assert results(folder) == before


def test_a_checkpoint_of_an_earlier_version_goes_on(former_jobs):
    folder = former_jobs / FORMER
    before = results(folder)
    (folder / "results.json").unlink()
    run(compose_run(folder, *TASK, *VARIANT, "seed=1", "ckpt_path=auto"))
    assert results(folder)["metrics"] == pytest.approx(before["metrics"], rel=1e-5)
    assert results(folder)["identity"] == IDENTITY
    assert hash_of_run(Run(folder)) == plan()[0].name


# ---- refactoring -----------------------------------------------------------------------------------------------------

AFTERWARDS = """
import json, sys
from pathlib import Path
import torch
from src.checkpoints import load_model
from src.config.records import has_finished
from src.runs.runs import Run
from src.sweeps.former import recognised
from src.sweeps.jobs import is_finished
from src.sweeps.plan import Sweep
from src.components.mixers.renamed.gated import Gated

words, folder, jobs = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
models = [load_model(folder), load_model(jobs / "5ffd29e2f130")]
assert all(type(model.blocks[0].mixer) is Gated and model.blocks[0].mixer.louder is False for model in models)
sweep = Sweep(title="again", tasks={"Depo": words[0]}, variants={"GLA + Canon": words[1]}, axes={"seed": [1]})
(job,) = recognised(sweep.jobs(), jobs)
print(json.dumps({
    "logits": [model(torch.arange(8)[None])[0, -1].tolist() for model in models],
    "hash": job.name,
    "former": job.former,
    "finished": is_finished(job, jobs),
    "named": has_finished(Run(folder), job.name),
}))
"""


def test_a_class_can_be_renamed_and_moved(former_jobs, tmp_path):
    """In a copy of the tree: its checkpoints open, its jobs are finished, hashes are the same; so with an option more."""
    folder = tmp_path / "run"
    run(compose_run(folder, *TASK, *VARIANT, "seed=1"))
    config = read_checkpoint(folder)["config"]
    assert config["model"]["mixers"]["G"]["_target_"] == "gla"
    tree = tmp_path / "tree"
    for part in ("src", "configs"):
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__", "local"))
    refactor(tree)
    done = subprocess.run(
        [sys.executable, "-c", AFTERWARDS, json.dumps([TASK, VARIANT]), str(folder), str(former_jobs)],
        check=False,
        capture_output=True,
        text=True,
        cwd=tree,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["hash"] == plan()[0].name == hash_of_run(Run(folder))
    assert (told["former"], told["finished"], told["named"]) == (FORMER, True, True)
    for path, logits in zip((folder, former_jobs / FORMER), told["logits"], strict=True):
        assert load_model(path)(torch.arange(8)[None])[0, -1].tolist() == logits


def refactor(tree: Path) -> None:
    """Renames a mixer's class, moves its file into a folder of its own, and gives it and the model another option."""
    old, new = tree / "src/components/mixers/gla.py", tree / "src/components/mixers/renamed/gated.py"
    new.parent.mkdir()
    (new.parent / "__init__.py").touch()
    old.rename(new)
    for path in [*tree.rglob("*.py"), *tree.rglob("*.yaml")]:
        text = path.read_text()
        moved = text.replace("components.mixers.gla", "components.mixers.renamed.gated")
        moved = (
            re.sub(r"\bGLA\b", "Gated", moved) if path.suffix == ".py" else moved.replace("gated.GLA", "gated.Gated")
        )
        if moved != text:
            path.write_text(moved)
    text = new.read_text()
    text = text.replace(
        "        layer: int = 0,\n    ):\n", "        layer: int = 0,\n        louder: bool = False,\n    ):\n", 1
    )
    text = text.replace("        self.decay_rank,", "        self.louder = louder\n        self.decay_rank,", 1)
    new.write_text(text)
    canon = tree / "src/components/canon/config.py"
    canon.write_text(
        canon.read_text().replace('    backend: str = "auto"\n', '    backend: str = "auto"\n    later: int = 3\n', 1)
    )
