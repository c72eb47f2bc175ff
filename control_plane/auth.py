"""Who calls, and may they: credentials become a Principal, and every route's rule is one of those below.

An ``Access`` is a Litestar guard. ``check_routes`` refuses to start an application with a route that has none.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import msgspec
from litestar import Litestar, Request
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler, HTTPRouteHandler
from litestar.routes import HTTPRoute
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.db import Database
from control_plane.errors import Forbidden, NotFound, Unauthorized, ValidationFailed
from control_plane.services import accounts, keys
from control_plane.services.scope import Principal
from control_plane.tables import ApiKey, Team
from control_plane.tables.accounts import Role, Scope, SessionKind, TeamRole

Connection = ASGIConnection[Any, Any, Any, Any]
COOKIE = "brightrun_session"
CSRF_HEADER = "X-Requested-With"
TEAM_HEADER = "X-Team-Id"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
EVERYTHING = frozenset(Scope)


class Access:
    """Who may call a route."""

    def __init__(
        self, *, scope: Scope | None = None, owner: bool = False, billing: bool = False, anonymous: bool = False
    ) -> None:
        self.scope = scope
        self.owner = owner
        """The team's owner (or an administrator)."""
        self.billing = billing
        """A billing administrator too, for any team."""
        self.anonymous = anonymous

    async def __call__(self, connection: Connection, _: BaseRouteHandler) -> None:
        if b"%00" in connection.scope["raw_path"] or b"%00" in connection.scope["query_string"]:
            raise ValidationFailed("The URL contains the character U+0000")
        if self.anonymous:
            return
        database: Database = connection.app.state.database
        connection.scope["state"]["principal"] = await authenticate(database, connection, billing=self.billing)
        self.check(connection.scope["state"]["principal"])

    def check(self, who: Principal) -> None:
        """Raises Forbidden for a missing scope or role."""
        if self.scope is not None and self.scope not in who.scopes:
            raise Forbidden(f"This needs the scope {self.scope}")
        if self.owner and not (who.owns_team or (self.billing and who.user.role is Role.BILLING_ADMIN)):
            raise Forbidden("Only the team's owner may do this")


ANYONE = Access(anonymous=True)
SIGNED_URL = Access(anonymous=True)
"""The URL's signature is the permission; the handler verifies it."""
READ = Access(scope=Scope.READ)
TRAIN = Access(scope=Scope.TRAIN)
MANAGE = Access(scope=Scope.ADMIN)
"""The caller's own account and keys."""
OWN = Access(scope=Scope.ADMIN, owner=True)
"""What the team has and its owner manages."""
SEE_COSTS = Access(scope=Scope.READ, billing=True)
SET_BUDGET = Access(scope=Scope.ADMIN, owner=True, billing=True)


def check_routes(app: Litestar) -> None:
    """Raises RuntimeError naming the routes that do not say who may call them."""
    open_routes = [
        f"{handler} {route.path}"
        for route in app.routes
        for handler in getattr(route, "route_handlers", [getattr(route, "route_handler", None)])
        if not _states_access(route, handler)
    ]
    if open_routes:
        raise RuntimeError(f"Routes without an access rule: {', '.join(open_routes)}")


def _states_access(route: Any, handler: Any) -> bool:
    generated = isinstance(route, HTTPRoute) and isinstance(handler, HTTPRouteHandler)
    if generated and handler.http_methods == {"OPTIONS"}:
        return True
    return any(isinstance(getattr(guard, "func", guard), Access) for guard in handler.resolve_guards())


def principal_of(request: Request[Any, Any, Any]) -> Principal:
    """The caller that the route's rule let in."""
    found: Principal = request.scope["state"]["principal"]
    return found


async def authenticate(database: Database, connection: Connection, *, billing: bool = False) -> Principal:
    """Raises Unauthorized, NotFound for a team that is not the caller's, Forbidden for a cookie without its header."""
    authorization = connection.headers.get("Authorization", "")
    scheme, _, token = authorization.partition(" ")
    cookie = connection.cookies.get(COOKIE)
    used: ApiKey | None = None
    async with database.read() as session:
        if authorization and (scheme.lower() != "bearer" or not token.strip()):
            raise Unauthorized("Send the header Authorization: Bearer KEY")
        if token.startswith(keys.PREFIX):
            used, who = await _by_key(session, token.strip())
        elif token:
            who = await _in_session(session, token.strip(), SessionKind.TOKEN, connection)
        elif cookie:
            _require_same_site(connection)
            who = await _in_session(session, cookie, SessionKind.COOKIE, connection)
        else:
            raise Unauthorized("Authentication required")
        who = await _elsewhere(session, who, connection, billing)
    if used is not None and keys.used_long_ago(used):
        async with database.write() as session:
            await keys.touch(session, used.id)
    return who


async def _by_key(session: AsyncSession, token: str) -> tuple[ApiKey, Principal]:
    """An API key acts in its own team."""
    found = await keys.bearer_of(session, token)
    if found is None:
        raise Unauthorized("The API key is unknown, revoked or expired")
    key, user, role = found
    scopes = keys.allowed(key.scopes)
    return key, Principal(user=user, team_id=key.team_id, team_role=role, scopes=scopes, key_id=key.id)


async def _in_session(session: AsyncSession, token: str, kind: SessionKind, connection: Connection) -> Principal:
    """A signed-in user acts in the team of ``X-Team-Id``, else in the personal one."""
    found = await accounts.session_of(session, token, kind)
    if found is None:
        raise Unauthorized("The session has ended: sign in again")
    opened, user = found
    team_id = connection.headers.get(TEAM_HEADER) or await accounts.personal_team(session, user.id)
    role = await accounts.role_in(session, user.id, team_id)
    if role is None:
        raise NotFound("Team not found")
    return Principal(user=user, team_id=team_id, team_role=role, scopes=EVERYTHING, session_id=opened.id)


async def _elsewhere(session: AsyncSession, who: Principal, connection: Connection, billing: bool) -> Principal:
    """An administrator (for costs and budgets a billing administrator too) may name any team with ``team=``."""
    named = connection.query_params.get("team")
    may = who.user.role is Role.ADMIN or (billing and who.user.role is Role.BILLING_ADMIN)
    if named is None or not may:
        return who
    if await session.get(Team, named) is None:
        raise NotFound("Team not found")
    role = await accounts.role_in(session, who.user_id, named) or TeamRole.MEMBER
    return msgspec.structs.replace(who, team_id=named, team_role=role)


def _require_same_site(connection: Connection) -> None:
    """A form or script of another site can send our cookie, but neither this header nor our origin."""
    if connection.scope.get("method") in SAFE_METHODS:
        return
    origin = connection.headers.get("Origin")
    foreign = origin is not None and urlsplit(origin).netloc != connection.headers.get("Host")
    if foreign or not connection.headers.get(CSRF_HEADER):
        raise Forbidden(f"A request with a session cookie needs the header {CSRF_HEADER}")
