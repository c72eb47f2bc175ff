from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    name: str
    weakens: str
    file: str
    old: str
    """Is in the file exactly once."""
    new: str
    tests: tuple[str, ...]
    """Pytest's ids; at least one of them must fail."""
