"""/health: is the process alive, and can it serve?"""

from __future__ import annotations

import logging

from litestar import get

from control_plane.api.context import House
from control_plane.auth import ANYONE
from control_plane.errors import ServiceUnavailable
from control_plane.migrations import current_revision, head_revision
from control_plane.schemas.base import Ok, ok

log = logging.getLogger(__name__)


@get("/health/live", guards=[ANYONE], tags=["health"], summary="The process answers")
async def live() -> Ok[dict[str, str]]:
    return ok({"status": "alive"})


@get("/health/ready", guards=[ANYONE], tags=["health"], summary="Database, its version, and object store answer")
async def ready(installation: House) -> Ok[dict[str, str]]:
    try:
        async with installation.database.read() as session:
            revision = await current_revision(session)
        await installation.storage.size("health/probe")
    except Exception as error:
        log.warning("not ready: %s", error)
        raise ServiceUnavailable("The database or the object store does not answer", retry_after_s=2) from error
    if revision != head_revision():
        raise ServiceUnavailable("The database is not at this version's tables: brightrun migrate", retry_after_s=2)
    return ok({"status": "ready", "schemaVersion": head_revision()})
