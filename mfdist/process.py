"""A process and what surrounds it: signals that ask it to stop, a console that may be gone, the letters of a path."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
"""What the launcher passes on to its workers, and what a job answers by keeping what it has and ending with 75."""


def stop_signals() -> tuple[signal.Signals, ...]:
    """Those of ``STOP_SIGNALS`` that this process answers: not SIGHUP where it was started to ignore it (nohup)."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if not (ignored and number is signal.SIGHUP))


def end(code: int) -> NoReturn:
    """End this process with ``code``: wait for its threads, run what is registered for its end, flush the console, and
    go without taking down objects one by one.

    The interpreter looks for circular garbage among all that torch and numba have made, a second after the last word
    of a program and several on a busy machine; and threads of C++ that are still about then can abort a job that has
    done its work ("terminate called without an active exception").
    """
    vars(threading)["_shutdown"]()  # as the interpreter does: executors' threads are told to end, others waited for
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # the program was started without it (>&-)
            with contextlib.suppress(OSError, ValueError):  # a console that is gone, or closed
                stream.flush()
    os._exit(code)


# The console --------------------------------------------------------------------------------------

GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.ECONNRESET)
"""What writing to a pipe without a reader (``train | head``) or to a closed terminal raises."""


class _Stream:
    """A text stream that takes everything and shows nothing once its reader is gone."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, call: Any) -> None:
        try:
            call()
        except OSError as error:
            if error.errno not in GONE:
                raise
            silence(self)

    gone = False
    """Whether something could not be shown."""


def silence(stream: Any) -> None:
    """Let what is written to a text stream go nowhere from now on, what it still holds included: it is ``gone``."""
    with contextlib.suppress(AttributeError):
        stream.gone = True
    with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor holds nothing back
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)
    with contextlib.suppress(OSError, ValueError):
        stream.flush()


def visible(text: str) -> str:
    """``text`` without what steers a terminal: names and ids come from anywhere."""
    return _STEERING.sub(lambda found: repr(found[0])[1:-1], text)


_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@contextlib.contextmanager
def lasting_console() -> Iterator[None]:
    """Within the block stdout and stderr never fail for want of a reader, or for a letter that they do not have.

    What cannot be written at the end is lost in silence: who wants to know flushes before.
    """
    before = sys.stdout, sys.stderr
    for stream in before:
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    with contextlib.ExitStack() as stack:
        streams = [stream or stack.enter_context(open(os.devnull, "w")) for stream in before]
        sys.stdout, sys.stderr = map(_Stream, streams)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(ValueError, OSError):  # closed by now, or on a full disk
                    stream.flush()
            sys.stdout, sys.stderr = before


# Letters ------------------------------------------------------------------------------------------


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGE = 32 << 20


def give_memory_back() -> None:
    """Let glibc hold less of what was freed, for a process of many threads and large blocks; nothing elsewhere.

    By default each thread has an arena of its own, which keeps the blocks that its thread has freed. To be called
    before there are threads.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in ((_ARENA_MAX, 2), (_TRIM_THRESHOLD, _LARGE), (_MMAP_THRESHOLD, _LARGE)):
            mallopt(parameter, value)


def use_utf8() -> None:
    """Start this program again in Python's UTF-8 mode where its locale has another encoding, with the same pid.

    Arrow and our own files name paths in UTF-8. A locale of ASCII or Latin-1 would have Python and Arrow look for two
    different files under one name, and could not show either.
    """
    if sys.getfilesystemencoding().lower() in ("utf-8", "utf8") or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    if sys.stdout is not None:
        sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *_without_utf8_option(sys.orig_argv[1:])])


def _without_utf8_option(words: list[str]) -> list[str]:
    return [word for word in words if word != "-Xutf8=0"]
