"""Argon2id, in threads, a few at a time: hashing must neither block the event loop nor fill the memory."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError

_hasher = PasswordHasher()
_threads = ThreadPoolExecutor(4, thread_name_prefix="passwords")
NOBODY = "$argon2id$v=19$m=65536,t=3,p=4$Tk3JStgUFjcPScEaJ/pfdQ$TgvOiyW55NwUpzbTtpiPfcMsHvTMQ57+QuHETmLQl0U"
"""A hash of nobody's password, as costly to verify as anybody's."""


async def hash_password(password: str) -> str:
    return await asyncio.get_running_loop().run_in_executor(_threads, _hasher.hash, password)


async def verify_password(password_hash: str | None, password: str) -> bool:
    """Whether the password fits. Without a hash (no such account) it takes the same time and is False."""
    loop = asyncio.get_running_loop()
    fits = await loop.run_in_executor(_threads, _verify, password_hash or NOBODY, password)
    return fits and password_hash is not None


def _verify(password_hash: str, password: str) -> bool:
    try:
        return _hasher.verify(password_hash, password)
    except (Argon2Error, InvalidHashError):
        return False
