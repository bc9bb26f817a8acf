"""What ranks send each other in a step by messages (``hosts`` says when), and how they take it.

    ROWS n       header | late rows of step n
    GRADIENTS n  header | gradients of step n | which rows of step n + 1 are early | those rows | requests of n + 2

Peers that share memory with this rank (``segment[p] >= 0``) write rows and gradients where they are read; of their
messages there are only headers and requests.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mfdist.kernels.numba_intrinsics import LOOKS, SPINS, clock, kernel, yield_processor
from mfdist.kernels.sockets import AT, COUNT, WHOLE, add_section, clear_message, receive_some, send_some
from mfdist.kernels.wire import (
    AFTER,
    ASKED,
    ASKS,
    BODY,
    BYTES,
    CLOCK,
    CODE,
    EARLY_IN,
    EARLY_OUT,
    GRADIENTS,
    HEADER,
    KIND,
    LINES,
    LOST,
    MINE,
    NEXT,
    OUT_OF_STEP,
    PLACE,
    RANK,
    RING,
    ROOM,
    ROWS,
    SENT_BYTES,
    SENT_LINES,
    SLOPE,
    SOON,
    STEP,
    TAKEN,
    WAITED,
    gradients_from_others,
    lines_for_others,
    own_gradients,
    own_lines,
)  # fmt: skip


@kernel
def post_rows(ring: Any, wire: Any, control: Any, step: Any, rows: Any) -> None:
    """Begin to send the late rows of ``step``."""
    place = step % RING
    asked, early = ring.bounds[place, ASKED], ring.bounds[place, EARLY_OUT]
    first = lines_for_others(wire, control, step)
    for peer in range(wire.ends.size):
        if peer != control[RANK]:
            begin, end = asked[peer] + early[peer], asked[peer + 1]
            far = end - begin if wire.segment[peer] < 0 else 0
            _begin(wire, peer, ROWS, step, far, 0, 0)
            _add_lines(wire, control, peer, rows, wire.narrow[0], first, (step & 1) * control[ROOM], begin, far)
            control[SENT_LINES] += asked[peer + 1] - asked[peer]
            _go(wire, control, peer)


@kernel
def post_gradients(ring: Any, wire: Any, control: Any, step: Any, rows: Any, gradients: Any) -> None:
    """Begin to send the gradients of ``step``, and with them what peers need for the next step and the one after."""
    place, soon, later = step % RING, (step + 1) % RING, (step + 2) % RING
    rank = control[RANK]
    for peer in range(wire.ends.size):
        if peer == rank:
            continue
        is_far = wire.segment[peer] < 0
        mine = ring.bounds[place, MINE]
        number = mine[peer + 1] - mine[peer] if step >= 0 else 0
        early = ring.bounds[soon, EARLY_OUT, peer] if control[NEXT] > 0 else 0
        size = wire.id_bounds[peer + 1] - wire.id_bounds[peer] if control[AFTER] > 0 else 0
        _begin(wire, peer, GRADIENTS, step, number if is_far else 0, early, size)
        head = wire.heads_out[peer]
        head[SLOPE] = wire.slopes[rank]
        if control[AFTER] > 0:
            first = ring.bounds[later, MINE, peer]
            head[ASKS], head[PLACE] = ring.bounds[later, MINE, peer + 1] - first, first
        control[SENT_LINES] += number
        if is_far:
            if step >= 0:
                first = own_gradients(wire, control, rank)
                _add_lines(wire, control, peer, gradients, wire.narrow[1], first, 0, mine[peer], number)
            if control[NEXT] > 0:
                asked = ring.bounds[soon, ASKED]
                count = (asked[peer + 1] - asked[peer] + 7) // 8
                add_section(wire.sent[peer], wire.sent_state[peer], wire.bits_out[peer].ctypes.data, count)
                first = lines_for_others(wire, control, step + 1)
                half = ((step + 1) & 1) * control[ROOM]
                _add_lines(wire, control, peer, rows, wire.narrow[0], first, half, asked[peer], early)
        address = wire.ids_out.ctypes.data + wire.id_bounds[peer]
        add_section(wire.sent[peer], wire.sent_state[peer], address, size)
        _go(wire, control, peer)


@kernel
def _begin(wire: Any, peer: Any, kind: Any, step: Any, lines: Any, soon: Any, size: Any) -> None:
    head = wire.heads_out[peer]
    head[KIND], head[STEP], head[LINES], head[SOON], head[BYTES] = kind, step, lines, soon, size
    head[ASKS] = head[PLACE] = head[SLOPE] = 0
    clear_message(wire.sent_state[peer])
    add_section(wire.sent[peer], wire.sent_state[peer], head.ctypes.data, head.size * 8)


@kernel
def _add_lines(
    wire: Any, control: Any, peer: Any, array: Any, narrow: Any, first: Any, narrow_first: Any, begin: Any, number: Any
) -> None:  # fmt: skip
    """Add ``number`` lines of ``array`` from ``first + begin`` on, or their narrow copies."""
    width = array.shape[1]
    if narrow.shape[0] > 0:
        address, size = narrow.ctypes.data + (narrow_first + begin) * width * 2, number * width * 2
    else:
        address, size = array.ctypes.data + (first + begin) * width * 4, number * width * 4
    add_section(wire.sent[peer], wire.sent_state[peer], address, size)


@kernel
def _go(wire: Any, control: Any, peer: Any) -> None:
    """Count a message that is complete, and send what goes at once; :func:`take` sends the rest."""
    sections, state = wire.sent[peer], wire.sent_state[peer]
    for k in range(state[COUNT]):
        control[SENT_BYTES] += sections[k, 1]
    code = send_some(wire.connections[peer], sections, state)
    if code < 0:
        control[LOST], control[CODE] = peer, code


# Taking -------------------------------------------------------------------------------------------


@kernel
def expect(wire: Any, control: Any) -> None:
    """From now on the next message of every peer is due."""
    for peer in range(wire.ends.size):
        clear_message(wire.coming_state[peer])
        head = wire.heads_in[peer]
        add_section(wire.coming[peer], wire.coming_state[peer], head.ctypes.data, head.size * 8)
        wire.phase[peer] = TAKEN if peer == control[RANK] else HEADER


@kernel
def take(kind: Any, step: Any, ring: Any, wire: Any, control: Any, rows: Any, gradients: Any) -> bool:
    """Whether every peer's message is here and all of this rank's are on their way; gives up after a millisecond, or
    where a peer is lost (``control``). Call it again with the same arguments until it is."""
    looks, whole, began = 0, False, clock(control[CLOCK:])
    while control[LOST] < 0 and looks < SPINS // 20 + LOOKS:
        whole = _move(kind, step, ring, wire, control, rows, gradients)
        if whole:
            break
        looks += 1
        if looks > SPINS // 20:
            yield_processor()
    control[WAITED] += clock(control[CLOCK:]) - began
    return whole


@kernel
def _move(kind: Any, step: Any, ring: Any, wire: Any, control: Any, rows: Any, gradients: Any) -> bool:
    """Send and take what goes now; whether that was all."""
    whole = True
    for peer in range(wire.ends.size):
        code = WHOLE
        if wire.sent_state[peer, AT] < wire.sent_state[peer, COUNT]:
            code = send_some(wire.connections[peer], wire.sent[peer], wire.sent_state[peer])
            whole &= code == WHOLE
        if code >= 0 and wire.phase[peer] != TAKEN:
            code = _take_from(peer, kind, step, ring, wire, control, rows, gradients)
            whole &= code == WHOLE
        if code < 0:
            control[LOST], control[CODE] = peer, code
    return whole


@kernel
def _take_from(
    peer: Any, kind: Any, step: Any, ring: Any, wire: Any, control: Any, rows: Any, gradients: Any
) -> Any:  # fmt: skip
    sections, state = wire.coming[peer], wire.coming_state[peer]
    code = receive_some(wire.connections[peer], sections, state)
    if code == WHOLE and wire.phase[peer] == HEADER:
        wire.phase[peer] = BODY
        clear_message(state)
        head = wire.heads_in[peer]
        if head[KIND] != kind or head[STEP] != step:
            return OUT_OF_STEP
        code = (
            _list_rows(peer, step, ring, wire, control, rows)
            if kind == ROWS
            else _list_gradients(peer, step, ring, wire, control, rows, gradients)
        )
        if code == WHOLE:
            code = receive_some(wire.connections[peer], sections, state)
    if code == WHOLE:
        wire.phase[peer] = TAKEN
    return code


@kernel
def _list_rows(peer: Any, step: Any, ring: Any, wire: Any, control: Any, rows: Any) -> int:
    """The places of what follows a header of ROWS."""
    place, width = step % RING, rows.shape[1]
    if wire.segment[peer] >= 0:
        return WHOLE
    mine = ring.bounds[place, MINE]
    begin = mine[peer] + ring.bounds[place, EARLY_IN, peer]
    number = mine[peer + 1] - begin
    if wire.heads_in[peer, LINES] != number:
        return OUT_OF_STEP
    _expect_lines(wire, peer, rows, wire.narrow[2], own_lines(wire, control, control[RANK], step), begin, number, width)
    return WHOLE


@kernel
def _list_gradients(peer: Any, step: Any, ring: Any, wire: Any, control: Any, rows: Any, gradients: Any) -> int:
    """The places of what follows a header of GRADIENTS."""
    place, soon, width, head = step % RING, (step + 1) % RING, rows.shape[1], wire.heads_in[peer]
    size = np.int64(head[BYTES])
    if size > wire.ids_in.shape[1] or head[ASKS] > size:
        return OUT_OF_STEP
    wire.slopes[peer] = head[SLOPE]
    if wire.segment[peer] < 0:
        if step >= 0:
            asked = ring.bounds[place, ASKED]
            number = asked[peer + 1] - asked[peer]
            if head[LINES] != number:
                return OUT_OF_STEP
            first = gradients_from_others(wire, control)
            _expect_lines(wire, peer, gradients, wire.narrow[3], first, asked[peer], number, width)
        if control[NEXT] > 0:
            mine, early = ring.bounds[soon, MINE], np.int64(head[SOON])
            number = mine[peer + 1] - mine[peer]
            if early > number:
                return OUT_OF_STEP
            ring.bounds[soon, EARLY_IN, peer] = early
            bits = wire.bits_in[peer].ctypes.data
            add_section(wire.coming[peer], wire.coming_state[peer], bits, (number + 7) // 8)
            first = own_lines(wire, control, control[RANK], step + 1)
            _expect_lines(wire, peer, rows, wire.narrow[2], first, mine[peer], early, width)
    add_section(wire.coming[peer], wire.coming_state[peer], wire.ids_in[peer].ctypes.data, size)
    return WHOLE


@kernel
def _expect_lines(
    wire: Any, peer: Any, array: Any, narrow: Any, first: Any, begin: Any, number: Any, width: Any
) -> None:  # fmt: skip
    if narrow.shape[0] > 0:
        address, size = narrow.ctypes.data + begin * width * 2, number * width * 2
    else:
        address, size = array.ctypes.data + (first + begin) * width * 4, number * width * 4
    add_section(wire.coming[peer], wire.coming_state[peer], address, size)
