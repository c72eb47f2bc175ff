"""Integer micro-dollars inside, decimal strings in USD with six decimals outside. No float ever holds money."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal

MICRO = 1_000_000


def usd(microusd: int) -> str:
    """``1500000`` → ``"1.500000"``."""
    return f"{Decimal(microusd).scaleb(-6):.6f}"


def microusd(value: str | Decimal) -> int:
    """A decimal USD amount in micro-dollars, rounded half-even."""
    return int((Decimal(value) * MICRO).to_integral_value(ROUND_HALF_EVEN))


def charge(gpu_ms: int, microusd_per_hour: int) -> int:
    """Price of GPU time in micro-dollars, rounded half-even once."""
    return int((Decimal(gpu_ms * microusd_per_hour) / 3_600_000).to_integral_value(ROUND_HALF_EVEN))
