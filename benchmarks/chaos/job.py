"""One job under fire: when it can be hit, and what must be true of it in the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from benchmarks.chaos import victims
from benchmarks.chaos.installation import Installation
from tests.e2e.house import TINY, held_ms_by_ray

T = TypeVar("T")
STEPS = 480
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
"""So near its end a job is not hit any more."""
PATIENCE_S = 600.0
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
    billed_ms: int = 0
    absorbed_ms: int = 0
    compared: int = 0
    """Attempts whose held time Ray's own actor table still knew."""
    forgotten: int = 0
    """Attempts of a cluster that is gone, and its actor table with it."""
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
        self.ended_attempts = 0
        """Faults that must have cost an attempt."""
        self.uncertain = False
        """There was one that may have cost attempts."""

    def seen(self) -> dict[str, Any]:
        return self.patiently(lambda: self._client.job(self.id))

    def attempts(self) -> list[dict[str, Any]]:
        return self.patiently(lambda: self._client.get(f"/api/jobs/{self.id}/attempts"))["attempts"]

    def checkpoints(self) -> list[dict[str, Any]]:
        return self.patiently(lambda: self._client.get(f"/api/jobs/{self.id}/checkpoints"))["checkpoints"]

    def can_be_hit(self) -> dict[str, Any] | None:
        """Wait until it trains, with a checkpoint of the attempt at hand; None when it is (nearly) at its end."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            job = self.seen()
            if job["status"] in ENDED or (job["currentStep"] or 0) > STEPS - LAST_STEPS:
                return None
            last = self.attempts()[-1:]
            saved = {checkpoint["attemptId"] for checkpoint in self.checkpoints()}
            trains = job["status"] == "RUNNING" and not job["reconnecting"] and victims.child(self._installation)
            if trains and last and last[0]["id"] in saved:
                return job
            time.sleep(0.25)
        raise TimeoutError(f"job {self.id} does not train: {self.seen()}")

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
        if not self.uncertain and len(attempts) != 1 + self.ended_attempts:
            verdict.wrong.append(f"{len(attempts)} attempts for {self.ended_attempts} faults that end one")
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
        held = self._held_ms(attempts)
        for attempt in attempts:
            known = held.get(f"{self.id}/{attempt['number']}/r0")
            if known is None:
                verdict.forgotten += 1
                continue
            ours = sum(by_attempt.get(attempt["id"], {}).values())
            verdict.compared += 1
            verdict.worst_difference_ms = max(verdict.worst_difference_ms, abs(ours - known))
            if abs(ours - known) > TOLERANCE_MS:
                verdict.wrong.append(f"attempt {attempt['number']}: {ours} ms in the ledger, {known} ms held by Ray")

    def _held_ms(self, attempts: list[dict[str, Any]]) -> dict[str, int]:
        """From Ray's actor table, waited for until it knows the end of every rank that it knows."""
        here = attempts[-1]["clusterId"]
        wanted = {f"{self.id}/{attempt['number']}/r0" for attempt in attempts if attempt["clusterId"] == here}
        deadline = time.monotonic() + 60
        while True:
            held = held_ms_by_ray(self._installation.house, self.id)
            if (held and all(ms > 0 for ms in held.values())) or time.monotonic() > deadline:
                return {name: ms for name, ms in held.items() if name in wanted}
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


def round_half_even(numerator: int, denominator: int) -> int:
    whole, rest = divmod(numerator, denominator)
    return whole + (2 * rest > denominator or (2 * rest == denominator and whole % 2 == 1))
