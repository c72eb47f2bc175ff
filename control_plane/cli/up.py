"""``brightrun up``: API, scheduler, MLflow and Ray, each its own process, on one folder and on loopback."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
from dataclasses import replace
from pathlib import Path

import click

from control_plane.cli import folder, parts, processes, readiness
from control_plane.cli.ports import LOOPBACK, Ports, PortTaken, from_here, listening, placed
from control_plane.cli.processes import HUNG_S, Keeper, Part, PartFailed
from control_plane.db import Database
from control_plane.migrations import UnknownVersion, upgrade
from control_plane.settings import Settings

MLFLOW_HUNG_S = 60.0
ORDER_OF_ENDING = ("api", "scheduler", "mlflow", "ray")


@click.command()
@click.option("--data-dir", type=click.Path(file_okay=False, path_type=Path), help="Folder of all state.")
@click.option("--host", help="Address the API listens on; MLflow and Ray stay on loopback.")
@click.option("--api-port", type=int, help="0: any free one.")
@click.option("--mlflow-port", type=int, help="0: any free one.")
@click.option("--ray-port", type=int, help="0: any free one.")
@click.option("--dashboard-port", type=int, default=8265, show_default=True, help="Ray's dashboard; 0: any free one.")
@click.option("--json", "as_json", is_flag=True, help="Once all is ready, print one JSON line; nothing else on stdout.")
def up(
    data_dir: Path | None,
    host: str | None,
    api_port: int | None,
    mlflow_port: int | None,
    ray_port: int | None,
    dashboard_port: int,
    as_json: bool,
) -> None:
    """Start, watch and end the whole installation on this machine.

    A part that dies is started again. Ctrl-C or SIGTERM ends all of them.
    """
    settings = Settings.from_env(data_dir=data_dir, host=host)
    given = {"api": api_port, "mlflow": mlflow_port, "ray": ray_port}
    wanted = replace(Ports.of(settings, dashboard_port), **{k: v for k, v in given.items() if v is not None})
    try:
        with folder.locked(settings.data_dir):
            logger = folder.logger_to(folder.log_file(settings.data_dir, "up"))
            mark = processes.folder_mark(settings.data_dir)
            if left := processes.kill(mark):
                logger.info("ended %d processes that an earlier run had left behind", left)
            folder.make_secret(settings.data_dir)
            ports = wanted.resolved(settings.host)
            with listening(settings.host, ports.api) as listener:
                asyncio.run(_run(placed(settings, ports), ports, listener, mark, logger, as_json))
    except (folder.FolderInUse, PortTaken, UnknownVersion, PartFailed) as error:
        raise click.ClickException(str(error)) from error


async def _run(
    settings: Settings, ports: Ports, listener: socket.socket, mark: str, logger: logging.Logger, as_json: bool
) -> None:
    """Returns when told to stop and all has ended. Raises PartFailed when a part never comes up."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    _on_signals(stop, hurry)
    await upgrade(settings)
    database = Database(settings.database_url)
    keepers = {
        part.name: Keeper(part, mark, folder.log_file(settings.data_dir, part.name), logger.info)
        for part in _parts(settings, ports, listener, database)
    }
    keeping = [asyncio.create_task(keeper.keep(after=keepers.get(keeper.part.after))) for keeper in keepers.values()]
    stopping = asyncio.create_task(stop.wait())
    ready = asyncio.create_task(_all_ready(keepers))
    try:
        await asyncio.wait([*keeping, stopping, ready], return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            _announce(settings, keepers, as_json)
            await asyncio.wait([*keeping, stopping], return_when=asyncio.FIRST_COMPLETED)
        for task in keeping:
            if task.done():
                task.result()
    finally:
        for waiting in (*keeping, stopping, ready):
            waiting.cancel()
        await asyncio.gather(*keeping, return_exceptions=True)
        for name in ORDER_OF_ENDING:
            await keepers[name].end(hurry)
        await database.close()


async def _all_ready(keepers: dict[str, Keeper]) -> None:
    for keeper in keepers.values():
        await keeper.ready.wait()


def _parts(settings: Settings, ports: Ports, listener: socket.socket, database: Database) -> list[Part]:
    def dashboard() -> readiness.Probe:
        return readiness.answers(f"http://{LOOPBACK}:{ports.dashboard}/api/version", parts.ray_token(settings))

    def api() -> readiness.Probe:
        return readiness.answers(f"{from_here(settings)}/health/ready")

    def live() -> readiness.Probe:
        return readiness.answers(f"{from_here(settings)}/health/live")

    def mlflow() -> readiness.Probe:
        return readiness.answers(f"{settings.mlflow_url}/health")

    def scheduler() -> readiness.Probe:
        return readiness.beats(database)

    def moves() -> readiness.Probe:
        return readiness.moves(database)

    ray = parts.ray(settings, dashboard_port=ports.dashboard)
    return [
        Part("ray", ray, dashboard, url=settings.ray_dashboard_url, grace_s=20),
        Part("mlflow", parts.mlflow(settings), mlflow, url=settings.mlflow_url, alive=mlflow, hung_s=MLFLOW_HUNG_S),
        Part(
            "api",
            parts.api(settings, fd=listener.fileno()),
            api,
            url=settings.public_url,
            alive=live,
            listener=listener,
        ),
        Part(
            "scheduler",
            parts.scheduler(settings),
            scheduler,
            after="ray",
            alive=moves,
            hung_s=max(HUNG_S, 3 * settings.lease_timeout_s),
        ),
    ]


def _announce(settings: Settings, keepers: dict[str, Keeper], as_json: bool) -> None:
    urls = {"api": settings.public_url, "mlflow": settings.mlflow_public_url, "ray": settings.ray_dashboard_url}
    if as_json:
        answer = {
            "urls": urls,
            "pids": {name: keepers[name].pid for name in ORDER_OF_ENDING},
            "dataDir": str(settings.data_dir),
            "rayAddress": settings.ray_address,
        }
        click.echo(json.dumps(answer))
        return
    click.echo(f"\nBrightRun is ready. Its data is in {settings.data_dir}\n")
    for name, title in (("api", "API"), ("mlflow", "MLflow"), ("ray", "Ray dashboard")):
        click.echo(f"  {title:<14} {urls[name]}")
    click.echo("\nCtrl-C ends it.")


def _on_signals(stop: asyncio.Event, hurry: asyncio.Event) -> None:
    """The first signal ends everything in order, the second one at once."""

    def asked() -> None:
        if stop.is_set():
            hurry.set()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, asked)
