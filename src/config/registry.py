"""Which classes a configuration may name, section by section: the boundary between data and code.

A configuration is data, also one that lies in a checkpoint or in a run's folder, and building it must not be a way to call what its
author likes. So a ``_target_`` is no path that is imported and called. It is looked up here: every section has *families*, each a package
and a base class, and a node may be

    a class, public by its own name and by that of its module,
    defined in the family's package (not merely imported there), and
    derived from the family's base class

and nothing else: no function, no method, no private name, no class of another section. A new mixer, task, callback or schedule is
found by where it stands and what it derives from, so nothing is edited here to add one.

The section ``model`` is all that is built from a checkpoint when it is opened (``load_model``); ``data`` and ``loss`` too when it
is scored again.
"""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module
from typing import Any, NamedTuple

from src.config.names import declared_in, path_of
from src.support.errors import ConfigError, suggest


class Family(NamedTuple):
    """Public classes below ``package`` that derive from ``base``; the dotted name of a class stands for itself and what derives from it.

    Args:
        names: only these of them, where a package has others that a run could not deal with.
        why: what the others do.
    """

    package: str
    base: str
    names: frozenset[str] | None = None
    why: str = ""


class Section(NamedTuple):
    """What may be built in a part of the configuration.

    Args:
        roots: the classes of which the section's own object is one.
        families: of all that may be part of it, the object itself included.
        partial: the object is not built but made ready to be called with the rest of its arguments.
        named: the section is a mapping from names to such objects.
    """

    roots: tuple[str, ...]
    families: tuple[Family, ...]
    partial: bool = False
    named: bool = False


_MODEL = (
    Family("src.components.backbone", "src.components.backbone.Backbone"),
    Family("src.components.canon", "src.components.canon.CanonConfig"),
    Family("src.components.feedforward", "src.components.feedforward.FeedForward"),
    Family("src.components.initialization", "src.components.initialization.Initialization"),
    Family("src.components.mixers", "src.components.mixers.base.Mixer"),
    Family("src.components.mixture_of_experts", "src.components.mixture_of_experts.MixtureOfExperts"),
    Family("src.components.position", "src.components.position.NoPE"),
)
_DATA = (
    Family("src.datamodules", "src.datamodules.base.StreamDataModule"),
    Family("src.datamodules.tasks", "src.datamodules.tasks.Task"),
    Family("src.datamodules.corpora", "src.datamodules.corpora.Source"),
)
_TRAINER = (
    Family("lightning.pytorch.trainer", "lightning.Trainer"),
    Family("src.modules.strategies", "lightning.pytorch.strategies.Strategy"),
    Family("src.checkpoints.io", "lightning.pytorch.plugins.CheckpointIO"),
    Family("lightning.pytorch.accelerators", "lightning.pytorch.accelerators.Accelerator"),
    Family("lightning.pytorch.profilers", "lightning.pytorch.profilers.Profiler"),
    Family("lightning.pytorch.strategies", "lightning.pytorch.strategies.Strategy"),
    Family("lightning.pytorch.plugins", "lightning.pytorch.plugins.Precision"),
    Family("lightning.pytorch.plugins", "lightning.pytorch.plugins.LayerSync"),
    Family("lightning.fabric.plugins", "lightning.fabric.plugins.CheckpointIO"),
    Family("lightning.fabric.plugins", "lightning.fabric.plugins.environments.ClusterEnvironment"),
)

# Of Lightning's own callbacks those that leave weights, steps and batches to the run, and averages of weights that it knows how to test
# and to resume. The others change behind its back what is tested after what was validated (StochasticWeightAveraging, ModelPruning), how
# many steps or how large batches there are (BatchSizeFinder, GradientAccumulationScheduler), or the learning rate (LearningRateFinder).
_OF_LIGHTNING = frozenset(
    {
        *("DeviceStatsMonitor", "EarlyStopping", "EMAWeightAveraging", "LearningRateMonitor", "ModelCheckpoint"),
        *("ModelSummary", "OnExceptionCheckpoint", "ProgressBar", "RichModelSummary", "RichProgressBar"),
        *("ThroughputMonitor", "Timer", "TQDMProgressBar", "WeightAveraging"),
    }
)

_BEHIND_THE_RUN = "it changes weights, steps or batches without the run knowing of it"
# Not LBFGS, which computes a step's loss again and again, and SparseAdam.
_OF_TORCH = frozenset(
    {
        *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop"),
        *("Rprop", "SGD"),
    }
)

SECTIONS = {
    "model": Section(("src.components.backbone.Backbone",), _MODEL),
    "canon": Section(("src.components.canon.CanonConfig",), _MODEL),
    "position": Section(("src.components.position.NoPE",), _MODEL),
    "data": Section(("src.datamodules.base.StreamDataModule",), _DATA),
    "data.task": Section(("src.datamodules.tasks.Task",), _DATA),
    "optimizer": Section(
        ("torch.optim.Optimizer",),
        (
            Family("src.modules.optimizers", "torch.optim.Optimizer"),
            Family(
                "torch.optim", "torch.optim.Optimizer", _OF_TORCH, "it wants other steps or gradients than a run has"
            ),
        ),
        partial=True,
    ),
    "scheduler": Section(
        ("src.modules.schedules.Schedule",), (Family("src.modules.schedules", "src.modules.schedules.Schedule"),)
    ),
    "loss": Section(
        ("src.modules.losses.NextTokenLoss",), (Family("src.modules.losses", "src.modules.losses.NextTokenLoss"),)
    ),
    "trainer": Section(("lightning.Trainer",), _TRAINER),
    "callbacks": Section(
        ("lightning.Callback",),
        (
            Family("src.callbacks", "lightning.Callback"),
            Family("lightning.pytorch.callbacks", "lightning.Callback", _OF_LIGHTNING, _BEHIND_THE_RUN),
        ),
        named=True,
    ),
    "logger": Section(
        ("lightning.pytorch.loggers.Logger",),
        (
            Family("src.runs", "lightning.pytorch.loggers.Logger"),
            Family("lightning.pytorch.loggers", "lightning.pytorch.loggers.Logger"),
        ),
        named=True,
    ),
    "sweep": Section(
        ("src.sweeps.plan.Sweep", "src.sweeps.search.Search"),
        (Family("src.sweeps.plan", "src.sweeps.plan.Sweep"), Family("src.sweeps.search", "src.sweeps.search.Search")),
    ),
    "launcher": Section(
        ("src.sweeps.local.Local", "src.sweeps.slurm.Slurm"),
        (Family("src.sweeps.local", "src.sweeps.local.Local"), Family("src.sweeps.slurm", "src.sweeps.slurm.Slurm")),
    ),
}

_NAME = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)*", re.ASCII)  # no part begins with an underscore


def section_of(where: str) -> Section:
    """The section that a path of the configuration lies in.

    Raises:
        ConfigError: nothing is built there.
    """
    known = SECTIONS.get(where) or SECTIONS.get(where.split(".", maxsplit=1)[0].split("[", maxsplit=1)[0])
    if known is None:
        raise ConfigError(f"{where}: nothing can be built here; {suggest(where, SECTIONS)}")
    return known


def class_of(target: Any, where: str, section: Section) -> type[Any]:
    """The class that a ``_target_`` names, if the section may have it.

    Args:
        target: as the configuration has it: a declared name (``config/names.py``) or a dotted path.
        where: path of its node, for messages.
        section: that the node lies in.

    Raises:
        ConfigError: it names no class of the section; nothing but modules of the section's own packages has been imported.
    """
    said = f"{where}._target_={target!r}"
    if not isinstance(target, str) or len(target) > 200 or not _NAME.fullmatch(target):
        raise ConfigError(f"{said}: must be the name or the dotted path of a class, without leading underscores")
    own = tuple(dict.fromkeys(f.package for f in section.families if f.package.startswith("src.")))
    target = path_of(target, own)
    if "." not in target:
        raise ConfigError(
            f"{said} does not exist; {suggest(target, [n for package in own for n in declared_in(package)])}"
        )
    module_name, _, name = target.rpartition(".")
    families = [f for f in section.families if _may_stand_in(module_name, f)]
    if not families:
        packages = dict.fromkeys(f.package for f in section.families)
        raise ConfigError(f"{said}: may not be built here; only classes of {', '.join(packages)}")
    try:
        found = getattr(import_module(module_name), name)
    except ImportError as error:
        raise ConfigError(f"{said} cannot be imported: {error}") from error
    except AttributeError:
        raise ConfigError(f"{said} does not exist; {suggest(name, _classes_in(module_name, families))}") from None
    if not _belongs(found, families):
        why = next((f", {f.why}" for f in families if f.names and _belongs(found, [f._replace(names=None)])), "")
        raise ConfigError(f"{said} may not be built here{why}; {suggest(name, _classes_in(module_name, families))}")
    return found


def imported(dotted: str) -> Any:
    """What a dotted name of this file stands for."""
    module_name, _, name = dotted.rpartition(".")
    return getattr(import_module(module_name), name)


def _may_stand_in(module_name: str, family: Family) -> bool:
    """Whether a family's classes may be called by that module: their own, one above it in the package, or the base's short name."""
    return _below(module_name, family.package) or module_name == family.base.rpartition(".")[0]


def _below(module_name: str, package: str) -> bool:
    return module_name == package or module_name.startswith(package + ".")


def _belongs(found: Any, families: list[Family]) -> bool:
    if not inspect.isclass(found) or found.__name__.startswith("_") or inspect.isabstract(found):
        return False
    return any(
        _below(found.__module__, f.package)
        and issubclass(found, imported(f.base))
        and (f.names is None or found.__name__ in f.names)
        for f in families
    )


def _classes_in(module_name: str, families: list[Family]) -> list[str]:
    module = sys.modules.get(module_name)
    return [name for name, value in vars(module).items() if _belongs(value, families)] if module else []
