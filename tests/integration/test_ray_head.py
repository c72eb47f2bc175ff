"""The process that owns a Ray cluster, when it or its cluster is killed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from scheduler.cluster.head import token_file
from tests.ray_cluster import remains


def start(data_dir: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "scheduler.cluster.head", "--data-dir", str(data_dir), "--json"]
    with (data_dir / "ray.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
    assert process.stdout
    ready = json.loads(process.stdout.readline())
    assert ready["pid"] == process.pid
    return process


def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """With a path that is too long for Ray's sockets."""
    folder = tmp_path / ("d" * 100)
    folder.mkdir()
    return folder


def test_whoever_is_killed_nothing_stays(data_dir: Path) -> None:
    owner = start(data_dir)
    token = token_file(data_dir).read_text()
    processes = psutil.Process(owner.pid).children(recursive=True)
    listening = [connection for p in processes for connection in p.net_connections() if connection.status == "LISTEN"]
    assert listening
    assert {connection.laddr.ip.removeprefix("::ffff:") for connection in listening} == {"127.0.0.1"}

    owner.kill()
    owner.wait()
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes))

    again = start(data_dir)
    assert token_file(data_dir).read_text() == token
    (gcs,) = [p for p in psutil.Process(again.pid).children(recursive=True) if p.name() == "gcs_server"]
    gcs.kill()

    assert again.wait(30) == 1
    assert remains(data_dir) == []
