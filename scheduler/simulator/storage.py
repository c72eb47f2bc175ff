"""The rules of storage: one record of each team and finished day, of what the team's datasets cost."""

from __future__ import annotations

from calendar import monthrange
from datetime import timedelta
from fractions import Fraction
from typing import TYPE_CHECKING

from scheduler.simulator.clock import MIDNIGHT

if TYPE_CHECKING:
    from scheduler.simulator.oracle import Oracle
    from scheduler.simulator.world import World

DAY = (MIDNIGHT - timedelta(days=1)).date()
"""The one day that is over in every world in which any is: all datasets were there from its beginning."""
GIB = 2**30


class Storage:
    def __init__(self, world: World, oracle: Oracle) -> None:
        self.world = world
        self.oracle = oracle

    def under_way(self) -> list[str]:
        """What is to be charged: once the day is over by every scheduler's clock."""
        slowest_s = self.world.clock.date_s() + min(host.wall_offset_s for host in self.world.schedulers)
        if slowest_s < MIDNIGHT.timestamp():
            return []
        missing = self.oracle.rows(
            "SELECT id FROM teams WHERE id NOT IN (SELECT team_id FROM cost_records WHERE cost_type = 'STORAGE')"
        )
        return [f"storage of {team_id} on {DAY} is not charged" for (team_id,) in missing]

    def final(self) -> None:
        for team_id, day, count, amount, first in self.oracle.rows(
            "SELECT team_id, json_extract(details, '$.day'), count(*), sum(amount_microusd), min(recorded_at)"
            " FROM cost_records WHERE cost_type = 'STORAGE' GROUP BY 1, 2"
        ):
            if count > 1 or day != DAY.isoformat() or first < MIDNIGHT.strftime("%Y-%m-%d"):
                self.oracle.fail("storage is charged once a day", f"{team_id} {day}: {count} records from {first} on")
            if amount != self._due(team_id):
                self.oracle.fail("storage costs what it should", f"{team_id} {day}: {amount}, {self._due(team_id)} due")

    def _due(self, team_id: str) -> int:
        """Checkpoints and models weigh nothing here: a few bytes, for a few seconds."""
        ((size, price),) = self.oracle.rows(
            "SELECT sum(file_size), (SELECT storage_microusd_per_gib_month FROM price_versions WHERE number = 1)"
            " FROM datasets WHERE team_id = ?",
            team_id,
        )
        return round(Fraction(size * price, GIB * monthrange(DAY.year, DAY.month)[1]))
