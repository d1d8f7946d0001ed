"""Run a grid of experiments: ``python src/sweep.py sweep=results/R3 scale=smoke``; ``--dry-run`` says what it would cost.

A sweep is a file in ``configs/sweep``. Its jobs are named by the hash of their configuration and run once: started again after whatever
has happened, the same command finishes only what is missing. At its end stand the verdicts and a report.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

# Run as a script, Python puts src/ itself on the path; the package is one level up.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from hydra.core.hydra_config import HydraConfig  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from src.cli.entry import entrypoint, fail  # noqa: E402
from src.config import ConfigError, config_hash, instantiate, to_plain  # noqa: E402
from src.config.compose import CONFIG_DIR  # noqa: E402
from src.config.quoting import as_override, quoted  # noqa: E402
from src.reporting.results import SweepResults, write_manifest  # noqa: E402
from src.runs.foreign import Unreadable, read_yaml  # noqa: E402
from src.support.console import Telling, plain_console  # noqa: E402
from src.support.errors import printable  # noqa: E402
from src.support.files import leads_out  # noqa: E402
from src.sweeps.cost import duration, estimates, print_jobs, print_matched, print_plan  # noqa: E402
from src.sweeps.former import recognised  # noqa: E402
from src.sweeps.jobs import is_finished  # noqa: E402
from src.sweeps.local import Local  # noqa: E402
from src.sweeps.plan import Job, Sweep  # noqa: E402
from src.sweeps.progress import Progress  # noqa: E402
from src.sweeps.search import Search, write_trials  # noqa: E402


def sweep(config: DictConfig) -> None:
    """Plans, runs what is missing, and says what it shows."""
    plain = to_plain(config)
    name = HydraConfig.get().runtime.choices.get("sweep")
    check_values(plain)
    launcher = instantiate(plain["launcher"], "launcher")
    described = read(plain, str(name))
    for key, folder in (("paths.output_dir", plain["paths"]["output_dir"]), ("jobs_dir", plain["jobs_dir"])):
        if (strange := leads_out(Path(folder), Path(plain["paths"]["log_dir"]))) is not None:
            raise ConfigError(f"{key}={folder}: {strange}. Remove it, or choose another folder")
    if isinstance(described, Search):
        search(described, plain, launcher)
        return
    planned = at_scale(described, plain["scale"], str(name)).along(plain["axes"] or {})
    scale = plain["scale"] if described.scales else ""
    with Telling() as told:
        root = Path(plain["jobs_dir"])
        jobs = recognised(planned.jobs(told), root, told)
        expected = estimates(jobs, root, told)
    command, changes = command_of(plain, str(name), scale)
    # A trial with other values does not take the place of the sweep itself.
    manifest = Path(plain["paths"]["output_dir"]) / changes / "manifest.json"

    print_plan(f"{name} {scale}: {planned.title}", jobs, root, expected, launcher.describe(), launcher.workers)
    if planned.match:
        print_matched(jobs, planned.match)
    if plain["dry_run"]:
        print_jobs(jobs, expected)
        return
    write_manifest(manifest, f"{name}{changes and '+'}{changes}", scale, planned, jobs, root, command)
    progress = Progress(jobs, root, expected, launcher.workers)
    try:
        launcher.run(jobs, root, progress)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {progress.left()}. The same command goes on", flush=True)
        sys.exit(130)
    conclude(manifest, jobs, root, report=plain["report"])


def check_values(plain: dict[str, Any]) -> None:
    """Raises a ConfigError for values of the command line that are of another kind than what they are for."""
    for key in ("dry_run", "report"):
        if not isinstance(plain[key], bool):
            raise ConfigError(f"{key}={plain[key]!r}: true or false")
    for key in ("scale", "jobs_dir"):
        if not isinstance(plain[key], str) or not plain[key]:
            raise ConfigError(f"{key}={plain[key]!r}: a {'folder' if key == 'jobs_dir' else 'name'}")
    if not isinstance(plain["overrides"], list) or not all(isinstance(text, str) for text in plain["overrides"]):
        raise ConfigError(f"""overrides={plain["overrides"]!r}: a list of texts, 'overrides=["seed=1"]'""")
    if not isinstance(plain["axes"], dict | None):
        raise ConfigError(f"axes={plain['axes']!r}: a mapping, 'axes={{seed: [1, 2]}}'")
    if not isinstance(plain["sweep"], dict) or "_target_" not in plain["sweep"]:
        raise ConfigError("sweep: no sweep; its file begins with defaults: [/sweep/base@_here_, _self_]")


def read(plain: dict[str, Any], name: str) -> Sweep | Search:
    """What the file of a sweep describes; mistakes in it name the file."""
    own = plain["sweep"].get("overrides", [])
    if not isinstance(own, list):
        raise ConfigError(f"{_file(name)}: sweep.overrides: a list of texts")
    try:
        return instantiate(plain["sweep"] | {"overrides": [*own, *plain["overrides"]]}, "sweep")
    except ConfigError as error:
        raise ConfigError(f"{_file(name)}: {error}") from error


def at_scale(described: Sweep, scale: str, name: str) -> Sweep:
    """At one of its scales; mistakes in what the file says of it name the file."""
    try:
        return described.at(scale)
    except ConfigError as error:
        if str(error).startswith(("sweep.", "at scale")):
            raise ConfigError(f"{_file(name)}: {error}") from error
        raise


def _file(name: str) -> str:
    return f"configs/sweep/{name}.yaml"


def check_file(arguments: list[str]) -> None:
    """Ends in one message for the file of a sweep that is no YAML, or no mapping: Hydra would end in a traceback."""
    for argument in arguments:
        path = CONFIG_DIR / "sweep" / f"{argument.removeprefix('sweep=')}.yaml"
        if argument.startswith("sweep=") and path.is_file():
            try:
                read_yaml(path)
            except Unreadable as error:
                fail(f"{path}: {error}")


def command_of(plain: dict[str, Any], name: str, scale: str) -> tuple[str, str]:
    """What a shell would run again, and a word that names what is changed in the sweep; empty if nothing is."""
    words = ["python", "src/sweep.py", f"sweep={name}", *([f"scale={scale}"] if scale else [])]
    changes = {key: plain[key] for key in ("axes", "overrides") if plain[key]}
    words += [f"{key}={as_override(value)}" for key, value in changes.items()]
    # So is one whose own description is changed on the command line.
    described = [override for override in HydraConfig.get().overrides.task if re.match(r"[+~]*sweep\.", override)]
    words += described
    if described:
        changes["sweep"] = described
    return " ".join(map(quoted, words)), config_hash(changes)[:6] if changes else ""


def search(described: Search, plain: dict[str, Any], launcher: Any) -> None:
    """Lets Optuna choose the jobs, and prints what it found."""
    if not isinstance(launcher, Local):
        raise ConfigError("launcher: a search runs on this machine, launcher=local")
    if plain["dry_run"]:
        print(f"{described.title}: {described.trials} trials over {', '.join(described.space)}, {launcher.describe()}")
        return
    folder, root = Path(plain["paths"]["output_dir"]), Path(plain["jobs_dir"])

    def told(job: Job, what: str, seconds: float) -> None:
        print(
            f"{job.variant} | {job.settings_in_words}: {what}{f' in {duration(seconds)}' if seconds else ''}",
            flush=True,
        )

    try:
        study = described.run(launcher, folder, root, told)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", flush=True)
        sys.exit(130)
    path = write_trials(study, described, folder)
    if not any(trial.value is not None for trial in study.trials):
        print(f"no trial has ended well; all trials: {path}", file=sys.stderr)
        sys.exit(1)
    best = study.best_trial
    chosen = " ".join(
        f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}" for key, value in best.params.items()
    )
    print(f"best {described.metric} {best.value:.4f}: {printable(chosen)}\nall trials: {path}")


def conclude(manifest: Path, jobs: list[Job], root: Path, report: bool) -> None:
    """Prints the verdicts and writes the report; exit status 1 if a job has failed."""
    missing = [job for job in jobs if not is_finished(job, root)]
    results = SweepResults(manifest)
    plain_console().print(f"{results.name}: {results.outcome}", style="bold")
    for verdict in results.verdicts:
        print(f"  {verdict}")
    if report:
        from src.reporting.page import write_report

        with Telling() as told:
            path = write_report([results], manifest.parent / "report", told=told)
        print(f"report: {path}")
    for job in missing:
        print(
            f"not finished: {job.task}, {job.variant}, {job.settings}; see {job.folder(root) / 'output.log'}",
            file=sys.stderr,
        )
    if missing:
        sys.exit(1)


def _arguments(arguments: list[str]) -> list[str]:
    """``--dry-run`` is a flag to people; to Hydra it is a value. ``experiment=results/R3`` is what some will type."""
    replaced = {"--dry-run": "dry_run=true"}
    found = [replaced.get(argument, argument) for argument in arguments]
    return ["sweep=" + a.removeprefix("experiment=") if a.startswith("experiment=") else a for a in found]


def _chosen(arguments: list[str]) -> bool:
    return any(argument.startswith(("sweep=", "-")) and argument != "-m" for argument in arguments)


if __name__ == "__main__":
    sys.argv[1:] = _arguments(sys.argv[1:])
    if not _chosen(sys.argv[1:]):
        folder = CONFIG_DIR / "sweep"
        there = sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))
        fail(f"sweep=: which one? There are: {', '.join(name for name in there if name != 'base')}")
    check_file(sys.argv[1:])
    entrypoint("sweep", sweep)
