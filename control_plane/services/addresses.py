"""Which network addresses are anybody's, and which are somebody's own."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

GLOBAL_UNICAST = IPv6Network("2000::/3")
NAT64 = IPv6Network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether it is no loopback, link-local, private, multicast or otherwise reserved address, nor leads to one.

    Raises ValueError for what is not an address.
    """
    parsed = ip_address(address.partition("%")[0])
    inner = _inner(parsed)
    if inner is not None:
        parsed = inner
    if isinstance(parsed, IPv6Address):
        return parsed in GLOBAL_UNICAST and parsed.is_global and parsed.sixtofour is None and parsed.teredo is None
    return parsed.is_global and not (parsed.is_multicast or parsed.is_reserved)


def _inner(address: IPv4Address | IPv6Address) -> IPv4Address | None:
    """The IPv4 address that an IPv6 address stands for."""
    if isinstance(address, IPv4Address):
        return None
    if address in NAT64:
        return IPv4Address(address.packed[-4:])
    return address.ipv4_mapped


def written(host: str) -> str | None:
    """The address that a URL's host is written as, in any form that connecting understands (``127.1``, ``0x7f.1``,
    ``2130706433``); None for a name."""
    try:
        return str(ip_address(host.strip("[]").partition("%")[0]))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return None
