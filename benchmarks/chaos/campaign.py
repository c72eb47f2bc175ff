"""Strikes in a row, each in its phase of a job; and what is found out."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from benchmarks.chaos import deeds, leaks, victims
from benchmarks.chaos.deeds import Fault, NotDone, Scene
from benchmarks.chaos.installation import FLAVOURS, Installation
from benchmarks.chaos.job import ENDED, Job, Verdict
from benchmarks.chaos.plan import Phase, Strike
from benchmarks.chaos.probe import EXCUSED_S, PERIOD_S, RATE, Probe, Sample, Silences
from tests.e2e.house import TINY

ENDINGS_PER_JOB = 5
"""More than the retries of a job that gets no further: each of these attempts gets further."""
TRIES = 5
"""A strike that could not be seen to happen so often in its phase comes while the job trains, and then not at all."""
DELAYS_S = {Phase.QUEUED: 0.5, Phase.LOADING: 4.0, Phase.FIRST_STEPS: 0.5, Phase.TRAINING: 0.5, Phase.FINISHING: 2.0}
"""A strike comes at some time between the first sight of its phase and so much later."""
NEW_ATTEMPT_S = 240.0
FIND_S, FIND_LATE_S = 60.0, 2.0
"""A job that is about to end leaves no time to look for its parts."""


@dataclass
class Injected:
    """What was seen to happen at once; ``status`` and ``step`` are its job's just before."""

    number: int
    flavour: str
    faults: list[str]
    kills: int
    phase: str
    job_id: str
    status: str
    step: int
    recovered_s: float
    """Until what was hit did its work again (for an attempt that trained: until the next one trains)."""


@dataclass
class Findings:
    """Of one installation under fire."""

    flavour: str
    injected: list[Injected] = field(default_factory=list)
    jobs: list[Verdict] = field(default_factory=list)
    questions: int = 0
    questions_per_s: float = 0.0
    excused: dict[str, int] = field(default_factory=dict)
    """Missing answers by what excuses them."""
    bad_answers: list[dict[str, Any]] = field(default_factory=list)
    longest_answer_s: float = 0.0
    api_back_s: list[float] = field(default_factory=list)
    """From each death of the API to the first good answer to a question asked after it."""
    missed: list[str] = field(default_factory=list)
    """Strikes that came while the job trained, because its other phases were too short for them."""
    leaked: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    interrupted: bool = False

    def hear(self, samples: list[Sample], per_second: float, silences: Silences) -> None:
        """Judge what the probe was answered."""
        self.questions, self.questions_per_s = len(samples), round(per_second, 2)
        self.longest_answer_s = round(max((s.answered - s.asked for s in samples), default=0.0), 1)
        for sample in samples:
            excuse = "" if sample.good else silences.excuse(sample)
            if excuse is None:
                self.bad_answers.append(asdict(sample) | {"since_api_death_s": silences.since_api_death_s(sample)})
            elif excuse:
                self.excused[excuse] = self.excused.get(excuse, 0) + 1
        late = [back for back in self.api_back_s if back > EXCUSED_S]
        self.wrong += [f"the API answered only {back} s after its death" for back in late]
        if per_second < RATE / PERIOD_S:
            self.wrong.append(f"only {self.questions_per_s} questions a second were asked")

    @property
    def all_well(self) -> bool:
        wrong = self.leaked or self.wrong or self.bad_answers or self.interrupted
        return not wrong and all(not job.wrong for job in self.jobs)


class Campaign:
    """``note`` hears a line for each thing that happens."""

    def __init__(
        self, installation: Installation, strikes: list[Strike], dice: random.Random, note: Callable[[str], None]
    ) -> None:
        self._installation, self._dice, self._note = installation, dice, note
        self._strikes = list(strikes)
        self._tries: Counter[Strike] = Counter()
        self._silences = Silences()
        self._probe = Probe(installation.client.http)
        self.findings = Findings(installation.flavour)

    def run(self) -> None:
        """All strikes, then what must hold of the whole. The installation still runs afterwards."""
        names = (f"{self._installation.flavour} {number}" for number in count(1))
        unbroken = Job(self._installation, next(names))
        self._probe.start(unbroken.id)
        try:
            reference = self._judge(unbroken, None).sha256 or None
            while self._strikes:
                job = Job(self._installation, next(names))
                self._probe.job_id = job.id
                self._torment(job)
                if self._judge(job, reference).status != "COMPLETED":
                    raise LookupError(f"{len(self._strikes)} strikes were not tried any more")
        finally:
            self._probe.stop()
            self.findings.hear(self._probe.samples, self._probe.per_second, self._silences)
        self.findings.wrong += leaks.ledger_violations(self._installation)
        self.findings.leaked += leaks.left_in(self._installation)

    def _torment(self, job: Job) -> None:
        """One strike in each phase; in training, until the job is nearly done or has borne as many as it may."""
        for phase in Phase:
            while strike := self._next(job, phase):
                reached = job.reached(phase) is not None
                happened = reached and self._strike(job, strike)
                if not happened and (reached or phase is not Phase.TRAINING):
                    self._try_again(strike)
                if not reached or phase is not Phase.TRAINING:
                    break

    def _next(self, job: Job, phase: Phase) -> Strike | None:
        """The first that the job can bear: one attempt that gets no further, and a few that do."""
        limit = {Phase.TRAINING: ENDINGS_PER_JOB, Phase.FINISHING: ENDINGS_PER_JOB + 1}.get(phase, 1)
        worn = job.ended_attempts + job.uncertain >= limit
        return next((s for s in self._strikes if s.phase is phase and not (worn and s.ends_attempt is not False)), None)

    def _try_again(self, strike: Strike) -> None:
        self._tries[strike] += 1
        if self._tries[strike] < TRIES:
            return
        self._strikes.remove(strike)
        if strike.phase is Phase.TRAINING:
            self.findings.wrong.append(f"could not be done: {strike.name}")
        else:
            self.findings.missed.append(f"{strike.name}, {strike.phase}")
            self._strikes.append(Strike(strike.faults, Phase.TRAINING))

    def _strike(self, job: Job, strike: Strike) -> bool:
        """Whether it happened while the job was there to suffer it."""
        if self._ends_ray(strike):
            job.remember_held()
        time.sleep(self._dice.uniform(0, DELAYS_S[strike.phase]) / (1 + self._tries[strike]))
        seen, attempts, trainer = job.seen(), len(job.attempts()), victims.child(self._installation)
        if seen["status"] in ENDED or (strike.phase is Phase.TRAINING and trainer is None):
            return False
        begun = time.monotonic()
        done = self._done(strike, trainer)
        if not done:
            return False
        self._strikes.remove(strike)
        if left := strike.faults[len(done) :]:
            self._strikes.append(Strike(left, Phase.TRAINING))
        happened = Strike(tuple(done), strike.phase)
        job.ended_attempts += happened.ends_attempt is True
        job.uncertain += happened.ends_attempt is None
        self._wait_whole(job, happened, attempts)
        self._tell(job, happened, seen, time.monotonic() - begun - sum(fault.hold_s for fault in done))
        return True

    def _ends_ray(self, strike: Strike) -> bool:
        """`brightrun up` ends a Ray whose own node is gone; a node that has only joined it leaves it alone."""
        return strike.hits("head") or (strike.hits("raylet") and self._installation.node is None)

    def _done(self, strike: Strike, trainer: psutil.Process | None) -> list[Fault]:
        """What of it was seen to happen; nothing if the ``trainer`` had ended by itself."""
        late = strike.phase is Phase.FINISHING
        scene = Scene(self._installation, self._silences, FIND_LATE_S if late else FIND_S)
        done: list[Fault] = []
        try:
            with ExitStack() as stack:
                for fault in strike.faults:
                    stack.enter_context(deeds.done(scene, fault))
                    done.append(fault)
                spared = strike.phase is Phase.TRAINING and not strike.ends_attempt
                if spared and trainer and not victims.lives(trainer):
                    return []
                self._hold(strike)
        except (NotDone, LookupError) as reason:
            self._note(f"not done: {strike.name}, {strike.phase}: {reason}")
            return done if len(strike.faults) > 1 else []
        return done

    def _hold(self, strike: Strike) -> None:
        for fault in strike.faults:
            if fault.deed in ("fill", "away"):
                self._check_refusal(fault)
            time.sleep(fault.hold_s)

    def _tell(self, job: Job, strike: Strike, seen: dict[str, Any], took_s: float) -> None:
        told = Injected(
            number=len(self.findings.injected) + 1,
            flavour=self._installation.flavour,
            faults=[fault.name for fault in strike.faults],
            kills=strike.kills,
            phase=strike.phase,
            job_id=job.id,
            status=seen["status"],
            step=seen["currentStep"] or 0,
            recovered_s=round(took_s, 1),
        )
        self.findings.injected.append(told)
        when = f"{strike.phase}, {told.status} at step {told.step}"
        self._note(f"{strike.name:<16} {when:<36} of job {job.id[-6:]}, whole again in {took_s:5.1f} s")

    def _check_refusal(self, fault: Fault) -> None:
        """What cannot be kept is not acknowledged: 503, and when to come again."""
        body = {"name": "refused", "fileName": "refused.jsonl", "fileSize": 1, "baseModel": TINY}
        answer = self._installation.client.http.post("/api/datasets", json=body)
        if answer.status_code != 503 or "Retry-After" not in answer.headers:
            self.findings.wrong.append(f"{fault.name}: POST /api/datasets answered {answer.status_code} {answer.text}")

    def _wait_whole(self, job: Job, strike: Strike, attempts: int) -> None:
        for fault in strike.faults:
            if fault.part == "api" and fault.deed in ("kill", "hang"):
                died = self._silences.api_deaths[-1]
                self.findings.api_back_s.append(round(self._probe.first_good_after(died) - died, 2))
        if strike.ends_attempt:
            self._until(lambda: len(job.attempts()) > attempts and self._trains(job), "the next attempt trains")
        if strike.hits("scheduler") or strike.hits("standby"):
            self._until(self._two_schedulers, "two schedulers are there")
        if strike.hits("mlflow"):
            self._until(self._mlflow, "MLflow answers")
        if strike.hits("database"):
            self._probe.first_good_after(time.monotonic())

    def _trains(self, job: Job) -> bool:
        seen = job.seen()
        return seen["status"] == "COMPLETED" or (
            seen["status"] == "RUNNING" and victims.child(self._installation) is not None
        )

    def _two_schedulers(self) -> bool:
        return all(victims.is_there(self._installation, part) for part in ("scheduler", "standby"))

    def _mlflow(self) -> bool:
        return victims.is_there(self._installation, "mlflow") and leaks.mlflow_answers(self._installation)

    def _until(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + NEW_ATTEMPT_S
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {NEW_ATTEMPT_S:.0f} s until {what}")
            time.sleep(0.2)

    def _judge(self, job: Job, reference: str | None) -> Verdict:
        verdict = job.judged(reference)
        self.findings.jobs.append(verdict)
        self.findings.leaked += leaks.of_attempts(self._installation)
        told = "; ".join(verdict.wrong) or "bitwise the unbroken run's" * (reference is not None) or "unbroken"
        self._note(
            f"job {job.id[-6:]} {verdict.status} in {verdict.seconds:.0f} s, {verdict.attempts} attempts: {told}"
        )
        return verdict


@contextmanager
def under_fire(
    flavour: str, folder: Path, strikes: list[Strike], seed: int, note: Callable[[str], None]
) -> Iterator[Findings]:
    """Set up, torment, examine, take down. What goes wrong on the way stands in the findings."""
    findings = Findings(flavour)
    installation = FLAVOURS[flavour](folder)
    try:
        with installation:
            note(f"{flavour}: two schedulers and all else are up")
            campaign = Campaign(installation, strikes, random.Random(seed), note)
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
