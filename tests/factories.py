"""Accounts and datasets made through the API, as a client makes them."""

from __future__ import annotations

import itertools
from typing import Any

import httpx
from sqlalchemy import select

from control_plane.db import Database
from control_plane.services.datasets import apply_verdict
from control_plane.services.lifecycle import transition
from control_plane.states import Status
from control_plane.tables import Verdict

_numbers = itertools.count(1)
PASSWORD = "correct horse battery"

STATISTICS = {
    "conversations": 100,
    "trainingConversations": 90,
    "validationConversations": 10,
    "turns": 400,
    "tokens": 20_000,
    "learnedTokens": 9_000,
    "avgTurnsPerConversation": 4.0,
    "avgTokensPerTurn": 50.0,
    "lengthHistogram": [{"from": 128, "to": 256, "count": 100}],
    "p50": 200,
    "p95": 200,
    "max": 200,
    "overContext": {"limit": 2048, "conversations": 0, "tokensLost": 0, "learnedTokensLost": 0},
}
SOUND = {
    "format": "OPENAI_MESSAGES",
    "container": "jsonl",
    "passed": True,
    "counts": {},
    "findings": [],
    "statistics": STATISTICS,
    "sample": [{"line": 1, "pieces": [{"text": "hello", "learned": True}]}],
}
BROKEN = {
    **SOUND,
    "passed": False,
    "counts": {"NOT_JSON": 250, "UNKNOWN_ROLE": 1},
    "findings": [
        {"line": line, "pointer": "", "code": code, "severity": "error", "found": "{", "advice": "Close it."}
        for line, code in [*((line, "NOT_JSON") for line in range(1, 101)), (500, "UNKNOWN_ROLE")]
    ],
}
"""Reports as ``trainer.verdict`` makes them."""


class Account:
    """A user with an HTTP client that bears an access token."""

    def __init__(self, http: httpx.AsyncClient, email: str, user_id: str, token: str) -> None:
        self.http = http
        self.email = email
        self.user_id = user_id
        self.headers = {"Authorization": f"Bearer {token}"}

    async def call(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.http.request(method, path, json=body, headers=self.headers | named)

    async def data(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        return data_of(await self.call(method, path, body, **headers))


def data_of(response: httpx.Response) -> Any:
    body = response.json()
    assert body["success"] is True, (response.status_code, body)
    return body["data"]


def error_of(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error of a failure in the envelope, checked."""
    body = response.json()
    assert (response.status_code, body["success"]) == (status, False), body
    assert body.keys() == {"success", "error"}
    assert body["error"].keys() <= {"code", "message", "fields"}
    assert body["error"]["code"] == code
    assert body["error"]["message"]
    assert response.headers["X-Request-Id"]
    return body["error"]


async def make_account(http: httpx.AsyncClient, **overrides: Any) -> Account:
    email = overrides.pop("email", f"user{next(_numbers)}@example.com")
    body = {"email": email, "password": PASSWORD, "name": "Ada Lovelace", **overrides}
    user = data_of(await http.post("/api/auth/signup", json=body))["user"]
    signed_in = data_of(await http.post("/api/auth/signin", json={"email": email, "password": PASSWORD}))
    http.cookies.clear()
    return Account(http, email, user["id"], signed_in["accessToken"])


async def upload(account: Account, content: bytes = b'{"messages": []}\n', **fields: Any) -> str:
    """A dataset whose file is there, unconfirmed."""
    body = {"name": "talks", "fileName": "talks.jsonl", "fileSize": len(content), **fields}
    made = await account.data("POST", "/api/datasets", body)
    put = await account.http.request(
        made["uploadMethod"], made["uploadUrl"], content=content, headers=made["uploadHeaders"]
    )
    assert put.status_code == 200, put.text
    return str(made["datasetId"])


async def judge(database: Database, dataset_id: str, report: dict[str, Any] | None = SOUND) -> None:
    """End the dataset's queued verdict, as the scheduler does."""
    async with database.write() as session:
        verdict = await session.scalar(
            select(Verdict).where(Verdict.dataset_id == dataset_id, Verdict.status == Status.QUEUED)
        )
        assert verdict is not None
        assert await transition(session, verdict, Status.INITIALIZING)
        if report is not None:
            await apply_verdict(session, verdict, report)
        assert await transition(session, verdict, Status.COMPLETED if report else Status.FAILED)
        if report is None:
            await apply_verdict(session, verdict, None)


async def ready_dataset(account: Account, database: Database, report: dict[str, Any] = SOUND) -> str:
    dataset_id = await upload(account)
    await account.data("POST", f"/api/datasets/{dataset_id}/confirm", {})
    await judge(database, dataset_id, report)
    return dataset_id


def job_body(dataset_id: str, **fields: Any) -> dict[str, Any]:
    return {"datasetId": dataset_id, "presetId": "balanced", "gpuConfig": {"type": "cpu", "count": 1}, **fields}
