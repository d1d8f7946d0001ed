"""Which code ran: commit, branch, and what differed from the commit."""

from __future__ import annotations

import hashlib
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@cache
def git_state() -> dict[str, Any] | None:
    """Commit, branch, names of uncommitted changes, and a hash of those in ``src``; None outside of a git checkout.

    What changes in ``configs`` shows in a run's configuration, where it concerns the run.
    """
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    # New files count where they decide results; what else lies about does not.
    new = (_git("ls-files", "--others", "--exclude-standard", "--", "src") or "").splitlines()
    changed = (_git("status", "--porcelain", "--untracked-files=no") or "").splitlines() + [
        f"?? {name}" for name in new
    ]
    difference = (
        (_git("diff", "HEAD", "--", "src") or "") + "".join(_new_file(name) for name in new) if changed else None
    )
    return {
        "commit": commit,
        "branch": _git("rev-parse", "--abbrev-ref", "HEAD"),
        "dirty": bool(changed),
        "changed": [line[3:] for line in changed][:50],
        "diff_sha256": hashlib.sha256(difference.encode()).hexdigest() if difference else None,
    }


def code_words(git: Any) -> str:
    """A state of the code as ``git_state`` has written it down: b3059359c, or b3059359c with changes 1a2b3c; empty if it is not known.

    Args:
        git: of a record, of any age and from anybody.
    """
    commit, changes = (git.get(key) if isinstance(git, dict) else None for key in ("commit", "diff_sha256"))
    if not isinstance(commit, str) or not commit:
        return ""
    if not git.get("dirty") or ("diff_sha256" in git and changes is None):  # dirty, but not in src
        return commit[:9]
    return f"{commit[:9]} with changes" + (f" {changes[:6]}" if isinstance(changes, str) and changes else "")


def code_of(record: dict[str, Any]) -> str:
    """The states of the code that made a run, first to last: that of its last attempt, and of those that this one has gone on from.

    Args:
        record: run.json.
    """
    states: dict[str, None] = {}
    for attempt in (record, *reversed(record.get("earlier") or [])):
        if words := code_words(attempt.get("git")):
            states.setdefault(words)
        if not attempt.get("resumed_from"):  # what was before it has left nothing in its weights
            break
    return ", then ".join(reversed(list(states)[:20]))


def remarks_on_code(code: Counter[str]) -> list[str]:
    """What to say of runs that are compared, where more than one state of the code has made them.

    Args:
        code: how many runs each state has made, see ``code_of``; runs of which it is not known are silent.
    """
    known = Counter({state: count for state, count in code.items() if state})
    if len(known) < 2:
        return []
    shown = ", ".join(f"{state} ({count} run{'' if count == 1 else 's'})" for state, count in known.most_common(4))
    more = f" and {len(known) - 4} more" if len(known) > 4 else ""
    return [f"its runs were made by {len(known)} states of the code: {shown}{more}"]


def _new_file(name: str) -> str:
    try:
        return f"\n?? {name}\n{hashlib.sha256((ROOT / name).read_bytes()).hexdigest()}"
    except OSError:  # gone meanwhile
        return ""


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], check=False, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None
