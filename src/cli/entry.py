"""What every command line of this project does around its work: compose, check, explain errors."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, read_write
from omegaconf.errors import OmegaConfBaseException

from src.config import ConfigError, RunError
from src.config.compose import CONFIG_DIR, compose_config
from src.config.mistakes import first_misspelt_key, unreadable_override
from src.support.errors import printable
from src.support.files import leads_out, strange_in

log = logging.getLogger(__name__)

_USERS_MISTAKES = (
    ConfigError,
    OmegaConfBaseException,
    PermissionError,
    FileNotFoundError,
    NotADirectoryError,
)


# Others by name: importing them would import PyTorch and more, which not every command needs.
_USERS_MISTAKES_BY_NAME = {"BackendUnavailableError", "CorpusError", "MisconfigurationException"}

_THE_DISK_S = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def entrypoint(config_name: str, job: Callable[[DictConfig], Any]) -> None:
    """Runs ``job`` with the configuration that the command line asks for.

    A mistake in the command line, or a ConfigError in the job, ends in one message on stderr and exit status 2, a RunError in status 1;
    ``HYDRA_FULL_ERROR=1`` shows where it came from.
    """

    def guarded(config: DictConfig) -> Any:
        point_other_ranks_at_this_job()
        before = {name for name in _LAUNCH if name in os.environ}
        try:
            result = job(config)
        except Exception as error:
            status = status_of(error)
            if status == 2:
                written_before.restore(Path(HydraConfig.get().runtime.output_dir))
            if status is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            fail(str(error), status)
        forget_other_ranks(before)
        return result

    outlive_output()
    quieten()
    show_warnings_once()
    sys.argv[1:] = arguments = [at_home(argument) for argument in sys.argv[1:]]
    flags = {argument for argument in arguments if argument.startswith("-")}
    overrides = [argument for argument in arguments if argument not in flags]
    written_before = _HydrasFiles()
    if not flags:
        written_before.keep(explain_overrides(config_name, overrides))
    elif flags <= {"-m", "--multirun"} and (message := first_misspelt_key(config_name, overrides)):
        fail(message)
    for argument in overrides if flags else []:  # whatever else Hydra is told by flags, it writes there
        key, _, folder = argument.partition("=")
        if (
            key in ("hydra.run.dir", "hydra.sweep.dir")
            and (strange := strange_in(Path(folder.strip("'\"")))) is not None
        ):
            fail(f"{key}={folder}: {strange}. Remove it, or choose another folder")
        if key == "hydra.sweep.dir" and (there := Path(folder.strip("'\""))).is_dir():
            for child in there.iterdir():
                written_before.keep(child.absolute())
    guarded.__module__ = "__main__"
    hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(guarded)()


def status_of(error: Exception) -> int | None:
    """With which exit status a message alone is enough; None for what only a traceback explains."""
    if isinstance(error, _USERS_MISTAKES) or {kind.__name__ for kind in type(error).__mro__} & _USERS_MISTAKES_BY_NAME:
        return 2
    disk = isinstance(error, OSError) and error.errno in _THE_DISK_S
    return 1 if disk or isinstance(error, RunError) else None


def point_other_ranks_at_this_job() -> None:
    """In a multirun, makes the ranks that Lightning starts run the job at hand.

    Lightning starts the other ranks of a job by running ``sys.argv`` again. With ``-m`` in it each of them would be a sweep of its own,
    whose sampler may draw other values. Ranks that a launcher starts (torchrun, SLURM) read their own command line all the
    same; for them every rank compares configurations (``callbacks/agreement.py``).
    """
    config: Any = HydraConfig.instance().cfg
    if config is None or config.hydra.mode != RunMode.MULTIRUN:
        return
    sys.argv = [sys.argv[0], *config.hydra.overrides.task, "hydra.mode=RUN"]
    with read_write(config.hydra):  # where Lightning tells them to write
        config.hydra.run.dir = config.hydra.runtime.output_dir


# What Lightning leaves in the environment of the process that has started the other ranks.
_LAUNCH = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


def forget_other_ranks(before: set[str]) -> None:
    """In a multirun, ends what a job on several processes leaves in this one, so that the next job starts ranks of its own.

    Args:
        before: which of the variables of a launch there were before the job.
    """
    config: Any = HydraConfig.instance().cfg
    if config is None or config.hydra.mode != RunMode.MULTIRUN:
        return
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in _LAUNCH:
        if name not in before:
            os.environ.pop(name, None)


def quieten() -> None:
    """Silences what Lightning says in every run and nobody can act on."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*treespec.*is deprecated")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="The dirpath has changed from.*")
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`.*")


def show_warnings_once() -> None:
    """A warning is one line, without a line of source, and once in a run: a model is built more than once on the way."""
    seen = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        words = str(message)
        if words not in seen:
            seen.add(words)
            log.warning(words)

    warnings.showwarning = show


def fail(message: str, status: int = 2) -> None:
    """One message, and the end."""
    shown = "\n".join(map(printable, message.split("\n")))  # whoever has written what it quotes
    print(f"error: {shown}", file=sys.stderr, flush=True)
    sys.exit(status)


def at_home(argument: str) -> str:
    """``key=~/folder`` with the user's own folder in its place: a shell replaces ``~`` only where a word begins."""
    key, equals, value = argument.partition("=")
    return f"{key}={os.path.expanduser(value)}" if equals and value.startswith("~/") else argument


class _Output:
    """A stream that nobody may read any more: a closed pipe, a full disk or a terminal's alphabet never ends a run."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes what can be written."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            self.write(text.encode(self._stream.encoding, "replace").decode(self._stream.encoding))
        except (OSError, ValueError) as error:
            self._lost(error)
        return len(text)

    def flush(self) -> None:
        """Does not insist."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        if isinstance(error, BrokenPipeError):  # what is still to come goes nowhere, at the interpreter's end too
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_output() -> None:
    """Printing never ends a run, and a log file that cannot be written does not fill the terminal with tracebacks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _Output):
            setattr(sys, name, _Output(stream or open(os.devnull, "w")))  # noqa: SIM115 (for as long as the process)
    logging.raiseExceptions = False
    make = logging.getLogRecordFactory()

    def one_line(*arguments: Any, **more: Any) -> logging.LogRecord:
        """A message may quote what somebody else has written: no new lines, no control characters of a terminal."""
        record = make(*arguments, **more)
        record.msg, record.args = printable(record.getMessage()), ()
        return record

    logging.setLogRecordFactory(one_line)


class _HydrasFiles:
    """What ``.hydra`` in a run's folder says of the run: Hydra writes over it before anybody can refuse to go on with it."""

    def __init__(self) -> None:
        self._contents: dict[Path, bytes] = {}

    def keep(self, folder: Path | None) -> None:
        """Remembers those of a run."""
        if folder is not None:
            self._contents |= {path: path.read_bytes() for path in (folder / ".hydra").glob("*.yaml")}

    def restore(self, folder: Path) -> None:
        """Puts those of a run back."""
        for path, content in self._contents.items():
            if path.parent.parent == folder.absolute():
                path.write_bytes(content)


def explain_overrides(config_name: str, overrides: list[str]) -> Path | None:
    """Composes once ahead of Hydra, because its own message for a misspelt key does not say which keys exist.

    And looks at the folder that Hydra is about to write into, which is returned where it is known.
    """
    try:
        config = compose_config(overrides, config_name, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        fail(unreadable_override(overrides) or first_misspelt_key(config_name, overrides) or str(error))
    return check_folder(config)


def check_folder(config: DictConfig) -> Path | None:
    """Ends the process with a message if a run's folder cannot be written, or a test would write over the record of training."""
    try:
        folder = Path(config.hydra.run.dir).absolute()
    except OmegaConfBaseException:  # it depends on what only Hydra knows
        return None
    if config.get("train") is False and (folder / "checkpoints").is_dir() and (folder / "run.json").exists():
        fail(
            f"train=false: {folder} holds the record of a run, which a test would overwrite; choose another hydra.run.dir, or score it "
            f"with python src/evaluate.py ckpt_path={folder}"
        )
    logs = str((config.get("paths") or {}).get("log_dir") or folder)
    if (strange := leads_out(folder, Path(logs)) or strange_in(folder)) is not None:
        fail(f"hydra.run.dir={folder}: {strange}. Remove it, or choose another folder")
    # The folder itself is Hydra's to make: its name may be that of another moment then.
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is no folder")
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        fail(f"hydra.run.dir={folder} cannot be written: {error.strerror}", status_of(error) or 1)
    return folder
