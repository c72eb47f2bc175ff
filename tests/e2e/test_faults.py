"""Ten kills of a real installation and other faults between them, by the benchmark's own command: nothing is lost,
nothing is billed twice, nothing is left."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.e2e.house import REPO
from tests.warden import warden

KILLS, SEED = 10, 119
KINDS = {"api", "scheduler", "standby", "mlflow", "supervisor", "rank", "child", "raylet", "head"}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command has found; its lines stand in the output of a test that fails."""
    file = tmp_path_factory.mktemp("faults") / "faults.json"
    command = [sys.executable, "-m", "benchmarks.faults", f"--kills={KILLS}", f"--seed={SEED}", f"--json={file}"]
    command += ["--flavour=production"]  # has all that can be killed
    process = subprocess.Popen(command, cwd=REPO)
    try:
        with warden(f"kill -TERM {process.pid}"):
            process.wait(1200)
    finally:
        process.terminate()
        process.wait()
    answer: dict[str, Any] = json.loads(file.read_text())
    assert answer["well"] is (process.returncode == 0)
    return answer


@pytest.fixture(scope="module")
def jobs(told: dict[str, Any]) -> list[dict[str, Any]]:
    return [job for house in told["houses"] for job in house["jobs"]]


@pytest.fixture(scope="module")
def strikes(told: dict[str, Any]) -> list[dict[str, Any]]:
    return [strike for house in told["houses"] for strike in house["injected"]]


def test_every_part_was_killed_while_a_job_was_there(told: dict[str, Any], strikes: list[dict[str, Any]]) -> None:
    faults = [fault for strike in strikes for fault in strike["faults"]]
    assert told["kills"] == KILLS == sum(fault.startswith("kill ") for fault in faults)
    assert {fault.removeprefix("kill ") for fault in faults} >= KINDS
    assert len(faults) > KILLS, "no other faults"
    assert {strike["status"] for strike in strikes} <= {"QUEUED", "INITIALIZING", "RUNNING"}


def test_they_came_in_more_than_one_phase_of_a_job(strikes: list[dict[str, Any]]) -> None:
    assert len({strike["phase"] for strike in strikes}) > 2
    assert any(strike["status"] != "RUNNING" for strike in strikes)


def test_every_job_completed_with_the_unbroken_adapter(jobs: list[dict[str, Any]]) -> None:
    assert [job["wrong"] for job in jobs if job["wrong"]] == []
    assert len(jobs) > 2
    assert {job["status"] for job in jobs} == {"COMPLETED"}
    assert len({job["sha256"] for job in jobs}) == 1


def test_what_was_held_was_billed_or_absorbed(jobs: list[dict[str, Any]]) -> None:
    assert all(job["forgotten"] <= job["clusters_lost"] for job in jobs)
    assert sum(job["compared"] for job in jobs) >= len(jobs)
    assert sum(job["faults"] for job in jobs) > 3
    assert max(job["worst_difference_ms"] for job in jobs) <= 250
    assert any(job["absorbed_ms"] > 0 for job in jobs)
    assert all(job["billed_ms"] > 0 for job in jobs)


def test_nothing_was_left(told: dict[str, Any]) -> None:
    assert [(house["leaked"], house["wrong"]) for house in told["houses"]] == [([], [])] * len(told["houses"])


def test_the_probe_missed_no_answer_but_after_a_death_of_the_api(told: dict[str, Any]) -> None:
    for house in told["houses"]:
        assert house["questions_per_s"] >= 4.5
        assert house["bad_answers"] == []
        assert max(house["api_back_s"]) <= 5.0


def test_the_command_says_that_all_is_well(told: dict[str, Any]) -> None:
    if told["skipped"]:
        assert not told["well"]
        pytest.skip(f"this machine does not allow {told['skipped']}")
    assert told["well"]
    assert told["versions"]["ray"]
    assert told["seed"] == SEED
