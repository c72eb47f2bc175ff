"""Which faults strike in which phase of a job: drawn from a seed, now and then two at once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from benchmarks.chaos import sandbox
from benchmarks.chaos.deeds import KILLS, OTHERS, STOPS, Fault

KILLS_PER_OTHER = 2
PAIRED = 0.25
"""Of the neighbouring kills that go together, so many strike at once."""
SERVICES = ("api", "scheduler", "standby", "mlflow", "database")
"""No attempt is touched by what befalls these."""
OF_AN_ATTEMPT = ("child", "rank", "supervisor", "raylet")
"""Are there only once an attempt is."""


class Phase(StrEnum):
    """Of a job, in order."""

    QUEUED = "queued"
    LOADING = "loading"
    """An attempt was made: dispatch, staging, imports, the model."""
    FIRST_STEPS = "first steps"
    """It trains; the attempt has no checkpoint yet."""
    TRAINING = "training"
    FINISHING = "finishing"
    """The last steps, the adapter's upload, the final transaction."""


WEIGHTS = {Phase.QUEUED: 1, Phase.LOADING: 2, Phase.FIRST_STEPS: 1, Phase.TRAINING: 8, Phase.FINISHING: 2}


@dataclass(frozen=True)
class Strike:
    """What happens at once, and when."""

    faults: tuple[Fault, ...]
    phase: Phase

    @property
    def name(self) -> str:
        return " + ".join(fault.name for fault in self.faults)

    @property
    def kills(self) -> int:
        return sum(fault.kills for fault in self.faults)

    @property
    def ends_attempt(self) -> bool | None:
        """Whether the job needs another attempt; None: it may. Only who trains has surely something to lose."""
        ends = {fault.ends_attempt for fault in self.faults}
        if self.phase is Phase.TRAINING:
            return True if True in ends else None if None in ends else False
        harmless = all(fault.part in SERVICES or fault.deed == "stop" for fault in self.faults)
        return False if harmless else None

    def hits(self, part: str) -> bool:
        return any(fault.part == part for fault in self.faults)


def drawn(kills: int, seed: int, flavours: list[str], *, first: int = 1) -> dict[str, list[Strike]]:
    """Strikes by flavour: ``kills`` kills in all (numbered from 1; those before ``first`` are left out), and others.

    Every kind comes round before any comes again.
    """
    dice = random.Random(seed)
    plan: dict[str, list[Strike]] = {}
    number = 0
    for place, flavour in enumerate(flavours):
        share = kills // len(flavours) + (place < kills % len(flavours))
        rest = _rounds([fault for fault in STOPS + OTHERS if _fits(fault, flavour)], dice)
        plan[flavour] = []
        for faults in _paired(_rounds([fault for fault in KILLS if _fits(fault, flavour)], dice), share, dice):
            number += len(faults)
            here = [_at_some_time(faults, dice)]
            if dice.random() < len(faults) / KILLS_PER_OTHER:
                here.insert(dice.randrange(2), _at_some_time((next(rest),), dice))
            plan[flavour] += here if number >= first else []
    return plan


def skipped(flavours: list[str]) -> list[str]:
    """Names of the faults that this machine does not allow."""
    return [
        fault.name
        for fault in KILLS + STOPS + OTHERS
        if any(_exists(fault, flavour) and not _fits(fault, flavour) for flavour in flavours)
    ]


def _exists(fault: Fault, flavour: str) -> bool:
    """Whether an installation of this flavour has what the fault is about."""
    return fault.only_in in (None, flavour)


def _fits(fault: Fault, flavour: str) -> bool:
    return _exists(fault, flavour) and (fault.part not in ("node", "disk") or sandbox.is_inside())


def _rounds(kinds: list[Fault], dice: random.Random) -> Iterator[Fault]:
    while True:
        yield from dice.sample(kinds, len(kinds))


def _paired(lethal: Iterator[Fault], count: int, dice: random.Random) -> Iterator[tuple[Fault, ...]]:
    """``count`` kills, one or two at a time: of two, at least one hits a service."""
    left = [next(lethal) for _ in range(count)]
    while left:
        one, other = left.pop(0), left[0] if left else None
        together = other and other.part != one.part and {one.part, other.part} & set(SERVICES)
        if other and together and dice.random() < PAIRED:
            yield (one, left.pop(0))
        else:
            yield (one,)


def _at_some_time(faults: tuple[Fault, ...], dice: random.Random) -> Strike:
    phases = list(WEIGHTS)
    if any(fault.part in OF_AN_ATTEMPT for fault in faults):
        phases.remove(Phase.QUEUED)
    return Strike(faults, dice.choices(phases, [WEIGHTS[phase] for phase in phases])[0])
