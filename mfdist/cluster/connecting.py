"""How the connections of a :class:`~mfdist.cluster.transport.Transport` are made: who listens where, and who is let in.

    rank 0 listens at 10.0.0.1:4711, rank 1 at 10.0.0.2:4712       (addresses and a secret go by the process group)
    rank 1 -> rank 0   "I am rank 1, this is for data" and a number of its own
    rank 0 -> rank 1   a number of its own
    rank 1 -> rank 0   HMAC(secret, both numbers, who, what for)
    rank 0 -> rank 1   HMAC(secret, the same, "accepted")

Whoever cannot answer is refused, and named in the log; a rank stops listening once all its peers are there. What
travels afterwards is neither encrypted nor signed, as with gloo and NCCL.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any

from mfdist.cluster.addresses import is_loopback, own_address
from mfdist.cluster.shared_memory import here
from mfdist.cluster.transport import DATA, PULSE, Address, Transport
from mfdist.errors import MfdistError, UsageError

if TYPE_CHECKING:
    from mfdist.cluster.world import World

Links = dict[tuple[int, int], socket.socket]
"""Connections by rank and purpose."""
HELLO = struct.Struct("!8sHII32s")
"""What a connection begins with: MAGIC, what it is for, who calls, who is called, a number."""
MAGIC = b"mfdist-1"
HANDSHAKE_SECONDS, CONNECT_SECONDS = 5.0, 30.0


def open_transport(world: World) -> Transport | str:
    """Connections between every two ranks; collective. Where two of them cannot be connected, why, on every rank.

    UsageError where ``world.interface`` is no good."""
    secret = world.broadcast(secrets.token_bytes(32) if world.is_main else None)
    assert secret is not None
    hosts = world.gather(world.first_error(lambda: own_address(world.interface)))
    far = tuple(host for host in hosts if not is_loopback(host))
    host = hosts[world.rank]
    if far and is_loopback(host) and not world.interface:
        host = own_address(None, far)
    listener = world.first_error(lambda: Listener(host))
    try:
        addresses = world.gather(Address(host, listener.port, socket.gethostname(), here()))
        listener.open(world.rank, world.size, secret)
        links: Links = {}
        failure = None
        try:
            links = connect(world.rank, addresses, listener, secret)
        except (OSError, MfdistError) as error:
            failure = f"{error}"
        failures = [text for text in world.gather(failure) if text]
    finally:
        listener.close()
    if failures:
        for link in links.values():
            link.close()
        return failures[0]
    found = Transport(world.rank, addresses, links, listener.refused)
    world.transports.add(found)
    return found


class Listener:
    """The door of this rank while the connections are made: it lets in peers that know the secret."""

    def __init__(self, host: str) -> None:
        """UsageError where ``host`` is no address of this machine."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._door = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._door.bind((host, 0))
        except OSError as error:
            self._door.close()
            raise UsageError(f"this rank cannot listen on {host}: {error.strerror}; see --interface.") from None
        self._door.listen(128)
        self._door.settimeout(0.2)
        self.port = int(self._door.getsockname()[1])
        self.refused: list[str] = []
        self._found: Links = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def open(self, rank: int, ranks: int, secret: bytes) -> None:
        """Begin to let in the ranks above ``rank``."""
        self._thread = threading.Thread(target=self._let_in, args=(rank, ranks, secret), daemon=True)
        self._thread.start()

    def wait(self, number: int, seconds: float) -> Links:
        """The connections of (rank, purpose), once there are ``number``; else those that are there in time."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._found) >= number, seconds)
            return dict(self._found)

    def close(self) -> None:
        self._closed = True
        if self._thread is not None:
            self._thread.join()
        self._door.close()

    def _let_in(self, rank: int, ranks: int, secret: bytes) -> None:
        while not self._closed:
            try:
                link, where = self._door.accept()
            except (TimeoutError, OSError):
                continue
            # A thread each: somebody who connects and says nothing keeps nobody waiting.
            threading.Thread(target=self._examine, args=(link, where, rank, ranks, secret), daemon=True).start()

    def _examine(self, link: socket.socket, where: Any, rank: int, ranks: int, secret: bytes) -> None:
        try:
            link.settimeout(HANDSHAKE_SECONDS)
            hello = _read(link, HELLO.size)
            magic, purpose, caller, called, _number = HELLO.unpack(hello)
            number = secrets.token_bytes(32)
            link.sendall(number)
            answer = _read(link, 32)
            good = hmac.compare_digest(answer, _proof(secret, b"call", hello, number))
            if not (good and magic == MAGIC and called == rank < caller < ranks and purpose in (DATA, PULSE)):
                raise ConnectionError
            with self._changed:
                if (caller, purpose) in self._found:  # a peer calls once
                    raise ConnectionError
                link.sendall(_proof(secret, b"accepted", hello, number))
                self._found[caller, purpose] = link
                self._changed.notify_all()
        except OSError:
            link.close()
            self.refused.append(str(where[0]))


def call(address: Address, rank: int, called: int, purpose: int, secret: bytes) -> socket.socket:
    """A connection to a peer that knows the secret, too. OSError where there is none."""
    link = socket.create_connection((address.host, address.port), timeout=CONNECT_SECONDS)
    try:
        link.settimeout(CONNECT_SECONDS)
        hello = HELLO.pack(MAGIC, purpose, rank, called, secrets.token_bytes(32))
        link.sendall(hello)
        number = _read(link, 32)
        link.sendall(_proof(secret, b"call", hello, number))
        if not hmac.compare_digest(_read(link, 32), _proof(secret, b"accepted", hello, number)):
            raise ConnectionRefusedError(f"{address.host} does not know this job's secret")
    except BaseException:
        link.close()
        raise
    return link


def _proof(secret: bytes, what: bytes, hello: bytes, number: bytes) -> bytes:
    return hmac.digest(secret, what + hello + number, "sha256")


def _read(link: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        more = link.recv(size - len(found))
        if not more:
            raise ConnectionResetError
        found += more
    return found


def connect(rank: int, addresses: list[Address], listener: Listener, secret: bytes) -> Links:
    """The connections of (peer, purpose): to the ranks below, from those above. OSError or MfdistError name who is
    missing."""
    found: Links = {}
    try:
        for peer in range(rank):
            for purpose in (DATA, PULSE):
                found[peer, purpose] = call(addresses[peer], rank, peer, purpose, secret)
        missing = 2 * (len(addresses) - rank - 1)
        came = listener.wait(missing, CONNECT_SECONDS)
        found |= came
        if len(came) < missing:
            absent = next(p for p in range(rank + 1, len(addresses)) if (p, DATA) not in came or (p, PULSE) not in came)
            raise MfdistError(f"rank {absent} ({addresses[absent].name}) did not connect to rank {rank}.")
    except BaseException:
        for link in found.values():
            link.close()
        raise
    return found
