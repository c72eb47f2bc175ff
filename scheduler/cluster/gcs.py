"""What Ray's control store (GCS) knows of actors, placement groups and resources, asked without the dashboard.

Ray's public state API needs the dashboard, so this reads the tables that ``ray._private.state`` wraps: the one place
that leans on Ray's private names. Every function blocks; ray must be connected.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import state as tables
from ray.util.placement_group import PlacementGroup, placement_group_table

from scheduler.executor import RankTimes

LIVE_STATES = ("DEPENDENCIES_UNREADY", "PENDING_CREATION", "ALIVE", "RESTARTING")
INTERNAL_RESOURCE = re.compile(r"^(node:|bundle_group)|_group_")
RANK_NAME = re.compile(r"^(?P<attempt>.+/\d+)/r(?P<rank>\d+)$")
ATTEMPT_NAME = re.compile(r"^.+/\d+$")


@dataclass(frozen=True)
class Actor:
    """A row of the actor table; times in milliseconds since the epoch, 0 where not yet."""

    id: str
    name: str
    state: str
    start_ms: int
    end_ms: int
    node_ip: str
    node_id: str
    pid: int

    @property
    def dead(self) -> bool:
        return self.state == "DEAD"

    @property
    def rank(self) -> RankTimes | None:
        """Its times, if it is a rank. One that never came up held nothing: it starts when it ends."""
        match = RANK_NAME.match(self.name)
        if not match:
            return None
        return RankTimes(int(match["rank"]), self.start_ms or self.end_ms, self.end_ms, self.node_ip)


def live_actors() -> list[Actor]:
    return [actor for state in LIVE_STATES for actor in _actors(state)]


def dead_actors() -> list[Actor]:
    return _actors("DEAD")


def actor(actor_id: str) -> Actor | None:
    row = tables.actor_table(actor_id)
    return _actor(row) if row else None


def ranks_of(attempt: str) -> list[Actor]:
    """The ranks of an attempt, alive or dead, by rank."""
    found = [a for a in [*live_actors(), *dead_actors()] if a.name.startswith(f"{attempt}/r")]
    return sorted(found, key=lambda a: a.name)


def placement(group: PlacementGroup) -> tuple[str, str]:
    """(state, scheduling state) of a placement group."""
    row = placement_group_table(group)
    return row.get("state", "REMOVED"), row.get("stats", {}).get("scheduling_state", "")


def placements_named(name: str) -> list[str]:
    """Ids of the placement groups of this name that are not removed."""
    rows = tables.placement_group_table().values()
    return [row["placement_group_id"] for row in rows if row["name"] == name and row["state"] != "REMOVED"]


def resources() -> tuple[dict[str, float], dict[str, float]]:
    """(free, total) by resource name, over all nodes that are alive."""
    total = {name: count for name, count in tables.cluster_resources().items() if not INTERNAL_RESOURCE.search(name)}
    free = tables.available_resources()
    return {name: free.get(name, 0.0) for name in total}, total


def live_nodes() -> list[str]:
    return [row["NodeID"] for row in tables.node_table() if row["Alive"]]


def cluster_id() -> str:
    return str(ray._private.worker.global_worker.gcs_client.cluster_id.hex())


def _actors(state: str) -> list[Actor]:
    return [_actor(row) for row in tables.actor_table(None, None, state).values()]


def _actor(row: dict[str, Any]) -> Actor:
    address = row["Address"]
    return Actor(
        id=row["ActorID"],
        name=row["Name"],
        state=row["State"],
        start_ms=int(row["StartTime"]),
        end_ms=int(row["EndTime"]),
        node_ip=address["IPAddress"],
        node_id=address["NodeID"],
        pid=int(row["Pid"]),
    )
