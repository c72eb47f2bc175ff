"""Asks `GET /api/jobs/{id}` five times a second, whatever happens, and tells which silences are excused."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field

import httpx

PERIOD_S = 0.2
PATIENCE_S = 60.0
"""A caller who has waited so long for an answer gives up."""
EXCUSED_S = 5.0
"""After the API itself was killed, or its database was back."""


@dataclass(frozen=True)
class Sample:
    """Times are seconds of the monotonic clock. ``status`` 0: no answer at all, ``error`` says why."""

    asked: float
    answered: float
    status: int
    error: str = ""

    @property
    def good(self) -> bool:
        return 200 <= self.status < 300


@dataclass
class Silences:
    """Why an answer may be missing."""

    api_deaths: list[float] = field(default_factory=list)
    database_away: list[tuple[float, float]] = field(default_factory=list)

    def excuse(self, sample: Sample) -> str | None:
        if any(died <= sample.answered <= died + EXCUSED_S for died in self.api_deaths):
            return "api"
        if any(begun <= sample.answered <= ended + EXCUSED_S for begun, ended in self.database_away):
            return "database"
        return None


class Probe:
    """From ``start`` to ``stop``, in a thread of its own; ``job_id`` may change meanwhile."""

    def __init__(self, http: httpx.Client) -> None:
        self._url, self._headers = str(http.base_url), {"Authorization": http.headers["Authorization"]}
        self.job_id = ""
        self.samples: list[Sample] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="probe", daemon=True)

    def start(self, job_id: str) -> None:
        self.job_id = job_id
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_S + 5)

    def first_good_after(self, moment: float, timeout_s: float = PATIENCE_S) -> float:
        """When the first good answer came to a question that was asked after ``moment``. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            good = [s.answered for s in self.samples if s.good and s.asked > moment]
            if good:
                return min(good)
            time.sleep(0.05)
        raise TimeoutError("the API does not answer")

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=self._url, headers=self._headers, timeout=PATIENCE_S, limits=limits, trust_env=False
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
        asked, status, error = time.monotonic(), 0, ""
        try:
            status = (await http.get(f"/api/jobs/{self.job_id}")).status_code
        except httpx.HTTPError as failure:
            error = repr(failure)
        self.samples.append(Sample(asked, time.monotonic(), status, error))
