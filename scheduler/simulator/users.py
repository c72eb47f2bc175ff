"""What people do, at times drawn from the seed: they call the API's services, as its handlers do, and ask again when
an answer does not come."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import msgspec
from sqlalchemy.exc import DBAPIError

from control_plane.errors import BrightRunError
from control_plane.schemas.jobs import CreateJob, GpuConfig, NewJob
from control_plane.services import costs, idempotency, jobs, lifecycle, paused, retries
from control_plane.services.accounts import audit
from control_plane.services.scope import Principal, get_owned
from control_plane.states import StopReason
from control_plane.tables import PriceVersion, TrainingJob, User, now
from control_plane.tables.accounts import TeamRole
from scheduler.simulator.faults import DatabaseFault

if TYPE_CHECKING:
    from scheduler.simulator.world import World

TRIES = 6
ACTIONS = ("cancel", "pause", "pause", "resume", "resume", "budget", "budget", "price", "submit", "retry", "retry")


class NoAnswer(Exception):
    """The request died with its process, or with the database."""


class Customer:
    """One team's owner."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.rng: random.Random = world.rng(f"user {number}")
        self.team_id, self.dataset_id = f"team-{number}", f"dataset-{number}"
        person = User(id=f"user-{number}", email=f"{number}@example.com", password_hash="x", name="Ada")
        self.who = Principal(person, self.team_id, TeamRole.OWNER, frozenset())
        self.jobs: list[str] = []
        self._keys = 0

    async def live(self, submissions: int, actions: int, until_s: float) -> None:
        doings = [(self.rng.uniform(0.0, until_s / 3), "submit") for _ in range(submissions)]
        doings += [(self.rng.uniform(5.0, until_s), self.rng.choice(ACTIONS)) for _ in range(actions)]
        if self.rng.random() < 0.3:
            doings += [(self.rng.uniform(0.3, 0.6) * until_s, "lower"), (until_s, "raise")]
        waiting = []
        for at_s, what in sorted(doings):
            await asyncio.sleep(max(0.0, at_s - self.world.elapsed_s))
            waiting.append(self.world.background(getattr(self, f"_{what}")()))
        if waiting:
            await asyncio.wait(waiting)

    # What he does.

    async def _submit(self) -> None:
        self._keys += 1
        key = f"{self.team_id}-{self._keys}"
        count = self.rng.choice((1, 1, 1, 2, 3))
        body = CreateJob(
            dataset_id=self.dataset_id, preset_id="balanced", gpu_config=GpuConfig(type="cpu", count=count), name=key
        )
        twice = self.rng.random() < 0.3
        answers = await asyncio.gather(*(self._persist(lambda: self._create(body, key)) for _ in range(1 + twice)))
        self._made(key, answers)

    def _made(self, key: str, answers: list[str | None]) -> None:
        for job_id in answers:
            if job_id is not None:
                self.world.oracle.acknowledged(key, job_id)
                if job_id not in self.jobs:
                    self.jobs.append(job_id)

    async def _create(self, body: CreateJob, key: str) -> str:
        async with self.world.database.write() as session:
            request = idempotency.Request(
                scope=f"{self.team_id} POST /api/jobs", key=key, body=msgspec.json.encode(body), secret=b"secret"
            )

            async def run() -> NewJob:
                return await jobs.submit(session, self.who, body, self.world.catalog, body.base_model or MODEL)

            answer = await idempotency.once(session, request, NewJob, run)
        return answer.job_id

    async def _cancel(self) -> None:
        await self._stop(StopReason.CANCEL)

    async def _pause(self) -> None:
        await self._stop(StopReason.PAUSE)

    async def _stop(self, reason: StopReason) -> None:
        if not self.jobs:
            return
        job_id = self.rng.choice(self.jobs)

        async def ask() -> str:
            async with self.world.database.write() as session:
                job = await get_owned(session, TrainingJob, self.team_id, job_id, lock=True)
                await lifecycle.request_stop(session, job, reason)
                audit(session, reason.lower(), "job", job_id, user_id=self.who.user_id, team_id=self.team_id)
            return job_id

        asked_s = self.world.clock.now
        if await self._persist(ask):
            self.world.oracle.stop_accepted(job_id, reason, asked_s)

    async def _resume(self) -> None:
        if not self.jobs:
            return
        job_id = self.rng.choice(self.jobs)

        async def ask() -> str:
            async with self.world.database.write() as session:
                await paused.resume(session, await get_owned(session, TrainingJob, self.team_id, job_id, lock=True))
            return job_id

        await self._persist(ask)

    async def _retry(self) -> None:
        if not self.jobs:
            return
        old = self.rng.choice(self.jobs)
        self._keys += 1
        key = f"{self.team_id}-{self._keys}"

        async def ask() -> str:
            async with self.world.database.write() as session:
                request = idempotency.Request(scope=f"{self.team_id} POST retry", key=key, body=b"", secret=b"secret")

                async def run() -> str:
                    job, _ = await retries.retry(session, self.who, old, self.world.catalog)
                    return job.id

                return await idempotency.once(session, request, str, run)

        self._made(key, [await self._persist(ask)])

    async def _budget(self) -> None:
        await self._set_budget(self.rng.choice((None, "0.002", "0.004", "0.01", "0.05", "1")))

    async def _lower(self) -> None:
        """Too little for what is under way."""
        await self._set_budget(self.rng.choice(("0.001", "0.002", "0.004")))

    async def _raise(self) -> None:
        """Enough for all that was paused for want of money."""
        await self._set_budget(self.rng.choice((None, "1")))

    async def _set_budget(self, amount: str | None) -> None:
        async def ask() -> bool:
            async with self.world.database.write() as session:
                await costs.set_budget(session, self.who, None if amount is None else Decimal(amount))
            return True

        await self._persist(ask)

    async def _price(self) -> None:
        """An administrator publishes a new price version; accepted jobs keep theirs."""
        price = self.rng.randint(100_000, 2_000_000)
        number = self.world.next_price()

        async def ask() -> bool:
            async with self.world.database.write() as session:
                session.add(
                    PriceVersion(
                        number=number,
                        effective_from=now(),
                        gpu_microusd_per_hour={"cpu": price},
                        storage_microusd_per_gib_month=23_000,
                    )
                )
            return True

        await self._persist(ask, tries=1)

    # How he asks.

    async def _persist(self, ask: Callable[[], Awaitable[Any]], tries: int = TRIES) -> Any:
        """The answer; None when it was a refusal, or none came in several tries."""
        for _ in range(tries):
            try:
                return await self._request(ask)
            except BrightRunError as refusal:
                self.world.note("refused", who=self.team_id, why=refusal.code)
                return None
            except NoAnswer as error:
                self.world.note("no answer", who=self.team_id, why=str(error))
                await asyncio.sleep(self.rng.uniform(0.5, 5.0))
        return None

    async def _request(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        """In the API's process. Raises NoAnswer, and what the services refuse."""
        process = self.world.api.process
        if process is None or not process.alive:
            raise NoAnswer("nobody listens")
        task = process.spawn(_called(ask))
        await asyncio.wait({task})
        if task.cancelled():
            raise NoAnswer("the API was killed")
        error = task.exception()
        if isinstance(error, DBAPIError) and isinstance(error.orig, DatabaseFault):
            raise NoAnswer(str(error.orig))
        return task.result()


MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


async def _called(ask: Callable[[], Awaitable[Any]]) -> Any:
    return await ask()
