"""What every body shares: strict JSON in, with each bad field named; one envelope out."""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any, Generic, Self, TypeVar

import msgspec
from msgspec import Meta

from control_plane.errors import ValidationFailed

T = TypeVar("T")


def said(message: str, **bounds: Any) -> Meta:
    """Bounds of a string field, and what is said when it breaks them."""
    return Meta(**bounds, extra={"said": message})


Name = Annotated[str, said("Must have 1 to 200 characters, not only spaces", max_length=200, pattern=r"\S")]
Money = str
"""Decimal USD with six decimals."""


class In(msgspec.Struct, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """A request body."""


class Out(msgspec.Struct, rename="camel", kw_only=True):
    """A part of an answer."""

    @classmethod
    def of(cls, row: Any, **more: Any) -> Self:
        """From a row's attributes of the same names, and ``more`` for those that differ."""
        return cls(**{name: getattr(row, name) for name in cls.__struct_fields__ if name not in more}, **more)


class Ok(msgspec.Struct, Generic[T]):
    """The envelope of success."""

    success: bool
    data: T


def ok(data: T) -> Ok[T]:
    return Ok(True, data)


class Error(msgspec.Struct, omit_defaults=True):
    code: str
    message: str
    fields: dict[str, list[str]] | None = None


class Failure(msgspec.Struct):
    """The envelope of failure."""

    success: bool
    error: Error


class Pagination(Out):
    page: int
    page_size: int
    total: int
    total_pages: int


class Range(Out):
    """Ten, fifty and ninety of a hundred such cases stay at or below."""

    p10: float
    p50: float
    p90: float


class MoneyRange(Out):
    p10: Money
    p50: Money
    p90: Money


def decode(raw: bytes, kind: type[T]) -> T:
    """A body of type ``kind``. Raises ValidationFailed with a message for every bad field, nested names dotted."""
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValidationFailed("The request body is not valid JSON") from error
    return convert(body, kind)


def convert(body: Any, kind: type[T], prefix: str = "") -> T:
    """The same from data that is decoded already; ``prefix`` leads the fields' names."""
    fields: dict[str, list[str]] = {}
    value = _convert(body, kind, prefix, fields)
    if fields:
        raise ValidationFailed("Invalid input data", fields=fields)
    return value


def _convert(value: Any, kind: Any, path: str, fields: dict[str, list[str]]) -> Any:
    struct = _struct(kind)
    if struct is not None and isinstance(value, dict):
        return _convert_struct(value, struct, path, fields)
    try:
        converted = msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        fields[path or "body"] = [_message(value, kind, str(error))]
        return None
    if "\x00" in _strings(converted):
        fields[path or "body"] = ["Must not contain the character U+0000"]
    return converted


def _convert_struct(value: dict[str, Any], struct: type, path: str, fields: dict[str, list[str]]) -> Any:
    known: dict[str, Any] = {}
    described = {f.encode_name: f for f in msgspec.structs.fields(struct)}
    for name in value.keys() - described.keys():
        fields[_join(path, name)] = ["Unknown field"]
    for name, field in described.items():
        if name in value:
            known[field.name] = _convert(value[name], field.type, _join(path, name), fields)
        elif field.required:
            fields[_join(path, name)] = ["Required"]
    return None if fields else struct(**known)


def _struct(kind: Any) -> type | None:
    """The struct that ``kind`` is, or is beside None."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    found = [o for o in options if isinstance(o, type) and issubclass(o, msgspec.Struct)]
    return found[0] if len(found) == 1 else None


def _message(value: Any, kind: Any, message: str) -> str:
    """Our own words for a broken bound, when the field has some (``said``); else msgspec's, without the path."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        for meta in getattr(option, "__metadata__", ()):
            if isinstance(value, str) and isinstance(meta, Meta) and meta.extra:
                return str(meta.extra["said"])
    return message.split(" - at `$")[0]


def _strings(value: Any) -> str:
    """Every string within ``value``, joined."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "".join(_strings(v) for pair in value.items() for v in pair)
    if isinstance(value, list | tuple | set | frozenset):
        return "".join(_strings(v) for v in value)
    return ""


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
