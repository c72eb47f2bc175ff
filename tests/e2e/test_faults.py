"""Every part is killed with SIGKILL during a job; nothing is lost, nothing is billed twice."""

from __future__ import annotations

import signal
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import TINY
from tests.e2e.house import Client, House, conversations, held_ms_by_ray, jsonl, wait_for

STEPS = 40
RECIPE = {
    "baseModel": TINY,
    "presetId": "balanced",
    "gpuConfig": {"type": "cpu", "count": 1},
    "hyperparameters": {
        "batchSize": 4,
        "maxSteps": STEPS,
        "numEpochs": 20,
        "checkpointSteps": 5,
        "evalSteps": 20,
        "learningRate": 0.001,
    },
}


@pytest.fixture(scope="module")
def dataset(client: Client) -> dict[str, Any]:
    dataset = client.upload(jsonl(conversations(120)), "things", TINY)
    assert dataset["status"] == "READY", dataset
    return dataset


@pytest.fixture(scope="module")
def unbroken(client: Client, dataset: dict[str, Any]) -> str:
    """SHA-256 of the adapter of a run that nothing disturbed."""
    job_id = client.post("/api/jobs", RECIPE | {"datasetId": dataset["id"], "name": "unbroken"})["jobId"]
    job = client.wait_job(job_id, lambda job: job["status"] == "COMPLETED")
    assert len(client.get(f"/api/jobs/{job_id}/attempts")["attempts"]) == 1
    return client.adapter_sha256(job)


def child_of(house: House) -> psutil.Process:
    return wait_for("the trainer child", lambda: next(iter(house.trainer_children()), None), 30)


def victim(house: House, part: str) -> psutil.Process:
    if part == "child":
        return child_of(house)
    if part == "rank":
        parent = child_of(house).parent()
        assert parent is not None
        return parent
    return psutil.Process(house.pids[part])


@pytest.mark.parametrize("part", ["child", "rank", "scheduler", "api"])
def test_a_job_survives_the_death_of(
    part: str, house: House, client: Client, dataset: dict[str, Any], unbroken: str
) -> None:
    job_id = client.post("/api/jobs", RECIPE | {"datasetId": dataset["id"], "name": f"kill {part}"})["jobId"]
    client.wait_job(job_id, lambda job: bool(client.get(f"/api/jobs/{job_id}/checkpoints")["checkpoints"]))
    killed = victim(house, part)
    killed.send_signal(signal.SIGKILL)
    assert part in ("child", "rank") or house.trainer_children(), "the job was over before the kill"

    job = client.wait_job(job_id, lambda job: job["status"] == "COMPLETED")

    assert job["currentStep"] == STEPS
    assert client.adapter_sha256(job) == unbroken
    metrics = client.get(f"/api/jobs/{job_id}/metrics")["metrics"]
    assert [point["step"] for point in metrics] == list(range(1, STEPS + 1))
    attempts = client.get(f"/api/jobs/{job_id}/attempts")["attempts"]
    assert len(attempts) == (2 if part in ("child", "rank") else 1), attempts

    by_attempt = client.compute_ms(job_id)
    ledger = {kind: sum(sums[kind] for sums in by_attempt.values()) for kind in ("billed", "absorbed")}
    price = client.gpu_price_microusd("cpu")
    assert client.micro(job["finalCost"]) == round_half_even(ledger["billed"] * price, 3_600_000)
    held = wait_for("the ranks' ends in Ray", lambda: ended(held_ms_by_ray(house, job_id)), 20, 0.5)
    assert len(held) == len(attempts)
    for attempt in attempts:
        ours, rays = sum(by_attempt[attempt["id"]].values()), held[f"{job_id}/{attempt['number']}/r0"]
        assert abs(ours - rays) <= 250, (attempt["number"], by_attempt, held)
    if part == "rank":
        assert ledger["absorbed"] > 0


def ended(held: dict[str, int]) -> dict[str, int] | None:
    return held if held and all(ms > 0 for ms in held.values()) else None


def round_half_even(numerator: int, denominator: int) -> int:
    whole, rest = divmod(numerator, denominator)
    return whole + (2 * rest > denominator or (2 * rest == denominator and whole % 2 == 1))
