"""Notifications by mail, handed to a real SMTP server."""

from __future__ import annotations

import asyncio
import email
import email.policy
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword
from sqlalchemy import select

from control_plane.db import Database
from control_plane.services.notifications import notify
from control_plane.settings import Settings
from control_plane.tables import Outbox, User, now, uuid7
from control_plane.tables.notices import Channel, NotificationType
from scheduler.carrier import Carrier, Mail, Undelivered
from scheduler.deliver import LIMIT_S
from scheduler.network import NetworkCarrier
from tests.certificates import make_certificate, server_context
from tests.conftest import without_fsync
from tests.integration.scheduler.post_office import Ahead, PostOffice
from tests.receiver import Receiver
from tests.rows import make_team

HANG = "hang"
PASSWORD = "p:/@ss"


class MailServer:
    """``script`` holds the answers to come; then it takes everything."""

    def __init__(self) -> None:
        self.port = 0
        self.taken: list[tuple[list[str], EmailMessage]] = []
        self.script: list[str] = []
        self.asked = 0

    async def handle_DATA(self, server: SMTP, session: Any, envelope: Envelope) -> str:
        self.asked += 1
        answer = self.script.pop(0) if self.script else "250 OK"
        if answer == HANG:
            await asyncio.sleep(60)
        if answer.startswith("250"):
            assert isinstance(envelope.content, bytes)
            message = email.message_from_bytes(envelope.content, policy=email.policy.default)
            self.taken.append((envelope.rcpt_tos, message))
        return answer

    def check(self, server: SMTP, session: Any, envelope: Envelope, mechanism: str, data: Any) -> AuthResult:
        good = isinstance(data, LoginPassword) and (data.login, data.password) == (
            b"ada@example.com",
            PASSWORD.encode(),
        )
        return AuthResult(success=good, handled=good)


@asynccontextmanager
async def serving(tls: ssl.SSLContext | None = None, **options: Any) -> AsyncIterator[MailServer]:
    """``tls``: of STARTTLS, which is then required, as is signing in."""
    handler = MailServer()
    if tls is not None:
        options |= {"tls_context": tls, "require_starttls": True, "auth_required": True, "authenticator": handler.check}
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: SMTP(handler, hostname="test", **options), "127.0.0.1", 0)
    handler.port = server.sockets[0].getsockname()[1]
    try:
        yield handler
    finally:
        server.close()


@pytest.fixture
async def server() -> AsyncIterator[MailServer]:
    async with serving() as server:
        yield server


def carrier(url: str) -> Carrier:
    return NetworkCarrier(
        Settings(
            smtp_url=url,
            mail_from="BrightRun <noreply@brightrun.example>",
            public_url="https://b.example",
            webhook_networks="any",
        )
    )


class Mailing(PostOffice):
    async def notice(self, key: str = "one", **fields: Any) -> None:
        values = {
            "title": "Training complete: räksmörgås",
            "message": "It cost 1.000000 USD.",
            "action_url": "/models/1",
        }
        user_id = str(self.team.personal_of)
        async with self.database.write() as session:
            for _ in range(2):
                await notify(
                    session,
                    user_id=user_id,
                    team_id=self.team.id,
                    type=NotificationType.JOB_COMPLETE,
                    dedupe_key=f"{key}:{user_id}",
                    **{**values, **fields},
                )

    async def user(self) -> User:
        async with self.database.read() as session:
            return await session.get_one(User, str(self.team.personal_of))

    async def mail_row(self) -> Outbox:
        async with self.database.read() as session:
            return (await session.scalars(select(Outbox).where(Outbox.channel == Channel.MAIL))).one()


@pytest.fixture
async def mailing(database_url: str, receiver: Receiver, server: MailServer) -> AsyncIterator[Mailing]:
    database = Database(database_url, mail=True)
    without_fsync(database)
    async with database.write() as session:
        mailing = Mailing(database, receiver, await make_team(session))
    mailing.carrier = carrier(f"smtp://127.0.0.1:{server.port}")
    yield mailing
    await database.close()


async def test_a_notification_arrives_once(mailing: Mailing, server: MailServer) -> None:
    await mailing.notice()
    async with mailing.delivering():
        row = await mailing.until_row(str(mailing.team.personal_of), lambda row: row.delivered_at)
        await mailing.notice()
        await asyncio.sleep(0.1)

    ((recipients, message),) = server.taken
    address = (await mailing.user()).email
    assert recipients == [address]
    assert (message["To"], message["From"]) == (address, "BrightRun <noreply@brightrun.example>")
    assert message["Subject"] == "Training complete: räksmörgås"
    assert message["Message-ID"] == f"<{row.id}@brightrun.example>"
    assert message["Date"].datetime is not None
    assert message.get_content().splitlines() == ["It cost 1.000000 USD.", "", "https://b.example/models/1"]


async def test_a_name_cannot_add_headers_or_recipients(mailing: Mailing, server: MailServer) -> None:
    title = "Done: x\r\nBcc: victim@example.com\r\nRCPT TO:<victim@example.com>"
    await mailing.notice(title=title, message="text\r\n.\r\nMAIL FROM:<a@b.example>\r\n")
    async with mailing.delivering():
        await mailing.until_row(str(mailing.team.personal_of), lambda row: row.delivered_at)
    ((recipients, message),) = server.taken
    assert recipients == [(await mailing.user()).email]
    assert message["Bcc"] is None
    assert message["Subject"] == " ".join(title.split())
    assert message.get_content().splitlines()[:3] == ["text", ".", "MAIL FROM:<a@b.example>"]


async def test_a_server_that_is_busy_is_asked_again(mailing: Mailing, server: MailServer, clock: Ahead) -> None:
    server.script = ["451 4.3.0 Come back later"]
    await mailing.notice()
    async with mailing.delivering():
        row = await mailing.until_row(str(mailing.team.personal_of), lambda row: row.last_error)
        assert row.last_error == "The mail was refused: 451 4.3.0 Come back later"
        assert row.not_before is not None
        assert 3 < (row.not_before - now()).total_seconds() <= 6
        clock.pass_by(seconds=6)
        await mailing.until_row(str(mailing.team.personal_of), lambda row: row.delivered_at)
    assert len(server.taken) == 1


async def test_what_a_server_will_never_take_is_given_up(mailing: Mailing, server: MailServer) -> None:
    server.script = ["550 5.1.1 No such person"]
    await mailing.notice()
    async with mailing.delivering():
        row = await mailing.until_row(str(mailing.team.personal_of), lambda row: row.failed_at)
    assert (row.tries, row.not_before) == (1, None)
    assert row.last_error == "The mail was refused: 550 5.1.1 No such person"


async def test_a_server_that_hangs_delays_no_webhook(
    mailing: Mailing, server: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.mail.STEP_S", 1.0)
    monkeypatch.setitem(LIMIT_S, Channel.MAIL, 0.5)
    webhook_id = await mailing.webhook("/a")
    server.script = [HANG]
    await mailing.notice()
    async with mailing.delivering():
        while not server.asked:
            await asyncio.sleep(0.02)
        await mailing.tell("one")
        await mailing.until_row(webhook_id, lambda row: row.delivered_at)
        row = await mailing.until_row(str(mailing.team.personal_of), lambda row: row.last_error)
    assert row.last_error == "It did not answer within 0.5 s"


async def test_who_has_left_gets_nothing(mailing: Mailing, server: MailServer) -> None:
    await mailing.notice()
    async with mailing.database.write() as session:
        (await session.get_one(User, str(mailing.team.personal_of))).deactivated_at = now()
    async with mailing.delivering():
        row = await mailing.until_row(str(mailing.team.personal_of), lambda row: row.failed_at)
    assert (row.last_error, server.asked) == ("The account is deactivated", 0)


async def test_mail_that_was_switched_off_is_given_up(mailing: Mailing, server: MailServer) -> None:
    await mailing.notice()
    async with mailing.delivering(NetworkCarrier(Settings())):
        row = await mailing.until_row(str(mailing.team.personal_of), lambda row: row.failed_at)
    assert row.last_error == "Mail is not configured any more"


async def test_an_address_that_is_none_is_given_up(mailing: Mailing, server: MailServer) -> None:
    await mailing.notice()
    async with mailing.database.write() as session:
        (await session.get_one(User, str(mailing.team.personal_of))).email = "a@b.example,victim@c.example"
    async with mailing.delivering():
        row = await mailing.until_row(str(mailing.team.personal_of), lambda row: row.failed_at)
    assert (row.last_error, server.asked) == ("The account's address cannot be written to", 0)


LETTER = Mail(uuid7(), "bob@example.com", "Title", "Text", None)


async def test_starttls_and_signing_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = make_certificate(tmp_path, "localhost")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    async with serving(server_context(certificate)) as server:
        there = f"localhost:{server.port}"
        await carrier(f"smtp://ada%40example.com:p%3A%2F%40ss@{there}?starttls=yes").mail(LETTER)
        assert [recipients for recipients, _ in server.taken] == [["bob@example.com"]]
        for url, said in (
            (f"smtp://ada%40example.com:wrong@{there}?starttls=yes", "SMTPAuthenticationError"),
            (f"smtp://{there}", "SMTP"),
        ):
            with pytest.raises(Undelivered, match=said) as failed:
                await carrier(url).mail(LETTER)
            assert not failed.value.final
            assert "wrong" not in failed.value.reason
        monkeypatch.delenv("SSL_CERT_FILE")
        with pytest.raises(Undelivered, match="SSLCertVerificationError"):
            await carrier(f"smtp://ada:x@{there}?starttls=yes").mail(LETTER)
        assert len(server.taken) == 1


async def test_nobody_listens() -> None:
    async with serving() as server:
        port = server.port
    with pytest.raises(Undelivered, match="ConnectionRefusedError") as failed:
        await carrier(f"smtp://127.0.0.1:{port}").mail(LETTER)
    assert not failed.value.final
