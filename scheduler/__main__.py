"""``python -m scheduler``: one scheduler process.

Exit code 0 after SIGTERM or SIGINT (running work goes on); 1 when the lease or the cluster is lost: whoever watches it
starts it again, and it adopts what runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path

from control_plane.db import Database
from control_plane.services.catalog import Catalog
from control_plane.settings import Settings
from control_plane.storage import Storage
from scheduler.cluster.executor import RayExecutor
from scheduler.cluster.head import token_file
from scheduler.lease import LeaseLost
from scheduler.loop import ClusterLost, Scheduler
from scheduler.network import NetworkCarrier
from scheduler.tracking import MlflowTracking

log = logging.getLogger("scheduler")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
CLOSE_S = 2.0
STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class JsonLines(logging.Formatter):
    """One JSON object a line; what a call gave as ``extra`` stands beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **{key: value for key, value in record.__dict__.items() if key not in STANDARD},
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


async def serve(settings: Settings) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, stop.set)
    database = Database(settings.database_url, mail=settings.mails)
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    token = Path(given) if given else token_file(settings.data_dir)
    executor = RayExecutor(settings.ray_address, token_file=token, work_root=settings.work_dir)
    tracking = MlflowTracking(settings.mlflow_url)
    scheduler = Scheduler(
        settings,
        Catalog.load(settings),
        database,
        executor,
        tracking,
        Storage(settings.storage_url),
        carrier=NetworkCarrier(settings),
        reached=take_signals_back,
    )
    try:
        await scheduler.run(stop)
        return 0
    except (LeaseLost, ClusterLost) as error:
        log.error("%s: ending, to be started again", type(error).__name__)
        return 1
    finally:
        for part in (tracking, executor, database):
            with contextlib.suppress(Exception):
                async with asyncio.timeout(CLOSE_S):
                    await part.close()


def take_signals_back() -> None:
    """Ray's driver puts a handler of its own below Python's, which writes stack traces of an orderly end."""
    for number in SIGNALS:
        signal.signal(number, signal.getsignal(number))


def main() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)
    code = asyncio.run(serve(Settings.from_env()))
    sys.stderr.flush()
    os._exit(code)  # threads that wait for a cluster that is gone would keep the process


if __name__ == "__main__":
    main()
