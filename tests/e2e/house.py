"""A whole installation for end-to-end tests: `brightrun up` in a temporary folder, spoken to by HTTP only."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil

from tests.tiny_model import make_tiny_model
from tests.warden import warden

TINY = "tests/tiny-random-llama"
REPO = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 180


def wait_for(what: str, probe: Callable[[], Any], timeout_s: float, pause_s: float = 0.1) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = probe()
        if found is not None and found is not False:
            return found
        time.sleep(pause_s)
    raise AssertionError(f"waited {timeout_s:.0f} s for {what}")


def base_models_file(folder: Path) -> Path:
    """A tiny random model in ``folder``, and the file that offers it as ``TINY``."""
    model = make_tiny_model(folder / "tiny")
    file = folder / "base_models.yaml"
    entry = {
        "id": TINY,
        "name": "Tiny random Llama",
        "revision": "1",
        "source": {"kind": "folder", "location": str(model), "revision": "1"},
        "parameters": 4_000_000,
        "hiddenSize": 64,
        "layers": 2,
        "vocabularySize": 49152,
        "contextLength": 2048,
        "license": "none",
    }
    file.write_text(json.dumps({"baseModels": [entry]}))  # JSON is YAML
    return file


class House:
    """`brightrun up --json` as a child process; ended with SIGTERM."""

    def __init__(self, data_dir: Path, base_models: Path, **settings: str) -> None:
        self.data_dir = data_dir
        self.base_models = base_models
        self.settings = settings
        self.process: subprocess.Popen[str] | None = None
        self._guard = ExitStack()
        self.urls: dict[str, str] = {}

    def start(self) -> House:
        command = [sys.executable, "-m", "control_plane.cli", "up", "--json", "--data-dir", str(self.data_dir)]
        command += ["--api-port", "0", "--mlflow-port", "0", "--ray-port", "0", "--dashboard-port", "0"]
        env = {k: v for k, v in os.environ.items() if not k.startswith(("BRIGHTRUN_", "RAY_", "MLFLOW_"))}
        env |= {"BRIGHTRUN_BASE_MODELS_FILE": str(self.base_models), **self.settings}
        self.data_dir.mkdir(parents=True, exist_ok=True)
        log = (self.data_dir / "up.log").open("a")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env, cwd=REPO)
        self._guard.close()
        self._guard.enter_context(warden(f"kill -TERM {self.process.pid}"))
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self._guard.close()
        assert line, f"brightrun up ended: {(self.data_dir / 'up.log').read_text()[-3000:]}"
        self.answer = json.loads(line)
        self.urls = self.answer["urls"]
        return self

    @property
    def pids(self) -> dict[str, int]:
        """As `up` prints them; a restarted part has another one, found by its command line."""
        return self.answer["pids"]

    def tree(self) -> list[psutil.Process]:
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        with self._guard:
            return self.process.wait(60)

    def trainer_children(self) -> list[psutil.Process]:
        """Trainer processes of this house that train (a verdict's child has another config)."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if "trainer" in line and any(str(self.data_dir) in part for part in line):
                found.append(process)
        return found


class Client:
    """One account of a house, with an API key."""

    def __init__(self, house: House, email: str = "ada@example.com") -> None:
        self.house = house
        self.http = httpx.Client(base_url=house.urls["api"], timeout=30)
        account = {"email": email, "password": "correct horse battery", "name": "Ada Lovelace"}
        self.data(self.http.post("/api/auth/signup", json=account))
        signin = {k: account[k] for k in ("email", "password")}
        token = self.data(self.http.post("/api/auth/signin", json=signin))["accessToken"]
        bearer = {"Authorization": f"Bearer {token}"}
        made = self.data(
            self.http.post("/api/keys", json={"name": "tests", "scopes": ["read", "train", "admin"]}, headers=bearer)
        )
        self.http.cookies.clear()
        self.http.headers["Authorization"] = f"Bearer {made['key']}"

    @staticmethod
    def data(response: httpx.Response) -> Any:
        body = response.json()
        assert body["success"], (response.status_code, body)
        return body["data"]

    def get(self, path: str, **params: Any) -> Any:
        return self.data(self.http.get(path, params=params))

    def post(self, path: str, body: Any = None) -> Any:
        return self.data(self.http.post(path, json=body if body is not None else {}))

    def upload(self, content: bytes, name: str, base_model: str, wait: bool = True) -> dict[str, Any]:
        made = self.post(
            "/api/datasets",
            {"name": name, "fileName": f"{name}.jsonl", "fileSize": len(content), "baseModel": base_model},
        )
        put = httpx.request(made["uploadMethod"], made["uploadUrl"], headers=made["uploadHeaders"], content=content)
        assert put.is_success, put.text
        self.post(f"/api/datasets/{made['datasetId']}/confirm")
        return self.dataset_when_judged(made["datasetId"])

    def dataset_when_judged(self, dataset_id: str, timeout_s: float = 120) -> dict[str, Any]:
        def judged() -> dict[str, Any] | None:
            dataset = self.get(f"/api/datasets/{dataset_id}")["dataset"]
            return dataset if dataset["status"] in ("READY", "ERROR") else None

        return wait_for("the verdict", judged, timeout_s)

    def job(self, job_id: str) -> dict[str, Any]:
        return self.get(f"/api/jobs/{job_id}")["job"]

    def wait_job(self, job_id: str, until: Callable[[dict[str, Any]], bool], timeout_s: float = 180) -> dict[str, Any]:
        """Poll until ``until(job)``; a request that fails while the API is away is tried again."""
        last: dict[str, Any] = {}

        def probe() -> dict[str, Any] | None:
            nonlocal last
            try:
                last = self.job(job_id)
            except httpx.TransportError:
                return None
            if last["status"] == "FAILED" and not until(last):
                raise AssertionError(f"job failed: {last['errorCode']}: {last['errorMessage']}")
            return last if until(last) else None

        try:
            return wait_for(f"job {job_id}", probe, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; last seen: {json.dumps(last, default=str)[:1500]}") from None

    def adapter_sha256(self, job: dict[str, Any]) -> str:
        answer = self.get(f"/api/models/{job['artifactId']}/download", artifact="adapter-model")
        file = next(f for f in answer["files"] if f["name"].endswith("adapter_model.safetensors"))
        content = httpx.get(file["url"]).raise_for_status().content
        digest = hashlib.sha256(content).hexdigest()
        assert digest == file["sha256"]
        return digest

    @staticmethod
    def micro(amount: str) -> int:
        """Micro-dollars of a decimal string with six decimals."""
        whole, fraction = amount.split(".")
        assert len(fraction) == 6
        return int(whole) * 1_000_000 + int(fraction)

    def gpu_price_microusd(self, gpu_type: str) -> int:
        gpu = next(g for g in self.get("/api/gpu-types")["gpuTypes"] if g["id"] == gpu_type)
        return self.micro(gpu["pricePerHour"])

    def compute_ms(self, job_id: str) -> dict[str, dict[str, int]]:
        """GPU-milliseconds by the ledger, by attempt: billed (charges less reversals) and absorbed."""
        sums: dict[str, dict[str, int]] = {}
        page = 1
        while True:
            answer = self.get("/api/costs", job=job_id, type="COMPUTE", page=page, pageSize=100)
            for record in answer["costs"]:
                details = record["details"]
                of_attempt = sums.setdefault(record["attemptId"], {"billed": 0, "absorbed": 0})
                of_attempt["absorbed" if details["kind"] == "absorbed" else "billed"] += details["gpuMs"]
            if page >= answer["pagination"]["totalPages"]:
                return sums
            page += 1


def conversations(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Short made-up conversations, all different."""
    words = (
        "red",
        "green",
        "blue",
        "round",
        "square",
        "tall",
        "small",
        "quick",
        "slow",
        "warm",
        "cold",
        "bright",
        "old",
    )
    for i in range(count):
        a, b, c = (words[(i * k + seed) % len(words)] for k in (3, 7, 11))
        yield {
            "conversation_id": f"c{seed}-{i}",
            "turns": [
                {"role": "user", "content": f"Tell me about the {a} {b} thing number {i}."},
                {"role": "assistant", "content": f"Thing number {i} is {a}, {b} and quite {c}: {i * 37 + seed}."},
            ],
        }


def jsonl(rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


RAY_TIMES = """
import json, sys, ray
from ray._private import state, worker
ray.init(address=sys.argv[1], namespace="brightrun", logging_level="ERROR", log_to_driver=False)
actors = [actor for actor in state.actors().values() if actor["Name"].startswith(sys.argv[2])]
times = [(actor["Name"], int(actor["StartTime"]), int(actor["EndTime"])) for actor in actors]
print(json.dumps([worker.global_worker.gcs_client.cluster_id.hex(), times]))
"""


class RayTimes(NamedTuple):
    """From the actor table of the cluster that is there now: it knows nothing of those before it."""

    cluster_id: str
    held_ms: dict[str, int | None]
    """Rank actor name → milliseconds it lived; None while it lives."""

    @property
    def whole(self) -> bool:
        return None not in self.held_ms.values()


def held_ms_by_ray(house: House, job_id: str) -> RayTimes:
    """Straight from Ray, by none of our code. Raises RuntimeError when it cannot be asked."""
    env = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(house.data_dir / "ray_token"),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keeps 127.0.0.1 as it is given
    }
    address = house.answer["rayAddress"]
    try:
        done = subprocess.run(
            [sys.executable, "-c", RAY_TIMES, address, job_id], env=env, capture_output=True, text=True, timeout=60
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError("Ray does not answer") from error
    if done.returncode != 0:
        raise RuntimeError(f"Ray cannot be asked: {done.stderr[-2000:]}")
    cluster_id, rows = json.loads(done.stdout.strip().splitlines()[-1])
    ranks = [row for row in rows if row[0].split("/")[-1].startswith("r")]
    return RayTimes(cluster_id, {name: _lived(start, end) for name, start, end in ranks})


def _lived(start_ms: int, end_ms: int) -> int | None:
    """One that was ended before it had come up held nothing."""
    return (end_ms - start_ms if start_ms else 0) if end_ms else None
