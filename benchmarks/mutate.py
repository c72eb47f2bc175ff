"""Weaken the code, one named way at a time, in a copy of the checkout: each time a named test must fail.

A weakening is noticed when one of its tests fails. A module that cannot be imported, a name or attribute that is not
there, a call that does not fit, a test that cannot be found or a fixture that breaks notices nothing. Unweakened, all
tests must pass.
Ends with 1 when a mutation survives.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from benchmarks import report
from benchmarks.mutations import MUTATIONS, Mutation
from benchmarks.report import ROOT

COPIED = ("configs", "control_plane", "docker", "scheduler", "tests", "trainer", "README.md", "pyproject.toml")
LONGEST_S = 300
NO_VERDICT = (
    "AttributeError",
    "ImportError",
    "ModuleNotFoundError",
    "NameError",
    "SyntaxError",
    "TypeError",
    "UnboundLocalError",
)
"""Failures that say of the weakened code only that it is no code, or crashes."""


class Verdict(NamedTuple):
    """What pytest said, by test: passed, failed (in its call) or broken (before it, or not found)."""

    outcomes: dict[str, str]
    seconds: float
    output: str

    @property
    def failed(self) -> list[str]:
        return [test for test, outcome in self.outcomes.items() if outcome == "failed"]

    @property
    def all_passed(self) -> bool:
        return bool(self.outcomes) and set(self.outcomes.values()) == {"passed"}


class Unfit(Exception):
    """The mutation does not fit the code."""


def weaken(source: str, mutation: Mutation) -> str:
    """The weakened source. Raises Unfit unless the old text is there exactly once and the new one is Python."""
    found = source.count(mutation.old)
    if found != 1:
        raise Unfit(f"{mutation.name}: its text is {found} times in {mutation.file}, not once")
    weakened = source.replace(mutation.old, mutation.new)
    try:
        ast.parse(weakened)
    except SyntaxError as error:
        raise Unfit(f"{mutation.name}: the weakened {mutation.file} is no Python: {error}") from error
    return weakened


@contextmanager
def checkout() -> Iterator[Path]:
    """A copy of what tests need."""
    with tempfile.TemporaryDirectory(prefix="brightrun-mutate-") as folder:
        for name in COPIED:
            source, target = ROOT / name, Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        yield Path(folder)


def run_tests(folder: Path, tests: tuple[str, ...]) -> Verdict:
    """Run tests in a checkout until the first fails."""
    told = folder / "outcomes.xml"
    told.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--junitxml={told}", *tests]
    env = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=LONGEST_S)
        output = done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        output = f"not done within {LONGEST_S} s"
    return Verdict(_outcomes(told), time.monotonic() - began, output)


def _outcomes(told: Path) -> dict[str, str]:
    if not told.exists():
        return {}
    outcomes = {}
    for case in ElementTree.parse(told).iter("testcase"):
        failure = case.find("failure")
        outcome = "passed" if failure is None else "failed"
        if case.find("error") is not None or case.find("skipped") is not None or _is_no_verdict(failure):
            outcome = "broken"
        outcomes[case.get("name", "")] = outcome
    return outcomes


def _is_no_verdict(failure: ElementTree.Element | None) -> bool:
    return failure is not None and failure.get("message", "").startswith(NO_VERDICT)


def try_one(mutation: Mutation) -> Verdict:
    with checkout() as folder:
        target = folder / mutation.file
        target.write_text(weaken(target.read_text(), mutation))
        return run_tests(folder, mutation.tests)


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="only this mutation; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutations at once (default: one a core)")
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if not options.only or mutation.name in options.only]
    try:
        for mutation in chosen:
            weaken((ROOT / mutation.file).read_text(), mutation)
    except Unfit as unfit:
        parser.exit(2, f"{unfit}\n")
    report.heading(f"{len(chosen)} weakenings of the code, each with the tests that must notice it")
    if not _unweakened_passes(chosen):
        return 1
    with ThreadPoolExecutor(options.jobs) as pool:
        verdicts = list(pool.map(try_one, chosen))
    return _tell(options.json, chosen, verdicts)


def _unweakened_passes(chosen: list[Mutation]) -> bool:
    with checkout() as folder:
        verdict = run_tests(folder, tuple(sorted({test for mutation in chosen for test in mutation.tests})))
    if not verdict.all_passed:
        print(verdict.output[-4000:] + "\nThe tests must pass before the code is weakened.")
        return False
    print(f"unweakened: {len(verdict.outcomes)} tests pass in {verdict.seconds:.1f} s\n", flush=True)
    return True


def _tell(file: Path | None, chosen: list[Mutation], verdicts: list[Verdict]) -> int:
    rows = [
        (mutation.name, verdict.failed[0] if verdict.failed else "SURVIVED", verdict.seconds)
        for mutation, verdict in zip(chosen, verdicts, strict=True)
    ]
    report.table(("weakened", "noticed by", "seconds"), rows)
    survivors = [mutation.name for mutation, verdict in zip(chosen, verdicts, strict=True) if not verdict.failed]
    for mutation, verdict in zip(chosen, verdicts, strict=True):
        if not verdict.failed:
            print(f"\n{mutation.name} ({mutation.weakens}):\n{verdict.output[-1500:]}")
    print(f"\n{len(chosen) - len(survivors)} of {len(chosen)} noticed")
    told = [
        {"name": name, "weakens": mutation.weakens, "file": mutation.file, "killedBy": test, "seconds": round(s, 1)}
        for mutation, (name, test, s) in zip(chosen, rows, strict=True)
    ]
    report.write(file, "mutate", mutations=told, survivors=survivors)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
