"""The rules of telling: notifications and webhook letters, each of what was committed."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from scheduler.simulator.clock import Process
from scheduler.simulator.stops import AFTERMATH_S, OVER

if TYPE_CHECKING:
    from scheduler.simulator.oracle import Oracle
    from scheduler.simulator.world import World

LONGEST_WAIT_S = 80.0
"""Of a letter until its next try, by the clock of whoever tried."""
SUBSCRIBED = "team-1"


class Letters:
    def __init__(self, world: World, oracle: Oracle) -> None:
        self.world = world
        self.oracle = oracle
        self._received_s: dict[str, float] = {}
        """Letter → when its receiver last took it."""
        self._ahead_s = 0.0
        """The most that the wall clock of any process that wrote was ahead."""

    def received(self, letter_id: str) -> None:
        """A repeat needs a fault: one that kept what had been delivered from being noted."""
        before_s = self._received_s.get(letter_id)
        if before_s is not None and self.world.hazards.troubled_s + AFTERMATH_S < before_s:
            self.oracle.fail("a letter goes once", letter_id)
        self._received_s[letter_id] = self.world.clock.now

    def committed(self, process: Process) -> None:
        self._ahead_s = max(self._ahead_s, process.wall_offset_s)

    def under_way(self) -> list[str]:
        """Letters that are still to be delivered. Where a clock was ahead, the next try may lie as far off."""
        offsets = [host.wall_offset_s for host in self.world.schedulers]
        excused = range(int(LONGEST_WAIT_S), int(LONGEST_WAIT_S + self._ahead_s - min(offsets)) + 1)
        found = []
        for letter_id, tries, not_before in self.oracle.rows(
            "SELECT id, tries, not_before FROM outbox WHERE delivered_at IS NULL AND failed_at IS NULL"
        ):
            due = datetime.fromisoformat(not_before).replace(tzinfo=UTC) if not_before else None
            waits_s = due.timestamp() - self.world.clock.date_s() - min(offsets) if due else 0.0
            if tries == 0 or int(waits_s) not in excused:
                found.append(f"letter {letter_id} is not delivered")
        return found

    def ended(self, job_id: str, status: str) -> None:
        """A job that has ended was told of in the transaction that ended it, once."""
        told = [
            kind
            for (kind,) in self.oracle.rows(
                "SELECT type FROM notifications WHERE type LIKE 'JOB%' AND dedupe_key LIKE ?", f"%{job_id}%"
            )
        ]
        due = {"COMPLETED": ["JOB_COMPLETE"], "FAILED": ["JOB_FAILED"]}.get(status, [])
        if told != due:
            self.oracle.fail("one notification of each end", f"{job_id} {status}: {told}")
        ((letters, team_id),) = self.oracle.rows(
            "SELECT (SELECT count(*) FROM outbox WHERE json_extract(payload, '$.data.jobId') = j.id"
            " AND json_extract(payload, '$.type') = 'job.' || lower(j.status)), team_id FROM training_jobs j"
            " WHERE id = ?",
            job_id,
        )
        if letters != (status in OVER and team_id == SUBSCRIBED):
            self.oracle.fail("one letter of each end", f"{job_id} {status}: {letters}")

    def final(self) -> None:
        for job_id, status in self.oracle.rows("SELECT id, status FROM training_jobs"):
            if status in OVER:
                self.ended(job_id, status)
        for status, told in self.oracle.rows(
            "SELECT v.status, (SELECT count(*) FROM notifications n WHERE n.dedupe_key LIKE '%' || v.id || '%')"
            " FROM verdicts v WHERE v.attempt > 0"
        ):
            if told != (status in OVER):
                self.oracle.fail("one notification of each end", f"a verdict {status}: {told}")
        rows = dict(self.oracle.rows("SELECT id, delivered_at FROM outbox"))
        for letter_id, delivered_at in rows.items():
            if delivered_at is not None and letter_id not in self._received_s:
                self.oracle.fail("delivered is delivered", letter_id)
        invented = [letter_id for letter_id in self._received_s if letter_id not in rows]
        if invented or self.oracle.rows("SELECT 1 FROM outbox WHERE failed_at IS NOT NULL"):
            self.oracle.fail("letters are of what was committed, and are not given up", str(invented))
