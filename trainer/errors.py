"""Why a child could not do what it was asked: a stable code, a message, and what to do about it. Torch-free."""

from __future__ import annotations


class TrainerError(Exception):
    """Ends the child with a ``Failed`` event. Codes in ``trainer.protocol.USER_FAULTS`` are not tried again."""

    def __init__(self, code: str, message: str, advice: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.advice = advice


class Stopped(Exception):
    """A stop request was seen in the middle of something that can be left undone."""


def explain(error: BaseException) -> TrainerError:
    """Any exception as a TrainerError: exhausted memory is named, the rest is INTERNAL (the platform's fault)."""
    if isinstance(error, TrainerError):
        return error
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return TrainerError(
            "OUT_OF_MEMORY",
            text,
            "Lower maxSeqLength first, then loraRank; or choose a GPU type with more memory.",
        )
    return TrainerError("INTERNAL", text, "This is not your data's fault; the job is tried again by itself.")
