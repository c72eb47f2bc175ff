from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.unit.trainer.conftest import Recorder, v4_rows, write_jsonl
from trainer import verdict
from trainer.chat import Chat
from trainer.config import VerdictConfig, dump
from trainer.control import StopRequest
from trainer.protocol import ChildEvent, Finished, Progress, Verdict
from trainer.splits import Digests


def examine(config: VerdictConfig, rows: list[Any], **more: Any) -> dict[str, Any]:
    write_jsonl(Path(config.dataset_path), rows)
    record = Recorder()
    finished = verdict.examine(msgspec.structs.replace(config, **more), record, StopRequest())
    assert finished == Finished(outcome="completed")
    assert record.of(Progress)[-1].percent == 100
    (event,) = record.of(Verdict)
    assert len(msgspec.json.encode(event)) < 1.1 * verdict.MAX_REPORT_BYTES
    report: dict[str, Any] = event.report
    return report


def named(report: dict[str, Any]) -> set[tuple[int, str]]:
    return {(found["line"], found["code"]) for found in report["findings"]}


def test_a_sound_dataset_passes_with_statistics_that_a_recount_confirms(
    verdict_config: VerdictConfig, tiny: Path
) -> None:
    rows = v4_rows(60)
    report = examine(verdict_config, rows)
    assert (report["format"], report["container"], report["passed"]) == ("BRIGHTRUN_LORA_V4", "JSONL", True)
    assert report["counts"] == {}
    chat = Chat(tiny, 2048)
    texts = [
        "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in row["turns"]) for row in rows
    ]
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    lengths = [len(chat.tokenizer.encode(system + text, add_special_tokens=False).ids) for text in texts]
    answers = [t["content"] + "<|im_end|>" for row in rows for t in row["turns"] if t["role"] == "assistant"]
    learned = sum(len(chat.tokenizer.encode(answer, add_special_tokens=False).ids) for answer in answers)
    turns = sum(len(row["turns"]) for row in rows)
    statistics = report["statistics"]
    assert statistics["conversations"] == 60
    assert statistics["trainingConversations"] + statistics["validationConversations"] == 60
    assert 1 <= statistics["validationConversations"] <= 15
    assert (statistics["turns"], statistics["tokens"]) == (turns, sum(lengths))
    assert statistics["learnedTokens"] == learned
    assert statistics["max"] == max(lengths)
    assert statistics["p50"] in lengths
    assert sum(row["count"] for row in statistics["lengthHistogram"]) == 60
    for row in statistics["lengthHistogram"]:
        assert row["count"] == sum(row["from"] <= length < row["to"] for length in lengths)
    assert statistics["avgTurnsPerConversation"] == round(turns / 60, 2)
    assert len(report["sample"]) == 3
    pieces = report["sample"][0]["pieces"]
    assert "".join(piece["text"] for piece in pieces) == system + texts[0]
    assert [p["text"] for p in pieces if p["learned"]] == [
        t["content"] + "<|im_end|>" for t in rows[0]["turns"] if t["role"] == "assistant"
    ]


def test_a_broken_dataset_is_refused_with_all_defects_named(verdict_config: VerdictConfig) -> None:
    rows: list[Any] = v4_rows(40)
    rows[6] = json.dumps(rows[6])[:-5]
    rows[11]["turns"] = [rows[11]["turns"][0]]
    rows[29]["turns"][1]["role"] = "robot"
    rows[29]["turns"][0]["content"] = ""
    rows[33]["conversation_id"] = "c3"
    rows[35] = {**rows[36], "conversation_id": "c3", "turns": [*rows[36]["turns"], rows[36]["turns"][0]]}
    report = examine(verdict_config, rows)
    assert not report["passed"]
    assert named(report) >= {
        (7, "NOT_JSON"),
        (12, "NO_ASSISTANT"),
        (30, "UNKNOWN_ROLE"),
        (30, "EMPTY_CONTENT"),
        (34, "DUPLICATE_ID"),
        (36, "DUPLICATE_ID"),
        (36, "LAST_NOT_ASSISTANT"),
    }
    assert report["counts"]["DUPLICATE_ID"] == 2
    duplicate = next(found for found in report["findings"] if found["line"] == 34)
    assert duplicate["found"] == "the id of line 4"
    assert report["statistics"]["conversations"] == 36


def test_every_bad_row_is_counted_and_the_first_are_listed(verdict_config: VerdictConfig) -> None:
    rows: list[Any] = [*v4_rows(30), *(["{"] * 500), *([{"conversation_id": "x" * 300, "turns": []}] * 400)]
    report = examine(verdict_config, rows, max_listed=20)
    assert report["counts"] == {"NOT_JSON": 500, "EMPTY_TURNS": 400, "DUPLICATE_ID": 399}
    assert len(report["findings"]) == 60
    assert [found["line"] for found in report["findings"]][:20] == list(range(31, 51))


def test_the_report_stays_bounded(verdict_config: VerdictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "MAX_REPORT_BYTES", 8_000)
    report = examine(verdict_config, ["{"] * 3000)
    assert report["counts"]["NOT_JSON"] == 3000
    assert 5 < sum(found["code"] == "NOT_JSON" for found in report["findings"]) < 100


def test_warnings_do_not_refuse(verdict_config: VerdictConfig) -> None:
    rows = v4_rows(9)
    rows[2]["turns"] = rows[1]["turns"]
    rows[4]["turns"] = rows[5]["turns"]
    rows[4]["split"], rows[5]["split"] = "validation", "train"
    rows[7]["turns"][1]["content"] = "long " * 300
    report = examine(verdict_config, rows, max_seq_length=128)
    assert report["passed"]
    assert named(report) == {
        (0, "FEW_CONVERSATIONS"),
        (3, "EXACT_DUPLICATE"),
        (6, "SPLIT_OVERLAP"),
        (8, "OVER_CONTEXT"),
    }
    over = report["statistics"]["overContext"]
    assert over["limit"] == 128
    assert over["conversations"] == 1
    assert over["tokensLost"] == report["statistics"]["max"] - 128
    assert over["tokensLost"] - 10 < over["learnedTokensLost"] <= over["tokensLost"]


def test_a_row_with_nothing_left_to_learn_is_an_error(verdict_config: VerdictConfig) -> None:
    rows = v4_rows(12)
    rows[3]["turns"][0]["content"] = "long " * 300
    report = examine(verdict_config, rows, max_seq_length=128)
    assert not report["passed"]
    assert (4, "NOTHING_TO_LEARN") in named(report)


def test_an_empty_file_gets_a_verdict_too(verdict_config: VerdictConfig) -> None:
    report = examine(verdict_config, [])
    assert not report["passed"]
    assert report["counts"] == {"EMPTY_FILE": 1, "FEW_CONVERSATIONS": 1}
    assert report["statistics"]["lengthHistogram"] == []


def test_a_stop_request_is_obeyed(verdict_config: VerdictConfig) -> None:
    write_jsonl(Path(verdict_config.dataset_path), v4_rows(3))
    stop = StopRequest()
    stop.ask("CANCEL")
    assert verdict.examine(verdict_config, Recorder(), stop) == Finished(outcome="stopped", reason="CANCEL")


def test_the_program_gives_a_verdict_without_importing_torch(verdict_config: VerdictConfig, tmp_path: Path) -> None:
    write_jsonl(Path(verdict_config.dataset_path), v4_rows(12))
    (tmp_path / "config.json").write_bytes(dump(verdict_config))
    code = (
        "import sys; from trainer.__main__ import main; print('noise'); code = main(sys.argv[1:]);"
        "assert not {'torch', 'peft', 'datasets'} & sys.modules.keys(); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "config.json")], capture_output=True, check=False, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    events = [msgspec.json.decode(line, type=ChildEvent) for line in lines if line != "noise"]
    assert isinstance(events[-1], Finished)
    assert any(isinstance(event, Verdict) and event.report["passed"] for event in events)


def place(share: float) -> bytes:
    return int(share * 2**64).to_bytes(8, "big") + random.randbytes(8)


def test_splits_follow_contents_and_labels() -> None:
    digests = Digests()
    twin, marked, kept = place(0.05), place(0.5), place(0.01)
    for line, (digest, label) in enumerate(
        [(twin, None), (twin, None), (marked, "train"), (marked, "validation"), (place(0.5), None), (kept, "train"),
         (kept, None)],
    ):  # fmt: skip
        digests.add(digest, line, label)  # type: ignore[arg-type]
    assert digests.validation(0.1).tolist() == [True, True, True, True, False, False, False]
    assert digests.validation(0.0).tolist() == [False, False, True, True, False, False, False]
    assert list(digests.repeats()) == [(1, 0), (3, 2), (6, 5)]


def test_neither_side_is_left_empty_while_there_is_a_choice() -> None:
    for shares, expected in [((0.5, 0.3, 0.9), [False, True, False]), ((0.01, 0.03, 0.02), [True, False, True])]:
        digests = Digests()
        for line, share in enumerate(shares):
            digests.add(place(share), line)
        assert digests.validation(0.1).tolist() == expected
    alone = Digests()
    assert list(alone.repeats()) == []
    assert alone.validation(0.1).tolist() == []
    alone.add(place(0.5), 1)
    assert alone.validation(0.1).tolist() == [False]


def test_a_split_takes_its_fraction() -> None:
    rng = random.Random(1)
    digests = Digests()
    for line in range(20_000):
        digests.add(rng.randbytes(16), line)
    assert np.isclose(digests.validation(0.2).mean(), 0.2, atol=0.01)
