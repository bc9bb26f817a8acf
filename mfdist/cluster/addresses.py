"""The addresses of this host: which one a rank listens on, which one leads to another host."""

from __future__ import annotations

import contextlib
import os
import socket
import struct

from mfdist.errors import UsageError


def own_address(interface: str | None, peers: tuple[str, ...] = ()) -> str:
    """The address that this rank listens on: of ``interface`` (a name or an address), else of the interface by which
    torchrun's rendezvous is reached (or ``peers``, where that is this very host). UsageError where there is none."""
    if interface:
        return _address_of(interface)
    if name := os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]:
        return _address_of(name)
    for target in (os.environ.get("MASTER_ADDR", ""), *peers):
        found = way_to(target)
        if found and not is_loopback(found):
            return found
    return "127.0.0.1"


def way_to(target: str) -> str | None:
    """The local address from which ``target`` is reached."""
    with contextlib.suppress(OSError):
        for family, kind, _, _, where in socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM) if target else ():
            with socket.socket(family, kind) as probe:
                probe.connect(where)  # sends nothing
                return str(probe.getsockname()[0])
    return None


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _address_of(interface: str) -> str:
    """The IPv4 address of an interface; an address is its own."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            socket.inet_pton(family, interface)
            return interface
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            found = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", interface.encode()[:15]))  # SIOCGIFADDR
        except OSError:
            known = ", ".join(name for _, name in socket.if_nameindex())
            raise UsageError(
                f"--interface {interface}: no interface of that name has an IPv4 address; there are {known}."
            ) from None
    return socket.inet_ntoa(found[20:24])
