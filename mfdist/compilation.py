"""What numba compiles, and how long it takes: once a machine, then the code is found on the disk.

A job that compiles would seem dead, and its rates would be wrong. :mod:`mfdist.log` says that it compiles, and whoever
measures a time takes :func:`seconds` out of it. Nothing here imports numba: until somebody does, nothing is compiled.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

USUALLY = "once a machine, usually 20 to 60 s"
"""What a person is told beside "compiling kernels"."""


class _Clock:
    """Seconds with at least one compilation under way, of all threads; a compilation may begin others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way, self._began, self._seconds = 0, 0.0, 0.0

    def start(self) -> None:
        with self._lock:
            if self._under_way == 0:
                self._began = time.monotonic()
            self._under_way += 1

    def end(self) -> None:
        with self._lock:
            if self._under_way == 0:  # it began before anybody listened
                return
            self._under_way -= 1
            if self._under_way == 0:
                self._seconds += time.monotonic() - self._began

    def read(self) -> tuple[float, bool]:
        with self._lock:
            now = time.monotonic() - self._began if self._under_way else 0.0
            return self._seconds + now, self._under_way > 0


_clock = _Clock()
_listening = _announced = False


def seconds() -> float:
    """Seconds that this process has spent compiling so far."""
    _listen()
    return _clock.read()[0]


def under_way() -> bool:
    """Whether some thread of this process compiles now."""
    _listen()
    return _clock.read()[1]


def first_spell() -> bool:
    """Whether some thread compiles now, and this is the first call that finds one at it: who asks may say so."""
    global _announced  # noqa: PLW0603
    if _announced or not under_way():
        return False
    _announced = True
    return True


def _listen() -> None:
    """Hear of every compilation from now on, as soon as numba is there."""
    global _listening  # noqa: PLW0603
    if _listening or not hasattr(sys.modules.get("numba"), "njit"):
        return
    from numba.core import event

    class Listener(event.Listener):
        def on_start(self, event: Any) -> None:
            _clock.start()

        def on_end(self, event: Any) -> None:
            _clock.end()

    with _clock._lock:
        if not _listening:
            register: Any = event.register
            register("numba:compile", Listener())
            _listening = True
