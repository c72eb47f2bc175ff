from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from scheduler.cluster.eventlog import EventLog


def filled(path: Path, count: int, **bounds: int) -> EventLog:
    log = EventLog(path / "spill" / "events.jsonl", **bounds)
    for step in range(1, count + 1):
        log.append({"type": "stored", "step": step})
    return log


def steps(log: EventLog, cursor: int = 0, limit: int = 500) -> list[int]:
    events = log.after(cursor, limit)
    assert [event.number for event in events] == [event.event["step"] for event in events]
    return [event.number for event in events]


def test_numbers_have_no_gap_across_memory_and_disk(tmp_path: Path) -> None:
    log = filled(tmp_path, 95, memory_events=20)

    assert steps(log) == list(range(1, 96))
    assert steps(log, 40) == list(range(41, 96))
    assert steps(log, 3, limit=10) == list(range(4, 14))
    assert steps(log, 95) == []


def test_what_is_acknowledged_leaves_memory_and_disk(tmp_path: Path) -> None:
    log = filled(tmp_path, 95, memory_events=20)
    assert (tmp_path / "spill" / "events.jsonl").exists()

    log.acknowledge(92)

    assert not (tmp_path / "spill" / "events.jsonl").exists()
    assert steps(log) == [93, 94, 95]
    log.acknowledge(95)
    log.append({"type": "stored", "step": 96})
    assert steps(log) == [96]


def test_a_full_disk_share_gives_up_only_what_is_expendable(tmp_path: Path) -> None:
    log = filled(tmp_path, 100, memory_events=10, spill_bytes=500)
    before = log.last

    log.append({"type": "metrics", "step": -1})
    log.append({"type": "stored", "step": before + 1})

    assert log.last == before + 1
    assert steps(log, before) == [before + 1]


def test_a_disk_that_takes_nothing_costs_only_what_is_expendable(tmp_path: Path) -> None:
    """Nor is there a gap when it takes something again, or took half a line."""
    log = EventLog(tmp_path / "spill" / "events.jsonl", memory_events=10)
    (tmp_path / "spill").write_text("no folder can be made here")
    for step in range(1, 31):
        log.append({"type": "metrics" if step > 12 else "stored", "step": step})
    log.append({"type": "evaluation", "step": log.last + 1})
    assert steps(log) == list(range(1, 14))

    (tmp_path / "spill").unlink()
    (tmp_path / "spill").mkdir()
    (tmp_path / "spill" / "events.jsonl").write_text('{"number": 1, "at')
    for _ in range(40):
        log.append({"type": "metrics", "step": log.last + 1})
    assert steps(log) == list(range(1, 54))
    assert steps(log, 5, limit=3) == [6, 7, 8]
    log.acknowledge(53)
    assert steps(log, 0) == []


@given(st.lists(st.tuples(st.sampled_from(["append", "acknowledge", "read"]), st.integers(0, 60)), max_size=80))
def test_a_reader_who_acknowledges_what_it_read_sees_everything_once(
    tmp_path_factory, actions: list[tuple[str, int]]
) -> None:
    log = EventLog(tmp_path_factory.mktemp("log") / "events.jsonl", memory_events=6)
    cursor, seen = 0, []
    for action, amount in actions:
        if action == "append":
            for _ in range(amount):
                log.append({"type": "stored", "step": log.last + 1})
        elif action == "read":
            found = steps(log, cursor, limit=amount)
            seen += found
            cursor = found[-1] if found else cursor
        else:
            log.acknowledge(cursor)
    assert seen + steps(log, cursor, limit=10_000) == list(range(1, log.last + 1))
