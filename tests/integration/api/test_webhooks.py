"""Webhooks over HTTP: who manages them, what is refused, and that a secret is seen once."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from control_plane.app import create_app
from control_plane.db import Database
from control_plane.services import outbox
from control_plane.services.webhooks import MOST_PER_TEAM
from control_plane.tables import AuditEvent, IdempotencyKey, Membership, Outbox, Webhook, now
from control_plane.tables.accounts import TeamRole
from control_plane.tables.notices import Event
from tests.factories import Account, data_of, error_of, make_account
from tests.integration.api.conftest import Http, client_of, make_settings

URL = "https://receiver.example/hook?token=t"


async def make(account: Account, **fields: Any) -> tuple[dict[str, Any], str]:
    made = await account.data("POST", "/api/webhooks", {"url": URL, **fields})
    return made["webhook"], made["secret"]


async def team_of(account: Account) -> str:
    return str((await account.data("GET", "/api/teams"))["teams"][0]["id"])


async def test_a_webhook_from_its_creation_to_its_end(both: Http) -> None:
    ada = await make_account(both)
    response = await ada.call(
        "POST", "/api/webhooks", {"url": URL, "events": ["job.failed", "cost.alert", "job.failed"]}
    )
    assert response.status_code == 201
    made = data_of(response)["webhook"]
    assert made.keys() == {
        *("id", "url", "events", "enabled", "failingSince", "disabledAt", "disabledReason", "createdBy", "createdAt")
    }
    assert (made["url"], made["events"], made["enabled"]) == (URL, ["cost.alert", "job.failed"], True)
    assert (await ada.data("GET", "/api/webhooks"))["webhooks"] == [made]
    path = f"/api/webhooks/{made['id']}"

    changed = (await ada.data("PATCH", path, {"events": [], "url": "http://other.example/"}))["webhook"]
    assert (changed["events"], changed["url"], changed["enabled"]) == ([], "http://other.example/", True)
    assert (await ada.data("GET", path))["webhook"] == changed
    off = (await ada.data("PATCH", path, {"enabled": False}))["webhook"]
    assert (off["enabled"], off["disabledReason"]) == (False, "Disabled by an owner")
    assert off["disabledAt"] is not None
    on = (await ada.data("PATCH", path, {"enabled": True}))["webhook"]
    assert (on["enabled"], on["disabledAt"], on["disabledReason"]) == (True, None, None)

    assert await ada.data("DELETE", path) is None
    error_of(await ada.call("GET", path), 404, "NOT_FOUND")
    assert (await ada.data("GET", "/api/webhooks"))["webhooks"] == []


async def test_a_ping_and_what_became_of_it(both: Http) -> None:
    ada = await make_account(both)
    webhook, _ = await make(ada, events=["cost.alert"])
    path = f"/api/webhooks/{webhook['id']}"
    response = await ada.call("POST", f"{path}/test")
    assert response.status_code == 202
    ping = data_of(response)["delivery"]
    assert ping.keys() == {
        *("id", "type", "status", "tries", "createdAt", "nextTryAt", "deliveredAt", "failedAt", "lastError")
    }
    assert (ping["type"], ping["status"], ping["tries"]) == ("ping", "PENDING", 0)
    await ada.data("POST", f"{path}/test")
    listed = await ada.data("GET", f"{path}/deliveries?pageSize=1&page=2")
    assert (listed["deliveries"], listed["pagination"]["total"]) == ([ping], 2)

    await ada.data("PATCH", path, {"enabled": False})
    given_up = (await ada.data("GET", f"{path}/deliveries"))["deliveries"]
    assert {(d["status"], d["lastError"], d["nextTryAt"]) for d in given_up} == {
        ("FAILED", "The webhook was disabled", None)
    }
    error_of(await ada.call("POST", f"{path}/test"), 409, "CONFLICT")
    await ada.data("DELETE", path)
    error_of(await ada.call("GET", f"{path}/deliveries"), 404, "NOT_FOUND")


async def test_enabling_is_a_new_beginning(ada: Account, db: Database) -> None:
    webhook, _ = await make(ada)
    async with db.write() as session:
        values = {
            "enabled": False,
            "disabled_at": now(),
            "disabled_reason": "It answered 410 Gone",
            "failing_since": now(),
        }
        await session.execute(update(Webhook).values(**values))
    on = (await ada.data("PATCH", f"/api/webhooks/{webhook['id']}", {"enabled": True}))["webhook"]
    assert on == webhook
    async with db.write() as session:
        await outbox.tell_webhooks(session, await team_of(ada), Event.SYSTEM, {}, key="one")
        assert (await session.scalars(select(Outbox.target))).all() == [webhook["id"]]


async def test_the_secret_is_shown_once(ada: Account, db: Database, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    webhook, secret = await make(ada)
    path = f"/api/webhooks/{webhook['id']}"
    rotated = await ada.data("POST", f"{path}/secret")
    assert secret.startswith("whsec_")
    assert rotated["secret"] not in ("", secret)
    await ada.data("POST", f"{path}/test")
    answers = [
        (await ada.call(method, there, body)).text
        for method, there, body in (
            ("GET", "/api/webhooks", None),
            ("GET", path, None),
            ("PATCH", path, {"enabled": True}),
            ("GET", f"{path}/deliveries", None),
        )
    ]
    async with db.read() as session:
        kept = await session.get_one(Webhook, webhook["id"])
        assert (kept.secret, kept.previous_secret) == (rotated["secret"], secret)
        assert kept.previous_secret_until is not None
        audits = list(await session.scalars(select(AuditEvent).where(AuditEvent.object_type == "webhook")))
        rows = list(await session.scalars(select(Outbox)))
    assert sorted(audit.action for audit in audits) == ["change", "create", "rotate secret"]
    told = [*answers, caplog.text, *(str(vars(row)) for row in [*audits, *rows])]
    for part in (secret.removeprefix("whsec_"), rotated["secret"].removeprefix("whsec_")):
        assert not [text for text in told if part in text]


async def test_a_repeated_creation_answers_alike_and_keeps_no_secret(ada: Account, db: Database) -> None:
    answers = [await ada.data("POST", "/api/webhooks", {"url": URL}, Idempotency_Key="k") for _ in range(2)]
    assert answers[0] == answers[1]
    assert len((await ada.data("GET", "/api/webhooks"))["webhooks"]) == 1
    path = f"/api/webhooks/{answers[0]['webhook']['id']}/secret"
    rotations = [await ada.data("POST", path, Idempotency_Key="r") for _ in range(2)]
    assert rotations[0] == rotations[1]
    async with db.read() as session:
        kept = (await session.get_one(Webhook, answers[0]["webhook"]["id"])).secret
        stored = [str(answer) for answer in await session.scalars(select(IdempotencyKey.answer))]
    assert kept == rotations[0]["secret"]
    for secret in (answers[0]["secret"], kept):
        assert not [text for text in stored if secret.removeprefix("whsec_") in text]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "url"),
        ({"url": ""}, "url"),
        ({"url": "https://example.com/" + "x" * 2000}, "url"),
        ({"url": "ftp://example.com"}, "url"),
        ({"url": "https://user:password@example.com"}, "url"),
        ({"url": "http://169.254.169.254/latest/meta-data"}, "url"),
        ({"url": "http://[::ffff:10.0.0.1]:8080/"}, "url"),
        ({"url": "http://localhost:8080/"}, "url"),
        ({"url": "https://example.com/\u0000"}, "url"),
        ({"url": URL, "events": ["job.exploded"]}, "events"),
        ({"url": URL, "events": ["ping"]}, "events"),
        ({"url": URL, "events": "job.failed"}, "events"),
        ({"url": URL, "enabled": 1}, "enabled"),
        ({"url": URL, "secret": "whsec_mine"}, "secret"),
    ],
)
async def test_bad_webhooks_name_the_field(somebody: Account, body: dict[str, Any], field: str) -> None:
    error = error_of(await somebody.call("POST", "/api/webhooks", body), 400, "VALIDATION_ERROR")
    assert error["fields"].keys() == {field}


async def test_a_change_is_judged_like_a_creation(ada: Account) -> None:
    webhook, _ = await make(ada)
    path = f"/api/webhooks/{webhook['id']}"
    for body, field in (
        ({"url": "http://127.0.0.1/"}, "url"),
        ({"events": ["x"]}, "events"),
        ({"enabled": None}, "enabled"),
    ):
        assert error_of(await ada.call("PATCH", path, body), 400, "VALIDATION_ERROR")["fields"].keys() == {field}
    assert (await ada.data("GET", path))["webhook"] == webhook


async def test_an_installation_may_allow_its_own_network(tmp_path: Path, sqlite_url: str) -> None:
    settings = make_settings(tmp_path / "data", sqlite_url, webhook_networks="any")
    async with client_of(create_app(settings)) as http:
        webhook, _ = await make(await make_account(http), url="http://10.0.0.1:8080/hook")
    assert webhook["url"] == "http://10.0.0.1:8080/hook"


async def test_a_team_has_so_many_and_no_more(both: Http) -> None:
    ada = await make_account(both)
    answers = await asyncio.gather(*(ada.call("POST", "/api/webhooks", {"url": URL}) for _ in range(MOST_PER_TEAM + 3)))
    assert sorted(answer.status_code for answer in answers) == [201] * MOST_PER_TEAM + [409] * 3
    assert len((await ada.data("GET", "/api/webhooks"))["webhooks"]) == MOST_PER_TEAM


ROUTES = [("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/secret"), ("POST", "/test"), ("GET", "/deliveries")]


async def test_somebody_elses_webhook_is_not_there(ada: Account, bob: Account) -> None:
    webhook, _ = await make(bob)
    eve = await make_account(bob.http)
    for method, rest in ROUTES:
        body = {"enabled": False} if method == "PATCH" else None
        error_of(await eve.call(method, f"/api/webhooks/{webhook['id']}{rest}", body), 404, "NOT_FOUND")
    assert (await eve.data("GET", "/api/webhooks"))["webhooks"] == []
    assert (await bob.data("GET", "/api/webhooks"))["webhooks"] == [webhook]


async def test_owners_and_their_admin_keys_manage(ada: Account, bob: Account, db: Database) -> None:
    webhook, _ = await make(bob)
    team_id = await team_of(bob)
    member = await make_account(bob.http)
    async with db.write() as session:
        session.add(Membership(team_id=team_id, user_id=member.user_id, role=TeamRole.MEMBER))
    calls = [("GET", "", None), ("POST", "", {"url": URL})]
    calls += [(method, f"/{webhook['id']}{rest}", {} if method == "PATCH" else None) for method, rest in ROUTES]
    for scope, allowed in (("train", False), ("admin", True)):
        key = (await bob.data("POST", "/api/keys", {"name": scope, "scopes": [scope]}))["key"]
        response = await bob.http.get("/api/webhooks", headers={"Authorization": f"Bearer {key}"})
        assert response.status_code == (200 if allowed else 403)
    for method, rest, body in calls:
        response = await member.call(method, f"/api/webhooks{rest}", body, X_Team_Id=team_id)
        error_of(response, 403, "FORBIDDEN")
        error_of(await bob.http.request(method, f"/api/webhooks{rest}", json=body), 401, "UNAUTHORIZED")
    assert (await bob.data("GET", "/api/webhooks"))["webhooks"] == [webhook]
