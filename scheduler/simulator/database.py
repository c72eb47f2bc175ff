"""SQLite in memory, without threads, behind SQLAlchemy's aiosqlite dialect: every statement runs at once, on one
connection that all processes of a world share, and transactions exclude each other in virtual time as SQLite's own
locks do (one writer, or any number of readers; who waits too long hears "database is locked").
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import deque
from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection as SqlConnection
from sqlalchemy import NullPool, create_engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from control_plane.db import BUSY_TIMEOUT_S, Database
from control_plane.tables import Base
from scheduler.simulator.clock import PROCESS, Process
from scheduler.simulator.faults import DatabaseFault

if TYPE_CHECKING:
    from scheduler.simulator.world import World

READS = ("SELECT", "WITH", "PRAGMA")


@cache
def empty_database() -> bytes:
    """Every table and no row, as ``sqlite3.Connection.deserialize`` takes it."""
    raw = sqlite3.connect(":memory:")
    engine = create_engine("sqlite://", creator=lambda: raw)
    Base.metadata.create_all(engine)
    raw.commit()
    return raw.serialize()


class Store:
    """The database server, so to say: what is stored, and who holds which lock."""

    def __init__(self, world: World, content: bytes) -> None:
        self.world = world
        self.raw = sqlite3.connect(":memory:", isolation_level=None, cached_statements=1000)
        self.raw.deserialize(content)
        self.raw.execute("PRAGMA foreign_keys=ON")
        self.raw.execute("PRAGMA journal_mode=MEMORY")
        self.commits = 0
        self._open: list[Connection] = []
        """Those that hold a lock: one that writes, or any that read."""
        self._waiting: deque[tuple[Connection, asyncio.Future[None]]] = deque()

    async def lock(self, connection: Connection) -> None:
        """Raises sqlite3.OperationalError after BUSY_TIMEOUT_S; it is a fault's when a process stood still."""
        if not self._waiting and self._fits(connection):
            self._grant(connection)
        else:
            await self._queue(connection)

    async def _queue(self, connection: Connection) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = (connection, turn)
        self._waiting.append(place)
        try:
            async with asyncio.timeout(BUSY_TIMEOUT_S):
                await turn
        except BaseException as error:
            if place in self._waiting:
                self._waiting.remove(place)
            self.unlock(connection, "ROLLBACK")
            self._wake()
            if isinstance(error, TimeoutError):
                excused = self.world.hazards.stood_still(BUSY_TIMEOUT_S)
                raise (DatabaseFault if excused else sqlite3.OperationalError)("database is locked") from None
            raise

    def unlock(self, connection: Connection, how: str) -> None:
        if connection not in self._open:
            return
        if connection.writes:
            self.raw.execute(how)
        self._open.remove(connection)
        self._wake()

    def forget(self, process: Process) -> None:
        """The process is gone: its transactions are rolled back."""
        for connection in [c for c in self._open if c.process is process]:
            self.unlock(connection, "ROLLBACK")

    def _grant(self, connection: Connection) -> None:
        self._open.append(connection)
        if connection.writes:
            self.raw.execute("BEGIN IMMEDIATE")

    def _fits(self, connection: Connection) -> bool:
        return not self._open or not (connection.writes or self._open[0].writes)

    def _wake(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            connection, turn = self._waiting.popleft()
            if turn.done():
                continue
            if not connection.process.alive:
                turn.cancel()
                continue
            self._grant(connection)
            turn.set_result(None)


class Connection:
    """What SQLAlchemy's dialect uses of an ``aiosqlite.Connection``. A transaction begins at its first statement."""

    _connection = True
    """The dialect looks whether it is there."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.store = process.world.store
        self.writes = False
        self.begun = False
        self.dirty = False
        """Whether something other than the lease and the cluster's state was written."""
        self.broken = False

    def cursor(self) -> Cursor:
        return Cursor(self)

    async def execute(self, cursor: Cursor, sql: str, parameters: Any, many: bool = False) -> None:
        self.process.check()
        if self.broken:
            raise DatabaseFault("connection closed")
        hazards = self.process.world.hazards
        if not self.begun:
            await hazards.begin(self)
            self.process.check()
            await self.store.lock(self)
            self.begun = True
            self.process.check()
        await hazards.statement(self)
        reads = sql.startswith(READS)
        if not reads:
            if not self.writes:
                raise sqlite3.OperationalError("attempt to write in a transaction that only reads")
            self.dirty = self.dirty or not ("scheduler_lease" in sql or "cluster_state" in sql)
        raw = self.store.raw.executemany(sql, parameters) if many else self.store.raw.execute(sql, parameters)
        cursor.description = raw.description
        cursor.rows = raw.fetchall() if raw.description else []
        cursor.rowcount = raw.rowcount
        cursor.lastrowid = raw.lastrowid

    async def commit(self) -> None:
        self.process.check()
        if not self.begun:
            return
        if not self.writes:
            return await self.rollback()
        hazards = self.process.world.hazards
        await hazards.before_commit(self)
        self.process.check()
        if self.broken:
            raise DatabaseFault("connection closed")
        changed = self.dirty
        self._end("COMMIT")
        self.store.commits += 1
        self.process.world.committed(self.process, changed)
        await hazards.after_commit(self)

    async def rollback(self) -> None:
        self._end("ROLLBACK")

    async def close(self) -> None:
        self._end("ROLLBACK")

    def stop(self) -> None:
        self._end("ROLLBACK")

    def cut(self) -> None:
        """The connection drops: the server rolls back, the caller hears of it at its next use."""
        self._end("ROLLBACK")
        self.broken = True

    async def create_function(self, *_args: Any, **_kwargs: Any) -> None: ...

    def _end(self, how: str) -> None:
        if self.begun:
            self.begun = self.dirty = False
            self.store.unlock(self, how)


class Cursor:
    """What SQLAlchemy's dialect uses of an ``aiosqlite.Cursor``."""

    arraysize = 1

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.description: Any = None
        self.rows: list[Any] = []
        self.rowcount = -1
        self.lastrowid: int | None = None

    async def __aenter__(self) -> Cursor:
        return self

    async def execute(self, sql: str, parameters: Any = ()) -> None:
        await self._connection.execute(self, sql, parameters)

    async def executemany(self, sql: str, parameters: Any) -> None:
        await self._connection.execute(self, sql, parameters, many=True)

    async def fetchall(self) -> list[Any]:
        return self.rows

    async def close(self) -> None: ...


class SimulatedDatabase(Database):
    """The same sessions on the simulated database of whichever process asks; one object serves all worlds, so that
    every statement is compiled once."""

    def __init__(self) -> None:
        self.engine = _engine()
        writing = self.engine.execution_options(brightrun_begin="IMMEDIATE")
        self._read = async_sessionmaker(self.engine, expire_on_commit=False)
        self._write = async_sessionmaker(writing, expire_on_commit=False, info={"mail": False})

    async def close(self) -> None: ...


@cache
def _engine() -> AsyncEngine:
    engine = create_async_engine("sqlite+aiosqlite://", poolclass=NullPool, async_creator=_connect)
    event.listen(engine.sync_engine, "begin", _begin)
    return engine


async def _connect(*_args: Any, **_kwargs: Any) -> Connection:
    process = PROCESS.get()
    assert process is not None, "only a process of a simulated world has a database"
    process.check()
    return Connection(process)


def _begin(connection: SqlConnection) -> None:
    adapted: Any = connection.connection.dbapi_connection
    adapted._connection.writes = connection.get_execution_options().get("brightrun_begin") == "IMMEDIATE"
