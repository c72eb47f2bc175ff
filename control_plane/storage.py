"""The object store: a local folder (``file://``) or S3 (``s3://bucket/prefix``), and signed URLs to it.

A key is a relative path, ``datasets/…`` or ``mlflow/…``; a write is whole or not there at all.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import url2pathname

import obstore
from obstore.exceptions import BaseError as StoreError
from obstore.store import LocalStore, S3Store, from_url

__all__ = ["Storage", "StoreError", "UrlSigner"]
CHUNK = 4 * 1024 * 1024


class UrlSigner:
    """Signs URLs of our own object route (``/api/objects/{key}``) for stores that cannot sign."""

    def __init__(self, secret: bytes, public_url: str) -> None:
        self._secret = secret
        self._public_url = public_url.rstrip("/")

    def sign(self, method: str, key: str, *, expires_at: int, **claims: str) -> str:
        """An absolute URL; ``claims`` become query parameters that the signature covers."""
        query = {"expires": str(expires_at), **claims}
        query["signature"] = self._digest(method, key, query)
        return f"{self._public_url}/api/objects/{quote(key)}?{urlencode(query)}"

    def verify(self, method: str, key: str, query: Mapping[str, str]) -> bool:
        """Whether this signature was made for this method, key and query, and is still in time."""
        claims = {name: value for name, value in query.items() if name != "signature"}
        genuine = hmac.compare_digest(self._digest(method, key, claims).encode(), query.get("signature", "").encode())
        return genuine and claims.get("expires", "").isdigit() and int(claims["expires"]) >= time.time()

    def _digest(self, method: str, key: str, claims: Mapping[str, str]) -> str:
        message = "\n".join([method, quote(key), urlencode(sorted(claims.items()))])
        return hmac.new(self._secret, message.encode(), hashlib.sha256).hexdigest()


class Storage:
    """``url``: ``file:///folder`` or ``s3://bucket/prefix`` (credentials and endpoint from ``AWS_*``)."""

    def __init__(self, url: str, signer: UrlSigner | None = None) -> None:
        self.local = url.startswith("file:")
        self.folder = Path(url2pathname(urlsplit(url).path)) if self.local else None
        self._signer = signer
        self._store: Any = LocalStore.from_url(url, mkdir=True) if self.local else from_url(url)

    async def upload(self, path: str | os.PathLike[str], key: str) -> None:
        """A local file into the store."""
        await obstore.put_async(self._store, key, Path(path), chunk_size=CHUNK)
        await self._persist(key)

    async def download(self, key: str, path: str | os.PathLike[str]) -> None:
        """An object into a local file, in bounded memory. Raises FileNotFoundError."""
        with open(path, "wb") as file:  # noqa: ASYNC230
            async for chunk in self.stream(key):
                file.write(chunk)

    async def put(self, key: str, data: bytes | AsyncIterator[bytes]) -> None:
        """Bytes, or chunks as they come; when the iterator raises, nothing is stored and the error passes through."""
        await obstore.put_async(self._store, key, data, chunk_size=CHUNK)
        await self._persist(key)

    async def _persist(self, key: str) -> None:
        """What is acknowledged survives a power cut: the file is on disk, and its name in every folder above it."""
        if self.folder is not None:
            await asyncio.to_thread(_sync, self.folder, key)

    async def get(self, key: str) -> bytes:
        """Raises FileNotFoundError."""
        return bytes(await (await obstore.get_async(self._store, key)).bytes_async())

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        """Chunks of an object. Raises FileNotFoundError at the first."""
        result = await obstore.get_async(self._store, key)
        async for chunk in result.stream(min_chunk_size=CHUNK):
            yield bytes(chunk)

    async def size(self, key: str) -> int | None:
        """Bytes of an object; None if there is none."""
        try:
            return int((await obstore.head_async(self._store, key))["size"])
        except FileNotFoundError:
            return None

    async def list(self, prefix: str) -> list[tuple[str, int]]:
        """(key, size) of every object under a folder."""
        found = [(o["path"], o["size"]) async for chunk in obstore.list(self._store, prefix=prefix) for o in chunk]
        return sorted(found)

    async def delete(self, keys: Iterable[str]) -> None:
        """A key that is gone already is fine."""
        for key in keys:
            try:
                await obstore.delete_async(self._store, key)
            except FileNotFoundError:
                continue

    async def sign(self, method: str, key: str, *, ttl_s: int, **claims: str) -> str:
        """A URL that allows one method on one key for ``ttl_s`` seconds.

        ``claims`` (``name``: attachment name, ``limit``: bytes) bind our own object route; S3 knows neither.
        """
        if isinstance(self._store, S3Store):
            return str(await obstore.sign_async(self._store, method, key, timedelta(seconds=ttl_s)))
        if self._signer is None:
            raise RuntimeError("this storage was made without a signer")
        return self._signer.sign(method, key, expires_at=int(time.time()) + ttl_s, **claims)


def _sync(folder: Path, key: str) -> None:
    path = folder / key
    for place in (path, *(parent for parent in path.parents if parent.is_relative_to(folder))):
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
