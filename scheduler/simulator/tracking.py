"""MLflow in memory. It passes the same contract tests as the real server (``tests/integration/scheduler``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from scheduler.tracking import Metric, Run, TrackingDown, TrackingRefused


@dataclass
class FakeRun:
    run: Run
    name: str
    job_id: str = ""
    status: str = "RUNNING"
    ended: datetime | None = None
    metrics: dict[tuple[str, int, int], float] = field(default_factory=dict)
    """(key, step, timestamp) → value."""
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def history(self, key: str) -> list[tuple[int, float]]:
        """(step, value), in order."""
        return sorted((step, value) for (name, step, _), value in self.metrics.items() if name == key)


class FakeTracking:
    """``down``: the server does not answer."""

    def __init__(self) -> None:
        self.down = False
        self.runs: dict[str, FakeRun] = {}
        self._made = 0
        self._by_job: dict[str, str] = {}
        self._experiments: dict[str, str] = {}
        self.deleted: set[str] = set()
        """Experiments that somebody has deleted; they take no run until they are restored."""

    async def ensure_run(self, *, team_id: str, job_id: str, name: str) -> Run:
        self._answer()
        self.deleted.discard(self._experiments.get(team_id, ""))
        if job_id not in self._by_job:
            self._by_job[job_id] = self.stray(team_id=team_id, job_id=job_id, name=name).run_id
        return self.runs[self._by_job[job_id]].run

    def stray(self, *, team_id: str, job_id: str, name: str) -> Run:
        """A further run with the job's tag, as a repeated request makes it."""
        experiment = self._experiments.setdefault(team_id, str(len(self._experiments) + 1))
        self._made += 1
        run_id = f"run{self._made}"
        run = Run(experiment, run_id, f"mlflow/{experiment}/{run_id}/artifacts")
        self.runs[run_id] = FakeRun(run, name, job_id=job_id)
        return run

    async def log(self, run_id: str, metrics: list[Metric], params: dict[str, str], tags: dict[str, str]) -> None:
        run = self._run(run_id)
        if len(metrics) + len(params) + len(tags) > 1000:
            raise TrackingRefused("at most 1000 at once")
        if any(run.params.get(key, value) != value for key, value in params.items()):
            raise TrackingRefused("a param cannot be changed")
        run.metrics |= {(m.key, m.step, m.timestamp_ms): m.value for m in metrics}
        run.params |= params
        run.tags |= tags

    async def set_status(self, run_id: str, status: str, ended: datetime | None) -> None:
        run = self._run(run_id)
        run.status, run.ended = status, ended or run.ended

    async def settle(self, run_id: str, *, team_id: str, job_id: str) -> None:
        self._answer()
        self.runs = {key: run for key, run in self.runs.items() if key == run_id or run.job_id != job_id}

    async def close(self) -> None: ...

    def of_job(self, job_id: str) -> FakeRun:
        return self.runs[self._by_job[job_id]]

    def _answer(self) -> None:
        if self.down:
            raise TrackingDown("down")

    def _run(self, run_id: str) -> FakeRun:
        self._answer()
        if run_id not in self.runs:
            raise TrackingRefused("no such run")
        return self.runs[run_id]
