"""MLflow, as far as the scheduler needs it: one experiment a team, one run a job, over its REST interface.

Every call may be repeated. A server that is away costs a few seconds at most: one retry, short time-outs.
"""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any, NamedTuple, Protocol

import httpx

JOB_TAG = "brightrun.job_id"
TIMEOUT_S = 3.0
TRIES = 2
ARTIFACT_SCHEME = "mlflow-artifacts:/"
STORE_FOLDER = "mlflow"
"""Where in the object store the server's ``--artifacts-destination`` lies."""


class TrackingDown(Exception):
    """The server does not answer; try again later."""


class TrackingRefused(Exception):
    """The server answered that it will not do this; trying again cannot help."""


class Run(NamedTuple):
    experiment_id: str
    run_id: str
    artifact_prefix: str
    """Prefix of the run's artifacts in the object store."""


class Metric(NamedTuple):
    key: str
    value: float
    timestamp_ms: int
    step: int


class Tracking(Protocol):
    """What the MLflow client and its fake both do. Raises TrackingDown and TrackingRefused."""

    async def ensure_run(self, *, team_id: str, job_id: str, name: str) -> Run:
        """The job's run, found by its tag, created if there is none."""
        ...

    async def log(self, run_id: str, metrics: list[Metric], params: dict[str, str], tags: dict[str, str]) -> None:
        """At most 1000 metrics, params and tags together; repeating them adds nothing."""
        ...

    async def set_status(self, run_id: str, status: str, ended: datetime | None) -> None:
        """``status``: SCHEDULED, RUNNING, FINISHED, FAILED or KILLED."""
        ...

    async def settle(self, run_id: str, *, team_id: str, job_id: str) -> None:
        """Delete any other run of the job: a request that was repeated, or a scheduler that was superseded in the
        middle of it, may have made one."""
        ...

    async def close(self) -> None: ...


class MlflowTracking:
    def __init__(self, url: str) -> None:
        self._http = httpx.AsyncClient(
            base_url=url.rstrip("/") + "/api/2.0/mlflow/", timeout=TIMEOUT_S, trust_env=False
        )

    async def ensure_run(self, *, team_id: str, job_id: str, name: str) -> Run:
        experiment = await self._experiment(f"team-{team_id}")
        found = await self._runs_of(experiment, job_id)
        run = found[0] if found else await self._create_run(experiment, job_id, name)
        info = run["info"]
        return Run(experiment, info["run_id"], artifact_prefix(info["artifact_uri"]))

    async def log(self, run_id: str, metrics: list[Metric], params: dict[str, str], tags: dict[str, str]) -> None:
        await self._call(
            "POST",
            "runs/log-batch",
            {
                "run_id": run_id,
                "metrics": [
                    {"key": m.key, "value": m.value, "timestamp": m.timestamp_ms, "step": m.step} for m in metrics
                ],
                "params": [{"key": key, "value": value} for key, value in params.items()],
                "tags": [{"key": key, "value": value} for key, value in tags.items()],
            },
        )

    async def set_status(self, run_id: str, status: str, ended: datetime | None) -> None:
        update: dict[str, Any] = {"run_id": run_id, "status": status}
        if ended is not None:
            update["end_time"] = int(ended.timestamp() * 1000)
        await self._call("POST", "runs/update", update)

    async def settle(self, run_id: str, *, team_id: str, job_id: str) -> None:
        for run in await self._runs_of(await self._experiment(f"team-{team_id}"), job_id):
            if run["info"]["run_id"] != run_id:
                await self.set_status(run["info"]["run_id"], "KILLED", None)
                await self._call("POST", "runs/delete", {"run_id": run["info"]["run_id"]})

    async def close(self) -> None:
        await self._http.aclose()

    async def _runs_of(self, experiment: str, job_id: str) -> list[dict[str, Any]]:
        wanted = {"experiment_ids": [experiment], "filter": f"tags.`{JOB_TAG}` = '{job_id}'", "max_results": 100}
        return list((await self._call("POST", "runs/search", wanted)).get("runs") or [])

    async def _experiment(self, name: str) -> str:
        """Its id; created if there is none, restored if somebody deleted it: its name stays taken, and takes no run."""
        try:
            found = (await self._call("GET", "experiments/get-by-name", {"experiment_name": name}))["experiment"]
        except TrackingRefused:
            return str((await self._call("POST", "experiments/create", {"name": name}))["experiment_id"])
        if found.get("lifecycle_stage") == "deleted":
            await self._call("POST", "experiments/restore", {"experiment_id": found["experiment_id"]})
        return str(found["experiment_id"])

    async def _create_run(self, experiment: str, job_id: str, name: str) -> dict[str, Any]:
        answer = await self._call(
            "POST",
            "runs/create",
            {
                "experiment_id": experiment,
                "run_name": name,
                "start_time": int(time.time() * 1000),
                "tags": [{"key": JOB_TAG, "value": job_id}],
            },
        )
        return dict(answer["run"])

    async def _call(self, method: str, path: str, content: dict[str, Any]) -> dict[str, Any]:
        problem = ""
        for _ in range(TRIES):
            try:
                if method == "GET":
                    answer = await self._http.get(path, params=content)
                else:
                    answer = await self._http.post(path, json=content)
            except httpx.HTTPError as error:
                problem = repr(error)
                continue
            if answer.is_success:
                return dict(answer.json() or {})
            problem = f"{answer.status_code} {answer.text[:500]}"
            if answer.status_code < 500 and answer.status_code != 429:
                raise TrackingRefused(f"{path}: {problem}")
        raise TrackingDown(f"{path}: {problem}")


def artifact_prefix(uri: str) -> str:
    """``mlflow-artifacts:/E/R/artifacts`` → ``mlflow/E/R/artifacts``."""
    if not uri.startswith(ARTIFACT_SCHEME):
        raise TrackingRefused(f"The MLflow server does not serve artifacts itself: {uri}")
    return f"{STORE_FOLDER}/{uri.removeprefix(ARTIFACT_SCHEME).strip('/')}"
