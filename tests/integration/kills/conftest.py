"""One victim for all kills."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.integration.kills.syscalls import Victim


@pytest.fixture(scope="session")
def the_victim() -> Iterator[Victim]:
    strace = shutil.which("strace")
    if strace is None:
        pytest.fail("strace is not installed: apt-get install strace")
    made = Victim(strace)
    yield made
    made.end()
