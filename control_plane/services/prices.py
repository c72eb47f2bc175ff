"""The rate card. A job keeps the version that was current when it was accepted."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.errors import ServiceUnavailable
from control_plane.money import microusd
from control_plane.services.catalog import Catalog
from control_plane.services.sql import insert_or_nothing
from control_plane.tables import PriceVersion, now


async def ensure_first(session: AsyncSession, catalog: Catalog) -> None:
    """Version 1 from ``configs/gpus.yaml``, if there is none; any number of processes may do so at once."""
    await insert_or_nothing(
        session,
        PriceVersion,
        number=1,
        effective_from=now(),
        gpu_microusd_per_hour={g.id: g.microusd_per_hour for g in catalog.gpu_types.values()},
        storage_microusd_per_gib_month=microusd(catalog.storage_usd_per_gib_month),
    )


async def current(session: AsyncSession) -> PriceVersion:
    """Raises ServiceUnavailable before the first version is there."""
    version = await session.scalar(
        select(PriceVersion)
        .where(PriceVersion.effective_from <= now())
        .order_by(PriceVersion.effective_from.desc(), PriceVersion.number.desc())
        .limit(1)
    )
    if version is None:
        raise ServiceUnavailable("No prices are set yet", retry_after_s=2)
    return version


async def of_day(session: AsyncSession, day: date) -> PriceVersion | None:
    """The version in force when the UTC day began; on the first day of all, the first version."""
    start = datetime.combine(day, time(), UTC)
    newest = select(PriceVersion).order_by(PriceVersion.effective_from.desc(), PriceVersion.number.desc()).limit(1)
    oldest = select(PriceVersion).order_by(PriceVersion.effective_from, PriceVersion.number).limit(1)
    found = await session.scalar(newest.where(PriceVersion.effective_from <= start))
    return found or await session.scalar(oldest.where(PriceVersion.effective_from < start + timedelta(days=1)))
