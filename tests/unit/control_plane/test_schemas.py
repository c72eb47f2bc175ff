"""Bodies are read strictly and every bad field is named; answers have the wire's form."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal

import msgspec
import pytest

from control_plane.errors import ValidationFailed
from control_plane.money import charge, microusd, usd
from control_plane.schemas.accounts import ChangeMe, Signup
from control_plane.schemas.base import In, Out, decode
from control_plane.schemas.jobs import CreateJob, Overrides
from trainer.config import Hyperparameters


class Inner(In):
    count: int


class Body(In):
    inner: Inner
    tags: tuple[str, ...] = ()
    ratio: float | None = None
    optional: Inner | None = None


def fields_of(raw: bytes, kind: type = Body) -> dict[str, list[str]]:
    with pytest.raises(ValidationFailed) as refused:
        decode(raw, kind)
    return refused.value.fields or {}


def test_nested_names_are_dotted_and_all_are_told() -> None:
    raw = b'{"inner": {"count": "1", "x": 1}, "tags": ["a", 2], "ratio": true, "optional": {}, "extra": 0}'
    assert fields_of(raw).keys() == {"inner.count", "inner.x", "tags", "ratio", "optional.count", "extra"}


def test_whole_numbers_are_accepted_for_fractions_and_null_where_it_may_be() -> None:
    body = decode(b'{"inner": {"count": 2}, "ratio": 1, "optional": null}', Body)
    assert (body.inner.count, body.ratio, body.optional) == (2, 1.0, None)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"3", b"null", b'"x"', b"\xff\xfe", b'{"inner": NaN}', b"[" * 10_000]
)
def test_what_is_no_object_is_refused(raw: bytes) -> None:
    with pytest.raises(ValidationFailed):
        decode(raw, Body)


def test_nul_characters_are_refused_wherever_they_stand() -> None:
    assert fields_of(b'{"inner": {"count": 1}, "tags": ["a\\u0000"]}').keys() == {"tags"}


def test_own_words_for_a_broken_bound() -> None:
    said = fields_of(b'{"email": "x", "password": "short", "name": "A"}', Signup)
    assert said["email"] == ["Invalid email format"]
    assert said["password"] == ["Password must be at least 8 characters"]


@pytest.mark.parametrize(
    ("email", "good"),
    [
        ("a@b.co", True),
        ("a.b+c@d-e.example.org", True),
        ("a@b", False),
        ("a@@b.co", False),
        ("a b@c.co", False),
        ("@b.co", False),
        ("a@.co", False),
        ("a@b.co\n", False),
    ],
)
def test_email_form(email: str, good: bool) -> None:
    raw = json.dumps({"email": email, "password": "long enough", "name": "Ada"}).encode()
    if good:
        assert decode(raw, Signup).email == email
    else:
        assert fields_of(raw, Signup).keys() == {"email"}


def test_absent_differs_from_null() -> None:
    assert decode(b"{}", ChangeMe).organization is msgspec.UNSET
    assert decode(b'{"organization": null}', ChangeMe).organization is None
    assert fields_of(b'{"name": null}', ChangeMe).keys() == {"name"}


def test_overrides_name_exactly_the_hyperparameters() -> None:
    names = {f.encode_name for f in msgspec.structs.fields(Hyperparameters)}
    assert {f.encode_name for f in msgspec.structs.fields(Overrides)} == names
    raw = {
        "datasetId": "d",
        "presetId": "p",
        "gpuConfig": {"type": "cpu", "count": 1},
        "hyperparameters": {"seed": "1"},
    }
    assert fields_of(json.dumps(raw).encode(), CreateJob).keys() == {"hyperparameters.seed"}


def test_answers_are_camel_case_with_utc_times() -> None:
    class Seen(Out):
        created_at: datetime

    row = type("Row", (), {"created_at": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)})
    assert msgspec.json.encode(Seen.of(row)) == b'{"createdAt":"2026-01-02T03:04:05Z"}'


@pytest.mark.parametrize(
    ("micro", "shown"),
    [(0, "0.000000"), (1, "0.000001"), (-1, "-0.000001"), (1_500_000, "1.500000"), (10**15 + 1, "1000000000.000001")],
)
def test_money_is_shown_with_six_decimals(micro: int, shown: str) -> None:
    assert usd(micro) == shown
    assert microusd(shown) == micro


def test_gpu_time_is_priced_half_even() -> None:
    assert charge(3_600_000, 360_000) == 360_000
    assert [charge(ms, 1_800_000) for ms in (1, 3, 5)] == [0, 2, 2]
    assert microusd(Decimal("0.0000005")) == 0
