"""``python -m scheduler.verify [--all]``: check an installation's ledger, whether it runs or not.

Exit code 0 when it balances, 1 when it does not (the first violation is named, ``--all`` lists all), 2 when there is no
database to check. Nothing is written; the rows are read in one transaction and judged after it, so that on SQLite
writers wait no longer than for the reading.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import asyncpg  # type: ignore[import-untyped]
import click
from sqlalchemy import event, make_url
from sqlalchemy.exc import SQLAlchemyError

from control_plane.db import Database
from control_plane.migrations import current_revision, head_revision
from control_plane.settings import Settings
from scheduler.verify import RULES, Books, judge


class NothingToCheck(Exception):
    """There is no database, or not one of this version."""


def require_file(settings: Settings) -> None:
    """SQLite would make one that is not there. Raises NothingToCheck."""
    path = make_url(settings.database_url).database
    if settings.is_sqlite and not Path(path or "").is_file():
        raise NothingToCheck(f"There is no database at {path}; `brightrun up` makes one.")


async def read(settings: Settings) -> Books:
    """Raises NothingToCheck."""
    url = make_url(settings.database_url)
    shown = url.render_as_string(hide_password=True)
    database = Database(settings.database_url)
    options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    if settings.is_sqlite:
        options = {}
        event.listen(database.engine.sync_engine, "connect", lambda raw, _: raw.execute("PRAGMA query_only=ON"))
    try:
        async with database.read() as session:
            await session.connection(execution_options=options)
            version = await current_revision(session)
            if version != head_revision():
                raise NothingToCheck(
                    f"The database {shown} is at version {version or 'none'}, this is {head_revision()}: "
                    "`brightrun migrate` brings it there."
                )
            return await Books.read(session)
    except (SQLAlchemyError, asyncpg.PostgresError, OSError) as error:
        raise NothingToCheck(f"The database {shown} cannot be read: {error}") from error
    finally:
        await database.close()


@click.command(name="python -m scheduler.verify")
@click.option("--all", "everything", is_flag=True, help="List every violation, not only the first.")
def main(everything: bool) -> None:
    """Check every invariant of the ledger."""
    try:
        settings = Settings.from_env()
        require_file(settings)
        books = asyncio.run(read(settings))
    except NothingToCheck as error:
        click.echo(error, err=True)
        sys.exit(2)
    found = judge(books)
    for violation in found if everything else found[:1]:
        click.echo(f"VIOLATED {violation.rule}: {violation.object_id}: {violation.message}")
    if found:
        more = len(found) - 1
        click.echo(f"{len(found)} violations" + (f", {more} more than this: --all" if more and not everything else ""))
        sys.exit(1)
    records, jobs, attempts = len(books.records), len(books.jobs), len(books.attempts)
    click.echo(f"The ledger balances: {records} records of {jobs} jobs and {attempts} attempts, {len(RULES)} rules")


if __name__ == "__main__":
    main()
