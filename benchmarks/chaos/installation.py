"""What is put under fire: a whole installation with two schedulers, in one of two flavours, and an account on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from benchmarks.chaos import sandbox
from benchmarks.chaos.kept import Kept
from benchmarks.chaos.node import Node
from benchmarks.chaos.servers import ObjectStore, Postgres
from tests.e2e.house import TINY, Client, House, base_models_file, conversations, jsonl

SETTINGS = {
    "BRIGHTRUN_LEASE_TIMEOUT_S": "4",
    "BRIGHTRUN_MIN_FREE_MIB": "64",
    "BRIGHTRUN_CPU_THREADS": "1",
    "BRIGHTRUN_NODE_TIMEOUT_S": "0",
}
"""One thread a rank: two would wait for each other wherever something else computes, and starve the API. No time-out of
nodes: there is one training slot, and it is there again only once the node that had it has ended."""
DISK = "768m"
"""Of the data folder, which is a file system of its own where that is allowed."""


class Installation:
    """Embedded: as ``brightrun up`` makes it, with SQLite and folders. A context manager that leaves nothing."""

    flavour = "embedded"

    def __init__(self, folder: Path) -> None:
        self.folder, self.data_dir = folder, folder / "data"
        self.has_own_disk = sandbox.is_inside()
        self.node: Node | None = None
        self.store: ObjectStore | None = None
        self.postgres: Postgres | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Installation:
        self.data_dir.mkdir(parents=True)
        with ExitStack() as stack:
            if self.has_own_disk:
                stack.enter_context(_own_disk(self.data_dir))
            settings = SETTINGS | self._serve(stack)
            self.house = House(self.data_dir, base_models_file(self.folder / "models"), **settings)
            stack.callback(self._end_house)
            self.house.start()
            self.standby = Kept(self._scheduler, self.environment(), self.data_dir / "logs" / "standby.log")
            stack.callback(self.standby.close)
            self._join(stack)
            self.client = Client(self.house)
            self.dataset = self.client.upload(jsonl(conversations(200)), "things", TINY)
            assert self.dataset["status"] == "READY", self.dataset
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def database_url(self) -> str:
        """Past the proxy, if there is one."""
        return f"sqlite+aiosqlite:///{self.data_dir}/brightrun.sqlite3"

    @property
    def ended_well(self) -> bool:
        """Once it has been left: whether `brightrun up` ended by itself with exit code 0."""
        return self.house.process is not None and self.house.process.returncode == 0

    def _serve(self, _stack: ExitStack) -> dict[str, str]:
        """Start what it stands on; its settings."""
        return {}

    def _join(self, _stack: ExitStack) -> None:
        """Start what joins it."""

    def _end_house(self) -> None:
        process = self.house.process
        if process is None:
            return
        with suppress(subprocess.TimeoutExpired):
            self.house.stop()
        if process.poll() is None:
            process.kill()
        process.wait()

    def _scheduler(self) -> list[str]:
        return [sys.executable, "-m", "control_plane.cli", "scheduler"]

    def environment(self) -> dict[str, str]:
        """As ``brightrun up`` gives it to its parts."""
        outer = {k: v for k, v in os.environ.items() if not k.startswith(("BRIGHTRUN_", "RAY_", "MLFLOW_"))}
        return outer | {
            "BRIGHTRUN_DATA_DIR": str(self.data_dir),
            "BRIGHTRUN_BASE_MODELS_FILE": str(self.house.base_models),
            "BRIGHTRUN_PUBLIC_URL": self.house.urls["api"],
            "BRIGHTRUN_MLFLOW_URL": self.house.urls["mlflow"],
            "BRIGHTRUN_RAY_ADDRESS": self.house.answer["rayAddress"],
            **self.house.settings,
        }


class Production(Installation):
    """PostgreSQL, an S3 store, and a second node, which alone has a training slot."""

    flavour = "production"

    def _serve(self, stack: ExitStack) -> dict[str, str]:
        self.postgres = Postgres(self.folder / "postgres")
        stack.callback(self.postgres.close)
        self.store = ObjectStore(self.folder / "objects")
        stack.callback(self.store.close)
        settings = {"BRIGHTRUN_DATABASE_URL": self.postgres.url, "BRIGHTRUN_STORAGE_URL": self.store.url}
        if sandbox.is_inside():
            settings["BRIGHTRUN_CPU_SLOTS"] = "0"
        return settings | self.store.env

    def _join(self, stack: ExitStack) -> None:
        assert self.store
        if sandbox.is_inside():
            self.node = Node(self.data_dir, self.house.answer["rayAddress"], self.store.env)
            stack.callback(self.node.close)

    @property
    def database_url(self) -> str:
        assert self.postgres
        return self.postgres.direct_url


FLAVOURS: dict[str, type[Installation]] = {kind.flavour: kind for kind in (Installation, Production)}


@contextmanager
def _own_disk(folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=700", "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)
