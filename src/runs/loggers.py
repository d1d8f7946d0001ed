"""W&B and MLflow, except that a resumed run goes on in its own record there instead of opening another.

The id that the service gave a run is kept in the run's folder (``wandb_run_id``, ``mlflow_run_id``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from src.support.files import write_text


class _KeptId:
    """The id of a run at a service, in a file of the run's folder."""

    def __init__(self, folder: str, service: str):
        self.path = Path(folder) / f"{service}_run_id"

    def read(self) -> str | None:
        """None if there is none, or what is there is no id."""
        try:
            kept = self.path.read_text().strip() if self.path.is_file() else ""
        except (OSError, UnicodeDecodeError):
            return None
        return kept if re.fullmatch(r"[\w-]{1,64}", kept, re.ASCII) else None

    def write(self, value: str) -> None:
        """Unless it is there already."""
        if self.read() != value:
            write_text(self.path, f"{value}\n")


class WandbLog(WandbLogger):
    """Weights & Biases.

    Args:
        folder: of the run.
        project: at W&B.
        name: of the run there.
        tags: of the run there.
        entity: a user or team; None for the one that is logged in.
        group: of runs; None for none.
        offline: write to ``folder`` only; ``wandb sync`` sends it later.
        log_model: send checkpoints too.
    """

    config_name = "wandb_log"

    def __init__(
        self,
        folder: str,
        project: str = "canon-lab",
        name: str | None = None,
        tags: list[str] | None = None,
        entity: str | None = None,
        group: str | None = None,
        offline: bool = False,
        log_model: bool = False,
    ):
        self.kept = _KeptId(folder, "wandb")
        self.run_id = self.kept.read() or uuid4().hex[:8]
        Path(folder).mkdir(parents=True, exist_ok=True)
        more = {"entity": entity, "group": group, "tags": tags, "resume": "allow"}
        super().__init__(
            name=name,
            save_dir=folder,
            id=self.run_id,
            project=project,
            offline=offline,
            log_model=log_model,
            **{key: value for key, value in more.items() if value},
        )

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run at W&B."""
        self.kept.write(self.run_id)
        return WandbLogger.experiment.fget(self)  # type: ignore[attr-defined]


class MLflowLog(MLFlowLogger):
    """MLflow, in a database below ``logs/`` or on a server.

    Metrics by difficulty are called ``test/accuracy.hop1`` there: some of MLflow's stores keep ``test/accuracy`` as a file, in whose place
    ``test/accuracy/hop1`` would want a folder.

    Args:
        folder: of the run.
        experiment_name: at MLflow.
        run_name: of the run there.
        tracking_uri: ``sqlite:///<file>``, or the address of a server.
        tags: of the run there.
        log_model: send checkpoints too.
    """

    config_name = "mlflow_log"

    def __init__(
        self,
        folder: str,
        experiment_name: str = "canon-lab",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: dict[str, Any] | None = None,
        log_model: bool = False,
    ):
        self.kept = _KeptId(folder, "mlflow")
        if tracking_uri and tracking_uri.startswith("sqlite:///"):
            Path(tracking_uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        super().__init__(
            experiment_name=experiment_name,
            run_name=run_name,
            tracking_uri=tracking_uri,
            tags=tags,
            log_model=log_model,
            run_id=self.kept.read(),
            artifact_location=(Path(folder) / "mlflow").absolute().as_uri(),
        )

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """MLflow's client, with the run begun."""
        client = MLFlowLogger.experiment.fget(self)  # type: ignore[attr-defined]
        if self._run_id is not None:
            self.kept.write(self._run_id)
        return client

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Records metrics of a step."""
        super().log_metrics({_flat(name): value for name, value in metrics.items()}, step)


def _flat(name: str) -> str:
    split, slash, rest = name.partition("/")
    return split + slash + rest.replace("/", ".")
