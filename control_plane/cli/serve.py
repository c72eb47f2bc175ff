from __future__ import annotations

import os
import socket
from pathlib import Path

import click

from control_plane.cli.folder import make_secret
from control_plane.settings import Settings

START_FAILED = 3
GRACE_S = 3
"""Open streams are cut so long after the order to stop."""


@click.command()
@click.option("--host", help="Address to listen on.")
@click.option("--port", type=int, help="Port to listen on; 0: any free one.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder of all state.")
@click.option("--fd", type=int, help="A listening socket to serve on, by its inherited descriptor.")
def serve(host: str | None, port: int | None, data_dir: Path | None, fd: int | None) -> None:
    """Run the API alone."""
    import uvicorn

    settings = Settings.from_env(host=host, port=port, data_dir=data_dir)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    make_secret(settings.data_dir)
    os.environ.update(settings.to_env())
    config = uvicorn.Config(
        "control_plane.app:create_app",
        factory=True,
        host=settings.host,
        port=settings.port,
        timeout_graceful_shutdown=GRACE_S,
        server_header=False,
        log_level="info",
        access_log=False,
    )
    server = uvicorn.Server(config)
    server.run(None if fd is None else [socket.socket(fileno=fd)])
    if not server.started:
        raise SystemExit(START_FAILED)
