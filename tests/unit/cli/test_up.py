"""What ``brightrun up`` decides before it starts anything."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from control_plane.cli import SUBCOMMANDS, folder, main, parts
from control_plane.cli.ports import Ports, PortTaken, placed
from control_plane.settings import Settings


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    program = "import sys; sys.argv[1:] = ['--help']\nfrom control_plane.cli import main\n"
    program += "main(standalone_mode=False); sys.exit(any(m in sys.modules for m in ('sqlalchemy', 'litestar', 'ray')))"
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in SUBCOMMANDS)
    assert time.monotonic() - begun < 2, "imports have crept in"


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_is_there_and_explains_itself(name: str) -> None:
    answer = CliRunner().invoke(main, [name, "--help"])
    assert answer.exit_code == 0, answer.output
    assert len(answer.output.splitlines()) > 4


def test_two_runs_on_one_folder_are_refused(tmp_path: Path) -> None:
    with folder.locked(tmp_path):
        answer = CliRunner().invoke(main, ["up", "--data-dir", str(tmp_path)])
    assert answer.exit_code == 1
    assert f"in use by another `brightrun up` (process {os.getpid()})" in answer.output


def test_a_port_that_is_taken_is_named_with_its_option(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        answer = CliRunner().invoke(main, ["up", "--data-dir", str(tmp_path), "--mlflow-port", port])
    assert answer.exit_code == 1
    assert f"127.0.0.1:{port}: Address already in use; --mlflow-port 0 takes any free one" in answer.output


def test_free_ports_are_all_different() -> None:
    ports = Ports(0, 0, 0, 0).resolved("127.0.0.1")
    assert len({ports.api, ports.mlflow, ports.ray, ports.dashboard, 0}) == 5


def test_a_port_that_was_asked_for_is_kept() -> None:
    free = Ports(0, 0, 0, 0).resolved("127.0.0.1")
    assert free.resolved("127.0.0.1") == free
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free.ray))
        with pytest.raises(PortTaken, match="--ray-port"):
            free.resolved("127.0.0.1")


def test_public_urls_of_the_operator_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = Ports(1111, 2222, 3333, 4444)
    plain = placed(Settings(data_dir=tmp_path), ports)
    assert (plain.public_url, plain.mlflow_public_url) == ("http://127.0.0.1:1111", "http://127.0.0.1:2222")
    assert (plain.ray_address, plain.ray_dashboard_url) == ("127.0.0.1:3333", "http://127.0.0.1:4444")

    monkeypatch.setenv("BRIGHTRUN_PUBLIC_URL", "https://train.example.com")
    assert placed(Settings(data_dir=tmp_path), ports).public_url == "https://train.example.com"


def test_only_who_lets_nodes_join_waits_for_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = Ports(1111, 2222, 3333, 4444)
    assert placed(Settings(data_dir=tmp_path), ports).node_timeout_s == 0

    monkeypatch.setenv("BRIGHTRUN_NODE_TIMEOUT_S", "30")
    assert placed(Settings.from_env(data_dir=tmp_path), ports).node_timeout_s == 30


def test_the_secret_is_made_once_and_is_nobody_elses(tmp_path: Path) -> None:
    folder.make_secret(tmp_path)
    secret = Settings(data_dir=tmp_path).secret
    folder.make_secret(tmp_path)
    assert Settings(data_dir=tmp_path).secret == secret
    assert len(secret) == 32
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_a_log_over_the_limit_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "LOG_LIMIT_BYTES", 10)
    folder.log_file(tmp_path, "api").write_text("short")
    assert folder.log_file(tmp_path, "api").read_text() == "short"
    folder.log_file(tmp_path, "api").write_text("longer than the limit")
    assert not folder.log_file(tmp_path, "api").exists()
    assert (tmp_path / "logs" / "api.log.1").read_text() == "longer than the limit"


def test_no_part_inherits_what_is_not_meant_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://elsewhere")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    monkeypatch.setenv("BRIGHTRUN_DATABASE_URL", "postgresql+asyncpg://user:password@db/brightrun")
    settings = Settings.from_env(data_dir=tmp_path)

    assert parts.api(settings).environment()["BRIGHTRUN_DATABASE_URL"] == settings.database_url
    for command in (parts.mlflow(settings), parts.ray(settings, dashboard_port=0)):
        environment = command.environment()
        assert not {"RAY_ADDRESS", "MLFLOW_TRACKING_URI", "BRIGHTRUN_DATABASE_URL"} & set(environment)
    assert parts.mlflow(settings).environment()["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert parts.mlflow(settings).environment()["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
