"""Every refusal that a caller can see: a stable code, an HTTP status, a message that says what to do."""

from __future__ import annotations


class BrightRunError(Exception):
    """Base of all errors that reach a caller. ``fields`` maps a field's wire name to its messages."""

    code = "INTERNAL_ERROR"
    status = 500

    def __init__(
        self, message: str, *, fields: dict[str, list[str]] | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields
        self.retry_after_s = retry_after_s


class ValidationFailed(BrightRunError):
    code, status = "VALIDATION_ERROR", 400

    @classmethod
    def field(cls, name: str, message: str) -> ValidationFailed:
        return cls("Invalid input data", fields={name: [message]})


class EmailExists(BrightRunError):
    code, status = "EMAIL_EXISTS", 400


class Unauthorized(BrightRunError):
    code, status = "UNAUTHORIZED", 401


class BudgetExceeded(BrightRunError):
    code, status = "BUDGET_EXCEEDED", 402


class Forbidden(BrightRunError):
    code, status = "FORBIDDEN", 403


class NotFound(BrightRunError):
    code, status = "NOT_FOUND", 404


class MethodNotAllowed(BrightRunError):
    code, status = "METHOD_NOT_ALLOWED", 405


class Conflict(BrightRunError):
    code, status = "CONFLICT", 409


class PayloadTooLarge(BrightRunError):
    code, status = "PAYLOAD_TOO_LARGE", 413


class RateLimited(BrightRunError):
    code, status = "RATE_LIMITED", 429


class ServiceUnavailable(BrightRunError):
    code, status = "SERVICE_UNAVAILABLE", 503
