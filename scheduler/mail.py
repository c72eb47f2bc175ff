"""Plain-text mail by SMTP."""

from __future__ import annotations

import asyncio
import smtplib
import ssl
from concurrent.futures import ThreadPoolExecutor
from email.errors import MessageError
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import parseaddr
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from control_plane.tables import now
from scheduler.carrier import Mail, Undelivered

STEP_S = 10.0
"""For each answer of the server."""
SUBMISSION_PORT = 587
YES = {"1", "yes", "true", "on"}


class Server(NamedTuple):
    host: str
    port: int
    user: str
    password: str
    tls: bool
    """From the first byte (``smtps``)."""
    starttls: bool

    @classmethod
    def parse(cls, url: str) -> Server:
        """``smtp[s]://[user:password@]host[:port][?starttls=yes]``; port 587 means STARTTLS. Raises ValueError, which
        does not show the URL."""
        try:
            parts = urlsplit(url)
            tls = {"smtp": False, "smtps": True}[parts.scheme]
            port = parts.port or (465 if tls else 25)
        except (KeyError, ValueError):
            raise ValueError("expected smtp://user:password@host:port or smtps://…") from None
        if not parts.hostname:
            raise ValueError("a host is missing")
        asked = parse_qs(parts.query).get("starttls")
        starttls = asked[-1].lower() in YES if asked else port == SUBMISSION_PORT
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        return cls(parts.hostname, port, user, password, tls, starttls and not tls)


def mailbox(written: str) -> Address:
    """``address`` or ``Name <address>``. Raises ValueError for what is none."""
    name, address = parseaddr(written)
    return _address(address, name)


def compose(letter: Mail, sender: Address, public_url: str) -> EmailMessage:
    """Raises ValueError for a recipient that is no address."""
    message = EmailMessage()
    message["From"] = sender
    message["To"] = _address(letter.to)
    message["Subject"] = " ".join(letter.subject.split())
    message["Date"] = now()
    message["Message-ID"] = f"<{letter.id}@{sender.domain}>"
    message["Auto-Submitted"] = "auto-generated"
    link = f"\n\n{public_url}{letter.path}" if letter.path else ""
    message.set_content(f"{letter.text}{link}\n")
    return message


def _address(address: str, name: str = "") -> Address:
    try:
        return Address(name, addr_spec=address)
    except (ValueError, IndexError, MessageError):
        raise ValueError("not a mail address") from None


class Mailer:
    def __init__(self, url: str, sender: str, public_url: str) -> None:
        """Raises ValueError."""
        self._server = Server.parse(url)
        self._sender = mailbox(sender)
        self._public_url = public_url.rstrip("/")
        self._threads = ThreadPoolExecutor(2, "mail")

    async def send(self, letter: Mail) -> None:
        """Returns once the server has taken it. Raises Undelivered."""
        try:
            message = compose(letter, self._sender, self._public_url)
        except ValueError:
            raise Undelivered("The account's address cannot be written to", final=True) from None
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._threads, self._hand_over, message, letter.to)

    def _hand_over(self, message: EmailMessage, to: str) -> None:
        try:
            with self._connected() as smtp:
                smtp.send_message(message, self._sender.addr_spec, [to])
        except smtplib.SMTPRecipientsRefused as refused:
            raise _refusal(*refused.recipients[to]) from None
        except smtplib.SMTPDataError as error:
            raise _refusal(error.smtp_code, error.smtp_error) from None
        except (OSError, smtplib.SMTPException) as error:
            raise Undelivered(f"The mail server did not take it: {type(error).__name__}") from None

    def _connected(self) -> smtplib.SMTP:
        server = self._server
        if server.tls:
            smtp: smtplib.SMTP = smtplib.SMTP_SSL(
                server.host, server.port, timeout=STEP_S, context=ssl.create_default_context()
            )
        else:
            smtp = smtplib.SMTP(server.host, server.port, timeout=STEP_S)
        try:
            if server.starttls:
                smtp.starttls(context=ssl.create_default_context())
            if server.user:
                smtp.login(server.user, server.password)
        except BaseException:
            smtp.close()
            raise
        return smtp


def _refusal(code: int, said: bytes | str) -> Undelivered:
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else said
    return Undelivered(f"The mail was refused: {code} {text}", final=code >= 500)
