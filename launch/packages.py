"""Our import packages have plain names (`data`, `model`, ...): make sure that Python found ours."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from conf.errors import UserError

PACKAGES = ("conf", "data", "eval", "launch", "model", "train")
ROOT = Path(__file__).resolve().parent.parent


def check_packages() -> None:
    """Raise UserError if one of our package names resolves to something outside the tree this file lies in."""
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        origin = spec.origin if spec is not None else None
        if origin is None or Path(origin).resolve().parent != ROOT / name:
            found = origin or (list(spec.submodule_search_locations or []) if spec is not None else "nothing")
            raise UserError(
                f"the Python package '{name}' resolves to {found}, not to {ROOT / name}: "
                "another package of that name comes first; use a virtual environment of its own and leave "
                "PYTHONPATH unset"
            )
