"""The rules of stopping: where an accepted cancel or pause leads, and how soon."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scheduler.simulator.oracle import Oracle
    from scheduler.simulator.world import World

AFTERMATH_S = 90.0
"""For so long after a fault nothing need be prompt."""
HEED_S = 12.0
"""From a commit until what runs has heard of it: a tick or two polls, and calls over the network."""
LEAVE_S = 34.0
"""From then until its slots are free: the current step, and 30 seconds."""
LEADS_TO = {
    "CANCEL": ("CANCELLED", "COMPLETED", "FAILED"),
    "PAUSE": ("PAUSED", "CANCELLED", "COMPLETED", "FAILED"),
}
"""What a user asked of an active job, and where it may be after its attempt."""
OVER = ("COMPLETED", "FAILED", "CANCELLED")


class Stops:
    def __init__(self, world: World, oracle: Oracle) -> None:
        self.world = world
        self.oracle = oracle
        self._since_s: dict[str, float] = {}
        """Attempt → when it was first asked to stop."""
        self._noted_s: dict[tuple[str, str], float] = {}
        """(job, reason) → the last commit that found the job where the reason leads, or on its way there."""

    def accepted(self, job_id: str, reason: str, asked_s: float) -> None:
        """A user's request, made at ``asked_s``, was answered with success."""
        if self._noted_s.get((job_id, reason), 0.0) < asked_s:
            self.oracle.fail("an accepted stop is noted", f"{job_id} {reason}")

    def committed(self) -> None:
        for job_id, status, requested, paused_by, name in self.oracle.rows(
            "SELECT j.id, j.status, j.stop_requested, j.paused_by, a.actor_name FROM training_jobs j"
            " LEFT JOIN attempts a ON a.work_id = j.id AND a.number = j.attempt AND a.outcome IS NULL"
        ):
            for reason in LEADS_TO:
                paused = status == "PAUSED" and reason == paused_by
                if paused or status in OVER or requested in (reason, "CANCEL"):
                    self._noted_s[job_id, reason] = self.world.clock.now
            if name is not None and requested in LEADS_TO:
                self._check_prompt(name)

    def _check_prompt(self, name: str) -> None:
        """The stop reaches the attempt, and its slots become free, in time. A fault gives it more."""
        now = self.world.clock.now
        since_s = self._since_s.setdefault(name, now)
        attempt, fact = self.world.cluster.attempts.get(name), self.world.cluster.facts.get(name)
        if attempt is None or fact is None or not fact.holds:
            return
        begun_s = now - fact.held_ms(round(self.world.clock.date_s() * 1000)) / 1000 / fact.ranks
        due_s = max(since_s, begun_s, self.world.hazards.troubled_s + AFTERMATH_S) + HEED_S
        if attempt.stop_reason is None and now > due_s:
            self.oracle.fail("a stop reaches what runs", f"{name}, asked {now - since_s:.0f} s ago")
        if now > due_s + LEAVE_S:
            self.oracle.fail("what is stopped frees its slots", f"{name}, asked {now - since_s:.0f} s ago")

    def left(self, job_id: str, requested: str | None, target: str) -> None:
        """An active job went to ``target``; ``requested`` is what had been asked of it before."""
        if requested in LEADS_TO and target not in LEADS_TO[requested]:
            self.oracle.fail("a stop leads where it should", f"{job_id}, asked to {requested}, is {target}")
