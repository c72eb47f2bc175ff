"""Signatures that others can verify, and URLs that lead nowhere but outside."""

from __future__ import annotations

import base64
import json
from datetime import timedelta

import pytest
from standardwebhooks.webhooks import Webhook as Verifier
from standardwebhooks.webhooks import WebhookVerificationError

from control_plane.errors import ValidationFailed
from control_plane.services.addresses import is_public, written
from control_plane.services.webhooks import checked_url, derive, secrets_of, sign
from control_plane.tables import Webhook, now

SECRET, OTHER = (derive(b"an installation's secret", nonce) for nonce in ("one", "two"))
BODY = json.dumps({"type": "job.completed", "data": {"name": "Ünïcode\n"}}, ensure_ascii=False).encode()


def headers(*secrets: str, body: bytes = BODY, message_id: str = "m", at: int | None = None) -> dict[str, str]:
    at = int(now().timestamp()) if at is None else at
    signature = sign(secrets, message_id, at, body)
    return {"webhook-id": "m", "webhook-timestamp": str(at), "webhook-signature": signature}


def test_a_secret_is_32_bytes_and_never_the_same() -> None:
    assert SECRET.startswith("whsec_")
    assert len(base64.b64decode(SECRET.removeprefix("whsec_"))) == 32
    assert SECRET != OTHER
    assert SECRET == derive(b"an installation's secret", "one") != derive(b"another's", "one")


def test_an_independent_implementation_verifies_the_signature() -> None:
    assert Verifier(SECRET).verify(BODY, headers(SECRET)) == json.loads(BODY)


@pytest.mark.parametrize(
    ("signed", "body"),
    [
        (headers(OTHER), BODY),
        (headers(SECRET), BODY + b" "),
        (headers(SECRET, message_id="other"), BODY),
        (headers(SECRET, at=int((now() - timedelta(hours=1)).timestamp())), BODY),
        ({**headers(SECRET), "webhook-timestamp": str(int(now().timestamp()) - 5)}, BODY),
    ],
)
def test_whatever_is_changed_breaks_it(signed: dict[str, str], body: bytes) -> None:
    with pytest.raises(WebhookVerificationError):
        Verifier(SECRET).verify(body, signed)


def test_after_a_rotation_both_secrets_verify_for_a_day() -> None:
    webhook = Webhook(secret=SECRET, previous_secret=OTHER, previous_secret_until=now() + timedelta(hours=1))
    signed = headers(*secrets_of(webhook))
    assert Verifier(SECRET).verify(BODY, signed) == Verifier(OTHER).verify(BODY, signed)

    webhook.previous_secret_until = now() - timedelta(seconds=1)
    with pytest.raises(WebhookVerificationError):
        Verifier(OTHER).verify(BODY, headers(*secrets_of(webhook)))


PUBLIC = ["93.184.215.14", "8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
INSIDE = [
    *("127.0.0.1", "127.255.255.254", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
    *("0.0.0.0", "0.1.2.3", "192.0.2.1", "198.18.0.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "2001:db8::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1"),
    *("2002:7f00:1::", "2001:0:7f00:1::"),
]


@pytest.mark.parametrize("address", PUBLIC)
def test_anybodys_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", INSIDE)
def test_somebodys_own_addresses(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.1", "127.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("0x7f.1", "127.0.0.1"),
        ("017700000001", "127.0.0.1"),
        ("[::1]", "::1"),
        ("example.com", None),
        ("127.0.0.1.example.com", None),
    ],
)
def test_addresses_in_disguise(host: str, address: str | None) -> None:
    assert written(host) == address


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("https://example.com", "https://example.com"),
        ("HTTPS://Example.COM:8443/a?b=c", "https://example.com:8443/a?b=c"),
        ("http://bücher.example/hook", "http://xn--bcher-kva.example/hook"),
        ("https://93.184.215.14:8443/x", "https://93.184.215.14:8443/x"),
    ],
)
def test_sound_urls(url: str, normal: str) -> None:
    assert checked_url(url, "public") == normal


NOT_OUTSIDE = ["http://localhost/", "http://db.localhost./", "http://2130706433/", "http://127.1:8080/x"]
NOT_OUTSIDE += [f"http://[{a}]/" if ":" in a else f"https://{a}/" for a in INSIDE if "%" not in a]


@pytest.mark.parametrize("url", NOT_OUTSIDE)
def test_urls_that_lead_inside(url: str) -> None:
    with pytest.raises(ValidationFailed) as refused:
        checked_url(url, "public")
    assert refused.value.fields is not None
    assert refused.value.fields.keys() == {"url"}
    assert checked_url(url, "any")


@pytest.mark.parametrize(
    "url",
    [
        *("", "example.com", "/hook", "ftp://example.com", "file:///etc/passwd", "https://", "https:///path"),
        *("https://user:password@example.com", "https://user@example.com", "https://@example.com:0/", "http://a b/"),
        *("http://[::1", "https://example.com:99999/", "https://example.com/\n", "javascript:alert(1)"),
    ],
)
@pytest.mark.parametrize("networks", ["public", "any"])
def test_urls_that_are_none(url: str, networks: str) -> None:
    with pytest.raises(ValidationFailed) as refused:
        checked_url(url, networks)
    assert refused.value.fields is not None
    assert refused.value.fields.keys() == {"url"}
