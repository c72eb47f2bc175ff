"""A second Ray node on this machine: own address, PID namespace and temporary folder, so that it can lose its power."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import psutil

from benchmarks.chaos.kept import Kept
from benchmarks.chaos.proxy import Proxy
from benchmarks.chaos.sandbox import INIT, unshare
from scheduler.cluster.head import OBJECT_STORE_BYTES, Ports, head_env, temp_dir, token_file

ADDRESS = "127.0.0.2"


class Node:
    """Joins the head at ``head`` and joins again whenever it is gone. Offers one ``slot_cpu``.

    Ray resolves 127.0.0.1 to an address of the outside when it joins, where no head of ours listens: hence the proxy.
    """

    def __init__(self, data_dir: Path, head: str, env: dict[str, str]) -> None:
        self._folder = temp_dir(data_dir)
        host, _, port = head.rpartition(":")
        self._way = Proxy(lambda: asyncio.open_connection(host, int(port)), ADDRESS)
        own = head_env(token_file(data_dir), Ports.free()) | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"} | env
        self.kept = Kept(self._command, own, data_dir / "logs" / "node.log")

    @property
    def init(self) -> psutil.Process:
        """Process 1 of the node's namespace. Raises LookupError while there is none."""
        for process in psutil.Process(self.kept.process.pid).children():
            return process
        raise LookupError("the node is not up")

    def close(self) -> None:
        self.kept.close()
        self._way.close()

    def _command(self) -> list[str]:
        inside = unshare()
        assert inside is not None
        mount = f'mkdir -p "$0" && mount -t tmpfs none "$0" && {{ {INIT} ; }}'
        return [*inside, "sh", "-c", mount, str(self._folder), *self._ray()]

    def _ray(self) -> list[str]:
        return [
            sys.executable,
            *("-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", "--log-style=record"),
            *("--address", f"{ADDRESS}:{self._way.port}", "--node-ip-address", ADDRESS),
            *("--resources", json.dumps({"slot_cpu": 1})),
            *("--num-cpus", str(os.cpu_count() or 1), "--object-store-memory", str(OBJECT_STORE_BYTES)),
            *("--dashboard-agent-listen-port", "0", "--min-worker-port", "0", "--max-worker-port", "0"),
        ]
