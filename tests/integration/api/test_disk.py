"""A disk that fills up: what needs room is refused in time and says when to come back; the rest goes on."""

from __future__ import annotations

import shutil
from typing import NamedTuple

import httpx
import pytest
from obstore.exceptions import GenericError

from control_plane.db import Database
from control_plane.storage import Storage
from tests.factories import Account, error_of, job_body, ready_dataset

MIB = 1024 * 1024
ANNOUNCED = {"name": "talks", "fileName": "talks.jsonl", "fileSize": 10 * MIB}


class Usage(NamedTuple):
    free: int


def leave(monkeypatch: pytest.MonkeyPatch, free_mib: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free_mib * MIB))


def check_refused(response: httpx.Response, why: str) -> None:
    assert why in error_of(response, 503, "SERVICE_UNAVAILABLE")["message"]
    assert int(response.headers["Retry-After"]) > 0


async def test_no_dataset_is_announced_that_would_go_below_the_mark(
    ada: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(monkeypatch, 512 + 9)
    check_refused(await ada.call("POST", "/api/datasets", ANNOUNCED), "521 MiB free, 512 MiB are kept free")
    assert (await ada.data("GET", "/api/datasets"))["datasets"] == []

    leave(monkeypatch, 512 + 10)
    made = await ada.data("POST", "/api/datasets", ANNOUNCED)

    leave(monkeypatch, 512 + 9)
    check_refused(await ada.http.put(made["uploadUrl"], content=b"x" * MIB), "nearly full")
    leave(monkeypatch, 512 + 10)
    assert (await ada.http.put(made["uploadUrl"], content=b"x" * MIB)).status_code == 200


async def test_no_job_is_taken_below_the_mark_but_all_else_is(
    ada: Account, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = await ready_dataset(ada, db)
    job = (await ada.data("POST", "/api/jobs", job_body(dataset)))["jobId"]

    leave(monkeypatch, 511)
    check_refused(await ada.call("POST", "/api/jobs", job_body(dataset)), "nearly full")
    assert (await ada.call("GET", f"/api/jobs/{job}")).status_code == 200
    assert (await ada.call("POST", f"/api/jobs/{job}/cancel", {})).status_code == 202
    check_refused(await ada.call("POST", f"/api/jobs/{job}/retry", {}), "nearly full")
    assert len((await ada.data("GET", "/api/jobs"))["jobs"]) == 1


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ("Generic LocalFileSystem error: No space left on device (os error 28)", "The disk is full"),
        ("Generic S3 error: after 10 retries: 503 Service Unavailable", "The object store does not answer"),
    ],
)
async def test_a_store_that_fails_is_not_our_error(
    ada: Account, monkeypatch: pytest.MonkeyPatch, message: str, why: str
) -> None:
    async def broken(*_: object) -> None:
        raise GenericError(message)

    made = await ada.data("POST", "/api/datasets", ANNOUNCED)
    monkeypatch.setattr(Storage, "size", broken)
    check_refused(await ada.call("POST", f"/api/datasets/{made['datasetId']}/confirm", {}), why)
