"""Where a measurement was made: GPU, versions, commit, date. Stored beside every number."""

from __future__ import annotations

import datetime
import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMIT_VARIABLE = "LONGMOBA_COMMIT"
COMMIT_FILE = "COMMIT"  # beside the packages, for copies of the sources without their history
_HASH = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")


def environment(gpu: str) -> dict[str, str]:
    """gpu, torch, triton, commit, date (ISO, UTC)."""
    import torch
    import triton

    return {
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
        "date": today(),
    }


def today() -> str:
    """The date, ISO, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def commit(root: Path = ROOT) -> str:
    """The full hash of the checkout at `root`, or "unknown".

    Without history of its own (a copied tree, or a fresh repository around one) the environment variable
    LONGMOBA_COMMIT counts, then a file COMMIT at the root; also where sources differ from the history's last
    commit, which is named only if nothing else is.
    """
    stored, history = root / COMMIT_FILE, _from_git(root)
    named = [os.environ.get(COMMIT_VARIABLE, ""), stored.read_text() if stored.is_file() else ""]
    named.insert(2 if history and _changed(root) else 0, history)
    return next((text.strip() for text in named if _HASH.fullmatch(text.strip())), "unknown")


def _from_git(root: Path) -> str:
    """git's answer, if `root` is the top of a repository: one around it would name some other project's commit.

    --verify: without it git repeats the word HEAD where there is no commit yet.
    """
    if not (root / ".git").exists():
        return ""
    try:
        done = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def _changed(root: Path) -> bool:
    """Whether tracked Python files differ from the last commit."""
    return _git(root, "diff", "--quiet", "HEAD", "--", "*.py").returncode != 0


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ("git", "-c", f"safe.directory={root}", "-C", str(root), *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=False)
