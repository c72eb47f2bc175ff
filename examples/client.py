"""A small BrightRun client: plain HTTP, as any program would speak it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

RECONNECT_PAUSE_S = 1.0


class Refused(Exception):
    """The API said no; the message is its own."""


class Client:
    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=60, trust_env=False)

    def sign_up(self, email: str, password: str, name: str) -> None:
        """Create an account and an API key, and use the key from now on."""
        self.post("/api/auth/signup", email=email, password=password, name=name)
        token = self.post("/api/auth/signin", email=email, password=password)["accessToken"]
        self._http.cookies.clear()
        self._http.headers["Authorization"] = f"Bearer {token}"
        key = self.post("/api/keys", name="demo", scopes=["read", "train"])["key"]
        self._http.headers["Authorization"] = f"Bearer {key}"

    def get(self, path: str, **params: Any) -> Any:
        return _data(self._http.get(path, params=params))

    def post(self, path: str, **body: Any) -> Any:
        return _data(self._http.post(path, json=body))

    def upload(self, name: str, content: bytes, **more: Any) -> str:
        """Create a dataset, send the file by its signed URL, confirm it; returns the dataset's id."""
        made = self.post("/api/datasets", name=name, fileName=f"{name}.jsonl", fileSize=len(content), **more)
        sent = httpx.request(
            made["uploadMethod"], made["uploadUrl"], headers=made["uploadHeaders"], content=content, trust_env=False
        )
        sent.raise_for_status()
        self.post(f"/api/datasets/{made['datasetId']}/confirm")
        return str(made["datasetId"])

    def verdict(self, dataset_id: str, timeout_s: float = 300) -> Any:
        """The dataset, once it has been judged. Raises Refused if it is not fit for training."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            dataset = self.get(f"/api/datasets/{dataset_id}")["dataset"]
            if dataset["status"] == "READY":
                return dataset
            if dataset["status"] == "ERROR":
                raise Refused(f"the dataset is refused: {self.get(f'/api/datasets/{dataset_id}/errors')}")
            time.sleep(0.3)
        raise TimeoutError(f"no verdict within {timeout_s:.0f} s")

    def events(self, job_id: str) -> Iterator[tuple[str, Any]]:
        """The job's stream until it closes for good; a broken connection is taken up where it broke."""
        last_id = "0"
        while True:
            try:
                for number, name, data in self._stream(job_id, last_id):
                    last_id = number
                    yield name, data
                    if name in ("complete", "error"):
                        return
            except httpx.TransportError:
                pass
            time.sleep(RECONNECT_PAUSE_S)

    def _stream(self, job_id: str, last_id: str) -> Iterator[tuple[str, str, Any]]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": last_id}
        with self._http.stream("GET", f"/api/jobs/{job_id}/stream", headers=headers) as answer:
            if answer.status_code != 200:
                answer.read()
                _data(answer)
            fields: dict[str, str] = {}
            for line in answer.iter_lines():
                if line:
                    name, _, value = line.partition(":")
                    fields[name] = value.removeprefix(" ")
                elif "data" in fields:
                    last_id = fields.get("id", last_id)
                    yield last_id, fields.get("event", "message"), json.loads(fields["data"])
                    fields = {}

    def download(self, model_id: str, folder: Path) -> list[Path]:
        """All files of a model by their signed URLs, each checked against its size and SHA-256."""
        written = []
        for file in self.get(f"/api/models/{model_id}/download", artifact="all")["files"]:
            content = httpx.get(file["url"], trust_env=False).raise_for_status().content
            if len(content) != file["size"] or hashlib.sha256(content).hexdigest() != file["sha256"]:
                raise Refused(f"{file['name']} is not what was announced")
            path = folder / file["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            written.append(path)
        return written

    def costs(self, job_id: str) -> list[Any]:
        """All ledger records of a job."""
        records: list[Any] = []
        page, pages = 1, 1
        while page <= pages:
            answer = self.get("/api/costs", job=job_id, type="COMPUTE", page=page, pageSize=100)
            records += answer["costs"]
            page, pages = page + 1, answer["pagination"]["totalPages"]
        return records


def _data(response: httpx.Response) -> Any:
    try:
        body = response.json()
    except ValueError as error:
        raise Refused(f"{response.request.url}: HTTP {response.status_code}") from error
    if not body["success"]:
        said = body["error"]
        raise Refused(f"{response.request.url.path}: {said['code']}: {said['message']} {said.get('fields', '')}")
    return body["data"]


def microusd(amount: str) -> int:
    """Micro-dollars of a decimal string with six decimals."""
    sign = -1 if amount.startswith("-") else 1
    whole, fraction = amount.lstrip("-").split(".")
    if len(fraction) != 6:
        raise ValueError(f"{amount}: not six decimals")
    return sign * (int(whole) * 1_000_000 + int(fraction))
