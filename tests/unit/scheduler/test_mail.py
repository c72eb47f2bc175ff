"""How mail is written and where it is handed over."""

from __future__ import annotations

import pytest

from control_plane.tables import uuid7
from scheduler.carrier import Mail
from scheduler.mail import Server, compose, mailbox

SENDER = mailbox("BrightRun <noreply@example.com>")


@pytest.mark.parametrize(
    ("url", "server"),
    [
        ("smtp://mail.example", Server("mail.example", 25, "", "", False, False)),
        ("smtp://mail.example:587", Server("mail.example", 587, "", "", False, True)),
        ("smtp://mail.example:587?starttls=no", Server("mail.example", 587, "", "", False, False)),
        ("smtp://mail.example?starttls=yes", Server("mail.example", 25, "", "", False, True)),
        ("smtps://a%40b:p%3A%2F@mail.example", Server("mail.example", 465, "a@b", "p:/", True, False)),
        ("smtps://mail.example:2465?starttls=yes", Server("mail.example", 2465, "", "", True, False)),
    ],
)
def test_servers(url: str, server: Server) -> None:
    assert Server.parse(url) == server


@pytest.mark.parametrize(
    "url", ["mail.example:25", "http://user:hidden@mail", "smtp://user:hidden@", "smtp://h:hidden"]
)
def test_a_bad_url_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ValueError, match=r"expected smtp://|a host is missing") as refused:
        Server.parse(url)
    assert "hidden" not in str(refused.value)


def test_no_text_of_a_user_becomes_a_header() -> None:
    title = "Training complete: x\r\nBcc: victim@example.com\r\n\r\nHello\x0bthere"
    written = compose(Mail(uuid7(), "ada@example.com", title, "It is done.\n.\n", "/models/1"), SENDER, "https://b.r")
    assert written["Bcc"] is None
    assert written["Subject"] == "Training complete: x Bcc: victim@example.com Hello there"
    head = written.as_bytes().partition(b"\n\n")[0]
    assert not [line for line in head.splitlines() if line.lower().startswith(b"bcc")]
    assert written.get_content() == "It is done.\n.\n\n\nhttps://b.r/models/1\n"
    assert (written["From"], written["To"]) == ("BrightRun <noreply@example.com>", "ada@example.com")


@pytest.mark.parametrize(
    "address", ["a@b.example, victim@c.example", "a@b.example\nBcc: v@c.example", "<a@b.example>", ""]
)
def test_a_recipient_is_one_address(address: str) -> None:
    with pytest.raises(ValueError, match="not a mail address"):
        compose(Mail(uuid7(), address, "title", "text", None), SENDER, "https://b.r")
