"""The executor on Ray. Its process is a Ray driver and dies with its cluster: the watcher starts it again.

Ray's blocking calls run on threads, every call has a time-out, and Ray's errors become the protocol's three.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from scheduler.cluster.head import driver_env
from scheduler.cluster.watch import GRACE_S
from scheduler.executor import AttemptGone, AttemptSpec, Batch, Liveness, Look, RankTimes, StaleEpoch, Unreachable

log = logging.getLogger(__name__)
T = TypeVar("T")
GCS_AWAY_S = 30
"""Ray ends this process when GCS has been away for so long, or has come back as another cluster."""
CONNECT_S = 20.0
LOOK_S = 5.0
CALL_S = 5.0
START_S = 20.0
RELEASE_S = 30.0
TRAINER = (sys.executable, "-m", "trainer")
ATTEMPT_NAME = re.compile(r"^.+/\d+$")


class RayExecutor:
    """``address``: host:port of the GCS. ``token_file``: the cluster's secret. Connects by itself, at the first call.

    ``work_root``: the attempts' scratch folder on every node. ``child_command``: how the trainer is started on a node,
    before the config's path. ``grace_s``: how long a child may take to react to a stop request.
    """

    def __init__(
        self,
        address: str,
        *,
        token_file: Path,
        work_root: str,
        child_command: Sequence[str] = TRAINER,
        grace_s: float = GRACE_S,
    ) -> None:
        self._address, self._token_file, self._work_root = address, token_file, work_root
        self._child_command, self._grace_s = list(child_command), grace_s
        self._threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="ray")
        self._connecting: asyncio.Future[ModuleType] | None = None
        self._looking: asyncio.Future[Look] | None = None
        self._trouble = ""
        self._nodes: set[str] = set()
        """Nodes that have been seen, and tidied."""
        self._handles: dict[str, Any] = {}
        self._dead: set[str] = set()
        self._seen: set[str] | None = None
        """Attempts known to have lived; one that is no longer among the living is looked up among the dead."""

    async def look(self) -> Look:
        """One look at a time: while GCS keeps one waiting, the next answers that it is not reachable."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(self._look())
        done, _ = await asyncio.wait({self._looking}, timeout=LOOK_S)
        return self._looking.result() if done else self._unreachable()

    def _unreachable(self) -> Look:
        connecting = self._connecting
        failed = connecting is None or (connecting.done() and connecting.exception() is not None)
        return Look(reachable=False, bound=not failed)

    async def start(self, spec: AttemptSpec) -> None:
        driver = await self._driver()
        await self._blocking(driver.create, spec, self._child_command, self._grace_s, timeout_s=START_S)
        if self._seen is not None:
            self._seen.add(spec.name)

    async def poll(self, name: str, cursor: int, *, epoch: int, allowance_ms: int | None) -> Batch:
        batch: Batch = await self._call(name, "poll", cursor, epoch, allowance_ms)
        return batch

    async def stop(self, name: str, reason: str, *, epoch: int) -> None:
        await self._call(name, "stop", reason, epoch)

    async def times(self, name: str) -> list[RankTimes]:
        await self._driver()
        from scheduler.cluster import gcs

        rows = await self._blocking(gcs.ranks_of, name, timeout_s=CALL_S)
        return [row.rank for row in rows if row.rank]

    async def release(self, name: str, *, epoch: int) -> None:
        driver = await self._driver()
        gone = await self._blocking(driver.release, name, self._work_root, epoch, timeout_s=RELEASE_S)
        self._handles.pop(name, None)
        if not gone:
            raise Unreachable(f"{name} could not be ended yet")

    async def close(self) -> None:
        if self._connecting is not None and self._connecting.done() and not self._connecting.exception():
            await self._blocking(self._connecting.result().disconnect, timeout_s=CALL_S)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _look(self) -> Look:
        try:
            await self._driver()
            look = await asyncio.wrap_future(self._threads.submit(self._look_now))
        except Exception as error:
            if str(error) != self._trouble:
                log.warning("the cluster cannot be looked at: %s", error)
            self._trouble = str(error)
            return self._unreachable()
        self._trouble = ""
        return look

    def _look_now(self) -> Look:
        from scheduler.cluster import driver, gcs

        for node in set(gcs.live_nodes()) - self._nodes:
            driver.tidy(node, self._work_root)
            self._nodes.add(node)
        alive = {a.name for a in gcs.live_actors() if ATTEMPT_NAME.match(a.name)}
        if self._seen is None or self._seen - alive - self._dead:
            self._dead = {a.name for a in gcs.dead_actors() if ATTEMPT_NAME.match(a.name)}
            self._seen = set(self._dead)
        self._seen |= alive
        free, total = gcs.resources()
        return Look(
            reachable=True,
            cluster_id=gcs.cluster_id(),
            actors={**dict.fromkeys(self._dead, Liveness.DEAD), **dict.fromkeys(alive, Liveness.ALIVE)},
            free=free,
            total=total,
        )

    async def _call(self, name: str, method: str, *arguments: Any) -> Any:
        """Ask a supervisor. Raises StaleEpoch, AttemptGone, Unreachable."""
        driver = await self._driver()
        handle = self._handles.get(name)
        if handle is None:
            handle = await self._blocking(driver.find, name, timeout_s=CALL_S)
            if handle is None:
                raise AttemptGone(name)
            self._handles[name] = handle
        try:
            async with asyncio.timeout(CALL_S):
                return await driver.ask(handle, method, *arguments)
        except AttemptGone:
            self._handles.pop(name, None)
            raise
        except TimeoutError as error:
            raise Unreachable(f"{name} did not answer within {CALL_S:.0f} s") from error

    async def _driver(self) -> ModuleType:
        """Ray's side, connected. Raises Unreachable."""
        if self._connecting is None or (self._connecting.done() and self._connecting.exception()):
            self._connecting = asyncio.wrap_future(self._threads.submit(self._connect))
        done, _ = await asyncio.wait({self._connecting}, timeout=CONNECT_S)
        if not done:
            raise Unreachable(f"no connection to Ray at {self._address} within {CONNECT_S:.0f} s")
        try:
            return self._connecting.result()
        except Exception as error:
            raise Unreachable(f"no connection to Ray at {self._address}: {error}") from error

    def _connect(self) -> ModuleType:
        import socket

        host, _, port = self._address.rpartition(":")
        with closing(socket.create_connection((host, int(port)), timeout=2)):
            pass  # Ray itself would wait long for a GCS that is not there
        needed = driver_env(self._token_file, host) | {"RAY_gcs_rpc_server_reconnect_timeout_s": str(GCS_AWAY_S)}
        if "ray" in sys.modules and not needed.keys() <= os.environ.keys():
            raise RuntimeError("ray was imported before its environment was set, which it reads only then")
        os.environ.update(needed)
        from scheduler.cluster import driver

        driver.connect(self._address)
        return driver

    async def _blocking(self, function: Callable[..., T], *arguments: Any, timeout_s: float) -> T:
        future = asyncio.wrap_future(self._threads.submit(function, *arguments))
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError as error:
            raise Unreachable(f"Ray did not answer within {timeout_s:.0f} s") from error
        except StaleEpoch:
            raise
        except Exception as error:
            raise Unreachable(f"{type(error).__name__}: {error}") from error
