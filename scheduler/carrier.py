"""The way out of the house, as the deliverer sees it (``scheduler.network`` is the real one)."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Undelivered(Exception):
    """``reason`` is for the receiver's owner to read. ``final``: no further try; ``gone``: it wants nothing more."""

    def __init__(self, reason: str, *, final: bool = False, gone: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.final = final
        self.gone = gone


class Post(NamedTuple):
    id: str
    url: str
    secrets: tuple[str, ...]
    body: bytes


class Mail(NamedTuple):
    id: str
    to: str
    subject: str
    text: str
    path: str | None
    """Where in the console it leads."""


class Carrier(Protocol):
    mails: bool
    """Whether it takes mail."""

    async def post(self, letter: Post) -> None:
        """Returns once the receiver has taken it. Raises Undelivered."""
        ...

    async def mail(self, letter: Mail) -> None:
        """The same for mail."""
        ...
