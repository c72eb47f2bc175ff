"""Users, schedulers, children and faults in any order, against a model; the real services, on both databases."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from argon2 import PasswordHasher
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test

from control_plane.services import passwords
from control_plane.states import Outcome, StopReason, WorkKind
from scheduler.executor import StaleEpoch, Unreachable
from scheduler.lease import LeaseLost
from tests.conftest import without_fsync
from tests.factories import error_of, job_body, ready_dataset
from tests.integration.lifecycle_compared import Compared, Way, one
from tests.integration.lifecycle_world import CLUSTER, World

SEEDS, EXAMPLES, STEPS = (3, 4, 5), 8, 40
REPLAYED = os.environ.get("LIFECYCLE_SEED")
"""A seed to try instead of the next one (a new one in a Hypothesis profile that draws); a failure names its own."""
PICK = st.integers(0, 9)
MOST_JOBS = 4
SECONDS = st.sampled_from((1, 20, 300))
REACHED: set[Way] = {
    ("INITIALIZING", "RUNNING"),
    ("RUNNING", "QUEUED"),
    ("RUNNING", "PAUSED:PAUSE"),
    ("PAUSED:PAUSE", "QUEUED"),
    ("RUNNING", "PAUSED:BUDGET"),
    ("PAUSED:BUDGET", "QUEUED"),
    ("RUNNING", "CANCELLED"),
    ("RUNNING", "FAILED"),
    ("RUNNING", "COMPLETED"),
}
"""By ``SEEDS``."""


class Lifecycle(Compared):
    """Every rule acts on the installation and on the model; the invariants compare them."""

    @initialize()
    def arrive(self) -> None:
        self.account = self.run(self.world.begin())
        self.dataset_id = self.run(ready_dataset(self.account, self.world.database))
        self.submit()

    # Users.

    @precondition(lambda self: len(self.models) < MOST_JOBS)
    @rule()
    def submit(self) -> None:
        upper = self.estimate()
        fits = self.team.fits(upper, self.spent(), self.held())
        self.accepted_if(fits, self.post("/api/jobs", job_body(self.dataset_id)), upper)

    @rule(pick=PICK, action=st.sampled_from(("cancel", "pause", "resume", "retry")))
    def asks(self, pick: int, action: str) -> None:
        job = one(self.models, pick)
        if action == "retry":
            self.retry(job)
        elif action == "resume" and self.models[job].status == "PAUSED":
            self.resume_for_money(job)
        else:
            self.ask(job, action)

    def retry(self, job: str) -> None:
        """A new job, whatever becomes of it."""
        upper, before = self.estimate(), self.rows()
        fits = self.team.fits(upper, self.spent(), self.held())
        answer = self.post(f"/api/jobs/{job}/retry", None)
        if self.models[job].may_be_retried:
            self.accepted_if(fits, answer, upper)
        else:
            error_of(answer, 409, "CONFLICT")
            assert self.rows() == before

    def resume_for_money(self, job: str) -> None:
        pays, before = self.pays(job), self.rows()
        answer = self.post(f"/api/jobs/{job}/resume", {})
        assert answer.status_code == (202 if pays else 402)
        if pays:
            self.models[job].resume()
        else:
            error_of(answer, 402, "BUDGET_EXCEEDED")
            assert self.rows() == before

    @rule(room=st.none() | st.integers(0, 4))
    def set_budget(self, room: int | None) -> None:
        """Unlimited, or what has been spent and as much as ``room`` new jobs hold."""
        limit = None
        if room is not None:
            limit = 1 + sum(self.spent().values()) + room * self.estimate()
        amount = None if limit is None else f"{limit / 1_000_000:.6f}"
        self.run(self.account.data("PUT", "/api/budget", {"monthlyBudget": amount}))
        self.team.budget_microusd = limit

    # What they and the child do together.

    @precondition(lambda self: self.training)
    @rule(pick=PICK, action=st.sampled_from(("cancel", "pause")))
    def stops_as_asked(self, pick: int, action: str) -> None:
        job = one(self.training, pick)
        self.ask(job, action)
        self.obey(job)

    @precondition(lambda self: self.training)
    @rule(pick=PICK, seconds=SECONDS)
    def runs_out_of_money(self, pick: int, seconds: int) -> None:
        """The supervisor stops it, whether or not the scheduler has asked."""
        job = one(self.training, pick)
        self.learn(job, seconds)
        self.set_budget(0)
        self.listen(job)
        if job in self.training and self.world.executor.attempts[self.name(job)].stop_reason:
            self.world.executor.end(self.name(job), Outcome.STOPPED)
        if job in self.alive:
            self.listen(job)

    @precondition(lambda self: any(model.paused_by == "BUDGET" for model in self.models.values()))
    @rule(room=st.none() | st.integers(0, 4))
    def money_comes(self, room: int | None) -> None:
        self.set_budget(room)
        self.budget_is_looked_at()

    # The scheduler.

    @precondition(lambda self: self.unfinished)
    @rule(pick=PICK, times=st.integers(1, 5), seconds=SECONDS)
    def goes_on(self, pick: int, times: int, seconds: int) -> None:
        """What happens when nothing happens."""
        job = one(self.unfinished, pick)
        for _ in range(times):
            if self.models[job].status == "QUEUED":
                self.begin(job)
            elif job in self.training:
                self.learn(job, seconds)
                self.world.executor.store(self.name(job), self.world.step_of(self.name(job)))
            if job in self.alive:
                self.listen(job)

    @rule(pick=PICK, answer=st.sampled_from(("arrives", "is lost")))
    def dispatch(self, pick: int, answer: str) -> None:
        self.begin(one(self.models, pick), answer)

    def begin(self, job: str, answer: str = "arrives") -> None:
        model, executor = self.models[job], self.world.executor
        if answer == "is lost":
            executor.lost_answers = ["start"]
        try:
            self.run(self.world.scheduler.dispatcher.dispatch(WorkKind.JOB, job, CLUSTER))
        except Unreachable:
            assert answer == "is lost"
        executor.lost_answers = []
        model.dispatched()
        if model.active:
            executor.attempts[self.name(job)].on_stop = lambda _: None

    @precondition(lambda self: self.active)
    @rule(pick=PICK)
    def start_again(self, pick: int) -> None:
        job = one(self.active, pick)
        attempt_id = self.attempt_id(job)
        before = self.rows()
        self.run(self.world.scheduler.dispatcher.start(attempt_id, CLUSTER))
        assert self.rows() == before

    @precondition(lambda self: self.asked)
    @rule(pick=PICK, obeys=st.booleans())
    def pass_the_stop_on(self, pick: int, obeys: bool) -> None:
        job = one(self.asked, pick)
        if obeys and job in self.training:
            self.obey(job)
        else:
            self.tell_to_stop(job)

    def tell_to_stop(self, job: str) -> None:
        reason = str(self.models[job].stop)
        self.run(self.world.executor.stop(self.name(job), reason, epoch=self.world.scheduler.lease.epoch))

    def obey(self, job: str) -> None:
        self.tell_to_stop(job)
        self.world.executor.end(self.name(job), Outcome.STOPPED)
        self.listen(job)

    @precondition(lambda self: self.alive)
    @rule(pick=PICK)
    def hear(self, pick: int) -> None:
        self.listen(one(self.alive, pick))

    def listen(self, job: str) -> None:
        attempt_id, name = self.attempt_id(job), self.name(job)
        heard = self.run(self.world.poll(attempt_id, name))
        self.run(self.world.scheduler.collector.apply(*heard))
        self.heard.append(heard)
        self.take(self.models[job], heard.batch)

    @precondition(lambda self: self.heard)
    @rule(pick=PICK)
    def hear_again(self, pick: int) -> None:
        """A repeated or late answer, of whatever attempt."""
        before = self.rows()
        self.run(self.world.scheduler.collector.apply(*one(self.heard, pick)))
        assert self.rows() == before

    @precondition(lambda self: self.active)
    @rule(pick=PICK)
    def supervisor_dies(self, pick: int) -> None:
        job = one(self.active, pick)
        attempt_id, name = self.attempt_id(job), self.name(job)
        self.world.executor.lose(name)
        for _ in range(2):
            self.run(self.world.scheduler.collector.declare_fault(attempt_id, name, "SUPERVISOR_DIED", "It died"))
        self.ended(self.models[job], Outcome.FAULT, None)

    @rule()
    def budget_is_looked_at(self) -> None:
        """Jobs that the budget has paused go on when it allows."""
        for job in self.run(self.world.paused_by_budget()):
            model, pays = self.models[job], self.pays(job)
            assert (model.status, model.paused_by) == ("PAUSED", "BUDGET")
            assert self.run(self.world.go_on(job)) is pays
            if pays:
                model.resume()
        assert not any(model.paused_by == "BUDGET" and self.pays(job) for job, model in self.models.items())

    @rule()
    def another_scheduler_takes_over(self) -> None:
        self.superseded = [self.world.scheduler]
        self.run(self.world.new_scheduler())

    @precondition(lambda self: self.superseded)
    @rule(pick=PICK)
    def a_superseded_scheduler_acts(self, pick: int) -> None:
        job = one(self.models, pick)
        (stale,) = self.superseded
        before = self.rows()
        with pytest.raises(LeaseLost):
            self.run(stale.dispatcher.dispatch(WorkKind.JOB, job, CLUSTER))
        if self.models[job].active:
            attempt_id, name = self.attempt_id(job), self.name(job)
            with pytest.raises(LeaseLost):
                self.run(stale.collector.declare_fault(attempt_id, name, "SUPERVISOR_DIED", "It did not"))
            if self.world.executor.attempts[name].epoch > stale.lease.epoch:
                with pytest.raises(StaleEpoch):
                    self.run(self.world.executor.stop(name, StopReason.CANCEL, epoch=stale.lease.epoch))
        assert self.rows() == before

    # The child.

    @precondition(lambda self: self.training)
    @rule(pick=PICK, seconds=SECONDS)
    def train(self, pick: int, seconds: int) -> None:
        self.learn(one(self.training, pick), seconds)

    def learn(self, job: str, seconds: int) -> None:
        name, executor = self.name(job), self.world.executor
        executor.emit(name, {"type": "phase", "name": "training"})
        executor.clock.advance(min(seconds, self.world.seconds_left(name)))
        step = self.world.step_of(name) + 1
        executor.emit(name, {"type": "metrics", "step": step, "epoch": 0, "training_loss": 1.0, "learning_rate": 1e-4})

    @precondition(lambda self: self.training)
    @rule(pick=PICK)
    def save(self, pick: int) -> None:
        name = self.name(one(self.training, pick))
        self.world.executor.store(name, self.world.step_of(name))

    @precondition(lambda self: self.active)
    @rule(pick=PICK)
    def tear(self, pick: int) -> None:
        """The newest checkpoint's files are damaged."""
        job = one(self.active, pick)
        newest = self.run(self.world.newest_checkpoint(job))
        if newest:
            self.world.executor.torn.add(newest)

    @precondition(lambda self: self.training)
    @rule(pick=PICK, outcome=st.sampled_from(Outcome), adapter=st.booleans(), heard=st.booleans())
    def child_ends(self, pick: int, outcome: Outcome, adapter: bool, heard: bool) -> None:
        job = one(self.training, pick)
        name = self.name(job)
        if outcome is Outcome.STOPPED and not self.world.executor.attempts[name].stop_reason:
            outcome = Outcome.COMPLETED
        if outcome is Outcome.COMPLETED and adapter:
            files = {"adapter_config.json": {"key": f"{name}/adapter/adapter_config.json", "size": 1, "sha256": "0"}}
            self.world.executor.emit(name, {"type": "adapter", "files": files, "best_step": 1})
        self.world.executor.end(name, outcome, code="" if outcome is Outcome.STOPPED else "WHY")
        if heard:
            self.listen(job)


@pytest.fixture
def world(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[World, asyncio.Runner]]:
    monkeypatch.setattr(passwords, "_hasher", PasswordHasher(time_cost=1, memory_cost=64, parallelism=1))
    with asyncio.Runner() as runner:
        world = World(database_url, tmp_path / "data")
        without_fsync(world.database)
        running = world.running()
        runner.run(running.__aenter__())
        yield world, runner
        runner.run(running.__aexit__(None, None, None))


def test_the_lifecycle_is_as_the_model_says(world: tuple[World, asyncio.Runner]) -> None:
    ways = Counter[Way]()
    for number in SEEDS:
        try_seed(number, world, ways, EXAMPLES)
    assert set(ways) >= REACHED


def test_the_lifecycle_is_as_the_model_says_whatever_the_seed(world: tuple[World, asyncio.Runner]) -> None:
    new = max(SEEDS) + 1 if settings().derandomize else random.randrange(2**32)
    try_seed(int(REPLAYED or new), world, Counter(), EXAMPLES // 2)


def try_seed(number: int, world: tuple[World, asyncio.Runner], ways: Counter[Way], examples: int) -> None:
    options = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        phases=(Phase.generate, Phase.shrink),
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(seed(number)(lambda: Lifecycle(*world, ways)), settings=options)
    except BaseException as error:
        error.add_note(f"LIFECYCLE_SEED={number}")
        raise
