"""Who lives in a simulated world when it begins: teams with an owner and a dataset that is ready to be trained on, a
dataset that waits for its verdict, and a webhook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.services import prices
from control_plane.services.catalog import BaseModelEntry
from control_plane.tables import Dataset, Membership, Team, User, Verdict, Webhook, now
from control_plane.tables.accounts import TeamRole
from control_plane.tables.work import DatasetStatus
from scheduler.simulator.users import MODEL

if TYPE_CHECKING:
    from scheduler.simulator.world import World

TEAMS = 2
UNJUDGED = "dataset-3"
BUDGETS_MICROUSD = (None, 4_500, 6_000, 8_000, 10_000, 20_000, 1_000_000)
REPORT: dict[str, Any] = {
    "format": "OPENAI_MESSAGES",
    "passed": True,
    "counts": {},
    "findings": [],
    "sample": [],
    "statistics": {
        "conversations": 100,
        "trainingConversations": 90,
        "validationConversations": 10,
        "tokens": 20_000,
        "learnedTokens": 9_000,
        "avgTurnsPerConversation": 4.0,
        "avgTokensPerTurn": 50.0,
    },
}
"""What a verdict's child reports."""


async def move_in(world: World) -> None:
    """Fill an empty database."""
    model = world.catalog.base_models[MODEL]
    async with world.database.write() as session:
        await prices.ensure_first(session, world.catalog)
        for number in range(1, TEAMS + 1):
            person = User(id=f"user-{number}", email=f"{number}@example.com", password_hash="x", name="Ada")
            team = Team(id=f"team-{number}", name="Ada's team")
            session.add_all([person, team])
            await session.flush()
            session.add(Membership(team_id=team.id, user_id=person.id, role=TeamRole.OWNER))
            team.personal_of = person.id
            await _upload(session, f"dataset-{number}", team, model, judged=True)
        await _upload(session, UNJUDGED, team, model, judged=False)
        session.add(
            Webhook(
                id="webhook",
                team_id="team-1",
                created_by="user-1",
                url="https://example.com/hook",
                secret="whsec_c2VjcmV0",
            )
        )


async def _upload(session: AsyncSession, dataset_id: str, team: Team, model: BaseModelEntry, *, judged: bool) -> None:
    session.add(
        Dataset(
            id=dataset_id,
            team_id=team.id,
            created_by=team.personal_of,
            name="conversations",
            status=DatasetStatus.READY if judged else DatasetStatus.VALIDATING,
            base_model=model.id,
            storage_key=f"datasets/{dataset_id}",
            file_name="conversations.jsonl",
            file_size=2**30,
            uploaded_at=now(),
            training_ready=judged,
        )
    )
    await session.flush()
    session.add(
        Verdict(
            team_id=team.id,
            dataset_id=dataset_id,
            base_model=model.id,
            revision=model.revision,
            max_seq_length=512,
            status="COMPLETED" if judged else "QUEUED",
            passed=True if judged else None,
            statistics=REPORT["statistics"] if judged else None,
        )
    )


def vary(world: World) -> None:
    """Worlds differ in the budgets that their teams begin with, and in whether a dataset waits for its verdict."""
    rng = world.rng("inhabitants")
    for number in range(1, TEAMS + 1):
        world.store.raw.execute(
            "UPDATE teams SET monthly_budget_microusd = ? WHERE id = ?",
            (rng.choice(BUDGETS_MICROUSD), f"team-{number}"),
        )
    if rng.random() < 0.75:
        world.store.raw.execute("UPDATE verdicts SET status = 'CANCELLED' WHERE dataset_id = ?", (UNJUDGED,))
        world.store.raw.execute("UPDATE datasets SET status = 'ERROR' WHERE id = ?", (UNJUDGED,))
