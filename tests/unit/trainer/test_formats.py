from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer import containers, formats
from trainer.findings import CODES, Finding
from trainer.formats import Message, Parsed, preview, read

GOOD = {"conversation_id": "a", "turns": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
OPENAI = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}


def parse(data: bytes | list[Any], stated: str | None = None) -> list[Parsed]:
    if isinstance(data, list):
        data = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in data).encode()
    return list(read(io.BytesIO(data), len(data), stated))


def findings(data: bytes | list[Any], stated: str | None = None) -> list[tuple[int, str, str]]:
    return [(f.line, f.pointer, f.code) for row in parse(data, stated) for f in row.findings]


def turns(*pairs: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    return {"conversation_id": "x", "turns": [{"role": r, "content": c} for r, c in pairs], **more}


U, A = ("user", "Hi"), ("assistant", "Yo")

DEFECTS: list[tuple[Any, list[tuple[str, str]]]] = [
    ('{"conversation_id": "x", "turns": [', [("", "NOT_JSON")]),
    ("[1, 2]", [("", "NOT_OBJECT")]),
    ('"text"', [("", "NOT_OBJECT")]),
    ("null", [("", "NOT_OBJECT")]),
    (OPENAI, [("", "MIXED_FORMAT")]),
    ({"conversation_id": "x"}, [("/turns", "MISSING_TURNS")]),
    ({"conversation_id": "x", "turns": "no"}, [("/turns", "MISSING_TURNS")]),
    ({"conversation_id": "x", "turns": []}, [("/turns", "EMPTY_TURNS")]),
    ({"conversation_id": "x", "turns": [1, {"role": "user"}]}, [("/turns/0", "TURN_NOT_OBJECT"),
                                                               ("/turns/1/content", "CONTENT_NOT_STRING")]),
    (turns(U, ("robot", "Yo")), [("/turns/1", "UNKNOWN_ROLE"), ("/turns", "NO_ASSISTANT")]),
    (turns(U, A, (None, "Yo"), A), [("/turns/2", "UNKNOWN_ROLE")]),
    (turns(U, A, (["user"], "Yo"), A), [("/turns/2", "UNKNOWN_ROLE")]),
    (turns(A), [("/turns/0", "ROLE_ORDER")]),
    (turns(U, U, A), [("/turns/1", "ROLE_ORDER")]),
    (turns(U, A, A), [("/turns/2", "ROLE_ORDER")]),
    (turns(U, A, ("system", "Be good"), U, A), [("/turns/2", "ROLE_ORDER")]),
    (turns(("system", "Be good"), A), [("/turns/1", "ROLE_ORDER")]),
    (turns(U), [("/turns", "NO_ASSISTANT")]),
    (turns(U, A, U), [("/turns/2", "LAST_NOT_ASSISTANT")]),
    (turns(("user", " \n"), A), [("/turns/0/content", "EMPTY_CONTENT")]),
    (turns(("user", None), ("assistant", 3)), [("/turns/0/content", "CONTENT_NOT_STRING"),
                                               ("/turns/1/content", "CONTENT_NOT_STRING")]),
    (turns(U, A, split="test"), [("/split", "BAD_SPLIT")]),
    (turns(U, A, conversation_id={}), [("/conversation_id", "BAD_ID")]),
    (turns(U, A, metadata=json.loads("[" * 70 + "]" * 70)), [("", "ROW_TOO_DEEP")]),
    ('{"turns": ' + "[" * 5000 + "]" * 5000 + "}", [("", "ROW_TOO_DEEP")]),
    (turns(*[U, A] * 2049), [("/turns", "ROW_TOO_LARGE")]),
    (turns(U, A, conversation_id=True, split=1, tools=[{}]), [("/conversation_id", "BAD_ID"), ("/split", "BAD_SPLIT"),
                                                             ("/tools", "TOOLS_UNSUPPORTED")]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), DEFECTS, ids=lambda value: str(value)[:40])
def test_every_defect_of_a_row_is_named(row: Any, expected: list[tuple[str, str]]) -> None:
    found = findings([GOOD, row, GOOD])
    assert found == [(2, pointer, code) for pointer, code in expected]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [*OPENAI["messages"][:1], {"role": "assistant", "content": "x", "weight": 2}]},
         [("/messages/1/weight", "BAD_WEIGHT")]),
        ({"messages": [*OPENAI["messages"][:1], {"role": "assistant", "content": "x", "weight": 0}]},
         [("/messages", "NOTHING_TO_LEARN")]),
        ({"messages": [*OPENAI["messages"][:1], {"role": "assistant", "content": None, "tool_calls": [{}]}]},
         [("/messages/1", "TOOLS_UNSUPPORTED")]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}, OPENAI["messages"][1]]},
         [("/messages/0/content", "CONTENT_NOT_STRING")]),
        ({"text": "x"}, [("/messages", "MISSING_TURNS")]),
    ],
)  # fmt: skip
def test_defects_of_openai_rows(row: Any, expected: list[tuple[str, str]]) -> None:
    assert findings([OPENAI, OPENAI, row]) == [(3, pointer, code) for pointer, code in expected]


def test_bytes_that_are_not_utf8() -> None:
    row = json.dumps(GOOD).encode()
    rows = parse(row + b'\n{"conversation_id": "\xff"}\n' + row)
    assert [(f.line, f.code, f.found) for r in rows for f in r.findings] == [
        (2, "NOT_UTF8", "byte 0xff at position 21")
    ]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "EMPTY_FILE"),
        (b" \n\n", "EMPTY_FILE"),
        (b"PAR1" + b"\0" * 20, "UNSUPPORTED_CONTAINER"),
        (b"instruction,output\nhi,yo\n", "UNSUPPORTED_CONTAINER"),
        (b"PK\x03\x04....", "UNSUPPORTED_CONTAINER"),
        (json.dumps(GOOD).encode("utf-16"), "NOT_UTF8"),
        (gzip.compress(json.dumps(GOOD).encode() * 9000)[:-20], "CORRUPT_FILE"),
        (b"\x1f\x8bnot gzip at all", "CORRUPT_FILE"),
    ],
)
def test_files_that_cannot_be_read(data: bytes, code: str) -> None:
    assert findings(data)[-1] == (0, "", code)


@pytest.mark.parametrize("row", [{"instruction": "a", "input": "", "output": "b"}, {"prompt": "a", "completion": "b"}])
def test_formats_that_are_not_read_are_recognised_and_refused(row: dict[str, str]) -> None:
    assert findings([row, row]) == [(1, "", "UNSUPPORTED_FORMAT"), (2, "", "UNSUPPORTED_FORMAT")]


def test_a_stated_format_that_does_not_fit_is_an_error_on_every_row() -> None:
    assert findings([OPENAI, OPENAI], "SHAREGPT") == [(1, "", "WRONG_FORMAT"), (2, "", "WRONG_FORMAT")]


def test_a_file_of_no_known_format() -> None:
    assert findings([{"text": "a"}, {"text": "b"}]) == [(1, "", "WRONG_FORMAT"), (2, "", "WRONG_FORMAT")]


SAME = [
    ("BRIGHTRUN_LORA_V4", GOOD),
    ("BRIGHTRUN_LORA_V3", {"conversation_id": "a", "turns": [{"user": "Hi", "assistant": "Yo"}]}),
    ("OPENAI_MESSAGES", OPENAI),
    ("SHAREGPT", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}),
]


@pytest.mark.parametrize(("name", "row"), SAME)
@pytest.mark.parametrize("pack", ["jsonl", "gzip", "array", "pretty", "bom"])
def test_formats_and_containers_give_the_same_conversation(name: str, row: dict[str, Any], pack: str) -> None:
    line = json.dumps(row).encode()
    data = {
        "jsonl": line + b"\n\n" + line + b"\n",
        "gzip": gzip.compress(line + b"\n") + gzip.compress(line),
        "array": b"[" + line + b", " + line + b"]\n",
        "pretty": json.dumps([row, row], indent=2).encode(),
        "bom": b"\xef\xbb\xbf" + line + b"\r\n" + line,
    }[pack]
    reading = read(io.BytesIO(data), len(data))
    rows = list(reading)
    assert reading.format == name
    assert [r.findings for r in rows] == [[], []]
    for r in rows:
        assert r.conversation
        assert r.conversation.messages == (Message("user", "Hi"), Message("assistant", "Yo"))
    assert reading.fraction == 1.0
    assert len({r.conversation.digest() for r in rows if r.conversation}) == 1


def test_v3_turns_may_lack_a_side_and_are_told_so() -> None:
    def row(*entries: dict[str, str]) -> dict[str, Any]:
        return {"conversation_id": "x", "turns": list(entries)}

    good = row({"user": "a", "assistant": "b"})
    assert findings([good, row({"user": "a"}), row({"user": "a", "assistant": "b"}, {"user": "c"})]) == [
        (2, "/turns", "NO_ASSISTANT"),
        (3, "/turns/1", "LAST_NOT_ASSISTANT"),
    ]
    assert findings([good, good, row({"user": "a", "assistant": ""}, {"bot": "b"})]) == [
        (3, "/turns/0/assistant", "EMPTY_CONTENT"),
        (3, "/turns/1", "UNKNOWN_ROLE"),
    ]


def test_weights_splits_and_ids_are_kept() -> None:
    row = {**GOOD, "split": "validation", "conversation_id": 7}
    conversation = parse([row])[0].conversation
    assert conversation
    assert (conversation.line, conversation.id, conversation.split) == (1, "7", "validation")
    weighted = {"messages": [*OPENAI["messages"], OPENAI["messages"][0], {**OPENAI["messages"][1], "weight": 0}]}
    conversation = parse([weighted])[0].conversation
    assert conversation
    assert [message.weight for message in conversation.messages] == [1, 1, 1, 0]


def test_array_elements_have_the_line_they_begin_on_and_a_broken_one_costs_only_itself() -> None:
    good = json.dumps(GOOD)
    text = f'[\n{good},\n  {{"turns": oops}},\n\n{json.dumps(GOOD, indent=1)},\n{{"conversation_id": "y"}}\n]'
    lines = json.dumps(GOOD, indent=1).count("\n")
    assert findings(text.encode()) == [(3, "", "NOT_JSON"), (6 + lines, "/turns", "MISSING_TURNS")]


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ("", [(1, "", "NOT_JSON")]),
        (",\n", [(2, "", "NOT_JSON")]),
        ("] {}", [(1, "/turns", "MISSING_TURNS")]),
        ("]]", [(1, "", "NOT_JSON")]),
        (f",\n{json.dumps(GOOD)[:-9]}", [(2, "", "NOT_JSON")]),
    ],
    ids=["open", "comma", "junk", "brackets", "torn"],
)
def test_an_array_that_does_not_end_well(tail: str, expected: list[tuple[int, str, str]]) -> None:
    assert findings(f"[{json.dumps(GOOD)}{tail}".encode()) == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(st.sampled_from('a"\\[]{},\n é'), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(json_values, min_size=1, max_size=6), st.integers(1, 9), st.sampled_from([None, 1]), st.integers(12, 400)
)
def test_arrays_are_cut_alike_however_they_are_read(
    values: list[Any], chunk: int, indent: int | None, largest: int
) -> None:
    text = json.dumps(values, indent=indent).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(containers, "CHUNK_BYTES", chunk)
        patch.setattr(containers, "HEAD_BYTES", chunk)
        patch.setattr(containers, "MAX_ROW_BYTES", largest)
        patch.setattr(containers, "container_of", lambda head: "JSON_ARRAY")
        rows = list(containers.Source(io.BytesIO(text), len(text)).rows())
    assert len(rows) == len(values)
    for row, value in zip(rows, values, strict=True):
        if row.raw is None:
            assert row.size > largest
        else:
            assert json.loads(row.raw) == value
            assert text.splitlines()[row.line - 1].strip().startswith((row.raw.splitlines()[0].strip(), b"["))


@pytest.mark.parametrize("array", [False, True])
def test_an_enormous_row_is_reported_and_never_held(array: bool) -> None:
    good = json.dumps(GOOD).encode()
    huge = b'{"turns": "' + b'\\"[{' * (5 * 2**20) + b'"}'
    separator = b"," if array else b"\n"
    data = gzip.compress((b"[" if array else b"") + separator.join([good, huge, good]) + (b"]" if array else b""), 1)
    del huge
    tracemalloc.start()
    found = findings(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [(1 if array else 2, "", "ROW_TOO_LARGE")]
    assert peak < 4 * containers.MAX_ROW_BYTES


def test_a_bomb_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "MAX_TOTAL_BYTES", 2**22)
    assert findings(gzip.compress(b"{" + b" " * 2**25)) == [(0, "", "FILE_TOO_LARGE")]


def test_preview_leaves_out_a_row_that_was_cut() -> None:
    data = "\n".join(json.dumps({**GOOD, "conversation_id": str(n)}) for n in range(9)).encode()
    shown = preview(data[:-10])
    assert (shown.format, shown.container, len(shown.rows), shown.findings) == ("BRIGHTRUN_LORA_V4", "JSONL", 3, [])
    packed = preview(gzip.compress(data)[:-10])
    assert (packed.format, len(packed.rows), packed.findings) == ("BRIGHTRUN_LORA_V4", 3, [])
    array = preview(b"[" + data.replace(b"\n", b",")[:-10])
    assert (array.container, len(array.rows), array.findings) == ("JSON_ARRAY", 3, [])
    assert [f.code for f in preview(b"PAR1....").findings] == ["UNSUPPORTED_CONTAINER"]
    assert [f.code for f in preview(json.dumps(turns(U)).encode() + b"\n").findings] == ["NO_ASSISTANT"]


def test_findings_carry_severity_advice_and_a_bounded_view_of_what_stands_there() -> None:
    found: Finding = parse([GOOD, turns(("user", ["x" * 500]), A)])[1].findings[0]
    assert found.severity == "error"
    assert found.advice == CODES["CONTENT_NOT_STRING"].advice
    assert found.found.startswith('["xxx')
    assert len(found.found) == 120
    assert all(code.advice for code in CODES.values())


def test_every_format_of_the_product_is_read_or_refused_by_name() -> None:
    assert set(formats.FORMATS) | set(formats.UNSUPPORTED) == {
        "BRIGHTRUN_LORA_V4", "BRIGHTRUN_LORA_V3", "OPENAI_MESSAGES", "SHAREGPT", "ALPACA", "PROMPT_COMPLETION",
    }  # fmt: skip


def test_v3_turns_hold_nothing_but_what_was_said() -> None:
    row = {"conversation_id": "a", "turns": [{"user": "Hi", "assistant": "Yo", "system": "Be good", "assitant": "Y"}]}
    assert findings([row]) == [(1, "/turns/0", "UNKNOWN_ROLE"), (1, "/turns/0", "UNKNOWN_ROLE")]
