"""GET /api/jobs/{id}/stream: a job's events as Server-Sent Events."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import msgspec
from litestar import Response, get
from litestar.params import FromPath, QueryParameter
from litestar.response import Stream

from control_plane.api.context import AnyRequest, Caller, House, Installation
from control_plane.api.follower import Follower
from control_plane.auth import READ, authenticate
from control_plane.errors import BrightRunError, ValidationFailed
from control_plane.services.scope import get_owned
from control_plane.states import TERMINAL
from control_plane.tables import JobEvent, TrainingJob

COMMENT_S = 15.0
LAST = frozenset({"complete", "error"})
HEADERS = {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}


@get("/api/jobs/{job_id:str}/stream", guards=[READ], tags=["jobs"], summary="Its events, live (text/event-stream)")
async def stream(
    job_id: FromPath[str],
    request: AnyRequest,
    who: Caller,
    installation: House,
    last_event_id: Annotated[str | None, QueryParameter(name="lastEventId")] = None,
) -> Response[Any]:
    """Replays from ``Last-Event-ID`` (header or ``lastEventId``). 204 when everything was seen and nothing can come."""
    after = _cursor(request.headers.get("Last-Event-ID") or last_event_id)
    async with installation.database.read() as session:
        job = await get_owned(session, TrainingJob, who.team_id, job_id)
        over = job.status in TERMINAL and after >= job.event_seq
    if over:
        return Response(None, status_code=204)
    follower: Follower = request.app.state.follower
    events = _events(follower, request, installation, job_id, after)
    return Stream(events, media_type="text/event-stream", headers=HEADERS)


async def _events(
    follower: Follower, request: AnyRequest, installation: Installation, job_id: str, after: int
) -> AsyncIterator[bytes]:
    """Ends after the last event of a job, or when the caller may not see it any more. No session is held meanwhile."""
    checked = time.monotonic()
    yield b": connected\n\n"
    async with follower.watch(job_id, after) as watcher:
        while True:
            event = await watcher.next(COMMENT_S)
            if time.monotonic() - checked >= COMMENT_S:
                checked = time.monotonic()
                if not await _may_still(request, installation, job_id):
                    return
            if event is None:
                yield b": still here\n\n"
                continue
            yield _encoded(event)
            if event.type in LAST:
                return


async def _may_still(request: AnyRequest, installation: Installation, job_id: str) -> bool:
    try:
        who = await authenticate(installation.database, request)
        READ.check(who)
        async with installation.database.read() as session:
            await get_owned(session, TrainingJob, who.team_id, job_id)
    except BrightRunError:
        return False
    return True


def _encoded(event: JobEvent) -> bytes:
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (event.seq, event.type.encode(), msgspec.json.encode(event.payload))


def _cursor(given: str | None) -> int:
    if not given:
        return 0
    if not (given.isascii() and given.isdigit() and len(given) <= 9):
        raise ValidationFailed.field("lastEventId", "Must be the id of an event of this stream")
    return int(given)
