"""``python -m scheduler.simulator``: many seeds, in several processes, or one again with everything that happened.

Exit code 1 when a rule was violated: what, in which seed, what happened last, and how to see it again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sqlite3
import sys
import time
from pathlib import Path

import sqlalchemy

from scheduler.simulator.run import simulate
from scheduler.simulator.sweep import Summary, run

LAST = 60
"""Happenings shown of a violation."""
SHOWN = 5
"""Violations shown at length."""


def replay(seed: int) -> int:
    """One seed with all that happened."""
    result = simulate(seed, whole_trace=True)
    _say("\n".join(result.trace))
    _say(f"seed {seed}: {result.violation or 'no violation'}")
    return int(result.violation is not None)


def _tell(summary: Summary, took_s: float, processes: int) -> None:
    for result in summary.violations[:SHOWN]:
        _say(f"\nseed {result.seed} violates: {result.violation}")
        _say("\n".join(["  …", *result.trace[-LAST:]]))
        _say(f"replay: {Path(sys.executable).name} -m scheduler.simulator --seed {result.seed}")
    plain = summary.plain()
    _say(f"\n{'seeds':<22}{summary.seeds}, {summary.seeds / took_s:.1f} a second on {processes} processes")
    _say(f"{'virtual hours':<22}{plain['virtualHours']}")
    _say(f"{'transactions':<22}{summary.transactions}")
    _say(f"{'jobs by end':<22}" + ", ".join(f"{status} {count}" for status, count in plain["jobs"].items()))
    _say(f"{'passages':<22}" + ", ".join(f"{passage} {count}" for passage, count in plain["passages"].items()))
    _say(f"{'faults':<22}{summary.faults.total()}: " + ", ".join(f"{k} {n}" for k, n in plain["faults"].items()))
    _say(f"{'violations':<22}{len(summary.violations)}")
    for result in summary.violations[SHOWN:]:
        _say(f"  seed {result.seed}: {result.violation}")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scheduler.simulator", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="how many")
    parser.add_argument("--first", type=int, default=1, help="the first of them")
    parser.add_argument("--seed", type=int, help="replay this one alone and show all that happens")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--json", type=Path, help="write the summary there as well")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    if options.seed is not None:
        return replay(options.seed)
    begun = time.perf_counter()
    summary = run(range(options.first, options.first + options.seeds), options.jobs)
    took_s = time.perf_counter() - begun
    _tell(summary, took_s, options.jobs)
    if options.json:
        machine = {"processors": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
        versions = {"sqlite": sqlite3.sqlite_version, "sqlalchemy": sqlalchemy.__version__}
        figures = {**summary.plain(), "seconds": round(took_s, 1), "processes": options.jobs, **machine, **versions}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return int(bool(summary.violations))


if __name__ == "__main__":
    raise SystemExit(main())
