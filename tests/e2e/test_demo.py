"""The demo, shortened: one job on the real model and real conversations, from the account to the checked adapter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.e2e.house import REPO, Client
from tests.e2e.test_up import mentions

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def told(folder: Path) -> str:
    """What the demo printed."""
    env = os.environ | {
        "DEMO_STEPS": str(STEPS),
        "DEMO_CONVERSATIONS": "60",
        "DEMO_REPORT": str(folder / "report.json"),
        "DEMO_OUTPUT": str(folder / "output"),
        "TMPDIR": str(folder),
    }
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo"], cwd=REPO, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def report(told: str, folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


def test_the_report_has_its_keys(report: Any) -> None:
    assert {key: set(value) if isinstance(value, dict) else None for key, value in report.items()} == {
        "dataset": {"conversations", "tokens", "learnedTokens", "errors"},
        "job": {"id", "status", "steps", "attempts"},
        "loss": {"before", "after"},
        "tokensPerSecond": None,
        "gpuMs": None,
        "pricePerGpuHour": None,
        "finalCost": None,
        "estimate": {"p10", "p50", "p90"},
        "adapterDir": None,
        "mlflow": {"trackingUri", "experimentId", "runId"},
        "urls": {"api", "mlflow", "ray"},
    }


def test_the_real_model_has_learned(report: Any) -> None:
    assert report["job"]["status"] == "COMPLETED"
    assert report["job"]["steps"] == STEPS
    assert report["job"]["attempts"] == 1
    assert report["dataset"]["conversations"] == 60
    assert report["dataset"]["errors"] == 0
    assert 0 < report["dataset"]["learnedTokens"] < report["dataset"]["tokens"]
    assert 2 < report["loss"]["after"] < report["loss"]["before"] < 6


def test_the_bill_is_time_times_price(report: Any) -> None:
    price = Client.micro(report["pricePerGpuHour"])
    assert abs(Client.micro(report["finalCost"]) - report["gpuMs"] * price / 3_600_000) <= 0.5
    assert report["gpuMs"] > 1000


def test_the_adapter_stays(report: Any) -> None:
    weights = load_file(Path(report["adapterDir"]) / "adapter_model.safetensors")
    assert any("lora_B" in name and weight.any() for name, weight in weights.items())


def test_it_tells_what_it_did(told: str, report: Any) -> None:
    for line in (
        "plain peft loads it",
        "with lora_B zeroed by 0",
        "MLflow: FINISHED, 6 steps",
        "answer before",
        "in all",
    ):
        assert line in told, line
    assert f"{STEPS}/{STEPS}" in told
    assert report["mlflow"]["runId"] in told


def test_it_leaves_nothing_running(report: Any, folder: Path) -> None:
    assert mentions(str(folder)) == []
    assert not list(folder.glob("brightrun-demo-*"))
