"""Where a webhook's connection may lead, and by which names."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from control_plane.services import webhooks
from control_plane.settings import Settings
from scheduler.carrier import Mail, Post, Undelivered
from scheduler.network import NetworkCarrier
from tests.certificates import make_certificate, server_context
from tests.receiver import Receiver, receiving

NAME = "receiver.example"


def letter(url: str) -> Post:
    return Post("m", url, (webhooks.derive(b"test", "x"),), b"{}")


def carrier(networks: str) -> NetworkCarrier:
    return NetworkCarrier(Settings(webhook_networks=networks))


class Names:
    """The addresses of whatever name: of each lookup those that are next."""

    def __init__(self, *lookups: list[str]) -> None:
        self.lookups = list(lookups)
        self.asked = 0

    def __call__(self, host: str, port: int, *args: Any, **options: Any) -> list[Any]:
        self.asked += 1
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.lookups.pop(0)]


@pytest.fixture
def name_is(monkeypatch: pytest.MonkeyPatch) -> Any:
    def named(*lookups: list[str]) -> Names:
        names = Names(*lookups)
        monkeypatch.setattr("scheduler.network.socket.getaddrinfo", names)
        return names

    return named


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/", "http://127.1:{port}/", "http://localhost:{port}/"])
async def test_nothing_inside_is_connected_to(receiver: Receiver, url: str) -> None:
    there = letter(url.format(port=receiver.port))
    with pytest.raises(Undelivered, match="not public"):
        await carrier("public").post(there)
    assert (receiver.calls, receiver.connections) == ([], 0)
    await carrier("any").post(there)
    assert len(receiver.calls) == 1


async def test_a_name_is_looked_up_at_each_delivery_and_once(receiver: Receiver, name_is: Any) -> None:
    """A name that shows a public address to one lookup and an inner one to the next finds no second lookup."""
    names = name_is(["127.0.0.1"], ["127.0.0.1"])
    out = carrier("any")
    for asked in (1, 2):
        await out.post(letter(receiver.url("/a", NAME)))
        assert names.asked == asked
    assert {call.headers["host"] for call in receiver.calls} == {f"{NAME}:{receiver.port}"}


async def test_of_several_addresses_only_those_that_may_are_used(
    receiver: Receiver, name_is: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.network.is_public", lambda address: address in ("127.0.0.1", "127.0.0.3"))
    async with receiving(host="127.0.0.2", port=receiver.port) as inside:
        name_is(["127.0.0.2", "127.0.0.3", "127.0.0.1"], ["127.0.0.2"])
        await carrier("public").post(letter(receiver.url("/a", NAME)))
        with pytest.raises(Undelivered, match="not public"):
            await carrier("public").post(letter(receiver.url("/a", NAME)))
        assert (len(receiver.calls), inside.connections) == (1, 0)


async def test_a_lookup_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr("scheduler.network.CONNECT_S", 0.1)
    monkeypatch.setattr("scheduler.network.socket.getaddrinfo", lambda *_, **__: over.wait(20))
    try:
        with pytest.raises(Undelivered, match="could not be looked up in time"):
            await carrier("any").post(letter(f"http://{NAME}/"))
    finally:
        over.set()


async def test_tls_asks_for_the_name_and_checks_it(
    tmp_path: Path, name_is: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = make_certificate(tmp_path, NAME)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    asked: list[str] = []
    tls = server_context(certificate)
    tls.sni_callback = lambda _, name, __: asked.append(name)
    async with receiving(tls) as receiver:
        name_is(["127.0.0.1"], ["127.0.0.1"])
        out = carrier("any")
        await out.post(letter(receiver.url("/a", NAME, "https")))
        with pytest.raises(Undelivered, match=r"not valid for 'other\.example'"):
            await out.post(letter(receiver.url("/a", "other.example", "https")))
    assert asked == [NAME, "other.example"]
    assert [call.headers["host"] for call in receiver.calls] == [f"{NAME}:{receiver.port}"]


async def test_no_proxy_of_the_environment_comes_between(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    await carrier("any").post(letter(receiver.url("/a")))
    assert len(receiver.calls) == 1


async def test_paths_and_queries_arrive_as_they_were_given(receiver: Receiver) -> None:
    await carrier("any").post(letter(receiver.url("/a%20b/ü?token=%2Fx&y=1")))
    assert [call.path for call in receiver.calls] == ["/a%20b/%C3%BC?token=%2Fx&y=1"]


async def test_no_connection_is_left_open(receiver: Receiver) -> None:
    receiver.script["/a"] = [204, 500]
    await carrier("any").post(letter(receiver.url("/a")))
    with pytest.raises(Undelivered):
        await carrier("any").post(letter(receiver.url("/a")))
    assert receiver.connections == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"smtp_url": "http://mail", "mail_from": "a@b.example"},
        {"smtp_url": "smtp://mail", "mail_from": "nobody"},
    ],
)
def test_settings_of_mail_that_cannot_be_are_refused(settings: dict[str, str]) -> None:
    with pytest.raises(SystemExit, match="BRIGHTRUN_SMTP_URL"):
        NetworkCarrier(Settings(**settings))


async def test_mail_needs_a_server_and_a_sender() -> None:
    out = NetworkCarrier(Settings(smtp_url="smtp://mail.example"))
    assert not out.mails
    with pytest.raises(Undelivered, match="not configured"):
        await out.mail(Mail("m", "a@b.example", "title", "text", None))
