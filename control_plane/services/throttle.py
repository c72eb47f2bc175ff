"""Failed sign-ins are counted in the database, by account and by address; too many must wait."""

from __future__ import annotations

import math
from datetime import timedelta

from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.errors import RateLimited
from control_plane.services.sql import lock_name
from control_plane.tables import SigninFailure, now

WINDOW = timedelta(minutes=15)
MOST = {"email": 10, "address": 50}
"""Failures within the window, by kind of subject."""


async def count_attempt(session: AsyncSession, email: str, address: str) -> None:
    """Count an attempt as failed until ``forgive``. Raises RateLimited, with the seconds to wait."""
    for subject in (f"email:{email}", f"address:{address}"):
        subject = subject[:330]
        await lock_name(session, subject)
        at = now()
        failures = SigninFailure.subject == subject, SigninFailure.created_at > at - WINDOW
        count, oldest = (
            await session.execute(select(func.count(), func.min(SigninFailure.created_at)).where(*failures))
        ).one()
        if count >= MOST[subject.partition(":")[0]]:
            wait = max(1, math.ceil((oldest + WINDOW - at).total_seconds()))
            raise RateLimited(f"Too many failed sign-ins. Try again in {wait} seconds.", retry_after_s=wait)
        session.add(SigninFailure(subject=subject))
        await session.flush()
    await session.execute(delete(SigninFailure).where(SigninFailure.created_at <= now() - WINDOW))


async def forgive(session: AsyncSession, email: str, address: str) -> None:
    """The sign-in was good: the account's failures are forgotten, and this attempt of the address."""
    await session.execute(delete(SigninFailure).where(SigninFailure.subject == f"email:{email}"[:330]))
    newest = (
        select(SigninFailure.id)
        .where(SigninFailure.subject == f"address:{address}"[:330])
        .order_by(SigninFailure.id.desc())
        .limit(1)
    )
    await session.execute(delete(SigninFailure).where(SigninFailure.id.in_(newest.scalar_subquery())))
