"""Connections between every two ranks, for messages of compiled code (``kernels/messages.py``).

Between two ranks there are two connections: one for data, and one on which each says every second that it is alive. A
peer that is gone, that says nothing for ``SILENT_SECONDS`` (stopped, or its host cut off), or that leaves with an error
ends a wait within seconds, by an error that names it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from mfdist.errors import LostRankError

DATA, PULSE = 0, 1
"""What a connection is for."""
PULSE_SECONDS, SILENT_SECONDS = 1.0, 10.0
ALIVE = 0xFFFF
"""In a pulse: nothing is wrong; otherwise the rank that is lost, or the sender's own where it leaves with an error."""
PATIENCE_SECONDS = 0.5
"""How long a rank that finds a connection closed waits to hear why."""
ENDED = "its process has ended"


@dataclass(frozen=True)
class Address:
    """Where a rank listens."""

    host: str
    port: int
    name: str
    place: tuple[str, ...]
    """What the ranks of one host have in common, see ``shared_memory.here``."""


class Transport:
    """The connections of this rank. ``connections``: int32 (ranks) file descriptors for data, -1 for this rank."""

    def __init__(
        self, rank: int, addresses: list[Address], sockets: dict[tuple[int, int], socket.socket], refused: list[str]
    ) -> None:
        self.rank, self._addresses = rank, addresses
        for link in sockets.values():
            link.setblocking(False)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._data = {peer: link for (peer, purpose), link in sockets.items() if purpose == DATA}
        self.connections: npt.NDArray[np.int32] = np.full(len(addresses), -1, np.int32)
        for peer, link in self._data.items():
            self.connections[peer] = link.fileno()
        self._pulse = _Pulse(rank, {peer: link for (peer, purpose), link in sockets.items() if purpose == PULSE})
        self.refused = refused
        """Addresses of those who tried to connect and did not know the secret."""

    @property
    def near(self) -> list[int]:
        """The ranks of this host, this one among them."""
        return [rank for rank, at in enumerate(self._addresses) if at.place == self._addresses[self.rank].place]

    @property
    def name(self) -> str:
        hosts = len({at.place for at in self._addresses})
        return f"sockets between the ranks of {hosts} {'host' if hosts == 1 else 'hosts'}"

    def wait(self, reading: list[int], writing: list[int], began: float, timeout_seconds: float) -> None:
        """Sleep until one of these peers can be read from or written to, some milliseconds at most.

        LostRankError where a peer is lost, or where ``timeout_seconds`` are over since ``began``.
        """
        self.check()
        events: dict[int, int] = {}
        for peers, event in ((reading, select.POLLIN), (writing, select.POLLOUT)):
            for peer in peers:
                events[peer] = events.get(peer, 0) | event
        watch = select.poll()
        for peer, event in events.items():
            watch.register(int(self.connections[peer]), event)
        watch.poll(50)
        if time.monotonic() - began > timeout_seconds:
            late = (reading or writing or [self.rank])[0]
            raise LostRankError(self._lost(late, f"it is alive, but sent nothing for {timeout_seconds:.0f} seconds"))

    def check(self) -> None:
        """LostRankError where a peer is known to be lost."""
        found = self._pulse.lost
        if found is not None:
            raise LostRankError(self._lost(*found))

    def named(self) -> LostRankError | None:
        """The rank whose loss is the cause of an error, where this is known by now or very soon."""
        end = time.monotonic() + PATIENCE_SECONDS
        while self._pulse.lost is None and time.monotonic() < end:
            time.sleep(0.01)
        found = self._pulse.lost
        return LostRankError(self._lost(*found)) if found else None

    def lose(self, peer: int, why: str) -> NoReturn:
        """Raise LostRankError: the data connection to ``peer`` has failed. Names the rank that began it, if known."""
        raise self.named() or LostRankError(self._lost(peer, why))

    def leave(self, all_alive: bool) -> None:
        """Close the connections; the others learn whether this rank ends as it should."""
        culprit = ALIVE if all_alive else (self._pulse.lost or (self.rank, ""))[0]
        self._pulse.close(culprit)
        for link in self._data.values():
            link.close()
        self._data.clear()

    def _lost(self, peer: int, why: str) -> str:
        at = self._addresses[peer]
        return (
            f"the contact to rank {peer} of this job ({at.name}, {at.host}) was lost: {why}. "
            "The same command continues from the last checkpoint."
        )


def why_failed(code: int) -> str:
    """What errno ``code`` of a connection to a peer says of the peer.

    A reset is what the kernel answers for a process that has ended with words unread or still to come.
    """
    if code in {errno.ECONNRESET, errno.EPIPE}:
        return ENDED
    return f"its connection failed ({os.strerror(code)})"


class _Pulse:
    """A thread that says to every peer that this rank is alive, and listens to theirs."""

    def __init__(self, rank: int, links: dict[int, socket.socket]) -> None:
        self.lost: tuple[int, str] | None = None
        """The first rank known to be lost, and why."""
        self._rank, self._links, self._closing = rank, links, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="mfdist-pulse", daemon=True)
        self._thread.start()

    def close(self, culprit: int) -> None:
        """Say ``culprit`` and end."""
        self._closing.set()
        self._thread.join()
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.send(struct.pack("!H", culprit))
                link.shutdown(socket.SHUT_WR)
                link.recv(4096)  # what is closed unread is a reset to the peer, which may overtake the word
            link.close()

    def _beat(self) -> None:
        heard = dict.fromkeys(self._links, time.monotonic())
        rest = dict.fromkeys(self._links, b"")
        said = 0.0
        while not self._closing.is_set() and heard:
            now = time.monotonic()
            if now - said >= PULSE_SECONDS:
                said = now
                for peer in heard:
                    with contextlib.suppress(OSError):
                        self._links[peer].send(struct.pack("!H", ALIVE))
            watch = select.poll()
            for peer in heard:
                watch.register(self._links[peer], select.POLLIN)
            watch.poll(100)
            for peer in list(heard):
                found = self._listen(peer, rest)
                if found is None:
                    del heard[peer]
                elif found:
                    heard[peer] = time.monotonic()
                elif time.monotonic() - heard[peer] > SILENT_SECONDS:
                    self._lose(peer, f"it has not answered for {SILENT_SECONDS:.0f} seconds")
                    del heard[peer]

    def _listen(self, peer: int, rest: dict[int, bytes]) -> bool | None:
        """Whether ``peer`` has said something; None where it will say no more."""
        try:
            found = self._links[peer].recv(4096)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self._lose(peer, why_failed(error.errno or 0))
            return None
        words = rest[peer] + found
        rest[peer] = words[len(words) // 2 * 2 :]
        for (culprit,) in struct.iter_unpack("!H", words[: len(words) // 2 * 2]):
            if culprit != ALIVE:
                self._lose(culprit, "that rank or the launcher says why" if culprit == peer else f"so rank {peer} says")
                return None
        if not found:
            if not self._closing.is_set():
                self._lose(peer, ENDED)
            return None
        return True

    def _lose(self, peer: int, why: str) -> None:
        if self.lost is None:
            self.lost = peer, why
