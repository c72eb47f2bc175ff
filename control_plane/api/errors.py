"""Every failure becomes one envelope; what is inside stays inside."""

from __future__ import annotations

import logging
import re
from errno import ENOSPC
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import (
    ClientException,
    HTTPException,
    MethodNotAllowedException,
    NotFoundException,
    SerializationException,
    ValidationException,
)
from sqlalchemy.exc import DataError, DBAPIError

from control_plane.api.context import DISK_RETRY_S
from control_plane.api.headers import request_id
from control_plane.db import is_unavailable
from control_plane.errors import (
    BrightRunError,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    ServiceUnavailable,
    ValidationFailed,
)
from control_plane.schemas.base import Error, Failure
from control_plane.storage import StoreError

log = logging.getLogger(__name__)
RETRY_S = 2


def answer_failure(request: Request[Any, Any, Any], error: Exception) -> Response[Failure]:
    """The one exception handler of the application."""
    known = as_refusal(error)
    if isinstance(error, ValidationException):
        known = ValidationFailed("Invalid input data", fields=_fields(request, error.extra))
    if known is None:
        log.error("request %s failed", request_id(request.scope), exc_info=error)
        known = BrightRunError("Something went wrong on our side. It has been logged under this answer's X-Request-Id.")
    elif known.status >= 500:
        log.warning("request %s: %s: %s", request_id(request.scope), known.code, error)
    headers = {}
    if known.retry_after_s is not None:
        headers["Retry-After"] = str(known.retry_after_s)
    if isinstance(error, MethodNotAllowedException) and error.headers:
        headers |= error.headers
    body = Failure(False, Error(known.code, known.message, known.fields))
    return Response(body, status_code=known.status, media_type="application/json", headers=headers)


def as_refusal(error: Exception) -> BrightRunError | None:
    """What the caller is told; None when it is our fault."""
    match error:
        case BrightRunError():
            return error
        case SerializationException() | msgspec.DecodeError():
            return ValidationFailed("The request body is not valid JSON")
        case MethodNotAllowedException():
            return MethodNotAllowed("This method is not allowed here")
        case NotFoundException():
            return NotFound("There is nothing at this address")
        case HTTPException(status_code=413):
            return PayloadTooLarge("The request body is too large")
        case ClientException():
            return ValidationFailed("The request is malformed")
        case _ if _disk_is_full(error):
            return ServiceUnavailable("The disk is full", retry_after_s=DISK_RETRY_S)
        case StoreError():
            return ServiceUnavailable("The object store does not answer. Try again shortly.", retry_after_s=RETRY_S)
        case DataError():
            return ValidationFailed("A value is out of range or has the wrong form")
        case _ if is_unavailable(error):
            return ServiceUnavailable("The database is not available. Try again shortly.", retry_after_s=RETRY_S)
    return None


def _disk_is_full(error: Exception) -> bool:
    """By errno, in the database's words, or in those of the object store's folder."""
    told = (DBAPIError, StoreError)
    return getattr(error, "errno", None) == ENOSPC or (
        isinstance(error, told) and any(words in str(error) for words in ("disk is full", "No space left on device"))
    )


def _fields(request: Request[Any, Any, Any], extra: Any) -> dict[str, list[str]]:
    """Litestar's list of messages, by wire name."""
    fields: dict[str, list[str]] = {}
    for item in extra or ():
        name, message = item.get("key", "body"), item["message"]
        if name == "data":
            name, message = "body", "A JSON object is required"
        fields.setdefault(_wire_name(request, name), []).append(message)
    return fields


def _wire_name(request: Request[Any, Any, Any], name: str) -> str:
    parameter = request.route_handler.parsed_fn_signature.parameters.get(name)
    alias = getattr(parameter.kwarg_definition, "name", None) if parameter else None
    return alias or re.sub(r"_([a-z])", lambda m: m.group(1).upper(), name)
