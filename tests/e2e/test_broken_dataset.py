"""A broken dataset is refused with every defect named, and cannot be trained on."""

from __future__ import annotations

import json

from tests.e2e.conftest import TINY
from tests.e2e.house import Client, conversations


def broken() -> bytes:
    rows = list(conversations(40))
    rows[11]["turns"] = rows[11]["turns"][:1]
    rows[29]["turns"][0]["role"] = "robot"
    rows[35]["conversation_id"] = rows[3]["conversation_id"]
    lines = [json.dumps(row) for row in rows]
    lines[6] = '{"conversation_id": "c7", "turns": ['
    return "\n".join(lines).encode()


def test_every_defect_is_named_with_its_line(client: Client) -> None:
    dataset = client.upload(broken(), "broken", TINY)

    assert dataset["status"] == "ERROR"
    assert dataset["trainingReady"] is False
    answer = client.get(f"/api/datasets/{dataset['id']}/errors")
    errors = [e for e in answer["errors"] if e["severity"] == "error"]
    assert {(7, "NOT_JSON"), (12, "NO_ASSISTANT"), (30, "UNKNOWN_ROLE"), (36, "DUPLICATE_ID")} <= {
        (e["line"], e["code"]) for e in errors
    }
    assert {e["line"] for e in errors} == {7, 12, 30, 36}, errors
    assert all(e["advice"] and e["found"] for e in errors)
    assert answer["counts"]["NOT_JSON"] == 1


def test_it_cannot_be_trained_on(client: Client) -> None:
    dataset = client.upload(broken(), "broken again", TINY)
    body = {
        "datasetId": dataset["id"],
        "baseModel": TINY,
        "presetId": "balanced",
        "gpuConfig": {"type": "cpu", "count": 1},
    }
    response = client.http.post("/api/jobs", json=body)

    assert response.status_code == 409
    assert response.json()["error"]["code"] == "CONFLICT"
    assert response.json()["error"]["message"]
