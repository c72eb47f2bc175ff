"""What must not be left: in the installation when its jobs are over, on the machine when it has ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
import psutil

from benchmarks.chaos import sandbox, victims
from benchmarks.chaos.installation import Installation

SETTLE_S = 120.0
"""Releases, uploads' ends and MLflow's mirror may take so long after the last job."""
RAY_NOW = """
import json, sys, ray
from ray._private import state
ray.init(address=sys.argv[1], namespace="brightrun", logging_level="ERROR", log_to_driver=False)
names = [a["Name"] for a in state.actors().values() if a["State"] != "DEAD" and "/" in a["Name"]]
total, free = ray.cluster_resources(), ray.available_resources()
held = [name for name in total if name.startswith(("slot_", "GPU")) and free.get(name, 0) < total[name]]
groups = [g["name"] for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
print(json.dumps([f"Ray actor {n}" for n in names] + [f"held {n}" for n in held] + [f"Ray group {g}" for g in groups]))
"""


def ledger_violations(installation: Installation) -> list[str]:
    """What ``brightrun ledger verify`` says, unless that all is well."""
    command = [sys.executable, "-m", "control_plane.cli", "ledger", "verify", "--all"]
    done = subprocess.run(
        command, env=installation.environment(), capture_output=True, text=True, timeout=120, check=False
    )
    return [] if done.returncode == 0 else [f"ledger verify: {done.stdout} {done.stderr}"]


def of_attempts(installation: Installation) -> list[str]:
    """Trainers, ranks and supervisors that outlive their jobs, and processes that stand still."""
    return _settled(lambda: [_told(process) for process in victims.of_attempts(installation)])


def left_in(installation: Installation) -> list[str]:
    """Ray names, slots, running MLflow runs and work folders that stay although every job is over."""
    found: list[str] = []
    for look in (_in_ray, _in_mlflow, _in_folders):
        found += _settled(partial(look, installation))
    return found


def mlflow_answers(installation: Installation) -> bool:
    try:
        return httpx.get(f"{installation.house.urls['mlflow']}/health", timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def processes(folder: Path) -> list[str]:
    """Processes that outlived the installation in ``folder``."""

    def look() -> list[str]:
        if sandbox.is_inside():
            return [_told(process) for process in sandbox.others()]
        lines = (_told(process) for process in psutil.process_iter() if process.pid != os.getpid())
        return [line for line in lines if str(folder) in line]

    return _settled(look, 10)


def _told(process: psutil.Process) -> str:
    try:
        return f"process {process.pid}: {' '.join(process.cmdline())[:150] or process.name()}"
    except psutil.Error:
        return f"process {process.pid}"


def _settled(look: Callable[[], list[str]], timeout_s: float = SETTLE_S) -> list[str]:
    deadline = time.monotonic() + timeout_s
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(1)
    return found


def _in_ray(installation: Installation) -> list[str]:
    env = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(installation.data_dir / "ray_token"),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    command = [sys.executable, "-c", RAY_NOW, installation.house.answer["rayAddress"]]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=90, check=False)
    if done.returncode != 0:
        return [f"Ray cannot be asked: {done.stderr[-300:]}"]
    return list(json.loads(done.stdout.strip().splitlines()[-1]))


def _in_mlflow(installation: Installation) -> list[str]:
    url = f"{installation.house.urls['mlflow']}/api/2.0/mlflow"
    with httpx.Client(timeout=20, trust_env=False) as http:
        experiments = http.get(f"{url}/experiments/search", params={"max_results": 100}).json()["experiments"]
        wanted = {"experiment_ids": [e["experiment_id"] for e in experiments], "max_results": 1000}
        runs = http.post(f"{url}/runs/search", json=wanted).json().get("runs", [])
    open_ = [run["info"] for run in runs if run["info"]["status"] != "FINISHED"]
    return [f"MLflow run {info['run_name']}: {info['status']}" for info in open_]


def _in_folders(installation: Installation) -> list[str]:
    work = installation.data_dir / "work"
    return [f"work folder {entry.name}" for entry in work.iterdir()] if work.is_dir() else []
