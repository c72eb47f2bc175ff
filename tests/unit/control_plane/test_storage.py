"""The object store in a folder: whole writes, listings by folder, signatures."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from control_plane.storage import Storage, UrlSigner


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage((tmp_path / "objects").as_uri(), UrlSigner(b"secret", "http://here"))


async def test_what_is_put_is_there(storage: Storage, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(b"x" * 9_000_000)
    await storage.upload(source, "a/big")
    await storage.put("a/small", b"hello")
    await storage.download("a/big", copy)

    assert copy.read_bytes() == source.read_bytes()
    assert await storage.get("a/small") == b"hello"
    assert await storage.size("a/big") == 9_000_000
    assert await storage.size("a/none") is None
    assert await storage.list("a") == [("a/big", 9_000_000), ("a/small", 5)]


async def test_a_listing_is_of_a_folder_not_of_a_beginning(storage: Storage) -> None:
    for key in ("run/1/x", "run/10/x", "run/1y"):
        await storage.put(key, b"")
    assert [key for key, _ in await storage.list("run/1")] == ["run/1/x"]
    assert await storage.list("nothing") == []


async def test_a_stream_that_fails_leaves_what_was_there(storage: Storage, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    async def failing() -> AsyncIterator[bytes]:
        yield b"x" * 9_000_000
        raise Stop

    await storage.put("a/file", b"before")
    with pytest.raises(Stop):
        await storage.put("a/file", failing())
    assert await storage.get("a/file") == b"before"
    assert [p.name for p in (tmp_path / "objects" / "a").iterdir()] == ["file"]


async def test_deleting_twice_is_fine(storage: Storage) -> None:
    await storage.put("a", b"")
    await storage.delete(["a", "a", "none"])
    assert await storage.size("a") is None
    with pytest.raises(FileNotFoundError):
        await storage.get("a")


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "a//b"])
async def test_keys_cannot_leave_the_store(storage: Storage, key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="parse path"):
        await storage.put(key, b"")
    assert not (tmp_path / "outside").exists()


def test_a_signature_covers_method_key_and_every_claim() -> None:
    signer = UrlSigner(b"secret", "http://here/")
    url = signer.sign("PUT", "a/b c", expires_at=2**33, limit="5")
    assert url.startswith("http://here/api/objects/a/b%20c?")
    query = dict(pair.split("=") for pair in url.partition("?")[2].split("&"))
    assert signer.verify("PUT", "a/b c", query)
    assert not signer.verify("GET", "a/b c", query)
    assert not signer.verify("PUT", "a/b", query)
    assert not signer.verify("PUT", "a/b c", query | {"limit": "6"})
    assert not signer.verify("PUT", "a/b c", {**query, "x": "y"})
    assert not signer.verify("PUT", "a/b c", {})
    assert not UrlSigner(b"other", "http://here").verify("PUT", "a/b c", query)
    late = signer.sign("PUT", "a", expires_at=1).partition("?")[2]
    assert not signer.verify("PUT", "a", dict(pair.split("=") for pair in late.split("&")))
