"""The main job on the real model and real conversations: the demo itself, on a smaller scale."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.e2e.house import REPO, Client

KEYS = {
    "dataset": {"conversations", "tokens", "learnedTokens", "errors"},
    "job": {"id", "status", "steps", "attempts"},
    "loss": {"before", "after"},
    "estimate": {"p10", "p50", "p90"},
    "mlflow": {"trackingUri", "experimentId", "runId"},
    "urls": {"api", "mlflow", "ray"},
}
STEPS = 8


def test_the_demo_takes_real_conversations_to_a_real_adapter(tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    env = os.environ | {"DEMO_STEPS": str(STEPS), "DEMO_CONVERSATIONS": "120", "DEMO_REPORT": str(report_file)}
    env["DEMO_OUTPUT"] = str(tmp_path / "output")

    done = subprocess.run(
        [sys.executable, "-m", "examples.demo"], cwd=REPO, env=env, capture_output=True, text=True, timeout=600
    )

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads(report_file.read_text())
    for name, keys in KEYS.items():
        assert set(report[name]) == keys
    assert report["dataset"]["conversations"] == 120
    assert 0 < report["dataset"]["learnedTokens"] < report["dataset"]["tokens"]
    assert report["dataset"]["errors"] == 0
    assert report["job"] | {"id": ""} == {"id": "", "status": "COMPLETED", "steps": STEPS, "attempts": 1}
    assert 0 < report["loss"]["after"] < report["loss"]["before"] < 10
    assert report["tokensPerSecond"] > 0
    due = report["gpuMs"] * Client.micro(report["pricePerGpuHour"]) / 3_600_000
    assert abs(Client.micro(report["finalCost"]) - due) <= 0.5
    config = json.loads((Path(report["adapterDir"]) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config["revision"]
    assert (Path(report["adapterDir"]) / "adapter_model.safetensors").stat().st_size > 1_000_000
