"""The fault harness judges sternly: what is excused, what is drawn, who pays for what a fault lost."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.chaos import plan
from benchmarks.chaos.campaign import Findings
from benchmarks.chaos.deeds import KILLS, Fault
from benchmarks.chaos.job import badly_shared
from benchmarks.chaos.plan import Phase, Strike
from benchmarks.chaos.probe import Sample, Silences

DEATH, HUNG, AWAY = 100.0, (200.0, 220.0), (300.0, 306.0)
SILENCES = Silences(api_deaths=[DEATH], api_hung=[HUNG], database_away=[AWAY])
GOOD = [Sample(at, at + 0.01, 200) for at in range(50)]


@pytest.fixture
def sandboxed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.sandbox, "is_inside", lambda: True)


@pytest.mark.parametrize(
    ("at", "status", "retry_after", "excuse"),
    [
        (DEATH + 4.9, 0, "", "api"),
        (DEATH + 5.1, 0, "", None),
        (DEATH - 0.1, 0, "", None),
        (DEATH + 2, 404, "", None),
        (DEATH + 2, 500, "", None),
        (DEATH + 2, 503, "2", None),
        (HUNG[0] + 10, 0, "", "api hung"),
        (HUNG[0] + 10, 503, "2", None),
        (AWAY[0] + 1, 503, "2", "database"),
        (AWAY[1] + 1, 503, "2", "database"),
        (AWAY[1] + 3, 503, "2", None),
        (AWAY[0] + 1, 503, "", None),
        (AWAY[0] + 1, 401, "", None),
        (AWAY[0] + 1, 500, "2", None),
        (AWAY[0] + 1, 0, "", None),
    ],
)
def test_excused_is_silence_after_a_death_and_a_proper_refusal_without_database(
    at: float, status: int, retry_after: str, excuse: str | None
) -> None:
    sample = Sample(at - 0.1, at, status, "", retry_after)
    assert SILENCES.excuse(sample) == excuse
    findings = Findings("embedded")
    findings.hear([sample], 5.0, SILENCES)
    assert findings.all_well is (excuse is not None)
    assert findings.excused == ({excuse: 1} if excuse else {})


@pytest.mark.parametrize(("back_s", "per_second", "well"), [(5.0, 4.5, True), (5.1, 5.0, False), (1.0, 4.4, False)])
def test_a_late_api_and_a_slow_probe_are_not_well(back_s: float, per_second: float, well: bool) -> None:
    findings = Findings("embedded", api_back_s=[back_s])
    findings.hear(GOOD, per_second, Silences())
    assert findings.all_well is well


def attempt(number: int, outcome: str, *, recovery: bool = False) -> dict[str, Any]:
    return {"id": f"a{number}", "number": number, "outcome": outcome, "recovery": recovery}


@pytest.mark.parametrize(
    ("billed_ms", "stamp", "recovery", "right"),
    [
        (40_000, {"loading": 3_000, "training": 37_000}, False, True),
        (900_000, {"loading": 3_000, "training": 37_000}, False, False),
        (39_999, {"loading": 3_000, "training": 37_000}, False, False),
        (37_000, {"loading": 3_000, "training": 37_000}, True, True),
        (40_000, {"loading": 3_000, "training": 37_000}, True, False),
        (0, {}, False, True),
        (1, {}, False, False),
    ],
)
def test_a_fault_is_billed_up_to_the_last_checkpoint(
    billed_ms: int, stamp: dict[str, int], recovery: bool, right: bool
) -> None:
    attempts = [attempt(1, "FAULT", recovery=recovery), attempt(2, "COMPLETED")]
    bill = {"a1": {"billed": billed_ms, "absorbed": 5}, "a2": {"billed": 70_000, "absorbed": 0}}
    stamps = {"a1": {"0": stamp}} if stamp else {}
    assert (badly_shared(attempts, stamps, bill) == []) is right


@pytest.mark.usefixtures("sandboxed")
def test_drawn_are_all_kinds_in_all_phases_and_some_together() -> None:
    strikes = [strike for own in plan.drawn(100, 7, ["embedded", "production"]).values() for strike in own]
    assert sum(strike.kills for strike in strikes) == 100
    assert {fault for strike in strikes for fault in strike.faults if fault.kills} == set(KILLS)
    assert {strike.phase for strike in strikes} == set(Phase)
    pairs = [strike for strike in strikes if len(strike.faults) > 1]
    assert len(pairs) > 5
    assert all({fault.part for fault in pair.faults} & set(plan.SERVICES) for pair in pairs)


@pytest.mark.usefixtures("sandboxed")
def test_what_is_drawn_is_the_seeds_and_can_be_gone_on_with() -> None:
    whole = plan.drawn(40, 7, ["production"])["production"]
    rest = plan.drawn(40, 7, ["production"], first=21)["production"]
    assert plan.drawn(40, 7, ["production"])["production"] == whole
    assert rest == whole[-len(rest) :]
    assert sum(strike.kills for strike in rest) in (20, 21)


def test_what_the_machine_does_not_allow_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.sandbox, "is_inside", lambda: False)
    assert plan.skipped(["production"]) == ["kill node", "stop node", "fill disk"]
    assert plan.skipped(["embedded"]) == ["fill disk"]
    drawn = plan.drawn(40, 7, ["production"])["production"]
    assert not {"node", "disk"} & {fault.part for strike in drawn for fault in strike.faults}


@pytest.mark.parametrize(
    ("part", "phase", "ends"),
    [
        ("child", Phase.TRAINING, True),
        ("child", Phase.LOADING, None),
        ("api", Phase.TRAINING, False),
        ("api", Phase.FINISHING, False),
    ],
)
def test_only_an_attempt_that_trains_is_surely_lost(part: str, phase: Phase, ends: bool | None) -> None:
    fault = next(kill for kill in KILLS if kill.part == part)
    assert Strike((fault,), phase).ends_attempt is ends
    assert Strike((Fault("stop", part),), phase).ends_attempt is False
