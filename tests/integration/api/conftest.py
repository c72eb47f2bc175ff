from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from argon2 import PasswordHasher
from litestar import Litestar
from sqlalchemy import select

from control_plane.app import create_app
from control_plane.db import Database
from control_plane.services import passwords
from control_plane.settings import Settings
from control_plane.tables import BudgetHold
from control_plane.tables.money import HoldState
from tests.factories import Account, make_account

BASE = "http://brightrun.test"
Http = httpx.AsyncClient


@pytest.fixture(autouse=True)
def quick_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "_hasher", PasswordHasher(time_cost=1, memory_cost=64, parallelism=1))


def make_settings(folder: Path, database_url: str, **overrides: object) -> Settings:
    folder.mkdir(exist_ok=True)
    (folder / "secret").write_bytes(b"a test's secret, 32 bytes long..")
    return Settings(data_dir=folder, database_url=database_url, public_url=BASE, **overrides)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def running(app: Litestar) -> AsyncIterator[None]:
    """The application's lifespan, in a task of its own (fixtures are set up and torn down in different ones)."""
    started, stop = asyncio.Event(), asyncio.Event()

    async def live() -> None:
        async with app.lifespan():
            started.set()
            await stop.wait()

    task = asyncio.create_task(live())
    await asyncio.wait({task, asyncio.ensure_future(started.wait())}, return_when=asyncio.FIRST_COMPLETED)
    try:
        yield
    finally:
        stop.set()
        await task


@contextlib.asynccontextmanager
async def client_of(app: Litestar) -> AsyncIterator[Http]:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)  # type: ignore[arg-type]
    async with running(app), Http(transport=transport, base_url=BASE) as http:
        yield http


@pytest.fixture
def settings(tmp_path: Path, sqlite_url: str) -> Settings:
    return make_settings(tmp_path / "data", sqlite_url)


@pytest.fixture
def app(settings: Settings) -> Litestar:
    return create_app(settings)


@pytest.fixture
async def http(app: Litestar) -> AsyncIterator[Http]:
    async with client_of(app) as http:
        yield http


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[Database]:
    """The API's database, as the scheduler sees it."""
    database = Database(settings.database_url)
    yield database
    await database.close()


@pytest.fixture
async def ada(http: Http) -> Account:
    """The installation's first account, and so its administrator."""
    return await make_account(http)


@pytest.fixture
async def bob(ada: Account, http: Http) -> Account:
    """A plain user."""
    return await make_account(http)


@pytest.fixture
async def both(tmp_path: Path, database_url: str) -> AsyncIterator[Http]:
    """An API on each of the supported databases."""
    async with client_of(create_app(make_settings(tmp_path / "data", database_url))) as http:
        yield http


@pytest.fixture(scope="module")
async def somebody(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> AsyncIterator[Account]:
    """An account on an API that a module's tests share: for requests that are refused and so change nothing."""
    folder = tmp_path_factory.mktemp("shared")
    shutil.copyfile(sqlite_template, folder / "shared.sqlite3")
    settings = make_settings(folder / "data", f"sqlite+aiosqlite:///{folder}/shared.sqlite3")
    async with client_of(create_app(settings)) as http:
        yield await make_account(http)


async def holds(db: Database) -> list[tuple[HoldState, int]]:
    async with db.read() as session:
        rows = await session.execute(select(BudgetHold.state, BudgetHold.amount_microusd))
        return [(state, amount) for state, amount in rows]
