"""How each part is started. ``brightrun up`` and the commands that start one part alone use the same lines."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from control_plane.settings import Settings

FOREIGN = ("BRIGHTRUN_", "RAY_", "MLFLOW_")
"""Variables that a part gets from here or not at all: a caller's own Ray or MLflow must not lead ours astray, and the
database's URL is not Ray's business."""

MLFLOW_HARDENING = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


@dataclass(frozen=True)
class Command:
    argv: list[str]
    env: dict[str, str]

    def environment(self) -> dict[str, str]:
        return {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)} | self.env

    def exec(self) -> NoReturn:
        os.execve(self.argv[0], self.argv, self.environment())


def api(settings: Settings, *, fd: int | None = None) -> Command:
    """``fd``: a listening socket that is handed down."""
    given = [] if fd is None else [f"--fd={fd}"]
    return _python("control_plane.cli", "serve", *given, env=settings.to_env())


def scheduler(settings: Settings) -> Command:
    return _python("scheduler", env=settings.to_env())


def mlflow(settings: Settings, *, host: str = "127.0.0.1", store: str | None = None) -> Command:
    """The tracking server; answers only to the names by which it is meant to be reached."""
    inside, outside = urlsplit(settings.mlflow_url), urlsplit(settings.mlflow_public_url)
    names = {inside.netloc, outside.netloc, f"127.0.0.1:{inside.port}", f"localhost:{inside.port}"}
    return _python(
        "mlflow",
        "server",
        f"--backend-store-uri={store or f'sqlite:///{settings.data_dir}/mlflow.db'}",
        f"--artifacts-destination={settings.storage_url.rstrip('/')}/mlflow",
        f"--host={host}",
        f"--port={inside.port}",
        "--workers=1",
        f"--allowed-hosts={','.join(sorted(names))}",
        f"--cors-allowed-origins={outside.scheme}://{outside.netloc}",
        env=MLFLOW_HARDENING,
    )


def ray(settings: Settings, *, dashboard_port: int) -> Command:
    """A head on loopback, with the slots of this machine."""
    shared = {"BRIGHTRUN_CPU_SLOTS": str(settings.cpu_slots), "BRIGHTRUN_IO_SLOTS": str(settings.io_slots)}
    port = urlsplit(f"//{settings.ray_address}").port
    return _python(
        "scheduler.cluster.head",
        f"--data-dir={settings.data_dir}",
        f"--port={port}",
        f"--dashboard-port={dashboard_port}",
        env=shared,
    )


def ray_token(settings: Settings) -> Path:
    """File of the cluster's shared secret; the head makes it when there is none."""
    return settings.data_dir / "ray_token"


def _python(module: str, *arguments: str, env: dict[str, str]) -> Command:
    return Command([sys.executable, "-m", module, *arguments], env)
