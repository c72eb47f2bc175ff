"""Letters by network: signed POSTs that lead only where they may, and mail."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib.metadata import version

import httpcore
import httpx

from control_plane.services.addresses import is_public
from control_plane.services.webhooks import ANY_NETWORK, sign
from control_plane.settings import Settings
from control_plane.tables import now
from scheduler.carrier import Mail, Post, Undelivered
from scheduler.mail import Mailer

CONNECT_S = 5.0
ANSWER_S = 15.0
ADDRESSES_TRIED = 3
RESOLVERS = 16
"""Names that are looked up at once: a lookup that hangs cannot be called off."""


class NetworkCarrier:
    def __init__(self, settings: Settings) -> None:
        """Raises SystemExit for settings of mail that cannot be."""
        self.mails = settings.mails
        self._backend = _Guarded(anywhere=settings.webhook_networks == ANY_NETWORK)
        try:
            self._mailer = Mailer(settings.smtp_url, settings.mail_from, settings.public_url) if self.mails else None
        except ValueError as error:
            raise SystemExit(f"BRIGHTRUN_SMTP_URL, BRIGHTRUN_MAIL_FROM: {error}") from None

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return httpx.create_ssl_context()

    async def post(self, letter: Post) -> None:
        """A connection for each letter; of the answer only the status counts, and redirects are not followed."""
        status = await self._status_of(letter)
        if not 200 <= status < 300:
            redirected = " (redirects are not followed)" if 300 <= status < 400 else ""
            raise Undelivered(f"It answered HTTP {status}{redirected}", gone=status == 410)

    async def _status_of(self, letter: Post) -> int:
        url = httpx.URL(letter.url)
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        limits = {"connect": CONNECT_S, "read": ANSWER_S, "write": ANSWER_S, "pool": ANSWER_S}
        tls = self._tls if url.scheme == "https" else None
        try:
            async with (
                httpcore.AsyncConnectionPool(ssl_context=tls, network_backend=self._backend) as pool,
                pool.stream(
                    "POST", target, headers=_headers(letter), content=letter.body, extensions={"timeout": limits}
                ) as answer,
            ):
                return answer.status
        except httpcore.TimeoutException as error:
            raise Undelivered("It did not answer in time") from error
        except httpcore.ConnectError as error:
            raise Undelivered(f"No connection: {error}") from error
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise Undelivered(f"The connection broke: {error or type(error).__name__}") from error

    async def mail(self, letter: Mail) -> None:
        if self._mailer is None:
            raise Undelivered("Mail is not configured", final=True)
        await self._mailer.send(letter)


def _headers(letter: Post) -> dict[bytes | str, bytes | str]:
    at = int(now().timestamp())
    return {
        "Content-Type": "application/json",
        "User-Agent": f"BrightRun/{version('brightrun')}",
        "webhook-id": letter.id,
        "webhook-timestamp": str(at),
        "webhook-signature": sign(letter.secrets, letter.id, at, letter.body),
    }


class _Guarded(httpcore.AnyIOBackend):
    """Looks a name up once and connects to the addresses that were judged; the Host header and TLS keep the name."""

    def __init__(self, *, anywhere: bool) -> None:
        self._anywhere = anywhere
        self._resolvers = ThreadPoolExecutor(RESOLVERS, "resolve")

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await self._addresses(host, port)
        allowed = [address for address in addresses if self._anywhere or is_public(address)][:ADDRESSES_TRIED]
        if not allowed:
            raise Undelivered("Its address is not public, which this installation does not allow")
        for address in allowed[:-1]:
            try:
                return await super().connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return await super().connect_tcp(allowed[-1], port, timeout, local_address, socket_options)

    async def _addresses(self, host: str, port: int) -> list[str]:
        loop = asyncio.get_running_loop()
        lookup = loop.run_in_executor(self._resolvers, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        try:
            async with asyncio.timeout(CONNECT_S):
                found = await lookup
        except TimeoutError as error:
            raise Undelivered("Its name could not be looked up in time") from error
        except (OSError, UnicodeError) as error:
            raise Undelivered("Its name is not known") from error
        return list(dict.fromkeys(str(address[0]) for *_, address in found))
