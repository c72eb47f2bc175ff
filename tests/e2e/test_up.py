"""``brightrun up``: everything comes up, comes back when it dies, goes away without a trace, and is there again after.

The README's first job runs here word for word, so that what it promises is what a newcomer gets.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from control_plane.cli import processes
from tests.e2e.conftest import TINY
from tests.e2e.house import REPO, House, wait_for

PARTS = ("api", "scheduler", "mlflow", "ray")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, base_models: Path) -> Iterator[House]:
    house = House(tmp_path_factory.mktemp("up"), base_models, BRIGHTRUN_DEFAULT_BASE_MODEL=TINY)
    yield house.start()
    if house.process and house.process.poll() is None:
        house.stop()


@pytest.fixture(scope="module")
def first_job(house: House, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the README's shell lines print when they are run as they stand."""
    section = (REPO / "README.md").read_text().split("## The first own job")[1].split("\n## ")[0]
    script = "set -eu\n" + "\n".join(re.findall(r"```sh\n(.*?)```", section, re.DOTALL))
    script = script.replace("API=http://127.0.0.1:8080", f"API={house.urls['api']}")
    assert house.urls["api"] in script
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path_factory.mktemp("readme"), capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_all_parts_are_ready_when_it_says_so(house: House) -> None:
    assert set(house.urls) == {"api", "mlflow", "ray"}
    assert set(house.pids) == set(PARTS)
    assert httpx.get(f"{house.urls['api']}/health/ready").status_code == 200
    assert httpx.get(f"{house.urls['mlflow']}/health").status_code == 200
    assert httpx.get(f"{house.urls['ray']}/api/version").status_code == 401, "Ray must ask for its token"
    assert all(psutil.Process(pid).is_running() for pid in house.pids.values())
    assert len({os.getsid(pid) for pid in house.pids.values()}) == len(PARTS)


def test_nothing_listens_beyond_loopback(house: House) -> None:
    listening = [
        (process.name(), connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
        for process in house.tree()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= len(PARTS) - 1
    assert [found for found in listening if found[1] not in ("127.0.0.1", "::1")] == []


def test_the_first_own_job_of_the_readme_runs_as_it_stands(first_job: str) -> None:
    assert "event: complete" in first_job
    assert '"status":"COMPLETED"' in first_job
    assert "finalValidationLoss" in first_job
    assert "adapter_model.safetensors" in first_job
    assert "'costType': 'COMPUTE'" in first_job


def test_a_second_up_on_the_folder_is_refused(house: House) -> None:
    other = House(house.data_dir, house.base_models)
    with pytest.raises(AssertionError, match="is in use by another `brightrun up`"):
        other.start()
    assert httpx.get(f"{house.urls['api']}/health/ready").status_code == 200


def test_all_parts_come_back_on_the_same_ports_when_they_are_killed(house: House) -> None:
    for pid in house.pids.values():
        os.kill(pid, signal.SIGKILL)

    log = house.data_dir / "logs" / "up.log"
    wait_for("all parts to be ready again", lambda: all(f"{p:<9} ready again" in log.read_text() for p in PARTS), 120)

    assert httpx.get(f"{house.urls['api']}/health/ready").status_code == 200
    assert httpx.get(f"{house.urls['mlflow']}/health").status_code == 200


def test_the_end_leaves_no_process_port_or_ray_session(house: House, first_job: str) -> None:
    tree = house.tree()
    ports = [urlsplit(url).port for url in house.urls.values()]

    assert house.stop() == 0

    assert [p for p in tree if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    assert not processes.family(processes.folder_mark(house.data_dir))
    assert mentions(str(house.data_dir)) == []
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port or 0)) != 0, port
    assert not (house.data_dir / "ray").exists()


def test_everything_is_there_when_it_is_started_again(house: House, first_job: str) -> None:
    house.start()

    check_first_job(house)


def test_what_a_killed_up_left_behind_is_ended_at_the_next_start(house: House, first_job: str) -> None:
    assert house.process is not None
    tree = house.tree()
    house.process.kill()
    house.process.wait()
    assert [p for p in tree if p.pid in house.pids.values() and p.is_running()], (
        "nothing was left, so nothing is tested"
    )

    house.start()

    assert [p for p in tree if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    check_first_job(house)


def check_first_job(house: House) -> None:
    """The README's account, key, job, model, files and costs, and the run in MLflow."""
    with httpx.Client(base_url=house.urls["api"]) as http:

        def data(response: httpx.Response) -> Any:
            return response.raise_for_status().json()["data"]

        account = {"email": "ada@example.com", "password": "correct horse battery"}
        token = data(http.post("/api/auth/signin", json=account))["accessToken"]
        http.headers["Authorization"] = f"Bearer {token}"
        job = data(http.get("/api/jobs"))["jobs"][0]
        assert job["status"] == "COMPLETED"
        files = data(http.get(f"/api/models/{job['artifactId']}/download", params={"artifact": "all"}))["files"]
        assert all(len(httpx.get(file["url"]).raise_for_status().content) == file["size"] for file in files)
        assert data(http.get("/api/costs", params={"job": job["id"]}))["costs"]
    run = httpx.get(f"{house.urls['mlflow']}/api/2.0/mlflow/runs/get", params={"run_id": job["mlflowRunId"]})
    assert run.raise_for_status().json()["run"]["info"]["status"] == "FINISHED"


def mentions(text: str) -> list[str]:
    """Command lines of processes that name ``text``."""
    lines = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if text in line and process.pid != os.getpid():
            lines.append(line)
    return lines
