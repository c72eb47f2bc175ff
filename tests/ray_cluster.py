"""A Ray cluster for tests: the very process that an installation runs, on free ports, with a data folder of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from control_plane.settings import Settings
from scheduler.cluster.head import leftovers, temp_dir
from tests.warden import warden


@dataclass
class RayCluster:
    """``address``: host:port of the GCS. ``pid``: of the process that owns every other process of the cluster."""

    address: str
    dashboard: str
    token_file: Path
    pid: int
    data_dir: Path


@contextmanager
def ray_cluster(*, cpu_slots: int = 1, io_slots: int = 2) -> Iterator[RayCluster]:
    """Some 8 s to start, 2 s to end; whatever happens, no process and no folder of it stays."""
    with tempfile.TemporaryDirectory(prefix="brt") as folder:
        data_dir = Path(folder)
        settings = Settings(data_dir=data_dir, cpu_slots=cpu_slots, io_slots=io_slots)
        with (data_dir / "ray.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "scheduler.cluster.head", "--data-dir", folder, "--json"],
                env={**os.environ, **settings.to_env()},
                stdout=subprocess.PIPE,
                stderr=log,
            )
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert line, (data_dir / "ray.log").read_text()[-4000:]
            ready = json.loads(line)
            token = Path(ready["token_file"])
            with warden(f"kill -TERM {process.pid}"):
                yield RayCluster(ready["address"], ready["dashboard"], token, ready["pid"], data_dir)
        except Exception:
            _tell(temp_dir(data_dir))
            raise
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
            assert process.stdout
            process.stdout.close()
        assert remains(data_dir) == []


def _tell(folder: Path) -> None:
    """The last words of the control service, before its logs are removed."""
    for log in sorted(folder.glob("session_2*/logs/gcs_server.*")):
        sys.stderr.write(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}\n")


def remains(data_dir: Path) -> list[str]:
    """Processes and the temporary folder of a Ray session of a data folder."""
    folder = temp_dir(data_dir)
    return [str(process) for process in leftovers(folder)] + [str(folder)] * folder.exists()
