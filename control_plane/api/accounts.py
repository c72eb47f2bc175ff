"""/api/auth, /api/keys, /api/teams."""

from __future__ import annotations

import secrets
from typing import Any

from litestar import Controller, Response, delete, get, patch, post
from litestar.datastructures import Cookie
from litestar.params import FromPath, JSONBody
from msgspec import UNSET

from control_plane.api.context import AnyRequest, Caller, House, Installation, Once, Session, address_of
from control_plane.auth import ANYONE, COOKIE, MANAGE, READ
from control_plane.errors import Unauthorized
from control_plane.schemas.accounts import (
    ChangeMe,
    CreateKey,
    KeyOut,
    Keys,
    NewKey,
    NewUser,
    NewUserData,
    Signin,
    SigninData,
    Signup,
    TeamOut,
    Teams,
    UserData,
    UserOut,
)
from control_plane.schemas.base import Ok, ok
from control_plane.services import accounts, keys, throttle
from control_plane.services.passwords import hash_password, verify_password
from control_plane.tables import User
from control_plane.tables.accounts import SessionKind


class AuthController(Controller):
    path = "/api/auth"
    tags = ("auth",)

    @post("/signup", guards=[ANYONE], summary="Create an account")
    async def signup(
        self,
        data: JSONBody[Signup],
        request: AnyRequest,
        installation: House,
        session: Session,
        idempotent: Once,
    ) -> Ok[NewUserData]:
        password_hash = await hash_password(data.password)
        policy, address = installation.settings.signup, address_of(request)

        async def run() -> NewUserData:
            user = await accounts.signup(session, data, password_hash, policy=policy, address=address)
            return NewUserData(user=NewUser.of(user))

        return ok(await idempotent(NewUserData, run))

    @post("/signin", guards=[ANYONE], status_code=200, summary="Open a session; answers a bearer token too")
    async def signin(
        self, data: JSONBody[Signin], request: AnyRequest, installation: House
    ) -> Response[Ok[SigninData]]:
        """The password is verified between transactions, not within one."""
        settings, database = installation.settings, installation.database
        email, address = accounts.fold(data.email), address_of(request)
        async with database.write() as session:
            await throttle.count_attempt(session, email, address)
            user = await accounts.by_email(session, email)
        fits = await verify_password(user.password_hash if user else None, data.password)
        if user is None or not fits:
            raise Unauthorized("Wrong email or password")
        async with database.write() as session:
            await throttle.forgive(session, email, address)
            cookie, _ = await accounts.open_session(session, user.id, SessionKind.COOKIE, settings.session_ttl_s)
            token, expires_at = await accounts.open_session(session, user.id, SessionKind.TOKEN, settings.token_ttl_s)
        answer = ok(SigninData(user=UserOut.of(user), access_token=token, expires_at=expires_at))
        return Response(answer, cookies=[_cookie(cookie, installation, settings.session_ttl_s)])

    @post("/signout", guards=[READ], status_code=200, summary="End the session that the request came in")
    async def signout(self, session: Session, who: Caller, installation: House) -> Response[Ok[None]]:
        if who.session_id is not None:
            await accounts.close_session(session, who.session_id)
        return Response(ok(None), cookies=[_cookie("", installation, 0)])

    @get("/me", guards=[READ], summary="The caller's account")
    async def me(self, who: Caller) -> Ok[UserData]:
        return ok(UserData(user=UserOut.of(who.user)))

    @patch("/me", guards=[MANAGE], summary="Change name or organization")
    async def change_me(self, data: JSONBody[ChangeMe], session: Session, who: Caller) -> Ok[UserData]:
        user = await session.get_one(User, who.user_id)
        if data.name is not UNSET:
            user.name = data.name
        if data.organization is not UNSET:
            user.organization = data.organization
        await session.flush()
        return ok(UserData(user=UserOut.of(user)))


class KeyController(Controller):
    path = "/api/keys"
    tags = ("keys",)

    @post(guards=[MANAGE], summary="Create an API key; it is shown this once")
    async def create(
        self,
        data: JSONBody[CreateKey],
        installation: House,
        session: Session,
        who: Caller,
        idempotent: Once,
    ) -> Ok[NewKey]:
        async def run() -> NewKey:
            nonce = secrets.token_hex()
            made = await keys.create(session, who, data, keys.derive(installation.secret, nonce))
            return NewKey.of(made, key=nonce)

        made = await idempotent(NewKey, run)  # what is kept for a repetition holds the nonce, not the key
        made.key = keys.derive(installation.secret, made.key)
        return ok(made)

    @get(guards=[MANAGE], summary="The caller's keys in this team; an owner sees everybody's")
    async def list_keys(self, session: Session, who: Caller) -> Ok[Keys]:
        return ok(Keys(keys=[KeyOut.of(key) for key in await keys.listed(session, who)]))

    @delete("/{key_id:str}", guards=[MANAGE], status_code=200, summary="Revoke a key")
    async def revoke(self, key_id: FromPath[str], session: Session, who: Caller) -> Ok[None]:
        await keys.revoke(session, who, key_id)
        return ok(None)


@get("/api/teams", guards=[READ], tags=["teams"], summary="The caller's teams, the personal one first")
async def list_teams(session: Session, who: Caller) -> Ok[Teams]:
    found = await accounts.teams_of(session, who.user_id)
    return ok(Teams(teams=[TeamOut.seen(team, role, who.user_id) for team, role in found]))


def _cookie(value: str, installation: Installation, max_age_s: int) -> Cookie:
    secure = installation.settings.public_url.startswith("https:")
    options: dict[str, Any] = {"path": "/", "httponly": True, "samesite": "lax", "secure": secure}
    return Cookie(key=COOKIE, value=value, max_age=max_age_s, **options)
