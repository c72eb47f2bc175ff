"""Real short training jobs on real Ray under real faults: kills, stops, a full disk, a bad object store, no database.

    python -m benchmarks.faults [--kills N] [--seed S] [--json FILE]

Every job must complete from its last checkpoint with the unbroken run's adapter, bit for bit, be billed once (what a
fault lost is the platform's), and leave nothing; and a probe asks `GET /api/jobs/{id}` five times a second all the
while. Beside the N kills come stops and other faults, one for every two kills; each strikes in a drawn phase of a job,
from the queue to the last transaction, and now and then two kills come at once. Exit code 1 if anything was not as it
must be, or if this machine does not allow all of it.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import report
from benchmarks.chaos import sandbox
from benchmarks.chaos.campaign import Findings, under_fire
from benchmarks.chaos.deeds import KILLS, OTHERS, STOPS, Fault
from benchmarks.chaos.installation import FLAVOURS
from benchmarks.chaos.plan import Phase, Strike, drawn, skipped
from benchmarks.chaos.probe import EXCUSED_S

COLUMNS = ("fault", "times", "embedded", "production", "slowest recovery, s")


def main(arguments: list[str]) -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs in all (default 100)")
    parser.add_argument("--seed", type=int, help="of the order of faults (default: drawn, and printed)")
    parser.add_argument("--first", type=int, default=1, metavar="K", help="go on with the seed's kill number K")
    parser.add_argument("--flavour", choices=FLAVOURS, action="append", help="only this installation (default: both)")
    parser.add_argument("--only", action="append", metavar="FAULT", help='only this fault, once, e.g. "kill node"')
    parser.add_argument("--phase", choices=list(Phase), default=Phase.TRAINING, help="when --only strikes")
    parser.add_argument("--folder", type=Path, help="make the installations here, and leave their logs")
    given = parser.parse_args(arguments)
    if not sandbox.is_inside():
        code = sandbox.run_inside("benchmarks.faults", arguments)
        if code is not None:
            return code
    sandbox.interruptible()
    seed = given.seed if given.seed is not None else random.SystemRandom().randrange(10**6)
    report.heading(f"Faults: {given.kills} kills, seed {seed}")
    if not sandbox.is_inside():
        print("This machine does not allow namespaces and mounts: no node is killed, no disk filled.\n")
    flavours = given.flavour or list(FLAVOURS)
    left_out = [] if given.only else skipped(flavours)
    plan = drawn(given.kills, seed, flavours, first=given.first)
    plan = {flavour: strikes for flavour, strikes in plan.items() if strikes}
    if given.only:
        plan = {flavour: [Strike((_named(name),), given.phase) for name in given.only] for flavour in plan}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults") as temporary:
        findings = []
        for flavour, strikes in plan.items():
            findings.append(_fire(flavour, given.folder or Path(temporary), strikes, seed))
            if findings[-1].interrupted:
                break
    minutes = (time.monotonic() - begun) / 60
    _tell(findings, minutes)
    well = all(found.all_well for found in findings) and not left_out
    report.write(
        given.json,
        "faults",
        seed=seed,
        kills=_kills(findings),
        minutes=minutes,
        well=well,
        skipped=left_out,
        houses=[asdict(found) for found in findings],
    )
    if left_out:
        print(f"\nNot everything was tried; skipped: {', '.join(left_out)}")
    return 0 if well else 1


def _fire(flavour: str, folder: Path, strikes: list[Strike], seed: int) -> Findings:
    def note(line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)

    note(f"{flavour}: {len(strikes)} strikes")
    with under_fire(flavour, folder / flavour, strikes, seed, note) as findings:
        return findings


def _named(name: str) -> Fault:
    return next(fault for fault in KILLS + STOPS + OTHERS if fault.name == name)


def _kills(findings: list[Findings]) -> int:
    return sum(injected.kills for found in findings for injected in found.injected)


def _tell(findings: list[Findings], minutes: float) -> None:
    everything = [injected for found in findings for injected in found.injected]
    rows = []
    for name in sorted({name for injected in everything for name in injected.faults}):
        own = [injected for injected in everything if name in injected.faults]
        here = Counter(injected.flavour for injected in own)
        rows.append((name, len(own), here["embedded"], here["production"], max(i.recovered_s for i in own)))
    print()
    report.table(COLUMNS, rows)
    print()
    phases = Counter(injected.phase for injected in everything)
    pairs = Counter(injected.phase for injected in everything if len(injected.faults) > 1)
    report.table(("phase", "strikes", "two at once"), [(phase, phases[phase], pairs[phase]) for phase in Phase])
    jobs = [job for found in findings for job in found.jobs]
    right = sum(not job.wrong for job in jobs)
    others = sum(len(injected.faults) for injected in everything) - _kills(findings)
    print(f"\n{_kills(findings)} kills and {others} other faults in {minutes:.1f} minutes")
    print(f"{right} of {len(jobs)} jobs completed from their last checkpoints, bitwise the same, billed once")
    compared, forgotten = sum(job.compared for job in jobs), sum(job.forgotten for job in jobs)
    worst = max((job.worst_difference_ms for job in jobs), default=0)
    print(f"{compared} attempts: ledger and Ray's actor table differ by at most {worst} ms")
    print(f"{forgotten} attempts could not be compared: they lived when their cluster was lost")
    print(f"{sum(job.faults for job in jobs)} attempts ended by a fault: each billed up to its last checkpoint")
    for found in findings:
        _tell_house(found)


def _tell_house(found: Findings) -> None:
    slowest = max(found.api_back_s, default=0.0)
    print(f"\n{found.flavour}: {found.questions:,} questions, {found.questions_per_s} a second;")
    print(f"  missing answers: {found.excused or 'none'}; excused are those within {EXCUSED_S:.0f} s of the API's own")
    print("  death or while it stands still, and a 503 with Retry-After while its database was away;")
    print(f"  the API answered again {slowest:.1f} s after its death at the latest;")
    print(f"  the longest wait for an answer was {found.longest_answer_s:.1f} s")
    for job in found.jobs:
        for wrong in job.wrong:
            print(f"  WRONG: job {job.job_id}: {wrong}")
    if found.missed:
        print(f"  came in training, since their phase was too short: {'; '.join(found.missed)}")
    for what in ("wrong", "leaked", "bad_answers"):
        for entry in getattr(found, what)[:20]:
            print(f"  {what.upper()}: {entry}")
    if found.all_well:
        print("  nothing leaked, the ledger verifies, no answer was missing without excuse")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
