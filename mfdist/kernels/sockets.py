"""Messages between ranks over connected TCP sockets, in compiled code without Python's lock and without a copy.

A message is a list of *sections*, each a place in memory and its bytes; a *state* says how far it has come. Both ends
list the same sections, the receiver of a body once it has its header:

    sections  int64 (MOST, 2)    [address, bytes] of each, none empty
    state     int64 (3)          [section in work, its bytes done, how many sections there are]

:func:`send_some` and :func:`receive_some` move what goes now and never wait.
"""

from __future__ import annotations

import errno
import socket
import sys
from typing import Any

from numba import types

from mfdist.kernels.numba_intrinsics import kernel

MOST = 8
"""Sections of a message."""
AT, DONE, COUNT = range(3)
"""Places of a state."""
MOVING, WHOLE, CLOSED = 0, 1, -(1 << 20)
"""What :func:`send_some` and :func:`receive_some` return: more is to come, nothing is left, the other end has closed;
other negative numbers are an error of the system, negated."""

_ADDRESS, _SIZE, _NUMBER = types.uintp, types.intp, types.int32
_send: Any = types.ExternalFunction("send", _SIZE(_NUMBER, _ADDRESS, _ADDRESS, _NUMBER))
_receive: Any = types.ExternalFunction("recv", _SIZE(_NUMBER, _ADDRESS, _ADDRESS, _NUMBER))
_error: Any = types.ExternalFunction(
    "__error" if sys.platform == "darwin" else "__errno_location",
    types.CPointer(types.int32)(),  # type: ignore[no-untyped-call]
)
NOW = int(getattr(socket, "MSG_DONTWAIT", 0))
QUIETLY = NOW | int(getattr(socket, "MSG_NOSIGNAL", 0))
MORE = int(getattr(socket, "MSG_MORE", 0))
AGAIN, BUSY, INTERRUPTED = errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR


@kernel
def clear_message(state: Any) -> None:
    """Begin an empty message."""
    state[AT] = state[DONE] = state[COUNT] = 0


@kernel
def add_section(sections: Any, state: Any, address: Any, size: Any) -> None:
    """Add ``size`` bytes at ``address`` to a message; none are no section."""
    if size > 0:
        at = state[COUNT]
        sections[at, 0], sections[at, 1] = address, size
        state[COUNT] = at + 1


@kernel
def send_some(connection: Any, sections: Any, state: Any) -> int:
    """Send what the system takes of a message."""
    while state[AT] < state[COUNT]:
        at, done = state[AT], state[DONE]
        flags = QUIETLY if at + 1 == state[COUNT] else QUIETLY | MORE
        moved = _send(connection, sections[at, 0] + done, sections[at, 1] - done, flags)
        if moved < 0:
            code = _error()[0]
            if code == INTERRUPTED:
                continue
            return MOVING if code in (AGAIN, BUSY) else -code
        _go_on(sections, state, moved)
    return WHOLE


@kernel
def receive_some(connection: Any, sections: Any, state: Any) -> int:
    """Take what has come of a message."""
    while state[AT] < state[COUNT]:
        at, done = state[AT], state[DONE]
        moved = _receive(connection, sections[at, 0] + done, sections[at, 1] - done, NOW)
        if moved < 0:
            code = _error()[0]
            if code == INTERRUPTED:
                continue
            return MOVING if code in (AGAIN, BUSY) else -code
        if moved == 0:
            return CLOSED
        _go_on(sections, state, moved)
    return WHOLE


@kernel
def _go_on(sections: Any, state: Any, moved: Any) -> None:
    state[DONE] += moved
    if state[DONE] == sections[state[AT], 1]:
        state[AT] += 1
        state[DONE] = 0
