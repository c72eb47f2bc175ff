"""Asks `GET /api/jobs/{id}` five times a second, whatever happens, and tells which silences are excused."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field

import httpx

PERIOD_S = 0.2
RATE = 0.9
"""So much of five questions a second must have been asked."""
ANSWER_S = 5.0
"""A question that has waited so long has got no answer."""
BACK_S = 60.0
"""An API that does not answer for so long is not waited for any more."""
EXCUSED_S = 5.0
"""After the API itself was killed."""
DATABASE_BACK_S = 2.0
"""After its database was back."""


@dataclass(frozen=True)
class Sample:
    """Times are seconds of the monotonic clock. ``status`` 0: no answer at all, ``error`` says why."""

    asked: float
    answered: float
    status: int
    error: str = ""
    retry_after: str = ""

    @property
    def good(self) -> bool:
        return 200 <= self.status < 300


@dataclass
class Silences:
    """Why a good answer may be missing: the API is dead or stopped (no answer at all), or its database is away (503,
    and when to come again)."""

    api_deaths: list[float] = field(default_factory=list)
    api_hung: list[tuple[float, float]] = field(default_factory=list)
    """It stood still, until its watcher ended it."""
    database_away: list[tuple[float, float]] = field(default_factory=list)

    def excuse(self, sample: Sample) -> str | None:
        at = sample.answered
        if sample.status == 0:
            if any(died <= at <= died + EXCUSED_S for died in self.api_deaths):
                return "api"
            if any(begun <= at <= ended for begun, ended in self.api_hung):
                return "api hung"
        away = any(begun <= at <= ended + DATABASE_BACK_S for begun, ended in self.database_away)
        return "database" if away and sample.status == 503 and sample.retry_after else None

    def since_api_death_s(self, sample: Sample) -> float | None:
        """From the last death of the API before the answer."""
        deaths = [sample.answered - died for died in self.api_deaths if died <= sample.answered]
        return round(min(deaths), 1) if deaths else None


class Probe:
    """From ``start`` to ``stop``, in a thread of its own; ``job_id`` may change meanwhile."""

    def __init__(self, http: httpx.Client) -> None:
        self._url, self._headers = str(http.base_url), {"Authorization": http.headers["Authorization"]}
        self.job_id = ""
        self.samples: list[Sample] = []
        self._begun = self._ended = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="probe", daemon=True)

    def start(self, job_id: str) -> None:
        self.job_id = job_id
        self._begun = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        self._ended = time.monotonic()
        self._stop.set()
        self._thread.join(ANSWER_S + 5)

    @property
    def per_second(self) -> float:
        """Questions asked, once it has stopped."""
        return len(self.samples) / (self._ended - self._begun)

    def first_good_after(self, moment: float) -> float:
        """When the first good answer came to a question that was asked after ``moment``. Raises TimeoutError."""
        deadline = time.monotonic() + BACK_S
        while time.monotonic() < deadline:
            good = [s.answered for s in self.samples if s.good and s.asked > moment]
            if good:
                return min(good)
            time.sleep(0.05)
        raise TimeoutError("the API does not answer")

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=self._url, headers=self._headers, timeout=ANSWER_S, limits=limits, trust_env=False
        ) as http:
            asking: set[asyncio.Task[None]] = set()
            next_at = time.monotonic()
            while not self._stop.is_set():
                task = asyncio.create_task(self._ask(http))
                asking.add(task)
                task.add_done_callback(asking.discard)
                next_at = max(next_at + PERIOD_S, time.monotonic())
                await asyncio.sleep(next_at - time.monotonic())
            await asyncio.gather(*asking)

    async def _ask(self, http: httpx.AsyncClient) -> None:
        asked, status, error, retry_after = time.monotonic(), 0, "", ""
        try:
            async with asyncio.timeout(ANSWER_S):
                answer = await http.get(f"/api/jobs/{self.job_id}")
            status, retry_after = answer.status_code, answer.headers.get("Retry-After", "")
        except (httpx.HTTPError, TimeoutError) as failure:
            error = repr(failure)
        self.samples.append(Sample(asked, time.monotonic(), status, error, retry_after))
