"""When a part is truly ready: not that it runs, but that it does its work.

Each function here is called when a part has just been started, and gives the question to ask from then on.
"""

from __future__ import annotations

from asyncio import to_thread
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from control_plane.db import Database
from control_plane.tables import ClusterState, SchedulerLease

Probe = Callable[[], Awaitable[bool]]


def answers(url: str, token: Path | None = None) -> Probe:
    """An HTTP server answers 200. ``token``: file with the bearer token that it wants."""

    async def probe() -> bool:
        try:
            headers = {"Authorization": f"Bearer {await to_thread(token.read_text)}"} if token else {}
            async with httpx.AsyncClient(timeout=2, trust_env=False, headers=headers) as client:
                return (await client.get(url)).status_code == 200
        except (httpx.HTTPError, FileNotFoundError):
            return False

    return probe


def beats(database: Database) -> Probe:
    """A scheduler holds the lease and beats, and has written since that it reaches the cluster."""
    before: tuple[Any, Any] | None = None

    async def probe() -> bool:
        nonlocal before
        try:
            async with database.read() as session:
                beat = await session.scalar(select(SchedulerLease.beat))
                state = await session.scalar(select(ClusterState))
        except (SQLAlchemyError, OSError):
            return False
        now = (beat, state.updated_at if state else None)
        if before is None:
            before = now
        return state is not None and state.reachable and all(new != old for new, old in zip(now, before, strict=True))

    return probe


def moves(database: Database) -> Probe:
    """A scheduler has beaten since it was last asked. A database that does not answer says nothing against it."""
    last: int | None = None

    async def probe() -> bool:
        nonlocal last
        try:
            async with database.read() as session:
                beat = await session.scalar(select(SchedulerLease.beat))
        except (SQLAlchemyError, OSError):
            return True
        moved, last = beat != last, beat
        return moved

    return probe
