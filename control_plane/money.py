"""Integer micro-dollars inside, decimal strings in USD with six decimals outside. No float ever holds money."""

from __future__ import annotations

from calendar import monthrange
from datetime import date
from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction

MICRO = 1_000_000
GIB = 1024**3


def usd(microusd: int) -> str:
    """``1500000`` → ``"1.500000"``."""
    return f"{Decimal(microusd).scaleb(-6):.6f}"


def microusd(value: str | Decimal) -> int:
    """A decimal USD amount in micro-dollars, rounded half-even."""
    return int((Decimal(value) * MICRO).to_integral_value(ROUND_HALF_EVEN))


def charge(gpu_ms: int, microusd_per_hour: int) -> int:
    """Price of GPU time in micro-dollars, rounded half-even once."""
    return int((Decimal(gpu_ms * microusd_per_hour) / 3_600_000).to_integral_value(ROUND_HALF_EVEN))


def storage_charge(mean_bytes: int, microusd_per_gib_month: int, day: date) -> int:
    """Price of keeping ``mean_bytes`` through ``day`` in micro-dollars, rounded half-even once."""
    days = monthrange(day.year, day.month)[1]
    return round(Fraction(mean_bytes * microusd_per_gib_month, GIB * days))
