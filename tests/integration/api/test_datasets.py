"""Datasets: announced, uploaded, confirmed, judged; and the signed URLs that carry them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import pytest
from sqlalchemy import func, select, update

from control_plane import storage as storage_module
from control_plane.db import Database
from control_plane.services.datasets import apply_verdict
from control_plane.settings import Settings
from control_plane.tables import Dataset, Notification, Verdict
from tests.factories import (
    BROKEN,
    SOUND,
    Account,
    data_of,
    error_of,
    job_body,
    judge,
    make_account,
    ready_dataset,
    upload,
)
from tests.integration.api.conftest import Http

ROW = b'{"messages": []}\n'
NEW = {"name": "talks", "fileName": "talks.jsonl", "fileSize": len(ROW)}


async def test_from_the_announcement_to_the_verdict(ada: Account, db: Database) -> None:
    dataset_id = await upload(ada, ROW, description="some talks")
    confirmed = await ada.call("POST", f"/api/datasets/{dataset_id}/confirm", {})
    assert confirmed.status_code == 202
    judged = data_of(confirmed)
    assert (judged["dataset"]["status"], judged["verdict"]["status"]) == ("VALIDATING", "QUEUED")
    error_of(await ada.call("POST", f"/api/datasets/{dataset_id}/confirm", {}), 409, "CONFLICT")

    await judge(db, dataset_id)

    dataset = (await ada.data("GET", f"/api/datasets/{dataset_id}"))["dataset"]
    expected = {
        "status": "READY",
        "trainingReady": True,
        "format": "OPENAI_MESSAGES",
        "totalTrainingPairs": 90,
        "totalValidationPairs": 10,
        "totalTokens": 20_000,
        "avgTurnsPerConversation": 4.0,
        "fileSize": len(ROW),
        "sha256": hashlib.sha256(ROW).hexdigest(),
        "sampleData": SOUND["sample"],
        "errorMessage": None,
    }
    assert dataset.items() >= expected.items()
    assert [(v["status"], v["passed"]) for v in dataset["verdicts"]] == [("COMPLETED", True)]
    (told,) = (await ada.data("GET", "/api/notifications"))["notifications"]
    assert (told["type"], told["priority"]) == ("DATASET_READY", "MEDIUM")


async def test_a_refused_dataset_says_what_is_wrong(ada: Account, db: Database) -> None:
    dataset_id = await ready_dataset(ada, db, BROKEN)

    dataset = (await ada.data("GET", f"/api/datasets/{dataset_id}"))["dataset"]
    assert (dataset["status"], dataset["trainingReady"]) == ("ERROR", False)
    assert dataset["errorMessage"] == "251 errors: NOT_JSON, UNKNOWN_ROLE"
    answer = await ada.data("GET", f"/api/datasets/{dataset_id}/errors")
    assert answer["counts"] == {"NOT_JSON": 250, "UNKNOWN_ROLE": 1}
    assert len(answer["errors"]) == 101
    assert dataset["validationErrors"] == answer["errors"]
    assert answer["errors"][0].keys() == {"line", "pointer", "code", "severity", "found", "advice"}
    error = error_of(await ada.call("POST", "/api/jobs", job_body(dataset_id)), 409, "CONFLICT")
    assert f"/api/datasets/{dataset_id}/errors" in error["message"]


async def test_an_examination_that_failed_can_be_made_again(ada: Account, db: Database) -> None:
    dataset_id = await upload(ada)
    await ada.data("POST", f"/api/datasets/{dataset_id}/confirm", {})
    await judge(db, dataset_id, None)
    dataset = (await ada.data("GET", f"/api/datasets/{dataset_id}"))["dataset"]
    assert (dataset["status"], dataset["trainingReady"]) == ("ERROR", False)

    body = {"baseModel": dataset["baseModel"]}
    again = await ada.call("POST", f"/api/datasets/{dataset_id}/validate", body)
    assert (again.status_code, data_of(again)["dataset"]["status"]) == (202, "VALIDATING")
    await judge(db, dataset_id)
    assert (await ada.data("GET", f"/api/datasets/{dataset_id}"))["dataset"]["status"] == "READY"
    unchanged = await ada.data("POST", f"/api/datasets/{dataset_id}/validate", body)
    assert unchanged["verdict"]["status"] == "COMPLETED"
    async with db.read() as session:
        assert await session.scalar(select(func.count()).select_from(Verdict)) == 1


async def test_applying_a_verdict_twice_tells_once(ada: Account, db: Database) -> None:
    dataset_id = await ready_dataset(ada, db)
    async with db.write() as session:
        verdict = (await session.scalars(select(Verdict))).one()
        await apply_verdict(session, verdict, SOUND)
    async with db.read() as session:
        assert await session.scalar(select(func.count()).select_from(Notification)) == 1
        assert (await session.get_one(Dataset, dataset_id)).training_ready


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "x" * 201}, "name"),
        ({"name": None}, "name"),
        ({"fileName": "../../etc/passwd"}, "fileName"),
        ({"fileName": ".."}, "fileName"),
        ({"name": "  "}, "name"),
        ({"fileSize": 0}, "fileSize"),
        ({"fileSize": 10 * 1024**3 + 1}, "fileSize"),
        ({"fileSize": "12"}, "fileSize"),
        ({"fileSize": 1.5}, "fileSize"),
        ({"format": "WORD"}, "format"),
        ({"baseModel": "nobody/nothing"}, "baseModel"),
        ({"surprise": 1}, "surprise"),
    ],
)
async def test_bad_announcements_name_the_field(somebody: Account, change: dict[str, object], field: str) -> None:
    error = error_of(await somebody.call("POST", "/api/datasets", NEW | change), 400, "VALIDATION_ERROR")
    assert error["fields"].keys() == {field}


async def test_nothing_uploaded_cannot_be_confirmed(ada: Account) -> None:
    made = await ada.data("POST", "/api/datasets", NEW)
    path = f"/api/datasets/{made['datasetId']}"
    error_of(await ada.call("POST", f"{path}/confirm", {}), 409, "CONFLICT")
    error_of(await ada.call("POST", f"{path}/validate", {"baseModel": "nobody/nothing"}), 400, "VALIDATION_ERROR")
    model = (await ada.data("GET", path))["dataset"]["baseModel"]
    error_of(await ada.call("POST", f"{path}/validate", {"baseModel": model}), 409, "CONFLICT")


async def test_a_larger_file_than_declared_is_refused_with_and_without_its_length(ada: Account) -> None:
    made = await ada.data("POST", "/api/datasets", NEW)
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(10_000):
            sent += 1
            yield b"x" * 1000

    error_of(await ada.http.put(made["uploadUrl"], content=ROW + b"x"), 413, "PAYLOAD_TOO_LARGE")
    error_of(await ada.http.put(made["uploadUrl"], content=endless()), 413, "PAYLOAD_TOO_LARGE")
    assert sent < 10
    error_of(await ada.call("POST", f"/api/datasets/{made['datasetId']}/confirm", {}), 409, "CONFLICT")


async def test_a_signed_url_serves_its_one_purpose_and_only_in_time(
    ada: Account, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    made = await ada.data("POST", "/api/datasets", NEW)
    parts = urlsplit(made["uploadUrl"])
    query = dict(parse_qsl(parts.query))

    def altered(path: str = parts.path, **change: str) -> str:
        return urlunsplit(parts._replace(path=path, query=urlencode(query | change)))

    forged = [
        altered(limit="1000000"),
        altered(expires=str(int(query["expires"]) + 1)),
        altered(dataset="another"),
        altered(path=parts.path + "x"),
        altered(signature="0" * 64),
        altered(signature="é"),
        altered(more="1"),
        urlunsplit(parts._replace(query="")),
        made["uploadUrl"] + "&limit=1000000",
    ]
    for url in forged:
        error_of(await ada.http.put(url, content=ROW), 403, "FORBIDDEN")
    error_of(await ada.http.get(made["uploadUrl"]), 403, "FORBIDDEN")

    late = storage_module.time.time() + settings.signed_url_ttl_s + 1
    with monkeypatch.context() as patch:
        patch.setattr(storage_module.time, "time", lambda: late)
        error_of(await ada.http.put(made["uploadUrl"], content=ROW), 403, "FORBIDDEN")
    assert (await ada.http.put(made["uploadUrl"], content=ROW)).status_code == 200


async def test_what_was_confirmed_cannot_be_replaced(ada: Account, settings: Settings, db: Database) -> None:
    made = await ada.data("POST", "/api/datasets", NEW)
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"x" * 5
        begun.set()
        await go_on.wait()
        yield b"x" * 5

    late = asyncio.create_task(ada.http.put(made["uploadUrl"], content=slow()))
    await begun.wait()
    assert (await ada.http.put(made["uploadUrl"], content=ROW)).status_code == 200
    await ada.data("POST", f"/api/datasets/{made['datasetId']}/confirm", {})
    go_on.set()

    error_of(await late, 409, "CONFLICT")
    error_of(await ada.http.put(made["uploadUrl"], content=ROW), 409, "CONFLICT")
    async with db.read() as session:
        dataset = await session.get_one(Dataset, made["datasetId"])
    assert (settings.data_dir / "objects" / dataset.storage_key).read_bytes() == ROW


async def test_lists_are_filtered_searched_sorted_and_paged(ada: Account, db: Database) -> None:
    for name in ("alpha", "Beta 100%", "gamma"):
        await ada.data("POST", "/api/datasets", NEW | {"name": name, "format": "SHAREGPT"})
    await ready_dataset(ada, db)

    async def names(query: str) -> list[str]:
        return [d["name"] for d in (await ada.data("GET", f"/api/datasets?{query}"))["datasets"]]

    assert await names("sortBy=name&order=asc") == ["Beta 100%", "alpha", "gamma", "talks"]
    assert await names("search=beta") == ["Beta 100%"]
    assert await names("search=100%25") == ["Beta 100%"]
    assert await names("search=%25") == ["Beta 100%"]
    assert await names("trainingReady=true") == ["talks"]
    assert await names("status=READY&format=SHAREGPT") == []
    assert await names("pageSize=2&page=2&sortBy=name&order=asc") == ["gamma", "talks"]
    listed = await ada.data("GET", "/api/datasets?pageSize=3")
    assert listed["pagination"] == {"page": 1, "pageSize": 3, "total": 4, "totalPages": 2}
    for bad in ("page=0", "pageSize=101", "pageSize=x", "sortBy=secret", "order=up", "status=GONE", "trainingReady=2"):
        error = error_of(await ada.call("GET", f"/api/datasets?{bad}"), 400, "VALIDATION_ERROR")
        assert error["fields"].keys() == {bad.partition("=")[0]}


async def test_change_and_delete(ada: Account, db: Database) -> None:
    dataset_id = await ready_dataset(ada, db)
    path = f"/api/datasets/{dataset_id}"
    changed = (await ada.data("PATCH", path, {"name": "renamed", "description": None}))["dataset"]
    assert (changed["name"], changed["description"]) == ("renamed", None)
    error_of(await ada.call("PATCH", path, {"status": "READY"}), 400, "VALIDATION_ERROR")

    job = (await ada.data("POST", "/api/jobs", job_body(dataset_id)))["jobId"]
    error_of(await ada.call("DELETE", path), 409, "CONFLICT")
    await ada.data("POST", f"/api/jobs/{job}/cancel", {})
    await ada.data("DELETE", path)
    error_of(await ada.call("GET", path), 404, "NOT_FOUND")
    assert (await ada.data("GET", "/api/datasets"))["datasets"] == []
    async with db.read() as session:
        assert (await session.get_one(Dataset, dataset_id)).deleted_at is not None


async def test_somebody_elses_object_is_not_there(ada: Account, bob: Account, db: Database) -> None:
    """ada is even an administrator: without ``team=`` she sees her own team only."""
    mine, foreign = await ready_dataset(ada, db), await ready_dataset(bob, db)
    job = (await bob.data("POST", "/api/jobs", job_body(foreign)))["jobId"]
    error_of(await ada.call("POST", "/api/jobs", job_body(foreign)), 404, "NOT_FOUND")
    error_of(await ada.call("POST", "/api/jobs/estimate", job_body(foreign)), 404, "NOT_FOUND")
    for method, path, body in [
        ("GET", f"/api/datasets/{foreign}", None),
        ("GET", f"/api/datasets/{foreign}/errors", None),
        ("PATCH", f"/api/datasets/{foreign}", {"name": "x"}),
        ("DELETE", f"/api/datasets/{foreign}", None),
        ("POST", f"/api/datasets/{foreign}/confirm", {}),
        ("POST", f"/api/datasets/{foreign}/validate", {"baseModel": "HuggingFaceTB/SmolLM2-135M-Instruct"}),
        ("GET", f"/api/jobs/{job}", None),
        ("PATCH", f"/api/jobs/{job}", {"name": "x"}),
        ("GET", f"/api/jobs/{job}/metrics", None),
        ("GET", f"/api/jobs/{job}/logs", None),
        ("GET", f"/api/jobs/{job}/checkpoints", None),
        ("GET", f"/api/jobs/{job}/attempts", None),
        ("GET", f"/api/jobs/{job}/stream", None),
        ("POST", f"/api/jobs/{job}/cancel", {}),
        ("POST", f"/api/jobs/{job}/pause", {}),
        ("POST", f"/api/jobs/{job}/resume", {}),
    ]:
        error_of(await ada.call(method, path, body), 404, "NOT_FOUND")
    assert [d["id"] for d in (await ada.data("GET", "/api/datasets"))["datasets"]] == [mine]
    assert (await ada.data("GET", "/api/jobs"))["jobs"] == []


async def test_confirming_at_once_queues_one_examination(both: Http) -> None:
    ada = await make_account(both)
    dataset_id = await upload(ada)
    answers = await asyncio.gather(*(ada.call("POST", f"/api/datasets/{dataset_id}/confirm", {}) for _ in range(5)))
    assert sorted(a.status_code for a in answers) == [202, 409, 409, 409, 409]
    assert len((await ada.data("GET", f"/api/datasets/{dataset_id}"))["dataset"]["verdicts"]) == 1


async def test_notifications_are_read_one_by_one_or_all(ada: Account, bob: Account, db: Database) -> None:
    for _ in range(3):
        await ready_dataset(ada, db)
    listed = await ada.data("GET", "/api/notifications")
    assert (listed["unread"], len(listed["notifications"])) == (3, 3)
    one = listed["notifications"][0]["id"]

    error_of(await bob.call("PATCH", f"/api/notifications/{one}/read"), 404, "NOT_FOUND")
    assert (await ada.data("PATCH", f"/api/notifications/{one}/read"))["notification"]["read"] is True
    assert (await ada.data("GET", "/api/notifications?read=false"))["pagination"]["total"] == 2
    assert await ada.data("POST", "/api/notifications/read-all") == {"updated": 2}
    assert (await ada.data("GET", "/api/notifications"))["unread"] == 0


async def test_a_verdict_under_another_model_leaves_the_dataset_as_it_is(ada: Account, db: Database) -> None:
    dataset_id = await ready_dataset(ada, db)
    async with db.write() as session:
        await session.execute(update(Verdict).values(base_model="first/model"))
        await session.execute(update(Dataset).values(base_model="first/model"))
    body = {"baseModel": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    error = error_of(await ada.call("POST", "/api/jobs", job_body(dataset_id)), 409, "CONFLICT")
    assert f"POST /api/datasets/{dataset_id}/validate" in error["message"]

    await ada.data("POST", f"/api/datasets/{dataset_id}/validate", body)
    error_of(await ada.call("POST", "/api/jobs", job_body(dataset_id)), 409, "CONFLICT")
    await judge(db, dataset_id, BROKEN)
    dataset = (await ada.data("GET", f"/api/datasets/{dataset_id}"))["dataset"]
    assert (dataset["status"], [v["passed"] for v in dataset["verdicts"]]) == ("READY", [True, False])
    error_of(await ada.call("POST", "/api/jobs", job_body(dataset_id)), 409, "CONFLICT")
