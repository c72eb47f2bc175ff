"""One job under fire: when it can be hit, and what must be true of it in the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from sqlalchemy import select

from benchmarks.chaos import victims
from benchmarks.chaos.installation import Installation
from benchmarks.chaos.plan import Phase
from control_plane.db import Database
from control_plane.tables import Checkpoint
from tests.e2e.house import TINY, RayTimes, held_ms_by_ray

Bill = dict[str, dict[str, int]]
"""Attempt → billed and absorbed GPU-milliseconds."""
Stamp = dict[str, dict[str, int]]
"""Rank → kind → GPU-milliseconds."""
T = TypeVar("T")
STEPS = 320
CHECKPOINT_STEPS = 16
RECIPE = {
    "baseModel": TINY,
    "presetId": "balanced",
    "gpuConfig": {"type": "cpu", "count": 1},
    "hyperparameters": {
        "batchSize": 4,
        "maxSteps": STEPS,
        "numEpochs": 50,
        "checkpointSteps": CHECKPOINT_STEPS,
        "evalSteps": STEPS // 2,
        "learningRate": 0.001,
    },
}
LAST_STEPS = 48
ENDINGS_AT_ONCE = 2
"""So many attempts at most are lost to one strike: the one at hand, and another while what it hit is not whole."""
PATIENCE_S = 600.0
RAY_S = 120.0
TOLERANCE_MS = 250
MS_PER_HOUR = 3_600_000
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "PAUSED")


@dataclass
class Verdict:
    """What was found out about a finished job; ``wrong`` says what should not be."""

    job_id: str
    status: str = ""
    sha256: str = ""
    attempts: int = 0
    faults: int = 0
    """Attempts that ended by a platform fault: each was billed up to its last checkpoint."""
    billed_ms: int = 0
    absorbed_ms: int = 0
    compared: int = 0
    """Attempts whose held time Ray's own actor table still knew."""
    forgotten: int = 0
    """Attempts that lived when their cluster was killed, and its actor table with it."""
    clusters_lost: int = 0
    worst_difference_ms: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


class Job:
    def __init__(self, installation: Installation, name: str) -> None:
        self._installation, self._client = installation, installation.client
        body = RECIPE | {"datasetId": installation.dataset["id"], "name": name}
        once = {"Idempotency-Key": name}
        self.id: str = self.patiently(
            lambda: self._client.data(self._client.http.post("/api/jobs", json=body, headers=once))
        )["jobId"]
        self._begun = time.monotonic()
        self._held_ms: dict[str, int] = {}
        """By rank actor, as Ray's table told before it was lost."""
        self.ended_attempts = 0
        """Strikes that must have cost an attempt."""
        self.uncertain = 0
        """Strikes that may have cost attempts."""
        self.clusters_lost = 0

    def seen(self) -> dict[str, Any]:
        return self.patiently(lambda: self._client.job(self.id))

    def attempts(self) -> list[dict[str, Any]]:
        return self.patiently(lambda: self._client.get(f"/api/jobs/{self.id}/attempts"))["attempts"]

    def checkpoints(self) -> list[dict[str, Any]]:
        return self.patiently(lambda: self._client.get(f"/api/jobs/{self.id}/checkpoints"))["checkpoints"]

    def reached(self, phase: Phase) -> dict[str, Any] | None:
        """Wait until it is in ``phase``; None when that is over."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            job = self.seen()
            if job["status"] in ENDED:
                return None
            if not job["reconnecting"]:
                now = self.phase(job)
                if now is phase:
                    return job
                if now and list(Phase).index(now) > list(Phase).index(phase):
                    return None
            time.sleep(0.1)
        raise TimeoutError(f"job {self.id} does not come to {phase}: {self.seen()}")

    def phase(self, job: dict[str, Any]) -> Phase | None:
        """Of a job as it was seen; None: none that can be told."""
        if job["status"] == "QUEUED":
            return Phase.QUEUED
        if job["status"] == "INITIALIZING":
            return Phase.LOADING
        if (job["currentStep"] or 0) > STEPS - LAST_STEPS:
            return Phase.FINISHING
        if not victims.child(self._installation):
            return None
        saved = {checkpoint["attemptId"] for checkpoint in self.checkpoints()}
        return Phase.TRAINING if self.attempts()[-1]["id"] in saved else Phase.FIRST_STEPS

    def remember_held(self) -> None:
        """Ray's table is about to be lost: keep what it says of attempts that have ended."""
        self.clusters_lost += 1
        if any(attempt["outcome"] for attempt in self.attempts()):
            self._held_ms |= {
                name: ms for name, ms in self._times_by_ray(ended=False).held_ms.items() if ms is not None
            }

    def wait_end(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_S
        while (job := self.seen())["status"] not in ENDED:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {self.id} does not end: {job}")
            time.sleep(0.25)
        return job

    def judged(self, reference: str | None) -> Verdict:
        """Once it has ended. ``reference``: SHA-256 of the unbroken run's adapter."""
        job = self.wait_end()
        verdict = Verdict(self.id, job["status"], seconds=round(time.monotonic() - self._begun, 1))
        attempts = self.attempts()
        verdict.attempts = len(attempts)
        if job["status"] != "COMPLETED":
            verdict.wrong.append(f"{job['status']}: {job['errorCode']}: {job['errorMessage']}")
            return verdict
        verdict.sha256 = self.patiently(lambda: self._client.adapter_sha256(job))
        if reference not in (None, verdict.sha256):
            verdict.wrong.append("its adapter is not the unbroken run's")
        least = 1 + self.ended_attempts
        if not least <= len(attempts) <= least + self.uncertain * ENDINGS_AT_ONCE:
            told = f"{self.ended_attempts} strikes that end one, {self.uncertain} that may"
            verdict.wrong.append(f"{len(attempts)} attempts for {told}")
        self._check_steps(verdict)
        self._check_resumption(verdict, attempts)
        self._check_bill(verdict, job, attempts)
        return verdict

    def _check_steps(self, verdict: Verdict) -> None:
        metrics = self.patiently(lambda: self._client.get(f"/api/jobs/{self.id}/metrics"))["metrics"]
        if [point["step"] for point in metrics] != list(range(1, STEPS + 1)):
            verdict.wrong.append("its curve has gaps")

    def _check_resumption(self, verdict: Verdict, attempts: list[dict[str, Any]]) -> None:
        """Each attempt went on from the newest checkpoint that there was when it was made."""
        saved = self.checkpoints()
        for attempt in attempts[1:]:
            before = [c for c in saved if c["createdAt"] <= attempt["createdAt"]]
            newest = max((c["step"] for c in before), default=None)
            used = next((c["step"] for c in saved if c["id"] == attempt["resumedFrom"]), None)
            if used != newest:
                verdict.wrong.append(f"attempt {attempt['number']} went on from step {used}, the last was {newest}")

    def _check_bill(self, verdict: Verdict, job: dict[str, Any], attempts: list[dict[str, Any]]) -> None:
        client = self._client
        by_attempt = self.patiently(lambda: client.compute_ms(self.id))
        verdict.billed_ms = sum(sums["billed"] for sums in by_attempt.values())
        verdict.absorbed_ms = sum(sums["absorbed"] for sums in by_attempt.values())
        price = self.patiently(lambda: client.gpu_price_microusd("cpu"))
        due = round_half_even(verdict.billed_ms * price, MS_PER_HOUR)
        if client.micro(job["finalCost"]) != due:
            verdict.wrong.append(f"finalCost {job['finalCost']}, {due} micro-dollars are due")
        stamps = asyncio.run(_last_stamps(self._installation.database_url, self.id))
        verdict.faults = sum(attempt["outcome"] == "FAULT" for attempt in attempts)
        verdict.wrong += badly_shared(attempts, stamps, by_attempt)
        self._check_held(verdict, attempts, by_attempt)

    def _check_held(self, verdict: Verdict, attempts: list[dict[str, Any]], bill: Bill) -> None:
        times = self._times_by_ray()
        for attempt in attempts:
            name = f"{self.id}/{attempt['number']}/r0"
            unmade = 0 if attempt["clusterId"] in (None, times.cluster_id) else None
            held = self._held_ms.get(name, times.held_ms.get(name, unmade))
            if held is None:
                verdict.forgotten += 1
                continue
            ours = sum(bill.get(attempt["id"], {}).values())
            verdict.compared += 1
            verdict.worst_difference_ms = max(verdict.worst_difference_ms, abs(ours - held))
            if abs(ours - held) > TOLERANCE_MS:
                verdict.wrong.append(f"attempt {attempt['number']}: {ours} ms in the ledger, {held} ms held by Ray")
        verdict.clusters_lost = self.clusters_lost
        if verdict.forgotten > self.clusters_lost:
            told = f"Ray knows nothing of {verdict.forgotten} attempts; {self.clusters_lost} of its clusters were lost"
            verdict.wrong.append(told)

    def _times_by_ray(self, *, ended: bool = True) -> RayTimes:
        """Waited for until the table knows the end of every rank that it knows, if they have ``ended``."""
        deadline = time.monotonic() + RAY_S
        while True:
            with suppress(RuntimeError):
                times = held_ms_by_ray(self._installation.house, self.id)
                if times.whole or not ended:
                    return times
            if time.monotonic() > deadline:
                raise TimeoutError(f"Ray does not tell how long the ranks of {self.id} lived")
            time.sleep(1)

    def patiently(self, ask: Callable[[], T]) -> T:
        """An answer, asked for again while the API or its database is away."""
        deadline = time.monotonic() + 120
        while True:
            try:
                return ask()
            except (httpx.TransportError, AssertionError) as error:
                refused = isinstance(error, AssertionError) and "503" not in str(error)
                if refused or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)


def badly_shared(attempts: list[dict[str, Any]], stamps: dict[str, Stamp], bill: Bill) -> list[str]:
    """A platform fault is billed up to the attempt's last checkpoint, and reloading after it not at all."""
    wrong = []
    for attempt in attempts:
        kinds = stamps.get(attempt["id"], {}).get("0", {})
        saved = sum(ms for kind, ms in kinds.items() if not (attempt["recovery"] and kind == "loading"))
        billed = bill.get(attempt["id"], {}).get("billed", 0)
        if attempt["outcome"] == "FAULT" and billed != saved:
            wrong.append(f"attempt {attempt['number']} saved {saved} ms and was billed {billed} ms")
    return wrong


async def _last_stamps(url: str, job_id: str) -> dict[str, Stamp]:
    """Attempt → its usage when it wrote its last checkpoint."""
    database = Database(url)
    try:
        async with database.read() as session:
            rows = await session.execute(
                select(Checkpoint.attempt_id, Checkpoint.usage)
                .where(Checkpoint.job_id == job_id)
                .order_by(Checkpoint.step)
            )
            return {attempt_id: usage for attempt_id, usage in rows}
    finally:
        await database.close()


def round_half_even(numerator: int, denominator: int) -> int:
    whole, rest = divmod(numerator, denominator)
    return whole + (2 * rest > denominator or (2 * rest == denominator and whole % 2 == 1))
