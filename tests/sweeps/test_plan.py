"""What a sweep file means: jobs, their names, scales, and mistakes in it."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser

from src.build import CONFIG_DIR, compose_config
from src.config import ConfigError, experiment_hash, instantiate, to_plain
from src.sweeps.compositions import Composer
from src.sweeps.cost import duration, estimates, net_of, print_matched, training_flops
from src.sweeps.plan import Job, Match, Statement, Sweep, as_override, job_of, quoted
from src.sweeps.search import Search
from src.training.checks import check_machine

SWEEPS = sorted(
    str(p.relative_to(CONFIG_DIR / "sweep").with_suffix(""))
    for p in (CONFIG_DIR / "sweep").rglob("*.yaml")
    if p.stem != "base"
)
RESULTS = [f"results/R{n}" for n in range(1, 13)]


def read(name: str) -> Sweep | Search:
    return instantiate(compose_config([f"sweep={name}"], "sweep").sweep, "sweep")


def small(**changes) -> Sweep:
    parts = {
        "title": "a test",
        "tasks": {"Depo": ["data=depo_small"]},
        "variants": {"none": ["canon.positions=''"], "AC": ["canon.positions=AC"]},
        "axes": {"seed,data.seed": [1, 2], "optimizer.lr": [1e-3, 2e-3]},
    }
    return Sweep(**(parts | changes))


def test_all_twelve_results_are_there():
    assert set(RESULTS) <= set(SWEEPS)


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_can_be_planned_at_every_scale(name):
    sweep = read(name)
    if isinstance(sweep, Search):
        assert sweep.base
        return
    assert not name.startswith("results/") or {"smoke", "single_gpu", "paper"} == set(sweep.scales)
    with Composer() as composer:
        for scale in sweep.scales or ["smoke"]:
            planned = sweep.at(scale)
            assert not name.startswith("results/") or planned.expect
            combinations = planned._combinations()
            # All of them would take minutes, and the experiments have tests of their own.
            for task, variant, settings in {str(c): c for c in (combinations[0], combinations[-1])}.values():
                own = [*planned.tasks_by_name[task], "compare=null", *planned.variants_by_name[variant]]
                local = ["trainer.accelerator=cpu", *(["data.path=."] if task == "text" else [])]
                overrides, thorough = [*planned.base, *own, *local], scale == "smoke"
                job = job_of(task, variant, settings, overrides, thorough=thorough, composer=composer)
                assert job.config["seed"] == settings["seed,data.seed"] == job.config["data"]["seed"]


@pytest.mark.parametrize("name", RESULTS)
def test_results_at_smoke_scale_have_three_seeds(name):
    sweep = read(name)
    assert isinstance(sweep, Sweep)
    combinations = sweep.at("smoke")._combinations()
    seeds = {7, 8, 9} if name == "results/R1" else {4, 5, 6}  # none of them one of the trial runs
    assert {settings["seed,data.seed"] for _, _, settings in combinations} == seeds
    assert len(combinations) <= 12  # what two cores do in ten minutes


def test_the_published_learning_rates_are_those_of_the_experiment():
    sweep = read("results/R2")
    assert isinstance(sweep, Sweep)
    rates: dict[str, set[float]] = {}
    for task, _, settings in sweep.at("paper")._combinations():
        rates.setdefault(task, set()).add(settings["optimizer.lr"])
    assert rates["Depo1 N=225"] == {3e-4, 5e-4, 1e-3, 2e-3}
    assert rates["Mano L=10"] == {1e-4, 2e-4, 3e-4, 5e-4}


def test_jobs_are_named_by_what_they_compute():
    jobs = small().jobs()
    assert len(jobs) == len({job.name for job in jobs}) == 8
    assert [job.seed for job in jobs] == [1] * 4 + [2] * 4  # all of a seed before the next
    for job in jobs:
        config = to_plain(compose_config([*job.overrides, "paths.output_dir=elsewhere", "name=other", "~logger"]))
        assert experiment_hash(config) == job.name
        assert experiment_hash(config | {"seed": 9}) != job.name
        assert job.learning_rate == job.settings["optimizer.lr"]
    assert json.loads(json.dumps(jobs[0].config)) == jobs[0].config


def test_a_command_can_be_typed_into_a_shell():
    job = small(variants={"x y": ["canon.positions=''", "+tags=[a b]"]}).jobs()[0]
    words = shlex.split(job.command)
    assert words == ["python", "src/train.py", *job.overrides]
    assert quoted("canon.positions=''") == '''"canon.positions=''"'''
    assert shlex.split(quoted("a='$HOME'")) == ["a='$HOME'"]


@pytest.mark.parametrize(
    "value", ["", "a b", "it's", "x,y", True, None, 3, 1e-3, [1, "a b"], {"k": [1, None]}, "[a]", "1e-3"]
)
def test_values_survive_hydras_grammar(value):
    assert OverridesParser.create().parse_override(f"key={as_override(value)}").value() == (
        float(value) if value == "1e-3" else value
    )


def test_overrides_of_every_job_are_stronger_than_those_of_tasks():
    (job, *_) = small(
        tasks={"Depo": ["data=depo_small", "trainer.max_steps=600"]}, overrides=["trainer.max_steps=7"]
    ).jobs()
    assert job.config["trainer"]["max_steps"] == 7


def test_a_plan_needs_no_gpu_and_a_run_does(tmp_path):
    """Login nodes have none."""
    job = small(tasks={"Depo": ["experiment=single_gpu/depo1"]}).jobs()[0]
    assert job.config["trainer"]["accelerator"] == "cuda"
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device here"):
            check_machine({"trainer": {"accelerator": "cuda"}})


def test_a_scale_adds_to_the_base_and_replaces_the_rest():
    sweep = small(
        base=["data.window=64"], scales={"big": {"base": ["size=8L512D"], "axes": {"seed": [7]}, "metric": "test/loss"}}
    )
    big = sweep.at("big")
    assert big.base == ["data.window=64", "size=8L512D"]
    assert big.axes == {"seed": [7]}
    assert big.metric_of("Depo") == "test/loss"
    assert big.selection_of("Depo") == "val/loss"
    assert big.along({"seed": [1, 2, 3]}).axes == {"seed": [1, 2, 3]}


MATCHED = {
    "variants": {"llama": ["model=llama"], "gla": ["model=gla"]},
    "axes": {"seed": [1, 2]},
    "match": {"budget": "parameters", "to": "llama"},
}


def counts(sweep: Sweep) -> dict[str, int]:
    return {
        f"{job.variant} {job.settings_in_words}": net_of(job).count_parameters()
        for job in sweep.jobs()
        if job.seed == 1
    }


def test_variants_can_be_made_equally_large(capsys):
    jobs = small(**MATCHED).jobs()
    for job in jobs:
        assert any(override.startswith("size.dim=") for override in job.overrides) == (job.variant == "gla")
    found = counts(small(**MATCHED))
    # Counted with the vocabulary of the data, 21 tokens: the size is published with 10,000.
    assert found["gla seed=1"] == pytest.approx(found["llama seed=1"], rel=0.05)
    print_matched(jobs, Match("parameters", "llama"))
    assert f"{found['llama seed=1']:,} (x1)" in capsys.readouterr().out


def test_what_is_matched_is_what_the_overrides_leave():
    """Those of the command line come first, and an axis is matched value by value."""
    found = counts(small(**MATCHED, overrides=["size.depth=4"]))
    assert found["llama seed=1"] > 1.5 * counts(small(**MATCHED))["llama seed=1"]
    assert found["gla seed=1"] == pytest.approx(found["llama seed=1"], rel=0.05)
    found = counts(small(**MATCHED | {"axes": {"seed": [1], "size.depth": [1, 4]}}))
    for depth in (1, 4):
        llama, gla = (found[f"{name} seed=1, size.depth={depth}"] for name in ("llama", "gla"))
        assert gla == pytest.approx(llama, rel=0.05)
    with pytest.raises(ConfigError, match=r"sweep.axes.size.dim: sweep.match decides on it"):
        small(**MATCHED | {"axes": {"seed": [1], "size.dim": [32, 64]}}).jobs()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {}}, "sweep.tasks: at least one"),
        ({"tasks": ["Dopo"], "settings": {"Depo": []}}, "'Dopo' is not in settings; did you mean 'Depo'"),
        ({"axes": {"seed": []}}, "sweep.axes.seed"),
        ({"axes": {"seed": 3}}, "sweep.axes.seed=3"),
        ({"expect": [{"better": "AC", "than": "nine"}]}, "expect.0..than='nine'"),
        ({"expect": [{"better": "AC", "then": "none"}]}, "than"),
        ({"expect": [{"better": "AC", "than": "none", "by": "much"}]}, "by"),
        ({"expect": [{"better": "AC", "than": "none", "task": "Mano"}]}, "task='Mano'"),
        ({"metrics": {"Mano": "test/loss"}}, "no task 'Mano'"),
        ({"match": {"budget": "parameters", "to": "x"}}, "sweep.match.to='x'"),
        ({"variants": {"a": ["canon.positions=AX"]}}, "Depo, a, .*no such point X"),
        ({"variants": {"a": [], "b": []}}, "two jobs of this sweep are the same run"),
        ({"metric": "test/accuracy/hop9"}, "sweep.metric=test/accuracy/hop9: not measured on Depo; .*accuracy/hop2"),
        ({"select": "train/loss"}, "sweep.select=train/loss"),
        ({"overrides": ["trainer.max_step=3"]}, "no key 'max_step' in trainer; did you mean 'max_steps'"),
        ({"axes": {"optimizer.lrr": [1]}}, "optimizer.lrr"),
        ({"axes": {"model": ["llamma"]}}, "did you mean 'llama'"),
        ({"axes": {"optimizer.lr": "recipe"}}, "is not swept over it, but over: none"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(ConfigError, match=message):
        small(**changes).checked().jobs()


def test_an_override_that_an_axis_overrules_is_a_mistake():
    with pytest.raises(ConfigError, match="overrides: seed=7 would do nothing, the axis seed is stronger"):
        small(overrides=["seed=7"]).at("smoke")


def test_misspelt_keys_of_statements_are_not_dropped():
    """Without "by" the statement would be a weaker one than was written."""
    with pytest.raises(ConfigError, match="bye: no such key; did you mean 'by'"):
        small(expect=[{"better": "AC", "than": "none", "bye": 0.1}])
    with pytest.raises(ConfigError, match="budged: no such key; did you mean 'budget'"):
        small(match={"budged": "parameters", "to": "none"})


def test_a_scale_of_a_sweep_that_has_none():
    assert small().at("smoke") == small()
    with pytest.raises(ConfigError, match="scale=big: this sweep has no scales"):
        small().at("big")


def test_mistakes_at_a_scale():
    sweep = small(scales={"big": {"axis": {}}})
    with pytest.raises(ConfigError, match=r"sweep.scales.big.axis: no such key; did you mean 'axes'"):
        sweep.at("big")
    with pytest.raises(ConfigError, match=r"scale=bog: .*did you mean 'big'"):
        sweep.at("bog")
    with pytest.raises(ConfigError, match=r"axes.sed: .*There are: optimizer.lr, seed,data.seed"):
        small().along({"sed": [1]})


def test_statements_may_be_written_as_mappings():
    (statement,) = small(expect=[{"better": "AC", "than": "none", "by": 1}]).expect
    assert statement == Statement("AC", "none", 1.0)


def test_cost_is_arithmetic_until_something_was_measured(tmp_path: Path):
    jobs: list[Job] = small().jobs()
    first = estimates(jobs, tmp_path)
    assert all(seconds > 0 for seconds in first.values())
    folder = jobs[0].folder(tmp_path)
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"status": "finished", "host": "x", "pid": 1}))
    (folder / "results.json").write_text(json.dumps({"config_hash": jobs[0].name, "seconds": 1234.0, "metrics": {}}))
    after = estimates(jobs, tmp_path)
    assert after[jobs[0].name] == 0
    same = [job for job in jobs[1:] if job.variant == jobs[0].variant]
    assert {after[job.name] for job in same} == {1234.0}
    assert training_flops(jobs[0]) > 1e9
    assert [duration(s) for s in (5, 600, 7200, 1e6)] == ["5 s", "10 min", "2.0 h", "11.6 days"]
