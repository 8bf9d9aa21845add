"""What a job runs that starts later or elsewhere: code and configuration as they were when it was submitted."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
from pathlib import Path

from conf.load import save_config
from conf.schema import TrainConfig
from launch.packages import PACKAGES, ROOT


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """`config` for a process in another working folder: every path in it that exists, and `out`, made absolute."""
    config = copy.deepcopy(config)
    config.out = _absolute(config.out)
    config.init.hf, config.init.checkpoint = map(_if_there, (config.init.hf, config.init.checkpoint))
    config.data.tokenizer.path = _if_there(config.data.tokenizer.path)
    for one in config.data.sets.values():
        one.path, one.source = _absolute(one.path), _if_there(one.source)
    return config


def save_code(folder: Path) -> Path:
    """Copy our packages to `folder/code-DIGEST`, named by what is in them; returns that path, absolute.

    The same code is copied once. `COMMIT` beside the packages names the commit they are of, if there is one.
    """
    files = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*")) if _is_source(path)]
    digest = hashlib.sha256()
    for path in files:
        data = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(data)}\n".encode() + data)
    final = folder.resolve() / f"code-{digest.hexdigest()[:12]}"
    if final.is_dir():
        return final
    temporary = final.with_name(f".tmp-{final.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    for path in files:
        target = temporary / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    _name_commit(temporary)
    temporary.rename(final)
    return final


def save_job_config(config: TrainConfig, folder: Path) -> Path:
    """Write the configuration for a job to `folder/config-DIGEST.yaml`; returns that path, absolute.

    A later submission with other settings writes another file: jobs that wait already keep theirs.
    """
    temporary = folder.resolve() / f".tmp-config-{os.getpid()}.yaml"
    save_config(with_absolute_paths(config), temporary, comment="what the job reads, with absolute paths")
    name = f"config-{hashlib.sha256(temporary.read_bytes()).hexdigest()[:12]}.yaml"
    return temporary.replace(temporary.with_name(name))


def _name_commit(folder: Path) -> None:
    from eval.bench.environment import COMMIT_FILE, commit

    (folder / COMMIT_FILE).write_text(commit(ROOT) + "\n", encoding="utf-8")


def _is_source(path: Path) -> bool:
    return path.is_file() and path.suffix != ".pyc" and not path.name.startswith(".")


def _absolute(path: str) -> str:
    return str(Path(path).resolve())


def _if_there(path: str) -> str:
    """Names that are no paths (a hub data set, `stdlib`) stay as they are."""
    return _absolute(path) if path and Path(path).exists() else path
