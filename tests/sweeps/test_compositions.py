"""Planning quickly gives what composing each job by itself gives, to the last value."""

import random
from dataclasses import replace
from typing import Any

import pytest

from src.build import CONFIG_DIR, compose_config
from src.config import experiment_hash, instantiate, to_plain
from src.sweeps.compositions import Composer, _copies
from src.sweeps.plan import Job, Sweep
from tests.sweeps.test_plan import small

NAMES = sorted(path.stem for path in (CONFIG_DIR / "sweep" / "results").glob("*.yaml"))


def described(name: str, scale: str) -> Sweep:
    plain = to_plain(compose_config([f"sweep=results/{name}"], "sweep").sweep)
    return instantiate(plain, "sweep").at(scale)


def alone(job: Job) -> dict:
    """The configuration as ``src/train.py`` composes it from the job's command."""
    plain = to_plain(compose_config([*job.overrides, "paths.output_dir=here"]))
    return {key: value for key, value in plain.items() if key != "compare"}


@pytest.mark.parametrize("name", NAMES)
def test_jobs_of_the_smoke_scale_are_named_as_their_runs_name_themselves(name):
    jobs = described(name, "smoke").jobs()
    for job in [random.Random(0).choice(jobs[:-1]), jobs[-1]]:
        assert job.config == alone(job)
        assert job.name == experiment_hash(alone(job))


@pytest.mark.parametrize("name", ["R3", "R5"])
def test_jobs_of_the_paper_scale_are_named_as_their_runs_name_themselves(name):
    sweep = described(name, "paper")
    parts = {"tasks": sweep.tasks_by_name, "variants": sweep.variants_by_name}
    first_and_last: dict[str, Any] = {
        kind: {key: values[key] for key in [*list(values)[:1], *list(values)[-1:]]} for kind, values in parts.items()
    }
    jobs = replace(sweep, **first_and_last, expect=[]).jobs()
    for job in random.Random(1).sample(jobs, 3):
        assert job.config == alone(job)
        assert job.name == experiment_hash(alone(job))


def test_what_depends_on_a_key_in_another_way_is_resolved_anew():
    raw = {"seed": 1, "data": {"seed": "${seed}", "n": "${twice:${seed}}"}, "name": "run ${data.seed}"}
    assert _copies(raw, "seed") is None  # an unknown resolver may look at anything
    raw["data"]["n"] = "${times:2,${seed}}"
    assert _copies(raw, "seed") is None  # a product is no copy
    raw["data"]["n"] = 3
    assert _copies(raw, "seed") is None  # part of a text is no copy
    raw["name"] = "x ${model.dim}"
    assert _copies(raw, "seed") == [("seed",), ("data", "seed")]
    raw["all"] = "${data}"
    assert _copies(raw, "seed") is None  # what holds it is referred to


@pytest.mark.parametrize("key", ["trainer.max_steps", "size.dim", "name"])
def test_any_axis_gives_what_composing_gives(key):
    values = {"name": ["a", "true", "1.5e3"], "seed": [1, 2]}.get(key, [8, 16])
    # A name changes nothing that is computed: two of them would be the same run.
    for job in small(axes={key: values if key != "name" else values[1:2]}).jobs():
        assert job.config == alone(job)


def test_composing_is_hydras_own():
    with Composer() as composer:
        for overrides in (["model=gla", "optimizer.lr=1e-3", "optimizer.lr=2e-3"], ["+tags=[a]"], ["data=depo_small"]):
            try:
                expected = compose_config(overrides)
            except Exception as error:
                with pytest.raises(type(error)):
                    composer.compose(tuple(overrides))
            else:
                assert composer.compose(tuple(overrides)) == expected
