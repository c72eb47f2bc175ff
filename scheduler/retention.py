"""Which checkpoints stay: the last two and the best. Rows are marked in a transaction, objects deleted after it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from datetime import timedelta
from typing import Protocol

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.db import Database
from control_plane.services.lineage import ancestors
from control_plane.tables import Checkpoint, TrainingJob, now

log = logging.getLogger(__name__)
KEEP_LAST = 2
SWEEP_BACK = timedelta(days=2)


class ObjectStore(Protocol):
    """What is needed of ``control_plane.storage.Storage``."""

    async def delete(self, keys: Iterable[str]) -> None: ...

    async def list(self, prefix: str) -> list[tuple[str, int]]: ...


async def whole(session: AsyncSession, job_id: str) -> list[Checkpoint]:
    """The job's checkpoints that still have their files, newest first."""
    found = await session.scalars(
        select(Checkpoint)
        .where(Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None))
        .order_by(Checkpoint.step.desc(), Checkpoint.created_at.desc())
    )
    return list(found)


async def resume_points(session: AsyncSession, job: TrainingJob) -> list[Checkpoint]:
    """Where the job may go on: its own whole checkpoints, newest first, then those of the jobs that it retries."""
    ids = [job.id, *await ancestors(session, job)]
    return [checkpoint for job_id in ids for checkpoint in await whole(session, job_id)]


async def mark_obsolete(session: AsyncSession, job_id: str) -> list[str]:
    """Mark what need not stay as deleted; the storage prefixes to delete once the transaction has committed."""
    obsolete = [checkpoint for checkpoint in (await whole(session, job_id))[KEEP_LAST:] if not checkpoint.best]
    for checkpoint in obsolete:
        checkpoint.deleted_at = now()
    return [checkpoint.storage_key for checkpoint in obsolete]


async def delete(storage: ObjectStore, prefixes: list[str]) -> None:
    """Delete every object under the prefixes. What fails is left to the next start's sweep."""
    for prefix in prefixes:
        try:
            await storage.delete([key for key, _ in await storage.list(prefix + "/")])
        except Exception:
            log.exception("checkpoint files could not be deleted", extra={"prefix": prefix})


async def sweep(database: Database, storage: ObjectStore) -> None:
    """Delete again what was marked lately: a scheduler may have ended between the mark and the deletion."""
    async with database.read() as session:
        prefixes = list(
            await session.scalars(select(Checkpoint.storage_key).where(Checkpoint.deleted_at > now() - SWEEP_BACK))
        )
    await delete(storage, prefixes)
