from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.trainer.conftest import v4_rows, write_jsonl
from trainer import __main__, control
from trainer.config import VerdictConfig, dump
from trainer.errors import TrainerError, explain
from trainer.protocol import USER_FAULTS, ChildEvent, Failed, Finished, Phase
from trainer.report import Pipe


def start(config: Path | str, *options: str, **more: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", str(config), *options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more,
    )  # fmt: skip


def events(output: bytes) -> list[Any]:
    return [msgspec.json.decode(line, type=ChildEvent) for line in output.splitlines()]


@pytest.fixture
def slow_verdict(verdict_config: VerdictConfig, tmp_path: Path) -> Path:
    """A verdict that takes some seconds."""
    write_jsonl(Path(verdict_config.dataset_path), v4_rows(20_000, turns=8))
    (tmp_path / "config.json").write_bytes(dump(verdict_config))
    return tmp_path / "config.json"


def when_working(child: subprocess.Popen[bytes]) -> None:
    assert child.stdout
    for line in child.stdout:
        if isinstance(msgspec.json.decode(line, type=ChildEvent), Phase) and b"evaluating" in line:
            return
    raise AssertionError("it never began")


def test_the_end_of_standard_input_ends_a_supervised_child_at_once(slow_verdict: Path) -> None:
    with start(slow_verdict, "--supervised") as child:
        when_working(child)
        assert child.stdin
        child.stdin.close()
        began = time.monotonic()
        assert child.wait(10) == control.ORPHANED
        assert time.monotonic() - began < 3


def test_a_control_message_stops_a_supervised_child_and_an_interrupt_does_not(slow_verdict: Path) -> None:
    with start(slow_verdict, "--supervised") as child:
        when_working(child)
        child.send_signal(signal.SIGINT)
        assert child.stdin
        assert child.stdout
        child.stdin.write(b'\n{"type":"stop","reason":"CANCEL"}\n')
        child.stdin.flush()
        assert events(child.stdout.read())[-1] == Finished(outcome="stopped", reason="CANCEL")
        assert child.wait(10) == 0


def test_a_parent_that_hangs_up_after_the_last_event_sees_the_exit_code(slow_verdict: Path) -> None:
    with start(slow_verdict, "--supervised") as child:
        assert child.stdin
        assert child.stdout
        child.stdin.write(b'{"type":"stop","reason":"PAUSE"}\n')
        child.stdin.flush()
        while not isinstance(msgspec.json.decode(child.stdout.readline(), type=ChildEvent), Finished):
            continue
        child.stdin.close()
        assert child.wait(10) == 0


def test_ctrl_c_stops_in_good_order(slow_verdict: Path) -> None:
    with start(slow_verdict) as child:
        when_working(child)
        child.send_signal(signal.SIGINT)
        assert child.stdout
        assert events(child.stdout.read())[-1] == Finished(outcome="stopped", reason="PAUSE")
    assert child.returncode == 0


def test_a_failure_is_an_event_with_code_advice_and_stack(verdict_config: VerdictConfig, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(dump(verdict_config))
    with start(tmp_path / "config.json") as child:
        output, _ = child.communicate()
    assert child.returncode == 1
    failed = events(output)[-1]
    assert isinstance(failed, Failed)
    assert failed.code == "INTERNAL"
    assert "FileNotFoundError" in failed.message
    assert "data.jsonl" in failed.stack


def test_usage(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["a", "b"]):
        assert __main__.main(arguments) == 2
    assert "usage: python -m trainer CONFIG.json" in capfd.readouterr().err


@pytest.mark.parametrize("text", [None, "{", '{"kind": "train"}', '{"kind": "verdict", "extra": 1}'])
def test_a_bad_config_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(TrainerError, match=r"config\.json") as caught:
        __main__._load(tmp_path / "config.json")
    assert caught.value.code == "BAD_CONFIG"


def test_exhausted_memory_is_the_users_to_mend_and_the_unknown_the_platforms() -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    for error in (MemoryError(), OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        assert explain(error).code == "OUT_OF_MEMORY"
        assert explain(error).advice
    assert explain(ZeroDivisionError()).code == "INTERNAL" not in USER_FAULTS
    known = TrainerError("NAN_LOSS", "x")
    assert explain(known) is known


def test_events_leave_as_whole_lines() -> None:
    reader, writer = os.pipe()
    pipe = Pipe(writer)
    for name in ("loading", "saving"):
        pipe(Phase(name=name))  # type: ignore[arg-type]
    os.close(writer)
    with open(reader, "rb") as stream:
        assert events(stream.read()) == [Phase(name="loading"), Phase(name="saving")]
    with pytest.raises(OSError, match="Bad file descriptor"):
        pipe(Phase(name="loading"))
