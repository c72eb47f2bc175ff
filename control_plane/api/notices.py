"""/api/notifications, /api/dashboard."""

from __future__ import annotations

from litestar import Controller, get, patch, post
from litestar.params import FromPath, FromQuery

from control_plane.api.context import Caller, Pages, Session
from control_plane.auth import READ
from control_plane.schemas.base import Ok, ok
from control_plane.schemas.notices import NotificationData, NotificationOut, Notifications, ReadAll, Stats
from control_plane.services import dashboard, notifications


class NotificationController(Controller):
    path = "/api/notifications"
    tags = ("notifications",)

    @get(guards=[READ], summary="The caller's notifications, newest first")
    async def list_notifications(
        self, session: Session, who: Caller, paging: Pages, read: FromQuery[bool | None] = None
    ) -> Ok[Notifications]:
        rows, pagination = await notifications.listed(session, who.user_id, paging, read)
        unread = await notifications.unread(session, who.user_id)
        seen = [NotificationOut.seen(row) for row in rows]
        return ok(Notifications(notifications=seen, unread=unread, pagination=pagination))

    @patch("/{notification_id:str}/read", guards=[READ], summary="Mark one as read")
    async def read(self, notification_id: FromPath[str], session: Session, who: Caller) -> Ok[NotificationData]:
        found = await notifications.mark_read(session, who.user_id, notification_id)
        return ok(NotificationData(notification=NotificationOut.seen(found)))

    @post("/read-all", guards=[READ], status_code=200, summary="Mark all as read")
    async def read_all(self, session: Session, who: Caller) -> Ok[ReadAll]:
        return ok(ReadAll(updated=await notifications.mark_all_read(session, who.user_id)))


@get("/api/dashboard/stats", guards=[READ], tags=["dashboard"], summary="The team's figures at a glance")
async def stats(session: Session, who: Caller) -> Ok[Stats]:
    return ok(await dashboard.stats(session, who.team_id))
