"""SIGKILL while a transaction that posts is written or sent: it is there wholly or not at all, and is made again."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from control_plane.db import Database
from scheduler.verify import verify
from tests.conftest import without_fsync
from tests.integration.kills import postings
from tests.integration.kills.postings import DEEDS
from tests.integration.kills.syscalls import Scene, Victim

JOB = "job"
EXPECTED: dict[str, dict[str, Any]] = {
    "charge": {"records": [("charge", 20_000, 2_000)]},
    "complete": {"records": [("absorbed", 200, 0), ("charge", 5_000, 500), ("charge", 20_000, 2_000)]},
    "lose": {"records": [("absorbed", 13_200, 0), ("charge", 20_000, 2_000), ("reversal", -8_000, -800)]},
}
"""What each deed leaves."""


class Look:
    """At a job that a deed was done to, wholly or not."""

    def __init__(self, deed: str, before: dict[str, Any]) -> None:
        self.deed, self.before, self.after = deed, before, dict[str, Any]()
        self.outcomes: Counter[bool] = Counter()

    async def at(self, database: Database, folder: Path, job_id: str, acknowledged: bool) -> None:
        """The first time nothing was killed: that tells what is left in the end."""
        found = await self._stands(database, job_id)
        repeats = 1 if self.after else 2
        self.after = self.after or found
        assert found in (self.before, self.after)
        assert found == self.after or not acknowledged
        self.outcomes[found == self.after] += 1
        for _ in range(repeats):
            await postings.act(self.deed, database, folder, job_id)
            assert await postings.stands(database, job_id) == self.after

    async def _stands(self, database: Database, job_id: str) -> dict[str, Any]:
        async with database.read() as session:
            assert await verify(session) == []
        return await postings.stands(database, job_id)

    def says_enough(self) -> None:
        assert self.before | EXPECTED[self.deed] != self.before
        assert self.after | EXPECTED[self.deed] == self.after
        assert self.outcomes[True] >= 1
        assert self.outcomes[False] >= 5


@pytest.mark.parametrize("deed", DEEDS)
def test_a_posting_is_in_the_file_wholly_or_not_at_all(
    deed: str, the_victim: Victim, tmp_path: Path, sqlite_template: Path
) -> None:
    template = tmp_path / "template"
    template.mkdir()
    shutil.copyfile(sqlite_template, template / "ledger.sqlite3")
    url = f"sqlite+aiosqlite:///{tmp_path}/scene/ledger.sqlite3"
    (template / "url").write_text(url)
    (template / "job").write_text(JOB)

    async def begin() -> dict[str, Any]:
        database = Database(f"sqlite+aiosqlite:///{template}/ledger.sqlite3")
        await postings.begin(database, tmp_path, JOB, deed)
        found = await postings.stands(database, JOB)
        await database.close()
        return found

    async def look(folder: Path, acknowledged: bool) -> None:
        database = Database(url)
        without_fsync(database)
        await seen.at(database, folder, JOB, acknowledged)
        await database.close()

    seen = Look(deed, asyncio.run(begin()))
    scene = Scene(the_victim, deed, template)
    scene.kill_everywhere(lambda folder, acknowledged: asyncio.run(look(folder, acknowledged)))
    seen.says_enough()
    assert scene.kills["write"] >= 20
    assert scene.kills["sync"] >= 3
    assert scene.kills["unlink"] >= 1


async def test_a_posting_is_on_the_server_wholly_or_not_at_all(
    the_victim: Victim, tmp_path: Path, postgres_database_url: str
) -> None:
    """The client is killed before each thing that it would have sent, and before it can say that it is done."""
    database, numbers = Database(postgres_database_url), count(1)

    async def scene() -> Path:
        folder = tmp_path / f"{next(numbers)}"
        folder.mkdir()
        (folder / "url").write_text(postgres_database_url)
        (folder / "job").write_text(folder.name)
        await postings.begin(database, folder, folder.name, "complete")
        return folder

    folder = await scene()
    seen = Look("complete", await postings.stands(database, folder.name))
    points = the_victim.sends("complete", folder)
    await seen.at(database, folder, folder.name, acknowledged=True)
    for point in points:
        folder = await scene()
        acknowledged = the_victim.kill_at(point, "complete", folder)
        await seen.at(database, folder, folder.name, acknowledged)
    seen.says_enough()
    assert seen.outcomes[True] == 2
    await database.close()
