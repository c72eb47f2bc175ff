"""The MLflow client and its fake do the same."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest

from control_plane.cli.parts import MLFLOW_HARDENING
from control_plane.tables import uuid7
from scheduler.tracking import Metric, MlflowTracking, Run, Tracking, TrackingDown, TrackingRefused, artifact_prefix
from tests.fake_tracking import FakeTracking

START_S = 90.0


@pytest.fixture(scope="module")
def mlflow_url() -> Iterator[str]:
    """A real server on a database and an artifact folder of its own."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        command = [sys.executable, "-m", "mlflow", "server", f"--backend-store-uri=sqlite:///{folder}/mlflow.db"]
        command += [f"--artifacts-destination=file://{folder}/objects/mlflow", f"--port={port}", "--workers=1"]
        output = Path(folder, "log").open("wb")  # noqa: SIM115
        server = subprocess.Popen(
            command, env=os.environ | MLFLOW_HARDENING, stdout=output, stderr=output, start_new_session=True
        )
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_for(f"{url}/health", server)
            yield url
        finally:
            os.killpg(server.pid, 15)
            server.wait(30)
            output.close()


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise AssertionError("MLflow did not start")


class Subject(Protocol):
    tracking: Tracking

    async def run(self, run: Run) -> dict[str, Any]:
        """status, ended (ms), metrics [(key, step, value)], params, tags of ours."""
        ...

    async def stray(self, team_id: str, job_id: str) -> str:
        """Another run with the job's tag; its id."""
        ...

    async def is_there(self, run_id: str) -> bool: ...

    async def delete_experiment(self, experiment_id: str) -> None:
        """As somebody may in MLflow's own pages."""
        ...

    async def is_deleted(self, experiment_id: str) -> bool: ...


class Fake:
    def __init__(self) -> None:
        self.tracking = FakeTracking()

    async def run(self, run: Run) -> dict[str, Any]:
        found = self.tracking.runs[run.run_id]
        return {
            "status": found.status,
            "ended": int(found.ended.timestamp() * 1000) if found.ended else None,
            "metrics": sorted((key, step, value) for (key, step, _), value in found.metrics.items()),
            "params": found.params,
            "tags": {key: value for key, value in found.tags.items() if key.startswith("brightrun.")},
        }

    async def stray(self, team_id: str, job_id: str) -> str:
        return self.tracking.stray(team_id=team_id, job_id=job_id, name="a stray").run_id

    async def is_there(self, run_id: str) -> bool:
        return run_id in self.tracking.runs

    async def delete_experiment(self, experiment_id: str) -> None:
        self.tracking.deleted.add(experiment_id)

    async def is_deleted(self, experiment_id: str) -> bool:
        return experiment_id in self.tracking.deleted


class Real:
    """What the server holds, by its own client."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.tracking = MlflowTracking(url)

    async def run(self, run: Run) -> dict[str, Any]:
        from mlflow.tracking import MlflowClient

        client = MlflowClient(self.url)
        found = client.get_run(run.run_id)
        assert found.info.experiment_id == run.experiment_id
        assert artifact_prefix(found.info.artifact_uri) == run.artifact_prefix
        history = [point for key in found.data.metrics for point in client.get_metric_history(run.run_id, key)]
        return {
            "status": found.info.status,
            "ended": found.info.end_time or None,
            "metrics": sorted((point.key, point.step, point.value) for point in history),
            "params": found.data.params,
            "tags": {
                key: value
                for key, value in found.data.tags.items()
                if key.startswith("brightrun.") and key != "brightrun.job_id"
            },
        }

    async def stray(self, team_id: str, job_id: str) -> str:
        from mlflow.tracking import MlflowClient

        client = MlflowClient(self.url)
        experiment = client.get_experiment_by_name(f"team-{team_id}")
        return str(client.create_run(experiment.experiment_id, tags={"brightrun.job_id": job_id}).info.run_id)

    async def is_there(self, run_id: str) -> bool:
        from mlflow.tracking import MlflowClient

        info = MlflowClient(self.url).get_run(run_id).info
        assert (info.lifecycle_stage == "active") is (info.status != "KILLED")
        return bool(info.lifecycle_stage == "active")

    async def delete_experiment(self, experiment_id: str) -> None:
        from mlflow.tracking import MlflowClient

        MlflowClient(self.url).delete_experiment(experiment_id)

    async def is_deleted(self, experiment_id: str) -> bool:
        from mlflow.tracking import MlflowClient

        return bool(MlflowClient(self.url).get_experiment(experiment_id).lifecycle_stage == "deleted")


@pytest.fixture(params=["fake", "mlflow"])
async def subject(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    subject: Subject = Fake() if request.param == "fake" else Real(request.getfixturevalue("mlflow_url"))
    yield subject
    await subject.tracking.close()


async def new_run(subject: Subject) -> Run:
    return await subject.tracking.ensure_run(team_id=uuid7(), job_id=uuid7(), name="a job")


async def test_a_job_has_one_run_in_its_teams_experiment(subject: Subject) -> None:
    team, other, job = uuid7(), uuid7(), uuid7()
    first = await subject.tracking.ensure_run(team_id=team, job_id=job, name="a job")
    again = await subject.tracking.ensure_run(team_id=team, job_id=job, name="renamed")
    sibling = await subject.tracking.ensure_run(team_id=team, job_id=uuid7(), name="another")
    stranger = await subject.tracking.ensure_run(team_id=other, job_id=uuid7(), name="a job")
    assert first == again
    assert first.run_id != sibling.run_id
    assert first.experiment_id == sibling.experiment_id != stranger.experiment_id
    assert first.artifact_prefix == f"mlflow/{first.experiment_id}/{first.run_id}/artifacts"
    assert (await subject.run(first))["status"] == "RUNNING"


async def test_a_deleted_experiment_is_restored(subject: Subject) -> None:
    team, job = uuid7(), uuid7()
    first = await subject.tracking.ensure_run(team_id=team, job_id=job, name="a job")
    await subject.delete_experiment(first.experiment_id)
    assert await subject.is_deleted(first.experiment_id)
    second = await subject.tracking.ensure_run(team_id=team, job_id=uuid7(), name="another")
    assert (second.experiment_id, await subject.is_deleted(first.experiment_id)) == (first.experiment_id, False)
    assert await subject.tracking.ensure_run(team_id=team, job_id=job, name="a job") == first
    assert (await subject.run(second))["status"] == "RUNNING"


async def test_repeating_adds_nothing(subject: Subject) -> None:
    run = await new_run(subject)
    metrics = [Metric("training_loss", 1 / step, 1_700_000_000_000 + step, step) for step in range(1, 450)]
    metrics += [Metric("learning_rate", 1e-4, 1_700_000_000_000 + step, step) for step in range(1, 450)]
    for _ in range(2):
        await subject.tracking.log(run.run_id, metrics, {"loraRank": "8"}, {"brightrun.status": "RUNNING"})
    held = await subject.run(run)
    assert held["metrics"] == sorted((m.key, m.step, m.value) for m in metrics)
    assert (held["params"], held["tags"]) == ({"loraRank": "8"}, {"brightrun.status": "RUNNING"})


async def test_a_run_ends_when_its_job_did(subject: Subject) -> None:
    ended = datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)
    for status in ("FINISHED", "FAILED", "KILLED"):
        run = await new_run(subject)
        await subject.tracking.set_status(run.run_id, "SCHEDULED", None)
        assert (await subject.run(run))["status"] == "SCHEDULED"
        for _ in range(2):
            await subject.tracking.set_status(run.run_id, status, ended)
        held = await subject.run(run)
        assert (held["status"], held["ended"]) == (status, int(ended.timestamp() * 1000))


async def test_runs_that_a_superseded_scheduler_made_are_deleted_at_the_end(subject: Subject) -> None:
    team, job = uuid7(), uuid7()
    run = await subject.tracking.ensure_run(team_id=team, job_id=job, name="a job")
    strays = [await subject.stray(team, job) for _ in range(2)]
    sibling = await subject.tracking.ensure_run(team_id=team, job_id=uuid7(), name="another")
    for _ in range(2):
        await subject.tracking.settle(run.run_id, team_id=team, job_id=job)
    there = [await subject.is_there(run_id) for run_id in (run.run_id, sibling.run_id, *strays)]
    assert there == [True, True, False, False]
    assert await subject.tracking.ensure_run(team_id=team, job_id=job, name="a job") == run


async def test_what_cannot_be_is_refused(subject: Subject) -> None:
    run = await new_run(subject)
    await subject.tracking.log(run.run_id, [], {"loraRank": "8"}, {})
    with pytest.raises(TrackingRefused):
        await subject.tracking.log(run.run_id, [], {"loraRank": "9"}, {})
    with pytest.raises(TrackingRefused):
        await subject.tracking.set_status("0" * 32, "RUNNING", None)
    with pytest.raises(TrackingRefused):
        await subject.tracking.log(run.run_id, [Metric("loss", 1.0, 1, step) for step in range(1000)], {}, {"a": "b"})


async def test_a_server_that_is_away_is_down_within_seconds() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{silent.getsockname()[1]}"
        silent.close()
        tracking = MlflowTracking(closed)
        started = time.monotonic()
        with pytest.raises(TrackingDown):
            await tracking.ensure_run(team_id="t", job_id="j", name="n")
        assert time.monotonic() - started < 3
        await tracking.close()


async def test_a_server_that_does_not_answer_is_down_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.tracking.TIMEOUT_S", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        tracking = MlflowTracking(f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(TrackingDown):
            await tracking.log("run", [], {}, {})
        assert 0.3 <= time.monotonic() - started < 3
        await tracking.close()


def test_only_a_server_that_serves_artifacts_will_do() -> None:
    assert artifact_prefix("mlflow-artifacts:/7/abc/artifacts") == "mlflow/7/abc/artifacts"
    with pytest.raises(TrackingRefused):
        artifact_prefix("file:///elsewhere/7/abc/artifacts")
