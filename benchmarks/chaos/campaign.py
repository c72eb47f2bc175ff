"""Faults in a row, drawn from a seed, each during a job; and what is found out."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.chaos import deeds, leaks, sandbox, victims
from benchmarks.chaos.deeds import KILLS, OTHERS, STOPS, Fault, NotDone
from benchmarks.chaos.installation import FLAVOURS, Installation
from benchmarks.chaos.job import Job, Verdict
from benchmarks.chaos.probe import Probe, Sample, Silences
from tests.e2e.house import TINY

ENDINGS_PER_JOB = 5
"""More than the retries of a job that gets no further: each of these attempts gets further."""
TRIES = 5
"""A fault that could not be seen to happen so often is given up."""
NEW_ATTEMPT_S = 240.0
KILLS_PER_OTHER = 2


@dataclass
class Injected:
    """One fault that was seen to happen while its job ran."""

    number: int
    flavour: str
    fault: str
    job_id: str
    step: int
    recovered_s: float
    """Until what it hit did its work again (for an attempt: until the next one trains)."""


@dataclass
class Findings:
    """Of one installation under fire."""

    flavour: str
    injected: list[Injected] = field(default_factory=list)
    jobs: list[Verdict] = field(default_factory=list)
    questions: int = 0
    excused: dict[str, int] = field(default_factory=dict)
    """Missing answers by what excuses them."""
    bad_answers: list[dict[str, Any]] = field(default_factory=list)
    longest_answer_s: float = 0.0
    api_back_s: list[float] = field(default_factory=list)
    """From each death of the API to the first good answer to a question asked after it."""
    leaked: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    interrupted: bool = False

    @property
    def all_well(self) -> bool:
        wrong = self.leaked or self.wrong or self.bad_answers or self.interrupted
        return not wrong and all(not job.wrong for job in self.jobs)


def drawn(kills: int, seed: int, flavours: list[str], *, first: int = 1) -> dict[str, list[Fault]]:
    """Faults by flavour: ``kills`` kills in all (numbered from 1; those before ``first`` are left out), and others.

    Every kind comes round before any comes again.
    """
    dice = random.Random(seed)
    plan: dict[str, list[Fault]] = {}
    number = count(1)
    for place, flavour in enumerate(flavours):
        share = kills // len(flavours) + (place < kills % len(flavours))
        own = [fault for fault in KILLS if _fits(fault, flavour)]
        rest = [fault for fault in STOPS + OTHERS if _fits(fault, flavour)]
        lethal, other = _rounds(own, dice), _rounds(rest, dice)
        faults = []
        for _ in range(share):
            here = [next(lethal)]
            if dice.random() < 1 / KILLS_PER_OTHER:
                here.insert(dice.randrange(2), next(other))
            faults += here if next(number) >= first else []
        plan[flavour] = faults
    return plan


def _fits(fault: Fault, flavour: str) -> bool:
    """Whether an installation of this flavour has what the fault is about, on this machine."""
    if fault.part in ("node", "disk") and not sandbox.is_inside():
        return False
    return flavour == "production" or fault.part not in ("store", "node")


def _rounds(kinds: list[Fault], dice: random.Random) -> Iterator[Fault]:
    while True:
        yield from dice.sample(kinds, len(kinds))


class Campaign:
    """``note`` hears a line for each thing that happens."""

    def __init__(self, installation: Installation, faults: list[Fault], note: Callable[[str], None]) -> None:
        self._installation, self._note = installation, note
        self._faults = list(faults)
        self._tries = 0
        self._silences = Silences()
        self._probe = Probe(installation.client.http)
        self.findings = Findings(installation.flavour)

    def run(self) -> None:
        """All faults, then what must hold of the whole. The installation still runs afterwards."""
        names = (f"{self._installation.flavour} {number}" for number in count(1))
        unbroken = Job(self._installation, next(names))
        self._probe.start(unbroken.id)
        try:
            reference = self._judge(unbroken, None).sha256 or None
            while self._faults:
                job = Job(self._installation, next(names))
                self._probe.job_id = job.id
                self._torment(job)
                self._judge(job, reference)
        finally:
            self._probe.stop()
            self._read_probe()
        self.findings.wrong += leaks.ledger_violations(self._installation)
        self.findings.leaked += leaks.left_in(self._installation)

    def _torment(self, job: Job) -> None:
        """Faults in turn, until the job is nearly done or has borne as many as it may."""
        while self._faults and (seen := job.can_be_hit()):
            fault = self._faults[0]
            if fault.ends_attempt is not False and job.ended_attempts + job.uncertain >= ENDINGS_PER_JOB:
                return
            if fault.ends_attempt is None and job.ended_attempts:
                return
            if self._inject(job, fault, seen):
                self._faults.pop(0)
                self._tries = 0

    def _inject(self, job: Job, fault: Fault, seen: dict[str, Any]) -> bool:
        """Whether it happened while the job ran."""
        trainer = victims.child(self._installation)
        attempts = len(job.attempts())
        if trainer is None:
            return False
        try:
            with deeds.done(self._installation, fault, self._silences):
                begun = time.monotonic()
                if not fault.ends_attempt and not victims.lives(trainer):
                    return False
                if fault.part == "disk" or (fault.part == "database" and self._installation.postgres):
                    self._check_refusal(fault)
                time.sleep(fault.hold_s)
        except (NotDone, LookupError) as reason:
            self._note(f"not done: {fault.name}: {reason}")
            self._tries += 1
            if self._tries == TRIES:
                self.findings.wrong.append(f"could not be done: {fault.name}: {reason}")
            return self._tries == TRIES
        if fault.ends_attempt:
            job.ended_attempts += 1
        job.uncertain = job.uncertain or fault.ends_attempt is None
        self._wait_whole(job, fault, attempts)
        number = len(self.findings.injected) + 1
        took = round(time.monotonic() - begun - fault.hold_s, 1)
        self.findings.injected.append(
            Injected(number, self._installation.flavour, fault.name, job.id, seen["currentStep"], took)
        )
        self._note(
            f"{fault.name:<16} at step {seen['currentStep']:>3} of job {job.id[-6:]}, whole again in {took:5.1f} s"
        )
        return True

    def _check_refusal(self, fault: Fault) -> None:
        """What cannot be kept is not acknowledged: 503, and when to come again."""
        body = {"name": "refused", "fileName": "refused.jsonl", "fileSize": 1, "baseModel": TINY}
        answer = self._installation.client.http.post("/api/datasets", json=body)
        if answer.status_code != 503 or "Retry-After" not in answer.headers:
            self.findings.wrong.append(f"{fault.name}: POST /api/datasets answered {answer.status_code} {answer.text}")

    def _wait_whole(self, job: Job, fault: Fault, attempts: int) -> None:
        if fault.part == "api" and fault.deed in ("kill", "hang"):
            died = self._silences.api_deaths[-1]
            self.findings.api_back_s.append(round(self._probe.first_good_after(died) - died, 2))
        elif fault.ends_attempt:
            self._until(lambda: len(job.attempts()) > attempts and self._trains(job), "the next attempt trains")
        if fault.part in ("scheduler", "standby"):
            self._until(lambda: self._found("scheduler", "standby"), "two schedulers are there")
        if fault.part == "mlflow":
            self._until(lambda: self._found("mlflow") and leaks.mlflow_answers(self._installation), "MLflow answers")
        if fault.part == "database":
            self._probe.first_good_after(time.monotonic())

    def _trains(self, job: Job) -> bool:
        seen = job.seen()
        return seen["status"] == "COMPLETED" or (
            seen["status"] == "RUNNING" and victims.child(self._installation) is not None
        )

    def _found(self, *parts: str) -> bool:
        return all(victims.find(self._installation, part) for part in parts)

    def _until(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + NEW_ATTEMPT_S
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {NEW_ATTEMPT_S:.0f} s until {what}")
            time.sleep(0.2)

    def _judge(self, job: Job, reference: str | None) -> Verdict:
        verdict = job.judged(reference)
        self.findings.jobs.append(verdict)
        told = "; ".join(verdict.wrong) or "bitwise the unbroken run's" * (reference is not None) or "unbroken"
        self._note(
            f"job {job.id[-6:]} {verdict.status} in {verdict.seconds:.0f} s, {verdict.attempts} attempts: {told}"
        )
        return verdict

    def _read_probe(self) -> None:
        found, samples = self.findings, self._probe.samples
        found.questions = len(samples)
        found.longest_answer_s = round(max((s.answered - s.asked for s in samples), default=0.0), 1)
        for sample in samples:
            if sample.good:
                continue
            excuse = self._silences.excuse(sample)
            if excuse:
                found.excused[excuse] = found.excused.get(excuse, 0) + 1
            else:
                found.bad_answers.append(self._told(sample))

    def _told(self, sample: Sample) -> dict[str, Any]:
        deaths = [round(sample.answered - died, 1) for died in self._silences.api_deaths if died <= sample.answered]
        return asdict(sample) | {"since_api_death_s": deaths[-1] if deaths else None}


@contextmanager
def under_fire(flavour: str, folder: Path, faults: list[Fault], note: Callable[[str], None]) -> Iterator[Findings]:
    """Set up, torment, examine, take down. What goes wrong on the way stands in the findings."""
    findings = Findings(flavour)
    installation = FLAVOURS[flavour](folder)
    try:
        with installation:
            note(f"{flavour}: two schedulers and all else are up")
            campaign = Campaign(installation, faults, note)
            findings = campaign.findings
            try:
                campaign.run()
            except KeyboardInterrupt:
                findings.interrupted = True
            except (TimeoutError, AssertionError, LookupError) as error:
                findings.wrong.append(f"{type(error).__name__}: {error}")
        if not installation.ended_well:
            findings.leaked.append("`brightrun up` did not end with exit code 0")
    finally:
        findings.leaked += leaks.processes(folder)
    yield findings
