"""Signing up and in, sessions, keys, teams, and who is refused."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import func, select, update

from control_plane.app import create_app
from control_plane.db import Database
from control_plane.services import throttle
from control_plane.settings import Settings
from control_plane.tables import ApiKey, AuthSession, Membership, SigninFailure, Team, User, now
from tests.factories import PASSWORD, Account, data_of, error_of
from tests.integration.api.conftest import Http, client_of, make_settings


def signup(**fields: object) -> dict[str, object]:
    return {"email": "grace@example.com", "password": PASSWORD, "name": "Grace Hopper", **fields}


async def test_signup_answers_the_user_without_the_password(http: Http) -> None:
    response = await http.post("/api/auth/signup", json=signup(email="Grace@Example.com", organization="Navy"))

    assert response.status_code == 201
    user = data_of(response)["user"]
    assert user.keys() == {"id", "email", "name", "createdAt"}
    assert user["email"] == "grace@example.com"
    assert user["createdAt"].endswith("Z")
    assert PASSWORD not in response.text


async def test_only_the_first_account_is_an_administrator_and_each_has_a_personal_team(
    ada: Account, bob: Account, db: Database
) -> None:
    roles = [(await a.data("GET", "/api/auth/me"))["user"]["role"] for a in (ada, bob)]
    assert roles == ["ADMIN", "USER"]
    for account in (ada, bob):
        (team,) = (await account.data("GET", "/api/teams"))["teams"]
        assert (team["personal"], team["role"], team["monthlyBudget"]) == (True, "OWNER", None)


async def test_signups_at_once_make_one_administrator(both: Http) -> None:
    answers = await asyncio.gather(
        *(both.post("/api/auth/signup", json=signup(email=f"u{n}@example.com")) for n in range(4))
    )
    assert [a.status_code for a in answers] == [201] * 4
    roles = []
    for n in range(4):
        body = {"email": f"u{n}@example.com", "password": PASSWORD}
        roles.append(data_of(await both.post("/api/auth/signin", json=body))["user"]["role"])
    assert sorted(roles) == ["ADMIN", "USER", "USER", "USER"]


async def test_an_email_is_taken_whatever_its_case(ada: Account, http: Http) -> None:
    response = await http.post("/api/auth/signup", json=signup(email=ada.email.upper()))
    assert error_of(response, 400, "EMAIL_EXISTS")["message"] == "An account with this email already exists"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (signup(email="not an address"), "email"),
        (signup(email=5), "email"),
        (signup(password="short"), "password"),
        (signup(name="G"), "name"),
        (signup(name="G" * 101), "name"),
        (signup(organization="x" * 201), "organization"),
        (signup(organisation="x"), "organisation"),
        (signup(name="nul\x00"), "name"),
        ({"email": "grace@example.com", "name": "Grace"}, "password"),
    ],
)
async def test_bad_signups_name_the_field(somebody: Account, body: dict[str, object], field: str) -> None:
    error = error_of(await somebody.http.post("/api/auth/signup", json=body), 400, "VALIDATION_ERROR")
    assert error["message"] == "Invalid input data"
    assert error["fields"].keys() == {field}


@pytest.mark.parametrize("policy", ["invitation", "closed"])
async def test_signing_up_can_be_closed_after_the_first(tmp_path: Path, sqlite_url: str, policy: str) -> None:
    async with client_of(create_app(make_settings(tmp_path / "data", sqlite_url, signup=policy))) as http:
        assert (await http.post("/api/auth/signup", json=signup())).status_code == 201
        error_of(await http.post("/api/auth/signup", json=signup(email="x@example.com")), 403, "FORBIDDEN")


async def test_signin_sets_a_cookie_and_answers_a_token_of_which_only_digests_are_kept(
    ada: Account, http: Http, db: Database
) -> None:
    response = await http.post("/api/auth/signin", json={"email": ada.email, "password": PASSWORD})

    cookie = response.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=lax" in cookie.lower()
    token = data_of(response)["accessToken"]
    async with db.read() as session:
        kept = list(await session.scalars(select(AuthSession.digest)))
    secret_parts = [token, response.cookies["brightrun_session"]]
    assert not any(part in digest for part in secret_parts for digest in kept)


async def test_the_cookie_serves_reads_and_needs_a_header_for_writes(ada: Account, http: Http) -> None:
    await http.post("/api/auth/signin", json={"email": ada.email, "password": PASSWORD})
    body = {"name": "Ada King"}

    assert data_of(await http.get("/api/auth/me"))["user"]["email"] == ada.email
    error_of(await http.patch("/api/auth/me", json=body), 403, "FORBIDDEN")
    foreign = {"X-Requested-With": "x", "Origin": "https://evil.example"}
    error_of(await http.patch("/api/auth/me", json=body, headers=foreign), 403, "FORBIDDEN")
    ours = {"X-Requested-With": "x", "Origin": "http://brightrun.test"}
    assert data_of(await http.patch("/api/auth/me", json=body, headers=ours))["user"]["name"] == "Ada King"


async def test_signout_ends_the_session(ada: Account, http: Http) -> None:
    await ada.data("POST", "/api/auth/signout")
    error_of(await ada.call("GET", "/api/auth/me"), 401, "UNAUTHORIZED")


async def test_sessions_expire(ada: Account, db: Database) -> None:
    async with db.write() as session:
        await session.execute(update(AuthSession).values(expires_at=now() - timedelta(seconds=1)))
    error_of(await ada.call("GET", "/api/auth/me"), 401, "UNAUTHORIZED")


async def test_a_deactivated_user_is_out_with_every_credential(ada: Account, db: Database, http: Http) -> None:
    key = (await ada.data("POST", "/api/keys", {"name": "k", "scopes": ["read"]}))["key"]
    async with db.write() as session:
        await session.execute(update(User).values(deactivated_at=now()))
    error_of(await ada.call("GET", "/api/auth/me"), 401, "UNAUTHORIZED")
    error_of(await http.get("/api/auth/me", headers={"Authorization": f"Bearer {key}"}), 401, "UNAUTHORIZED")
    body = {"email": ada.email, "password": PASSWORD}
    error_of(await http.post("/api/auth/signin", json=body), 401, "UNAUTHORIZED")


async def test_failures_are_throttled_by_account_and_forgotten_with_time(
    ada: Account, http: Http, db: Database
) -> None:
    wrong = {"email": ada.email, "password": "wrong password"}
    for _ in range(throttle.MOST["email"]):
        error_of(await http.post("/api/auth/signin", json=wrong), 401, "UNAUTHORIZED")

    right = {"email": ada.email, "password": PASSWORD}
    refused = await http.post("/api/auth/signin", json=right)
    error_of(refused, 429, "RATE_LIMITED")
    assert 1 <= int(refused.headers["Retry-After"]) <= throttle.WINDOW.total_seconds()
    async with db.write() as session:
        await session.execute(update(SigninFailure).values(created_at=now() - throttle.WINDOW))
    assert (await http.post("/api/auth/signin", json=right)).status_code == 200


async def test_an_address_that_tries_many_accounts_is_throttled(http: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(throttle.MOST, "address", 3)
    answers = [
        await http.post("/api/auth/signin", json={"email": f"{n}@example.com", "password": PASSWORD}) for n in range(4)
    ]
    assert [a.status_code for a in answers] == [401, 401, 401, 429]


async def test_good_signins_do_not_count(ada: Account, http: Http, db: Database) -> None:
    await http.post("/api/auth/signin", json={"email": ada.email, "password": "wrong password"})
    await http.post("/api/auth/signin", json={"email": ada.email, "password": PASSWORD})
    async with db.read() as session:
        counted = await session.scalar(select(func.count()).where(SigninFailure.subject == f"email:{ada.email}"))
    assert counted == 0


async def test_a_key_is_shown_once_and_kept_as_a_digest(ada: Account, http: Http, db: Database) -> None:
    made = await ada.data("POST", "/api/keys", {"name": "ci", "scopes": ["read", "train"]})
    (listed,) = (await ada.data("GET", "/api/keys"))["keys"]

    assert "key" not in listed
    assert listed["prefix"] == made["key"][: len(listed["prefix"])]
    async with db.read() as session:
        row = await session.get_one(ApiKey, made["id"])
    assert made["key"] not in (row.digest, row.prefix)
    assert (await http.get("/api/auth/me", headers={"Authorization": f"Bearer {made['key']}"})).status_code == 200


@pytest.mark.parametrize(
    ("scopes", "reads", "trains", "manages"),
    [
        (["read"], 200, 403, 403),
        (["train"], 200, 404, 403),
        (["admin"], 200, 404, 200),
    ],
)
async def test_scopes(ada: Account, http: Http, scopes: list[str], reads: int, trains: int, manages: int) -> None:
    key = (await ada.data("POST", "/api/keys", {"name": "k", "scopes": scopes}))["key"]
    bearer = {"Authorization": f"Bearer {key}"}

    assert (await http.get("/api/datasets", headers=bearer)).status_code == reads
    assert (await http.post("/api/jobs/none/cancel", headers=bearer)).status_code == trains
    assert (await http.get("/api/keys", headers=bearer)).status_code == manages


async def test_a_revoked_or_expired_or_altered_key_is_nothing(ada: Account, http: Http, db: Database) -> None:
    made = await ada.data("POST", "/api/keys", {"name": "k", "scopes": ["read"]})
    expiring = await ada.data(
        "POST", "/api/keys", {"name": "k", "scopes": ["read"], "expiresAt": "2999-01-01T00:00:00Z"}
    )
    async with db.write() as session:
        await session.execute(update(ApiKey).where(ApiKey.id == expiring["id"]).values(expires_at=now()))
    assert (await ada.call("DELETE", f"/api/keys/{made['id']}")).status_code == 200

    living = (await ada.data("POST", "/api/keys", {"name": "k", "scopes": ["read"]}))["key"]
    altered = living[:-1] + ("A" if living[-1] != "A" else "B")
    for key in (made["key"], expiring["key"], altered, "br_", "nonsense"):
        response = await http.get("/api/auth/me", headers={"Authorization": f"Bearer {key}"})
        error_of(response, 401, "UNAUTHORIZED")
    error_of(await ada.call("DELETE", f"/api/keys/{made['id']}"), 404, "NOT_FOUND")


@pytest.mark.parametrize(
    "body",
    [
        {"name": "k", "scopes": []},
        {"name": "k", "scopes": ["everything"]},
        {"name": "k", "scopes": "read"},
        {"name": "", "scopes": ["read"]},
        {"scopes": ["read"]},
        {"name": "k", "scopes": ["read"], "expiresAt": "2001-01-01T00:00:00Z"},
        {"name": "k", "scopes": ["read"], "expiresAt": "2999-01-01T00:00:00"},
    ],
)
async def test_bad_keys(somebody: Account, body: dict[str, object]) -> None:
    error_of(await somebody.call("POST", "/api/keys", body), 400, "VALIDATION_ERROR")


async def join(db: Database, team_of: Account, member: Account) -> str:
    async with db.write() as session:
        team = (await session.scalars(select(Team).where(Team.personal_of == team_of.user_id))).one()
        session.add(Membership(team_id=team.id, user_id=member.user_id))
        return team.id


async def test_the_team_is_the_keys_else_the_headers_else_the_personal_one(
    ada: Account, bob: Account, db: Database, http: Http
) -> None:
    team = await join(db, ada, bob)
    await ada.data("POST", "/api/datasets", {"name": "ada's", "fileName": "a.jsonl", "fileSize": 1})

    async def total(headers: dict[str, str]) -> int:
        return data_of(await http.get("/api/datasets", headers=headers))["pagination"]["total"]

    assert await total(bob.headers) == 0
    assert await total(bob.headers | {"X-Team-Id": team}) == 1
    made = await bob.call("POST", "/api/keys", {"name": "k", "scopes": ["read"]}, X_Team_Id=team)
    bearer = {"Authorization": f"Bearer {data_of(made)['key']}"}
    assert await total(bearer) == 1
    error_of(await http.get("/api/datasets", headers=ada.headers | {"X-Team-Id": "other"}), 404, "NOT_FOUND")

    async with db.write() as session:
        membership = (
            await session.scalars(
                select(Membership).where(Membership.team_id == team, Membership.user_id == bob.user_id)
            )
        ).one()
        await session.delete(membership)
    error_of(await http.get("/api/datasets", headers=bearer), 401, "UNAUTHORIZED")
    error_of(await http.get("/api/datasets", headers=bob.headers | {"X-Team-Id": team}), 404, "NOT_FOUND")


async def test_only_an_owner_sets_the_budget_and_only_administrators_name_a_team(
    ada: Account, bob: Account, db: Database
) -> None:
    team = await join(db, ada, bob)
    error_of(await bob.call("PUT", "/api/budget", {"monthlyBudget": "5"}, X_Team_Id=team), 403, "FORBIDDEN")
    assert await bob.data("PUT", "/api/budget", {"monthlyBudget": "5"}) == {"monthlyBudget": "5.000000"}

    (bobs,) = [t["id"] for t in (await bob.data("GET", "/api/teams"))["teams"] if t["personal"]]
    assert (await ada.data("GET", f"/api/costs/summary?team={bobs}"))["monthlyBudget"] == "5.000000"
    assert (await bob.data("GET", f"/api/costs/summary?team={team}"))["monthlyBudget"] == "5.000000"
    error_of(await ada.call("GET", "/api/costs/summary?team=none"), 404, "NOT_FOUND")


async def test_without_a_credential_nothing_but_the_open_routes_answers(settings: Settings, http: Http) -> None:
    spec = (await http.get("/schema/openapi.json")).json()
    open_routes = {
        "/api/auth/signup",
        "/api/auth/signin",
        "/health/live",
        "/health/ready",
        "/schema",
        "/schema/openapi.json",
    }
    seen = 0
    for path, methods in spec["paths"].items():
        for method in methods:
            if path not in open_routes and not path.startswith("/schema"):
                response = await http.request(method, path.replace("{", "").replace("}", ""))
                error_of(response, 401, "UNAUTHORIZED")
                seen += 1
    assert seen > 30
