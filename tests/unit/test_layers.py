"""The contracts between the layers do fail when a layer is crossed: a copy of the code with one crossing for each."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CROSSINGS = {
    "scheduler → control_plane → the torch-free part of trainer; never the other way": (
        "trainer/schedule.py",
        "import scheduler.policy",
    ),
    "control_plane and scheduler see only the torch-free contracts of trainer": (
        "control_plane/services/quality.py",
        "import trainer.verdict",
    ),
    "layers of the control plane": ("control_plane/db.py", "import control_plane.services.jobs"),
    "the scheduler leaves alone what answers requests": ("scheduler/work.py", "import control_plane.api.jobs"),
    "MLflow is the scheduler's to speak to": ("control_plane/services/jobs.py", "import mlflow"),
    "ray only in scheduler.cluster": ("scheduler/work.py", "import ray"),
    "torch and its family only in trainer": ("control_plane/money.py", "import torch"),
    "policy and states are pure": ("scheduler/policy.py", "import asyncio"),
}


def test_every_contract_notices_its_crossing(tmp_path: Path) -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert {contract["name"] for contract in contracts} == set(CROSSINGS)
    for package in ("control_plane", "scheduler", "trainer"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file, line in CROSSINGS.values():
        with (tmp_path / file).open("a") as module:
            module.write(f"\n{line}\n")

    linter = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    done = subprocess.run(
        linter, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )

    assert done.returncode == 1, done.stderr
    broken = re.findall(r"^(.+) BROKEN", done.stdout, re.MULTILINE)
    assert set(broken) == set(CROSSINGS), done.stdout
