"""Engine and sessions. A transaction commits at the edge that opened it, never inside a service."""

from __future__ import annotations

import sqlite3
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from socket import gaierror
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

BUSY_TIMEOUT_S = 30
TRANSIENT_STATES = ("08", "25006", "40", "53", "57", "58030")
"""SQLSTATEs, or classes of them, that say nothing against the statement: connection lost, read-only, rolled back (as in
a deadlock), out of resources (disk, memory, connections), operator intervention (start, shutdown), I/O error."""
UNREACHABLE = (OperationalError, InterfaceError, PoolTimeout, ConnectionError, TimeoutError, gaierror)


class Database:
    """One engine; ``read`` and ``write`` give sessions.

    On SQLite a writing transaction begins IMMEDIATE, so that two writers queue instead of failing at commit; the
    rollback journal is used because SQLite before 3.51.3 can corrupt a WAL database (see SQLite's WAL-reset bug).
    """

    def __init__(self, url: str, *, mail: bool = False) -> None:
        """``mail``: notifications go out by mail too (``session.info["mail"]``)."""
        sqlite = url.startswith("sqlite")
        options: dict[str, Any] = {"pool_pre_ping": True}
        if sqlite:
            options = {"connect_args": {"timeout": BUSY_TIMEOUT_S, "factory": _SqliteConnection}}
        self.engine = create_async_engine(url, **options)
        if sqlite:
            event.listen(self.engine.sync_engine, "connect", _sqlite_connect)
            event.listen(self.engine.sync_engine, "begin", _sqlite_begin)
        writing = self.engine.execution_options(brightrun_begin="IMMEDIATE")
        self._read = async_sessionmaker(self.engine, expire_on_commit=False)
        self._write = async_sessionmaker(writing, expire_on_commit=False, info={"mail": mail})

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """A session for looking; what it changes is rolled back."""
        async with self._read() as session:
            yield session

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        """A session whose transaction commits when the block ends well. It begins at the first statement."""
        async with self._write() as session, session.begin():
            yield session

    async def close(self) -> None:
        await self.engine.dispose()


class _SqliteConnection(sqlite3.Connection):
    """Closes completely. SQLite keeps a closed connection's locks while a statement of it is half read, and a cancelled
    task leaves such statements behind until they are collected."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cursors: weakref.WeakSet[sqlite3.Cursor] = weakref.WeakSet()

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        cursor = super().cursor(*args, **kwargs)
        self._cursors.add(cursor)
        return cursor

    def close(self) -> None:
        for cursor in list(self._cursors):
            cursor.close()
        super().close()


def _sqlite_connect(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver must not begin by itself; _sqlite_begin does
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _sqlite_begin(connection: Connection) -> None:
    mode = connection.get_execution_options().get("brightrun_begin", "DEFERRED")
    connection.exec_driver_sql(f"BEGIN {mode}")


def is_unavailable(error: Exception) -> bool:
    """Whether the database is away, or cannot serve just now: the same may go well when it is tried again.

    In SQLAlchemy's words, by PostgreSQL's SQLSTATE, or in the words of driver and system, which nobody translates while
    they connect (asyncio tells several failed addresses by a plain OSError).
    """
    if isinstance(error, UNREACHABLE) or type(error) is OSError or type(error).__module__.startswith("asyncpg."):
        return True
    state = getattr(error.orig, "sqlstate", None) if isinstance(error, DBAPIError) else None
    return (state or "").startswith(TRANSIENT_STATES) or getattr(error, "connection_invalidated", False)
