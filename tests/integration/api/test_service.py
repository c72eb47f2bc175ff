"""The application as a whole: health, headers, failures of what it stands on, and the rules of its routes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from asyncpg.exceptions import CannotConnectNowError
from litestar import Litestar, get
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError, OperationalError

from control_plane.app import ROUTES, create_app
from control_plane.auth import ANYONE, check_routes
from control_plane.db import Database
from control_plane.migrations import upgrade
from control_plane.schemas.base import Ok
from control_plane.services import dashboard, prices
from control_plane.services.catalog import Catalog
from control_plane.settings import Settings
from control_plane.tables import PriceVersion, User
from tests.factories import Account, error_of, make_account
from tests.integration.api.conftest import Http, client_of, make_settings


async def test_alive_always_ready_with_the_newest_tables(tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "data", f"sqlite+aiosqlite:///{tmp_path}/empty.sqlite3")
    async with client_of(create_app(settings)) as http:
        assert (await http.get("/health/live")).status_code == 200
        early = await http.get("/health/ready")
        error_of(early, 503, "SERVICE_UNAVAILABLE")
        assert int(early.headers["Retry-After"]) > 0
        await upgrade(settings)
        assert (await http.get("/health/ready")).json()["data"]["status"] == "ready"


async def test_every_answer_carries_its_id_and_stays_out_of_caches(http: Http) -> None:
    answers = [await http.get(path) for path in ("/health/live", "/api/jobs", "/nowhere", "/schema")]
    ids = [a.headers["X-Request-Id"] for a in answers]
    assert len(set(ids)) == 4
    for answer in answers:
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
    own = await http.get("/nowhere", headers={"X-Request-Id": "mine-1"})
    odd = await http.get("/nowhere", headers={"X-Request-Id": "not plain"})
    assert own.headers["X-Request-Id"] == "mine-1"
    assert odd.headers["X-Request-Id"] != "not plain"


async def test_unknown_addresses_and_methods(http: Http) -> None:
    error_of(await http.get("/api/nothing"), 404, "NOT_FOUND")
    wrong = await http.delete("/health/live")
    error_of(wrong, 405, "METHOD_NOT_ALLOWED")
    error_of(await http.get("/api/jobs/x%00y"), 400, "VALIDATION_ERROR")


async def test_an_error_of_ours_tells_nothing_internal(ada: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise ValueError("the secret is 42")

    monkeypatch.setattr(dashboard, "stats", broken)
    response = await ada.call("GET", "/api/dashboard/stats")
    error_of(response, 500, "INTERNAL_ERROR")
    assert "42" not in response.text
    assert "Traceback" not in response.text


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OperationalError("SELECT 1", {}, Exception("database is locked")), 503),
        (OperationalError("SELECT 1", {}, Exception("database or disk is full")), 503),
        (OSError(28, "No space left on device"), 503),
        (ConnectionRefusedError(111, "Connect call failed ('127.0.0.1', 5432)"), 503),
        (TimeoutError(), 503),
        (CannotConnectNowError("the database system is starting up"), 503),
        (IntegrityError("INSERT", {}, Exception("UNIQUE constraint failed")), 500),
    ],
)
async def test_failures_of_database_and_disk(
    ada: Account, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    async def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(dashboard, "stats", broken)
    response = await ada.call("GET", "/api/dashboard/stats")
    error_of(response, status, "SERVICE_UNAVAILABLE" if status == 503 else "INTERNAL_ERROR")
    assert ("Retry-After" in response.headers) is (status == 503)
    assert "SELECT" not in response.text


async def test_a_commit_that_fails_is_never_answered_as_a_success(app: Litestar, ada: Account, db: Database) -> None:
    def refuse(_: Any) -> None:
        raise OperationalError("COMMIT", {}, Exception("disk I/O error"))

    engine = app.state.database.engine.sync_engine
    event.listen(engine, "commit", refuse)
    try:
        response = await ada.call("PATCH", "/api/auth/me", {"name": "Never Kept"})
    finally:
        event.remove(engine, "commit", refuse)
    error_of(response, 503, "SERVICE_UNAVAILABLE")
    async with db.read() as session:
        assert (await session.get_one(User, ada.user_id)).name == "Ada Lovelace"


def test_an_app_with_a_route_that_states_no_rule_does_not_start() -> None:
    @get("/open")
    async def unguarded() -> None:
        return None

    @get("/stated", guards=[ANYONE])
    async def guarded() -> None:
        return None

    check_routes(Litestar([guarded], openapi_config=None))
    with pytest.raises(RuntimeError, match="/open"):
        check_routes(Litestar([guarded, unguarded], openapi_config=None))


async def test_the_schema_describes_every_operation(http: Http) -> None:
    spec = (await http.get("/schema/openapi.json")).json()
    assert len(spec["paths"]) >= len(ROUTES)
    body = spec["paths"]["/api/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    described = spec["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    assert set(described["required"]) == {"datasetId", "presetId", "gpuConfig"}
    for path, methods in spec["paths"].items():
        for method, operation in methods.items():
            assert operation.get("summary") or path.startswith("/schema"), (method, path)


async def test_the_first_prices_are_set_once_by_any_number_of_processes(database: Database) -> None:
    catalog = Catalog.load(Settings())
    for _ in range(2):
        async with database.write() as session:
            await prices.ensure_first(session, catalog)
    async with database.read() as session:
        assert (await prices.current(session)).gpu_microusd_per_hour["h100"] == 4_500_000
        assert (await session.get(PriceVersion, "none")) is None


async def test_both_databases_serve_the_lists(both: Http) -> None:
    ada = await make_account(both)
    for path in (
        "/api/datasets?search=x&trainingReady=true&sortBy=totalTokens",
        "/api/jobs?status=QUEUED&sortBy=startedAt",
        "/api/models?sortBy=quality&search=x",
        "/api/costs?from=2026-01-01&to=2026-12-31&type=COMPUTE",
        "/api/costs?groupBy=day",
        "/api/costs/summary",
        "/api/notifications?read=false",
        "/api/dashboard/stats",
        "/api/gpu-types",
        "/api/keys",
        "/api/teams",
    ):
        assert (await ada.call("GET", path)).status_code == 200, path
    await ada.data("PUT", "/api/budget", {"monthlyBudget": "1"})
    assert (await ada.data("GET", "/api/costs/summary"))["alerts"] == []


def test_the_envelope_has_two_keys() -> None:
    assert Ok.__struct_fields__ == ("success", "data")
