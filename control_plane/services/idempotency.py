"""The same creating request twice has the effect of one: its first answer is kept with what it created."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, TypeVar

import msgspec
from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.errors import Conflict, ValidationFailed
from control_plane.services.sql import insert_or_nothing
from control_plane.tables import IdempotencyKey, now

KEPT = timedelta(hours=24)
Answer = TypeVar("Answer")


class Request(msgspec.Struct, frozen=True):
    """What tells a repetition from another request."""

    scope: str
    """Team (or address, before sign-in), method and path."""
    key: str | None
    body: bytes
    secret: bytes
    """The body's digest is keyed, because bodies may hold passwords."""


async def once(
    session: AsyncSession, request: Request, kind: type[Answer], run: Callable[[], Awaitable[Answer]]
) -> Answer:
    """``run()``, or the answer of the first time. The key's row and what ``run`` wrote stand or fall together.

    Raises Conflict when the key came with another body before.
    """
    if request.key is None:
        return await run()
    if not 0 < len(request.key) <= 255 or not request.key.isprintable():
        raise ValidationFailed.field("Idempotency-Key", "Must have 1 to 255 printable characters")
    same = (IdempotencyKey.scope == request.scope[:200], IdempotencyKey.key == request.key)
    body = hmac.new(request.secret, request.body, hashlib.sha256).hexdigest()
    await session.execute(delete(IdempotencyKey).where(*same, IdempotencyKey.created_at <= now() - KEPT))
    mine = await insert_or_nothing(
        session,
        IdempotencyKey,
        scope=request.scope[:200],
        key=request.key,
        body_sha256=body,
        status_code=201,
        answer={},
    )
    if not mine:
        kept = (await session.execute(select(IdempotencyKey.body_sha256, IdempotencyKey.answer).where(*same))).one()
        if kept.body_sha256 != body:
            raise Conflict("This Idempotency-Key was used with another request body")
        return msgspec.convert(kept.answer, kind)
    answer = await run()
    plain: dict[str, Any] = msgspec.to_builtins(answer)
    await session.execute(update(IdempotencyKey).where(*same).values(answer=plain))
    return answer
