"""What the scheduler asks of a cluster, and what it hears back. The Ray executor and the fake pass the same tests.

Every call may be repeated: the same question twice has the effect of one. Names are deterministic, so an attempt that
was started by a scheduler that died before it could note so is found again, never doubled.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Protocol

import msgspec

OVERRUN_MS = 25_000


class Demand(msgspec.Struct, frozen=True):
    """What one rank needs. ``resources`` are Ray's custom resources (``{"slot_cpu": 1}``)."""

    resources: dict[str, float]
    num_gpus: float = 0
    labels: dict[str, str] = {}
    ranks: int = 1
    metered: bool = True
    """False for zero-GPU work (verdicts): its time is nobody's GPU time."""


class Stage(msgspec.Struct, frozen=True):
    """Something to bring into the attempt's folder before the child starts: an object or a prefix of objects."""

    key: str
    path: str
    """Relative to the attempt's work folder."""
    prefix: bool = False


class ResumePoint(msgspec.Struct, frozen=True):
    """A recorded checkpoint; the rank takes the first of the offered whose files and manifest are whole."""

    checkpoint_id: str
    key: str
    """Storage prefix of its files."""
    sha256: str
    """Of its manifest."""
    step: int


class AttemptSpec(msgspec.Struct, frozen=True):
    """All that an execution needs; plain data, goes to the supervisor as it is."""

    name: str
    """Actor name, ``<work id>/<attempt number>``."""
    work_id: str
    number: int
    config: dict[str, Any]
    """``trainer.config`` as JSON data. The rank fills in the local paths: work_dir, output_dir, dataset_path,
    resume_from, parent_adapter."""
    demand: Demand
    stage_in: tuple[Stage, ...]
    """``dataset`` first; ``parent`` when training on from a model."""
    resume_points: tuple[ResumePoint, ...] = ()
    """Newest first."""
    artifact_prefix: str | None = None
    """Storage prefix under which ``checkpoints/…`` and ``adapter/…`` are written."""
    storage_url: str = ""
    work_root: str = ""
    threads: int = 1
    epoch: int = 0
    """Lease epoch of the dispatching scheduler; a supervisor refuses calls with a lower one than it has seen."""
    allowance_ms: int | None = None
    """GPU-milliseconds (all ranks together) it may use until told more; None: unmetered."""
    overrun_ms: int = OVERRUN_MS
    """So far beyond its allowance an attempt that does not stop is ended by force (``OVER_ALLOWANCE``)."""
    hang_floor_s: float = 600.0
    """A training step is given up after max(this, 20 × the median step)."""


class Liveness(StrEnum):
    """Three-valued: unknown is not dead."""

    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"


class RankTimes(msgspec.Struct, frozen=True):
    """From Ray's own actor table, milliseconds since the epoch; ``end_ms`` 0 while it lives."""

    rank: int
    start_ms: int
    end_ms: int
    node: str = ""


class Look(msgspec.Struct):
    """One batched look at the cluster."""

    reachable: bool
    cluster_id: str = ""
    actors: dict[str, Liveness] = {}
    """Supervisors by name; a name that is absent was never created in this cluster (or is long gone)."""
    free: dict[str, float] = {}
    total: dict[str, float] = {}
    """Resources by name, for policy and for ``/api/gpu-types``."""
    bound: bool = False
    """Of one that is not reachable: this process has connected to it, and can reach no other in its life."""


class UpEvent(msgspec.Struct):
    """An event with its number within the attempt (1, 2, 3 …, no gap). ``event`` is a ``trainer.protocol`` event as
    JSON data, or one of those the rank adds:

    ``{"type": "pending", "reason"}`` placement waits (``NO_RESOURCES``) or cannot be (``INFEASIBLE``)
    ``{"type": "started", "node", "ranks", "checkpoint_id"|null, "step"}`` all ranks are up; resumed from what
    ``{"type": "stored", "step", "epoch", "loss", "key", "size", "sha256", "best", "usage": {rank: {kind: ms}}}``
    a checkpoint is in the object store (replaces the child's ``checkpoint``); usage as of when the child wrote it
    ``{"type": "adapter", "files": {name: {"key", "size", "sha256"}}, "best_step"}`` the adapter is in the store
    """

    number: int
    at: float
    """Seconds since the epoch, by the rank's clock; for display only."""
    event: dict[str, Any]


class Ending(msgspec.Struct):
    """How the attempt ended; present once there is nothing more to come."""

    outcome: str
    """``control_plane.states.Outcome``."""
    code: str = ""
    message: str = ""
    stack: str = ""
    stop_reason: str | None = None
    times: list[RankTimes] = []
    """Of every rank, once Ray has recorded their ends."""


class Batch(msgspec.Struct):
    """Answer to a poll: events after the cursor, the newest cumulative usage, and the ending if there is one."""

    events: list[UpEvent]
    usage: dict[str, dict[str, int]] = {}
    """rank → kind → cumulative GPU-milliseconds; only ever grows."""
    ending: Ending | None = None
    """Given only together with the last of the events."""
    state: str = "pending"
    """pending, starting, running, stopping or ended."""


class StaleEpoch(Exception):
    """The supervisor has heard from a newer scheduler: the caller's lease is over."""


class AttemptGone(Exception):
    """The supervisor is dead or was never there (confirmed, not merely unreachable)."""


class Unreachable(Exception):
    """No answer in time; says nothing about the attempt."""


class Executor(Protocol):
    async def look(self) -> Look: ...

    async def start(self, spec: AttemptSpec) -> None:
        """Create the supervisor, or find the one that has this name. Raises Unreachable."""
        ...

    async def poll(self, name: str, cursor: int, *, epoch: int, allowance_ms: int | None) -> Batch:
        """Events after ``cursor`` (at most 500); sets the allowance. Raises StaleEpoch, AttemptGone, Unreachable."""
        ...

    async def stop(self, name: str, reason: str, *, epoch: int) -> None:
        """Ask for an orderly end with a checkpoint."""
        ...

    async def times(self, name: str) -> list[RankTimes]:
        """What Ray's actor table says of the attempt's ranks, also when the supervisor is dead."""
        ...

    async def release(self, name: str, *, epoch: int) -> None:
        """End the supervisor and whatever is left of its gang, for certain; a name that is gone is fine.

        Raises StaleEpoch, Unreachable (something of it may be left). Who answers nothing cannot refuse: hold the lease.
        """
        ...

    async def close(self) -> None: ...
