"""Many seeds, in several processes."""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

from sqlalchemy.exc import SAWarning

from scheduler.simulator.faults import KINDS
from scheduler.simulator.run import Result, inhabited_database, simulate

CHUNK = 20


@dataclass
class Summary:
    seeds: int = 0
    virtual_s: float = 0.0
    transactions: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    jobs: Counter[str] = field(default_factory=Counter)
    passages: Counter[str] = field(default_factory=Counter)
    """How often jobs went from where to where, and why."""
    violations: list[Result] = field(default_factory=list)

    def add(self, result: Result) -> None:
        self.seeds += 1
        self.virtual_s += result.virtual_s
        self.transactions += result.commits
        self.faults += result.faults
        self.jobs += result.jobs
        self.passages += result.passages
        if result.violation:
            self.violations.append(result)

    def plain(self) -> dict[str, Any]:
        return {
            "seeds": self.seeds,
            "virtualHours": round(self.virtual_s / 3600, 1),
            "transactions": self.transactions,
            "faults": {kind: self.faults[kind] for kind in KINDS},
            "jobs": dict(sorted(self.jobs.items())),
            "passages": dict(sorted(self.passages.items())),
            "violations": {result.seed: result.violation for result in self.violations},
        }


def run(seeds: Iterable[int], processes: int) -> Summary:
    """Every seed once. Results are added in the order of the seeds, whatever the number of processes."""
    summary = Summary()
    ordered = list(seeds)
    chunks = [ordered[at : at + CHUNK] for at in range(0, len(ordered), CHUNK)]
    for results in _results(chunks, processes):
        for result in results:
            summary.add(result)
    return summary


def _results(chunks: list[list[int]], processes: int) -> Iterator[list[Result]]:
    if processes == 1:
        yield from map(_chunk, chunks)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_chunk, chunks)


def _chunk(seeds: list[int]) -> list[Result]:
    inhabited_database()
    gc.freeze()
    with warnings.catch_warnings(action="ignore", category=SAWarning):
        results = [simulate(seed) for seed in seeds]
        gc.collect()
    gc.unfreeze()
    return results
