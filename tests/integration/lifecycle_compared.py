"""What the lifecycle machine compares after every rule, and what its rules are made of."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Collection
from typing import Any, TypeVar

import httpx
from hypothesis.stateful import RuleBasedStateMachine, invariant

from control_plane.tables import Attempt, BudgetHold, TrainingJob
from control_plane.tables.money import HoldState
from scheduler.executor import Batch
from tests.factories import data_of, error_of, job_body
from tests.integration.lifecycle_model import ModelJob, ModelTeam, Recipe, Refused, stronger
from tests.integration.lifecycle_world import Heard, SchedulerParts, World

T = TypeVar("T")
Way = tuple[str, str]
"""From one status to another; "PAUSED:BUDGET" if the budget paused it."""


class Compared(RuleBasedStateMachine):
    """An installation, and the model of it."""

    def __init__(self, world: World, runner: asyncio.Runner, ways: Counter[Way]) -> None:
        super().__init__()
        self.ways, self.stood = ways, dict[str, str]()
        self.world, self.run = world, runner.run
        self.team = ModelTeam()
        self.models: dict[str, ModelJob] = {}
        self.with_adapter: set[str] = set()
        self.heard: list[Heard] = []
        self.superseded: list[SchedulerParts] = []

    # What must hold.

    @invariant()
    def it_is_as_the_model_says(self) -> None:
        stands = {row.id: row for row in self.run(self.world.select(TrainingJob, TrainingJob.id.in_(self.models)))}
        assert {job: seen(row) for job, row in stands.items()} == {job: told(m) for job, m in self.models.items()}
        for job, model in self.models.items():
            before, self.stood[job] = self.stood.get(job), where(model)
            if before not in (None, where(model)):
                self.ways[before, where(model)] += 1
        events = self.run(self.world.numbers_of_events(self.models))
        assert events == {job: (1, row.event_seq, row.event_seq) for job, row in stands.items()}

    @invariant()
    def what_is_open_belongs_to_what_goes_on(self) -> None:
        attempts = self.run(self.world.select(Attempt, Attempt.work_id.in_(self.models), Attempt.outcome.is_(None)))
        active = [(job, model.attempt) for job, model in self.models.items() if model.active]
        assert sorted((attempt.work_id, attempt.number) for attempt in attempts) == sorted(active)
        holds = self.run(self.world.select(BudgetHold, BudgetHold.job_id.in_(self.models)))
        assert {hold.job_id: hold.state for hold in holds} == {
            job: HoldState.CLOSED if model.ended else HoldState.OPEN for job, model in self.models.items()
        }

    def the_ledger_balances(self) -> None:
        assert self.run(self.world.violations()) == []

    def teardown(self) -> None:
        try:
            self.the_ledger_balances()
        finally:
            self.run(self.world.clear())

    # Within.

    @property
    def unfinished(self) -> list[str]:
        return [job for job, model in self.models.items() if model.active or model.status == "QUEUED"]

    @property
    def active(self) -> list[str]:
        """Jobs with an attempt that has not ended for the database."""
        return [job for job, model in self.models.items() if model.active]

    @property
    def alive(self) -> list[str]:
        """… whose supervisor answers."""
        attempts = self.world.executor.attempts
        return [job for job in self.active if attempts[self.name(job)].alive]

    @property
    def training(self) -> list[str]:
        """… and whose child goes on."""
        return [job for job in self.alive if self.world.executor.attempts[self.name(job)].ending is None]

    @property
    def asked(self) -> list[str]:
        return [job for job in self.alive if self.models[job].stop]

    def ask(self, job: str, action: str) -> None:
        before = self.rows()
        answer = self.post(f"/api/jobs/{job}/{action}", {})
        try:
            getattr(self.models[job], action)()
        except Refused:
            error_of(answer, 409, "CONFLICT")
            assert self.rows() == before
        else:
            assert data_of(answer)["job"]["status"] == self.models[job].status

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.run(self.account.call("POST", path, body))

    def estimate(self) -> int:
        """What a new job's hold will be."""
        made = data_of(self.post("/api/jobs/estimate", job_body(self.dataset_id)))["estimate"]
        return round(float(made["computeCost"]["p90"]) * 1_000_000)

    def accepted_if(self, fits: bool, answer: httpx.Response, hold: int) -> None:
        if fits:
            assert answer.status_code == 201
            job = str(data_of(answer)["jobId"])
            self.models[job] = ModelJob(job, self.recipe(job))
            assert self.held()[job] == hold
        else:
            error_of(answer, 402, "BUDGET_EXCEEDED")

    def recipe(self, job: str) -> Recipe:
        (row,) = self.run(self.world.select(TrainingJob, TrainingJob.id == job))
        interval = row.hyperparameters["checkpointSteps"] or math.ceil(row.total_steps / row.total_epochs)
        return Recipe(row.price_microusd_per_hour, row.total_steps, interval)

    def rows(self) -> list[dict[str, Any]]:
        return self.run(self.world.rows(self.models))

    def name(self, job: str) -> str:
        return f"{job}/{self.models[job].attempt}"

    def attempt_id(self, job: str) -> str:
        """Of the attempt that goes on."""
        where = (Attempt.work_id == job, Attempt.number == self.models[job].attempt)
        return str(self.run(self.world.select(Attempt, *where))[0].id)

    def take(self, model: ModelJob, batch: Batch) -> None:
        """What the model makes of a batch that is heard for the first time."""
        for rank, kinds in batch.usage.items():
            for kind, gpu_ms in kinds.items():
                model.used(int(rank), kind, gpu_ms)
        for up in batch.events:
            if up.event["type"] == "started":
                model.started(up.event["step"])
            if up.event["type"] == "metrics":
                model.step = up.event["step"]
            if up.event["type"] == "stored":
                model.saved(up.event["step"])
            if up.event["type"] == "adapter":
                self.with_adapter.add(model.id)
        if batch.state == "stopping":
            model.stop = stronger(model.stop, "BUDGET")
        if batch.ending:
            self.ended(model, batch.ending.outcome, batch.ending.stop_reason)

    def ended(self, model: ModelJob, outcome: str, asked: str | None) -> None:
        model.attempt_ended(outcome, asked, adapter=model.id in self.with_adapter, paid=self.pays(model.id))
        self.the_ledger_balances()

    def pays(self, job: str) -> bool:
        return self.team.pays(self.models[job], self.spent(), self.held())

    def spent(self) -> dict[str, int]:
        return self.run(self.world.spent(self.models))

    def held(self) -> dict[str, int]:
        return self.run(self.world.held(self.models))


def one(of: Collection[T], pick: int) -> T:
    return list(of)[pick % len(of)]


def where(model: ModelJob) -> str:
    return f"{model.status}:{model.paused_by}" if model.paused_by else model.status


def seen(job: TrainingJob) -> tuple[Any, ...]:
    return job.status, job.paused_by, job.stop_requested, job.attempt, job.retry_count


def told(model: ModelJob) -> tuple[Any, ...]:
    return model.status, model.paused_by, model.stop, model.attempt, model.faults
