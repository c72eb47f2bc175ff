"""What is the database's trouble, and what is the statement's."""

from __future__ import annotations

import socket

import pytest
from asyncpg.exceptions import CannotConnectNowError, TooManyConnectionsError
from litestar.status_codes import HTTP_503_SERVICE_UNAVAILABLE
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from control_plane.api.errors import as_refusal
from control_plane.db import Database, is_unavailable
from tests.conftest import postgres_url


async def test_postgresql_says_whose_trouble_it_is(postgres_socket: str) -> None:
    """Disk full, no connection left, shutdown, start, deadlock, read-only, serialisation; then three of ours."""
    database = Database(postgres_url(postgres_socket, "postgres"))
    told = {}
    for state in ("53100", "53300", "57P01", "57P03", "40P01", "25006", "40001", "22012", "42601", "23505"):
        try:
            async with database.write() as session:
                await session.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{state}'; END $$"))
        except Exception as error:
            refusal = as_refusal(error)
            told[state] = is_unavailable(error), refusal is not None and refusal.status == HTTP_503_SERVICE_UNAVAILABLE
            if refusal and told[state][1]:
                assert refusal.retry_after_s
    await database.close()
    ours = {"22012", "42601", "23505"}
    assert told == {state: (state not in ours, state not in ours) for state in told}
    assert len(told) == 10


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (CannotConnectNowError("the database system is starting up"), True),
        (TooManyConnectionsError("sorry, too many clients already"), True),
        (PoolTimeout(), True),
        (OperationalError("SELECT 1", {}, Exception("database is locked")), True),
        (ConnectionRefusedError(111, "Connect call failed"), True),
        (OSError("Multiple exceptions: [Errno 111] Connect call failed, [Errno 111] Connect call failed"), True),
        (socket.gaierror(-2, "Name or service not known"), True),
        (IntegrityError("INSERT", {}, Exception("UNIQUE constraint failed")), False),
        (FileNotFoundError(2, "No such file"), False),
        (ValueError(), False),
    ],
)
def test_errors_of_drivers_and_system(error: Exception, expected: bool) -> None:
    assert is_unavailable(error) is expected
