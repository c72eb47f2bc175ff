"""`brightrun serve` as a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from control_plane.settings import Settings


class Server:
    """A running `brightrun serve`; on the SQLite database in ``folder`` unless told otherwise."""

    def __init__(self, folder: Path, database_url: str = "") -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.settings = Settings(data_dir=folder, port=port, database_url=database_url)
        self.log = (folder / "api.log").open("ab")
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        env = {k: v for k, v in os.environ.items() if not k.startswith("BRIGHTRUN_")} | self.settings.to_env()
        command = [sys.executable, "-m", "control_plane.cli", "serve"]
        return subprocess.Popen(command, env=env, stdout=self.log, stderr=self.log)

    def said(self) -> str:
        return Path(self.log.name).read_text()

    async def ready(self, path: str = "/health/ready") -> None:
        async with httpx.AsyncClient(base_url=self.settings.public_url) as http:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                try:
                    if (await http.get(path)).status_code == 200:
                        return
                except httpx.TransportError:
                    assert self.process.poll() is None, self.said()
                await asyncio.sleep(0.05)
        raise AssertionError(f"not ready: {self.said()}")

    async def restart(self, how: signal.Signals) -> None:
        self.stop(how)
        self.process = self.start()
        await self.ready()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(15)
