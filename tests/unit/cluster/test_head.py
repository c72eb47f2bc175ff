from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scheduler.cluster import head


def test_the_token_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    token = head.token_file(tmp_path / "data")

    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text()) == 64
    assert head.token_file(tmp_path / "data").read_text() == token.read_text()
    assert [path.name for path in (tmp_path / "data").iterdir()] == [token.name]


def test_the_temporary_folder_is_short_enough_for_sockets(tmp_path: Path) -> None:
    short, long = Path("/srv/brightrun"), tmp_path / ("x" * 120)

    assert head.temp_dir(short) == short / "ray"
    assert len(str(head.temp_dir(long))) + head.SOCKET_TAIL <= head.SOCKET_LIMIT
    assert head.temp_dir(long) == head.temp_dir(long)
    assert head.temp_dir(long) != head.temp_dir(tmp_path / ("y" * 120))


def test_ports_are_free_and_differ() -> None:
    ports = head.Ports.free(gcs=6399)
    numbers = [ports.gcs, ports.dashboard, ports.client, ports.autoscaler_metrics, ports.dashboard_metrics]

    assert ports.gcs == 6399
    assert len(set(numbers)) == 5


def test_the_environment_carries_no_setting_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIGHTRUN_DATABASE_URL", "postgresql://user:password@host/db")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "leaked")
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:1")

    env = head.head_env(head.token_file(tmp_path), head.Ports.free())

    assert "BRIGHTRUN_DATABASE_URL" not in env
    assert "RAY_AUTH_TOKEN" not in env
    assert "RAY_ADDRESS" not in env
    assert env["RAY_AUTH_MODE"] == "token"
    assert env["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] == "1"
    assert env["RAY_memory_monitor_refresh_ms"] == "0"
    assert env["RAY_worker_niceness"] == "0"


def test_importable_without_ray() -> None:
    program = "import sys, scheduler.cluster.head, scheduler.cluster.executor; sys.exit('ray' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
