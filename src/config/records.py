"""Which computation the results in a run's folder are of, whichever version wrote them."""

from __future__ import annotations

from src.config.identity import experiment_hash
from src.runs.runs import FINISHED, Run
from src.runs.schema import IDENTITY


def hash_of(run: Run) -> str | None:
    """What names the computation whose results lie in a run's folder; None without results.

    Before version 0.2.0 it was a hash of another kind: it is taken anew of ``config.yaml``.
    """
    recorded = run.results.get("config_hash")
    if recorded is None or run.results.get("identity") == IDENTITY:
        return recorded
    config = run.config
    if run.results.get("identity") is not None or recorded != run.record.get("config_hash") or not config:
        return recorded  # of a later version; or the configuration is no longer that of the results
    model, composed = config.get("model"), run.composed.get("model")
    if isinstance(model, dict) and isinstance(composed, dict) and composed.get("vocab_size") is None:
        model["vocab_size"] = None  # the data filled it in
    try:
        return experiment_hash(config)
    except (TypeError, ValueError, AttributeError, RecursionError):  # a stranger's, or damaged
        return recorded


def has_finished(run: Run, config_hash: str) -> bool:
    """Whether a run of exactly this configuration has ended well in the folder."""
    if run.status != FINISHED:
        return False
    return config_hash == run.results.get("config_hash") or config_hash == hash_of(run)
