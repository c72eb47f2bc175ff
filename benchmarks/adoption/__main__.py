"""Kill a scheduler with jobs running, on Ray and on the fake cluster, and see the next one adopt them all.

Adopted is a job whose supervisor has answered a poll of the new scheduler. Ends with 1 when one was started again,
ended, or changed its processes. The aim is 10 s; the time is printed, not judged.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from benchmarks import report
from benchmarks.adoption.room import Adoption
from benchmarks.adoption.scenes import on_ray, on_the_fake


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--ray", type=int, default=25, metavar="N", help="jobs on real Ray (default 25; 0: leave out)")
    parser.add_argument("--fake", type=int, default=1000, metavar="M", help="jobs on the fake (default 1000)")
    options = parser.parse_args()
    report.heading("A killed scheduler's jobs are adopted by the next")
    adoptions: dict[str, Adoption] = {}
    with tempfile.TemporaryDirectory(prefix="brightrun-adoption-") as folder:
        if options.fake:
            adoptions["the fake cluster"] = asyncio.run(on_the_fake(Path(folder) / "fake", options.fake))
        if options.ray:
            adoptions["Ray"] = asyncio.run(on_ray(Path(folder) / "ray", options.ray))
    rows = [(where, a.jobs, len(a.started), a.lease_s, a.after_lease_s, a.adopted_s) for where, a in adoptions.items()]
    columns = ("on", "jobs adopted", "started again", "start to lease, s", "lease to all adopted, s", "in all, s")
    report.table(columns, rows)
    told = [
        dict(zip(("on", "jobs", "startedAgain", "leaseS", "afterLeaseS", "adoptedS"), row, strict=True)) for row in rows
    ]
    report.write(options.json, "adoption", adoptions=told)
    return 1 if any(adoption.started for adoption in adoptions.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
