"""Every choice of every config group composes and builds; every experiment runs."""

from importlib.util import find_spec

import pytest
import torch

from src.build import CONFIG_DIR
from src.cli.comparison import variants
from src.config import ConfigError, check, instantiate, to_plain
from src.datamodules.base import StreamDataModule
from src.datamodules.tasks import Capo
from src.training.checks import checked
from src.training.run import build_trainer, run
from tests.runs import compose_run

GROUPS = [
    "data",
    "model",
    "size",
    "family",
    "position",
    "optimizer",
    "scheduler",
    "trainer",
    "callbacks",
    "logger",
    "paths",
    "debug",
]
# Of other command lines, with tests of their own: tests/sweeps.
ELSEWHERE = {"sweep", "launcher"}
BASES = {("model", "base"), ("data", "task"), ("data", "text")}  # what others build on; nothing by themselves
CHOICES = [(g, p.stem) for g in GROUPS for p in sorted((CONFIG_DIR / g).glob("*.yaml")) if (g, p.stem) not in BASES]
EXPERIMENTS = sorted(
    p.relative_to(CONFIG_DIR / "experiment").with_suffix("") for p in (CONFIG_DIR / "experiment").rglob("*.yaml")
)
NEEDS_PACKAGE = {"wandb": "wandb", "mlflow": "mlflow", "tensorboard": "tensorboard"}
# Arguments that a user has to give.
ALSO = {("data", "text_files"): ["data.path=."]}
# Shrinks any experiment: data of every kind have a batch and evaluation sets.
SHORT = [
    "trainer=cpu",
    "trainer.max_steps=2",
    "trainer.val_check_interval=1",
    "data.batch_size=2",
    "data.eval_batch_size=2",
    "data.val_windows=2",
    "data.test_windows=2",
    "scheduler.warmup_steps=1",
]
# Shrinks those meant for larger machines as well.
TINY_MODEL = ["size=tiny", "model.dim=16", "compile=false", "trainer.val_check_interval=2"]
FEW_ANSWERS = ["data.val_answers=2", "data.test_answers=2"]


def test_every_group_is_tested():
    folders = {p.name for p in CONFIG_DIR.iterdir() if p.is_dir() and any(p.glob("*.yaml"))}
    assert folders == {*GROUPS, *ELSEWHERE, "experiment", "recipe", "hydra"}


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda v: v)
def test_every_choice_composes_and_fits_the_signatures(group, choice, tmp_path):
    config = compose_run(tmp_path, f"{group}={choice}", *ALSO.get((group, choice), []))
    plain = to_plain(config)
    plain["model"]["vocab_size"] = 10
    for section in ("data", "model", "optimizer", "scheduler", "loss", "trainer", "callbacks", "logger"):
        check(plain[section], section, {"callbacks", "logger"} if section == "trainer" else None)


@pytest.mark.parametrize("choice", [c for g, c in CHOICES if g == "logger"])
def test_every_logger_builds(choice, tmp_path):
    if choice in NEEDS_PACKAGE and not find_spec(NEEDS_PACKAGE[choice]):
        config = to_plain(compose_run(tmp_path, f"logger={choice}"))
        with pytest.raises(ConfigError, match=choice):
            instantiate(config["logger"][choice], f"logger.{choice}")
        return
    extra = ["logger.wandb.offline=true"] if choice == "wandb" else []
    config = to_plain(compose_run(tmp_path, f"logger={choice}", f"paths.log_dir={tmp_path}", *extra))
    for name, node in config["logger"].items():
        instantiate(node, f"logger.{name}")


@pytest.mark.parametrize("choice", [c for g, c in CHOICES if g == "data"])
def test_every_data_module_builds(choice, tmp_path):
    config = to_plain(compose_run(tmp_path, f"data={choice}", *ALSO.get(("data", choice), [])))
    assert isinstance(instantiate(config["data"], "data"), StreamDataModule)


@pytest.mark.parametrize("choice", [c for g, c in CHOICES if g == "trainer"])
def test_every_trainer_and_its_callbacks_build(choice, tmp_path):
    plain = to_plain(compose_run(tmp_path, f"trainer={choice}"))
    if plain["trainer"]["accelerator"] == "cuda" and not torch.cuda.is_available():
        plain["trainer"]["accelerator"] = "cpu"
    assert build_trainer(plain).max_steps == plain["trainer"]["max_steps"]


@pytest.mark.parametrize(
    ("group", "choice"),
    [(g, c) for g, c in CHOICES if g in ("optimizer", "scheduler", "model", "size", "family", "position")],
)
def test_every_part_of_a_model_and_its_training_builds(group, choice, tmp_path):
    """``checked`` builds the model on the meta device, its optimizer, loss and schedule."""
    checked(compose_run(tmp_path, f"{group}={choice}", "trainer=cpu"))


def first_of_each_task_at_once():
    """A task's published recipes differ in a number, and those of one GPU from them in sizes: the rest run in the slow tests."""
    seen = set()
    for experiment in EXPERIMENTS:
        again = experiment.parts[0] != "smoke" and experiment.parent in seen
        seen.add(experiment.parent)
        yield pytest.param(experiment, marks=pytest.mark.slow if again else [], id=str(experiment))


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=str)
def test_every_experiment_is_possible(experiment, tmp_path):
    """As it stands, on the meta device."""
    checked(compose_run(tmp_path, f"experiment={experiment}", "trainer=cpu"))


@pytest.mark.parametrize("experiment", first_of_each_task_at_once())
def test_every_experiment_runs_two_steps(experiment, tmp_path):
    base = [f"experiment={experiment}", *SHORT, f"paths.data_dir={tmp_path / 'data'}"]
    if len(experiment.parts) > 1 and experiment.parts[0] != "smoke":
        base += TINY_MODEL
    config = compose_run(tmp_path, *base)
    if "task" in config.data:
        base += FEW_ANSWERS
    overrides = [[]] if config.compare is None else list(config.compare.values())
    for i, own in enumerate({str(o): o for o in (overrides[0], overrides[-1])}.values()):
        metrics = run(compose_run(tmp_path / str(i), *base, *own, "compare=null"))
        assert all(name.split("/")[0] in ("val", "test") for name in metrics)
        assert metrics["test/loss"] > 0


# tokens per step and steps of appendix A; easy, middle and hard
PAPER = {
    "depo1": [(2048 * 128, steps) for steps in (87_500, 100_000, 112_500)],
    "depo2": [(2048 * 128, steps) for steps in (100_000, 125_000, 150_000)],
    "brevo1": [(1024 * 256, steps) for steps in (100_000, 125_000, 150_000)],
    "brevo2": [(1536 * 192, steps) for steps in (200_000, 225_000, 250_000)],
    "mano": [(1024 * 64, steps) for steps in (80_000, 95_000, 110_000)],
    "lano": [(512 * 96, 100_000), (1536 * 96, 100_000), (1536 * 96, 100_000)],
    "copy": [(1024 * 32, 50_000)],
}


@pytest.mark.parametrize("task", PAPER)
def test_recipes_of_the_paper(task, tmp_path):
    folder = CONFIG_DIR / "experiment" / "paper" / task
    # By length of the name first: N75 comes before N100.
    names = sorted((p.stem for p in folder.glob("*.yaml")), key=lambda name: (len(name), name)) or [""]
    found = []
    for name in names:
        config = to_plain(compose_run(tmp_path, f"experiment=paper/{task}{'/' if name else ''}{name}"))
        found.append((config["data"]["window"] * config["data"]["batch_size"], config["trainer"]["max_steps"]))
        assert config["optimizer"]["betas"] == [0.9, 0.98]
        assert config["optimizer"]["eps"] == 1e-6
        assert config["optimizer"]["weight_decay"] == (0.1 if task in ("mano", "lano") else 0.03)
        assert config["scheduler"]["warmup_steps"] == (0 if task == "lano" else 1000)
        assert config["scheduler"]["min_ratio"] == (0.0 if task == "lano" else 0.1)
    assert found == PAPER[task]


def test_capo_trains_for_a_hundred_exposures(tmp_path):
    for name, people, batch in (("50k", 50_000, 12), ("1M", 1_000_000, 192), ("2M", 2_000_000, 384)):
        config = to_plain(compose_run(tmp_path, f"experiment=paper/capo/{name}"))
        task: Capo = instantiate(config["data"]["task"], "data.task")
        assert (task.num_people, task.exposures, config["data"]["batch_size"]) == (people, 100, batch)
        assert config["model"]["tie_embeddings"]
        windows = config["trainer"]["max_steps"] * batch
        assert 0 <= windows - task.num_windows("train", config["data"]["window"]) < batch


def test_training_steps_of_endless_data_are_refused(tmp_path):
    with pytest.raises(Exception, match="never end"):
        to_plain(compose_run(tmp_path, "trainer.max_steps='${training_steps:${data}}'"))


def test_training_beyond_the_end_of_the_data_is_refused(tmp_path):
    config = compose_run(tmp_path, "experiment=smoke/capo", *SHORT, "compare=null", "trainer.max_steps=9999")
    with pytest.raises(ConfigError, match="max_steps=9999: the training data end after 1667 steps"):
        run(config)


def test_the_default_configuration_is_valid(tmp_path):
    assert checked(compose_run(tmp_path, "trainer=cpu"))["model"]["dim"] == 64


def test_comparison_variants_differ_only_in_their_overrides(tmp_path):
    config = compose_run(tmp_path, "experiment=quickstart")
    found = variants(config, tmp_path, ["experiment=quickstart"])
    first, second = (to_plain(found[name]) for name in ("without Canon", "Canon-ABCD"))
    assert first["canon"].pop("positions") == ""
    assert second["canon"].pop("positions") == "ABCD"
    for config in (first, second):
        config["model"].pop("canon")
        for section in ("paths", "callbacks", "logger", "trainer"):
            config[section] = {k: v for k, v in config[section].items() if str(tmp_path) not in str(v)}
    assert first == second
