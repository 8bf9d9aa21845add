"""A study from its plan to its page: data, workers, results."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from conf.schema import StudyConfig
from launch.local import usable_cores
from launch.packages import ROOT
from launch.study.places import Places
from launch.study.plan import Plan, arms_of, load_plan, scale_of


def run(config: StudyConfig) -> int:
    """Run what of the study is not done yet, then write its page. Returns the exit code."""
    plan = load_plan(config.name)
    places, values = Places.of(config), scale_of(plan, config)
    code = 0
    if not config.report:
        code = _speed(plan, config, places) if plan.timed else _train_arms(plan, config, places, values)
    from launch.study.page import write_page

    print(f"page: {write_page(plan, config, places)}", flush=True)
    return code


def _speed(plan: Plan, config: StudyConfig, places: Places) -> int:
    from launch.study.speed import measure_speed

    measure_speed(plan, scale_of(plan, config), places)
    return 0


def _train_arms(plan: Plan, config: StudyConfig, places: Places, values: dict[str, Any]) -> int:
    from launch.study.sets import describe_text, ensure_sets

    arms = arms_of(plan, config)
    left = [arm for arm in arms if not places.result(arm).is_file()]
    print(f"study {config.name}, scale {config.scale}: {len(left)} of {len(arms)} arms to run", flush=True)
    if not left:
        return 0
    ensure_sets(plan, config, places, values)
    describe_text(places)
    code = start_workers(config, places)
    missing = [arm.name for arm in arms if not places.result(arm).is_file()]
    if missing:
        print(f"not run: {', '.join(missing)}", flush=True)
    return code


def start_workers(config: StudyConfig, places: Places) -> int:
    """Start `config.workers` processes, wait for all, and return the first code that is not 0."""
    places.runs.mkdir(parents=True, exist_ok=True)
    request = places.runs / f"request-{config.name}-{os.getpid()}.json"  # several studies may share the folder
    deadline = time.time() + 60 * config.minutes if config.minutes else 0
    request.write_text(json.dumps({"config": asdict(config), "deadline": deadline}), encoding="utf-8")
    children = []
    try:
        for _ in range(config.workers):
            command = [sys.executable, "-m", "launch.study.worker", str(request)]
            children.append(subprocess.Popen(command, env=_environment(config.workers)))
        codes = [child.wait() for child in children]
    finally:
        for child in children:
            with suppress(ProcessLookupError):
                child.terminate()
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


def _environment(workers: int) -> dict[str, str]:
    """Of a worker: a process group of one, its share of the cores, and our packages first."""
    env = dict(os.environ)
    threads = max(1, usable_cores() // workers)
    env.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    env.update(OMP_NUM_THREADS=env.get("OMP_NUM_THREADS", str(threads)), TOKENIZERS_PARALLELISM="false")
    env["PYTHONWARNINGS"] = ",".join(filter(None, (env.get("PYTHONWARNINGS"), "ignore::FutureWarning")))
    env["PYTHONSAFEPATH"] = "1"
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    return env


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
