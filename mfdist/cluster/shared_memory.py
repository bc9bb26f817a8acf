"""Memory that all ranks of one host share, and how they tell each other what stands in it.

Rank 0 makes a memory file without a name; the others open it through its process, so that it needs no file system
(a container's ``/dev/shm`` may be small) and is gone with the last process, however that ends. A rank writes, calls
:meth:`SharedMemory.signal`, and the others read after :meth:`SharedMemory.wait`. Example, two ranks:

    rank 0:  a[0] = 1; signal()                  wait(); use a[1]
    rank 1:               a[1] = 2; signal()     wait(); use a[0]      # both calls return once both have signalled

A wait looks at the memory first, then offers the processor to others between looks, and last sleeps; it notices within
milliseconds that another rank has left or that its process is gone.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mfdist.errors import LostRankError
from mfdist.kernels.numba_intrinsics import all_arrived, arrive

LINE_BYTES = 128
"""Each rank's counter has two cache lines to itself: processors fetch them in pairs."""
SIGNALS, LEFT = 0, 8
"""Places in a rank's line, in int64."""
PATIENT_SECONDS, LONGEST_SLEEP = 0.003, 0.0005
GONE = (
    "the contact to another rank of this job was lost; the cause is what that rank or the launcher says. "
    "The same command continues from the last checkpoint."
)


@dataclass(frozen=True)
class Offer:
    """How to find a memory file: by the process that made it, and a name that nobody else uses."""

    host: tuple[str, ...]
    process: int
    file: int
    name: str


def here() -> tuple[str, ...]:
    """What the ranks of one host have in common: the running kernel, the host's name, the numbering of processes."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as stream:
        found.append(stream.read().strip())
    with contextlib.suppress(OSError):
        found.append(os.readlink("/proc/self/ns/pid"))
    return tuple(found)


def make(size_bytes: int) -> tuple[Offer, mmap.mmap] | None:
    """A new memory file of zeros; None where this system has none."""
    name = f"mfdist-{secrets.token_hex(16)}"
    try:
        file = os.memfd_create(name)
    except (OSError, AttributeError):
        return None
    try:
        os.ftruncate(file, size_bytes)
        memory = mmap.mmap(file, size_bytes)
    except (OSError, ValueError):
        os.close(file)
        return None
    return Offer(here(), os.getpid(), file, name), memory


def attach(offer: Offer, size_bytes: int) -> mmap.mmap | None:
    """The memory of another rank's offer; None where it cannot be reached from here."""
    path = f"/proc/{offer.process}/fd/{offer.file}"
    try:
        if offer.host != here() or offer.name not in os.readlink(path):
            return None
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return mmap.mmap(file, size_bytes)
    except (OSError, ValueError):
        return None
    finally:
        os.close(file)


class SharedMemory:
    """The memory of one purpose, the same bytes on every rank. ``processes``: those of the ranks, in rank order."""

    def __init__(self, memory: mmap.mmap, rank: int, processes: Sequence[int], timeout_seconds: float) -> None:
        """OSError where a process cannot be watched."""
        self.rank, self.size = rank, len(processes)
        self._memory, self._used = memory, 0
        self._timeout_seconds = timeout_seconds
        self.signals: npt.NDArray[np.int64] = self.array((self.size, LINE_BYTES // 8), np.int64)
        """Of each rank: how often it has signalled, and whether it has left."""
        self._watch = select.poll()
        self._watched: list[int] = []
        for number, process in enumerate(processes):
            if number != rank:
                self._watched.append(os.pidfd_open(process))
                self._watch.register(self._watched[-1], select.POLLIN)

    @staticmethod
    def room(ranks: int, *sizes: int) -> int:
        """Bytes that hold arrays of ``sizes`` bytes, each a cache line apart."""
        return ranks * LINE_BYTES + sum(-(-size // LINE_BYTES) * LINE_BYTES for size in sizes)

    def array(self, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """The next array in the memory; every rank asks for the same ones in the same order."""
        count = int(np.prod(shape))
        found = np.frombuffer(self._memory, dtype, count, self._used).reshape(shape)
        self._used += -(-found.nbytes // LINE_BYTES) * LINE_BYTES
        return found

    def signal(self) -> None:
        """Say that what this rank has written may be read."""
        arrive(self.signals[self.rank])

    def wait(self) -> None:
        """Return when every rank has signalled as often as this one; LostRankError where one never will."""
        aim = self.signals[self.rank, SIGNALS]
        if not all_arrived(self.signals, aim):
            self._wait_long(aim)

    def _wait_long(self, aim: np.int64) -> None:
        began, sleep = time.monotonic(), 0.0
        while True:
            lost = bool(self.signals[:, LEFT].any()) or bool(self._watch.poll(0))
            if all_arrived(self.signals, aim):  # its last signal may have come before it left
                return
            waited = time.monotonic() - began
            if lost or waited > self._timeout_seconds:
                raise LostRankError(GONE)
            if waited > PATIENT_SECONDS:
                sleep = min(sleep + 1e-5, LONGEST_SLEEP)
                time.sleep(sleep)

    def leave(self) -> None:
        """Let the others know that this rank signals no more."""
        self.signals[self.rank, LEFT] = 1
        while self._watched:
            os.close(self._watched.pop())
