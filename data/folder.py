"""Folders that appear complete or not at all, built by one process at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conf.errors import UserError


class Unfinished(UserError):
    """The work stopped half-way, and can be continued."""


@contextmanager
def exclusive_sibling(out: Path) -> Iterator[Path]:
    """A folder `.tmp-<name>` beside `out`, to be filled and then published under its name.

    The folder itself is the lock: a second process waits here until the first is done. It may hold what a killed
    or failed process left behind (see `clear`). A UserError removes it; Unfinished, a kill or a fault leaves it to
    be continued.
    """
    tmp = out.parent / f".tmp-{out.name}"
    tmp.parent.mkdir(parents=True, exist_ok=True)
    while True:
        tmp.mkdir(exist_ok=True)
        lock = os.open(tmp, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_still(tmp, lock):
            break
        os.close(lock)  # its holder published or removed it while we waited
    try:
        yield tmp
    except BaseException as error:
        bad_input = isinstance(error, UserError) and not isinstance(error, Unfinished)
        if bad_input or (_is_still(tmp, lock) and not any(tmp.iterdir())):
            _remove(tmp, lock)
        raise
    else:
        _remove(tmp, lock)
    finally:
        os.close(lock)


def clear(tmp: Path) -> None:
    """Remove everything in the folder."""
    for leftover in tmp.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _remove(tmp: Path, lock: int) -> None:
    if _is_still(tmp, lock):  # not published, and not the folder of the next process
        shutil.rmtree(tmp, ignore_errors=True)


def publish(tmp: Path, out: Path) -> None:
    """Give `tmp` its final name, durably, in one step. `out` may be an empty folder; OSError if it is not."""
    _fsync(tmp)
    tmp.rename(out)
    _fsync(out.parent)


def _is_still(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _fsync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
