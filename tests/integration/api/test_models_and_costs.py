"""Models with their signed files, the ledger's sums, budgets and their alerts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select

from control_plane.db import Database
from control_plane.services import budget
from control_plane.settings import Settings
from control_plane.storage import Storage
from control_plane.tables import CostRecord, Membership, ModelArtifact, Team, TrainingJob, now
from control_plane.tables.money import CostType
from tests.factories import Account, error_of, job_body, make_account, ready_dataset
from tests.integration.api.conftest import Http
from tests.rows import make_job

FILES = {
    "adapter_model.safetensors": b"weights",
    "adapter_config.json": b"{}",
    "tokenizer.json": b"[]",
    "tokenizer_config.json": b"[1]",
    "chat_template.jinja": b"{{ x }}",
    "README.md": b"# card",
}


async def team_of(db: Database, account: Account) -> Team:
    async with db.read() as session:
        return (await session.scalars(select(Team).where(Team.personal_of == account.user_id))).one()


async def make_model(db: Database, settings: Settings, account: Account, name: str = "m", stars: int = 3) -> str:
    storage = Storage(settings.storage_url)
    artifacts = {}
    for file, content in FILES.items():
        key = f"mlflow/1/{name}/artifacts/adapter/{file}"
        await storage.put(key, content)
        artifacts[file] = {"key": key, "size": len(content), "sha256": "0" * 64}
    job_id = (await account.data("POST", "/api/jobs", job_body(await ready_dataset(account, db))))["jobId"]
    async with db.write() as session:
        job = await session.get_one(TrainingJob, job_id)
        model = ModelArtifact(
            team_id=job.team_id,
            created_by=job.created_by,
            job_id=job.id,
            dataset_id=job.dataset_id,
            name=name,
            quality_metrics={"stars": stars},
            training_summary={},
            configuration={
                "baseModel": "HuggingFaceTB/SmolLM2-135M-Instruct",
                "revision": "another",
                "hyperparameters": job.hyperparameters,
            },
            artifacts=artifacts,
        )
        session.add(model)
        await session.flush()
        return model.id


async def test_downloads_are_signed_short_lived_attachments(
    ada: Account, db: Database, settings: Settings, http: Http
) -> None:
    path = f"/api/models/{await make_model(db, settings, ada)}/download"
    files = (await ada.data("GET", path))["files"]

    assert {f["name"] for f in files} == FILES.keys()
    for file in files:
        answer = await http.get(file["url"])
        assert answer.content == FILES[file["name"]]
        assert int(answer.headers["Content-Length"]) == file["size"]
        assert f'attachment; filename="{file["name"]}"' == answer.headers["Content-Disposition"]
        life = datetime.fromisoformat(file["expiresAt"]) - datetime.now(UTC)
        assert timedelta(0) < life <= timedelta(minutes=5)
        error_of(await http.put(file["url"], content=b"x"), 403, "FORBIDDEN")
        error_of(await http.get(file["url"].replace("name=", "name=x")), 403, "FORBIDDEN")

    async def names(artifact: str) -> set[str]:
        return {f["name"] for f in (await ada.data("GET", f"{path}?artifact={artifact}"))["files"]}

    assert await names("adapter-model") == {"adapter_model.safetensors"}
    assert await names("adapter-config") == {"adapter_config.json"}
    assert await names("tokenizer") == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for export in ("merged", "gguf", "archive"):
        error_of(await ada.call("GET", f"{path}?artifact={export}"), 409, "CONFLICT")
    error_of(await ada.call("GET", f"{path}?artifact=everything"), 400, "VALIDATION_ERROR")


async def test_a_file_that_is_gone_is_not_found(ada: Account, db: Database, settings: Settings, http: Http) -> None:
    model_id = await make_model(db, settings, ada)
    (file,) = (await ada.data("GET", f"/api/models/{model_id}/download?artifact=adapter-config"))["files"]
    await Storage(settings.storage_url).delete(["mlflow/1/m/artifacts/adapter/adapter_config.json"])
    error_of(await http.get(file["url"]), 404, "NOT_FOUND")


async def test_models_are_listed_marked_and_deleted(
    ada: Account, bob: Account, db: Database, settings: Settings
) -> None:
    plain, good, bad = [
        await make_model(db, settings, ada, name, stars) for name, stars in (("p", 3), ("g", 5), ("b", 1))
    ]

    async def ids(query: str) -> list[str]:
        return [m["id"] for m in (await ada.data("GET", f"/api/models?{query}"))["models"]]

    assert await ids("sortBy=quality") == [good, plain, bad]
    assert await ids("sortBy=created&order=asc") == [plain, good, bad]
    assert await ids("search=G") == [good]
    path = f"/api/models/{good}"
    marked = (await ada.data("PATCH", path, {"status": "DEPLOYED", "description": "live"}))["model"]
    assert (marked["status"], marked["description"], marked["deployedAt"] is not None) == ("DEPLOYED", "live", True)
    assert marked["artifacts"][0].keys() == {"name", "size", "sha256"}
    error_of(await ada.call("PATCH", path, {"status": "SOLD"}), 400, "VALIDATION_ERROR")
    for method, where in (("GET", path), ("DELETE", path), ("GET", f"{path}/download")):
        error_of(await bob.call(method, where), 404, "NOT_FOUND")
    await ada.data("DELETE", path)
    error_of(await ada.call("GET", f"{path}/download"), 404, "NOT_FOUND")
    assert await ids("") == [bad, plain]
    assert (await ada.data("GET", "/api/dashboard/stats"))["completedModels"] == 2


async def test_a_parent_must_fit(ada: Account, bob: Account, db: Database, settings: Settings) -> None:
    dataset_id = await ready_dataset(ada, db)
    foreign, mine = await make_model(db, settings, bob, "x"), await make_model(db, settings, ada, "y")
    error_of(await ada.call("POST", "/api/jobs", job_body(dataset_id, parentModelId=foreign)), 404, "NOT_FOUND")
    body = job_body(dataset_id, parentModelId=mine, presetId="conservative")
    error = error_of(await ada.call("POST", "/api/jobs", body), 400, "VALIDATION_ERROR")
    assert error["fields"].keys() == {"parentModelId"}
    async with db.write() as session:
        model = await session.get_one(ModelArtifact, mine)
        revision = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
        model.configuration = {**model.configuration, "revision": revision}
    error = error_of(await ada.call("POST", "/api/jobs", body), 400, "VALIDATION_ERROR")
    assert error["fields"].keys() == {"hyperparameters.loraRank"}
    fits = await ada.data("POST", "/api/jobs", body | {"presetId": "balanced"})
    assert (await ada.data("GET", f"/api/jobs/{fits['jobId']}"))["job"]["parentModelId"] == mine


async def spend(db: Database, account: Account, amount: int, *, days_ago: int = 0, **fields: Any) -> None:
    team = await team_of(db, account)
    at = now() - timedelta(days=days_ago)
    values: dict[str, Any] = {
        "team_id": team.id,
        "created_by": account.user_id,
        "cost_type": CostType.COMPUTE,
        "amount_microusd": amount,
        "details": {"kind": "charge"},
        "billing_period": at.replace(hour=0, minute=0, second=0, microsecond=0),
        "recorded_at": at,
    }
    async with db.write() as session:
        session.add(CostRecord(**{**values, **fields}))


async def test_costs_are_listed_filtered_and_summed(ada: Account, bob: Account, db: Database) -> None:
    job_id = (await ada.data("POST", "/api/jobs", job_body(await ready_dataset(ada, db))))["jobId"]
    await spend(db, ada, 1_000_001, job_id=job_id)
    await spend(db, ada, -1, job_id=job_id)
    await spend(db, ada, 500_000, cost_type=CostType.STORAGE, days_ago=40)
    await spend(db, bob, 7_000_000)
    today, then = now().date(), (now() - timedelta(days=40)).date()

    listed = await ada.data("GET", "/api/costs?sortBy=amount&order=asc")
    assert [c["amount"] for c in listed["costs"]] == ["-0.000001", "0.500000", "1.000001"]
    assert listed["pagination"]["total"] == 3

    async def count(query: str) -> int:
        return int((await ada.data("GET", f"/api/costs?{query}"))["pagination"]["total"])

    assert await count("type=STORAGE") == 1
    assert await count(f"job={job_id}") == 2
    assert await count(f"from={today}") == 2
    assert await count(f"to={then}") == 1
    assert await count(f"from={then}&to={today}") == 3

    async def groups(by: str) -> list[tuple[str | None, str, int]]:
        found = (await ada.data("GET", f"/api/costs?groupBy={by}"))["groups"]
        return [(g["key"], g["amount"], g["records"]) for g in found]

    assert await groups("day") == [(str(then), "0.500000", 1), (str(today), "1.000000", 2)]
    assert await groups("type") == [("COMPUTE", "1.000000", 2), ("STORAGE", "0.500000", 1)]
    assert await groups("user") == [(ada.user_id, "1.500000", 3)]
    assert {key for key, _, _ in await groups("job")} == {None, job_id}
    for bad, name in (("from=yesterday", "from"), ("to=1", "to"), ("type=BRIBE", "type"), ("groupBy=mood", "groupBy")):
        error = error_of(await ada.call("GET", f"/api/costs?{bad}"), 400, "VALIDATION_ERROR")
        assert error["fields"].keys() == {name}


async def test_statements_by_month(ada: Account, bob: Account, db: Database) -> None:
    await spend(db, ada, 1_000_001)
    await spend(db, ada, -1)
    await spend(db, ada, 500_000, cost_type=CostType.STORAGE, days_ago=40)
    this, then = f"{now():%Y-%m}", f"{now() - timedelta(days=40):%Y-%m}"
    months = (await ada.data("GET", "/api/costs/statements"))["statements"]
    assert [(m["month"], m["closed"], m["total"]) for m in months] == [
        (this, False, "1.000000"),
        (then, True, "0.500000"),
    ]
    made = (await ada.data("GET", f"/api/costs/statements/{this}"))["statement"]
    assert (made["opening"], made["closing"], len(made["lines"])) == ("0.500000", "1.500000", 1)
    table = await ada.call("GET", f"/api/costs/statements/{then}", Accept="text/csv")
    assert table.headers["Content-Type"].startswith("text/csv")
    assert f'filename="brightrun-{then}.csv"' in table.headers["Content-Disposition"]
    assert table.text.splitlines()[1:] == [f"{then},STORAGE,,1,0.500000,0.000000,0.500000,0,0"]
    assert await bob.data("GET", "/api/costs/statements") == {"statements": []}
    for bad in ("2026-13", "october", "0000-01", "9999-12"):
        error = error_of(await ada.call("GET", f"/api/costs/statements/{bad}"), 400, "VALIDATION_ERROR")
        assert error["fields"].keys() == {"month"}


async def test_the_summary_of_the_month(ada: Account, db: Database) -> None:
    await spend(db, ada, 900_000_000, days_ago=40)
    await ada.data("PUT", "/api/budget", {"monthlyBudget": 10})
    summary = await ada.data("GET", "/api/costs/summary")
    assert summary == {
        "monthToDate": "0.000000",
        "held": "0.000000",
        "monthlyBudget": "10.000000",
        "forecast": "0.000000",
        "alerts": [],
    }
    for amount in (7_000_000, 1_000_000, 1_500_000):
        await spend(db, ada, amount)
    summary = await ada.data("GET", "/api/costs/summary")
    assert summary["monthToDate"] == "9.500000"
    assert [a["threshold"] for a in summary["alerts"]] == [80]
    await spend(db, ada, 1_000_000)
    assert [a["threshold"] for a in (await ada.data("GET", "/api/costs/summary"))["alerts"]] == [80, 100]


async def test_owners_are_told_once_of_each_threshold(ada: Account, bob: Account, db: Database) -> None:
    team = await team_of(db, ada)
    async with db.write() as session:
        session.add(Membership(team_id=team.id, user_id=bob.user_id))
    await spend(db, ada, 8_000_000)
    for budget_usd in ("11", "10", "10", "8", "9"):
        await ada.data("PUT", "/api/budget", {"monthlyBudget": budget_usd})
    told = (await ada.data("GET", "/api/notifications?order=asc"))["notifications"]
    assert [(n["type"], n["priority"], n["metadata"]["threshold"]) for n in told] == [
        ("COST_ALERT", "HIGH", 80),
        ("COST_ALERT", "CRITICAL", 100),
    ]
    assert (await bob.data("GET", "/api/notifications"))["notifications"] == []


@pytest.mark.parametrize("value", ["0", "-1", "NaN", "Infinity", "much", 0, 1e30, [], "1e-9", "1.0000001"])
async def test_bad_budgets(somebody: Account, value: object) -> None:
    error = error_of(await somebody.call("PUT", "/api/budget", {"monthlyBudget": value}), 400, "VALIDATION_ERROR")
    assert error["fields"].keys() == {"monthlyBudget"}


async def test_holds_reserve_what_is_not_charged_yet_and_close_once(database: Database) -> None:
    async with database.write() as session:
        job = await make_job(session, held_microusd=1000)
        team = await budget.lock_team(session, job.team_id)
        team.monthly_budget_microusd = 5000
    for charged, reserved, free in ((0, 1000, 4000), (300, 700, 4000), (900, 0, 3800)):
        async with database.write() as session:
            job = await session.get_one(TrainingJob, job.id)
            if charged:
                session.add(
                    CostRecord(
                        team_id=job.team_id,
                        created_by=job.created_by,
                        job_id=job.id,
                        cost_type=CostType.COMPUTE,
                        amount_microusd=charged,
                        details={},
                        billing_period=budget.month_start(now()),
                    )
                )
                await session.flush()
            assert await budget.held(session, job.team_id) == reserved
            assert await budget.available(session, job.team_id) == free
    async with database.write() as session:
        assert [await budget.close_hold(session, job.id) for _ in range(2)] == [True, False]
        assert await budget.available(session, job.team_id) == 3800


async def test_each_team_spends_its_own(ada: Account, http: Http, db: Database) -> None:
    other = await make_account(http)
    await spend(db, ada, 1_000_000)
    assert (await other.data("GET", "/api/costs/summary"))["monthToDate"] == "0.000000"
