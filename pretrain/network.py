"""Addresses, ports and network interfaces of this machine, as ranks on several machines need them."""

from __future__ import annotations

import socket
from collections.abc import Iterable

import psutil

LOOPBACK = "127.0.0.1"
_ANY_PORT = 9  # where a route is asked for, nothing is sent
_OUTSIDE = "192.0.2.1"  # an address for documentation (RFC 5737): the way to it is the default route


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def own_address() -> str:
    """Return an address of this machine that others can reach: that of its host name, unless it is a loopback.

    Raises ValueError on a machine without any.
    """
    here = socket.gethostname()
    if not is_loopback(here):
        return socket.gethostbyname(here)
    found = list(interfaces().values())
    if not found:
        raise ValueError(f"host {here}: found no network interface with an address; set RUNG_MASTER_ADDR")
    routed = _source_address(_OUTSIDE)
    return routed if routed in found else found[0]


def gloo_interface(master: str) -> str | None:
    """Return the interface that Gloo must be told to use on this machine, None where it finds the right one itself.

    Gloo binds to what the host name resolves to: where that is a loopback address or nothing, no other machine reaches
    it. The right one has the route to `master`, the host of rank 0, or is the only one.
    Raises ValueError saying what to set where that leaves a choice.
    """
    here = socket.gethostname()
    if not is_loopback(here):
        return None
    found = interfaces()
    source = _source_address(master)
    chosen = [name for name, address in found.items() if address == source] or list(found)
    if len(chosen) == 1:
        return chosen[0]
    raise ValueError(
        f"host {here}: its name resolves to a loopback address or to none, and no interface has the route to rank 0 at "
        f"'{master}'; set GLOO_SOCKET_IFNAME to the one that reaches the other machines "
        f"({', '.join(found) or 'none was found'})"
    )


def is_loopback(host: str) -> bool:
    """Tell whether a host name resolves to a loopback address of this machine, or to none."""
    try:
        found: Iterable[str] = {str(row[4][0]) for row in socket.getaddrinfo(host, None)}
    except OSError:
        return True
    return any(address.startswith("127.") or address == "::1" for address in found)


def interfaces() -> dict[str, str]:
    """Return the interfaces that are up, but for loopback ones, with their IPv4 address."""
    up = {name for name, status in psutil.net_if_stats().items() if status.isup}
    return {
        name: row.address
        for name, rows in psutil.net_if_addrs().items()
        for row in rows
        if name in up and row.family == socket.AF_INET and not row.address.startswith("127.")
    }


def _source_address(destination: str) -> str:
    """Return the address from which packets to a destination would leave; empty where there is no way."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((destination, _ANY_PORT))
            return str(probe.getsockname()[0])
    except OSError:
        return ""
