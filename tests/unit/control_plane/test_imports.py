"""The API starts fast and stays up without a cluster: it imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys

from argon2 import PasswordHasher

from control_plane.services import passwords

HEAVY = ("ray", "torch", "transformers", "mlflow", "tokenizers", "datasets", "peft")


def test_the_api_imports_nothing_heavy() -> None:
    code = "import sys, control_plane.app, control_plane.cli.serve; print(' '.join(m for m in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "control_plane.app" in loaded
    assert not {name.partition(".")[0] for name in loaded} & set(HEAVY)


async def test_an_unknown_account_costs_as_much_as_a_known_one() -> None:
    assert not PasswordHasher().check_needs_rehash(passwords.NOBODY)
    assert not await passwords.verify_password(None, "anything")
    known = await passwords.hash_password("right")
    assert await passwords.verify_password(known, "right")
    assert not await passwords.verify_password(known, "wrong")
    assert known.startswith("$argon2id$")
