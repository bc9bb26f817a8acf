"""What ranks send each other in a step by messages (``hosts`` says when), and how they take it.

    ROWS n       header | late rows of step n
    GRADIENTS n  header | gradients of step n | which rows of step n + 1 are early | those rows | requests of n + 2

Requests of a rank are the items of its batch, ascending, each as the difference to the one before (from the owner's
first item on), seven bits a byte, low ones first: Electronics' at 65,536 ratings take 1.1 bytes each. An owner counts
requests in rank order. It sends a peer's early rows first and then the late ones, each by item; the peer learns which
are early by a bit a request, and keeps its gradients in the same order.

Peers that share memory with this rank (``segment[p] >= 0``) write rows and gradients where they are read; of their
messages there are only headers and requests. Example, two hosts of one rank: rank 0 asks rank 1 for items 12, 15 and
19, of which the step before moves 15: bits 1, 0, 1; lines of 12, 19, 15; GRADIENTS brings the first two, ROWS the last.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mfdist.kernels.grouping import group
from mfdist.kernels.machine import LOOKS, SPINS, clock, kernel, yield_processor
from mfdist.kernels.ranks import bound
from mfdist.kernels.sockets import AT, COUNT, WHOLE, add_section, clear_message, pull, push

RING = 3
"""Steps at hand: the one in work and two ahead; step m's place in the arrays of :class:`Ring` is m % RING."""


class Ring(NamedTuple):
    """The batches at hand, by step. ``room``: the most ratings of a batch, over all ranks."""

    user: Any
    item: Any
    """int32 (RING, room): local rows of users, global ones of items."""
    rating: Any
    """float32 (RING, room)."""
    by_user: Any
    by_item: Any
    """int32 (RING, 4, room + 2): see :func:`group`, at ORDER, DISTINCT, STARTS, SLOT."""
    by_owner: Any
    """int32 (RING, 11, room + 2): the same of what all ranks ask this one for, and SPLIT to LATE."""
    line: Any
    """int32 (RING, room): of each distinct item, its line in this rank's own ones."""
    counts: Any
    """int64 (RING, 6): RATINGS to EARLY."""
    bounds: Any
    """int64 (RING, 4, ranks + 1): MINE to EARLY_OUT."""
    pairs: Any
    """int64 (2, room + 1): space for :func:`group`."""


ORDER, DISTINCT, STARTS, SLOT, SPLIT, FIRSTS, ENDS, TO, BACK, REQUESTED, LATE = range(11)
"""Lines of ``by_owner``, the first four also of ``by_user`` and ``by_item``. SPLIT: distinct rows, early ones first;
FIRSTS, ENDS: where in ORDER the requests of each of these are. TO, BACK: of each request, where its row goes in
``rows`` and where its gradient comes in ``gradients``. LATE: whether each of DISTINCT is."""
RATINGS, USERS, ITEMS, REQUESTS, OWNED, EARLY = range(6)
"""Places of ``counts``: ratings and distinct rows of the batch; requests of all ranks, their distinct rows, how many of
those are early."""
MINE, ASKED, EARLY_IN, EARLY_OUT = range(4)
"""Lines of ``bounds``: the first of this rank's items that each rank owns; the first request of each rank; how many of
a rank's rows come early, and go early."""


class Wire(NamedTuple):
    """Connections to the other ranks and the messages in work on them, by rank."""

    connections: Any
    """int32 (ranks): file descriptors."""
    segment: Any
    """int64 (ranks): of the shared memory, -1 of ranks elsewhere; this rank has one as well."""
    ends: Any
    """int32 (ranks): one past the last item of each."""
    sent: Any
    coming: Any
    """int64 (ranks, MOST, 2): sections, see ``sockets``."""
    sent_state: Any
    coming_state: Any
    """int64 (ranks, 3)."""
    phase: Any
    """int64 (ranks): HEADER, BODY or TAKEN."""
    heads_out: Any
    heads_in: Any
    """float64 (ranks, 8): KIND to SLOPE."""
    ids_out: Any
    """uint8: requests as they travel, from ``id_bounds`` int64 (ranks + 1) on to each."""
    id_bounds: Any
    ids_in: Any
    """uint8 (ranks, bytes)."""
    bits_out: Any
    bits_in: Any
    """uint8 (ranks, bytes)."""
    slopes: Any
    """float32 (ranks + 1): each rank's gradient of the offset, and their sum in rank order."""
    narrow: Any
    """Rows and gradients rounded to bfloat16: uint16 (lines, width) rows for others (of even and odd steps), gradients
    for others, rows and gradients from others; and both arrays as uint32 (floats,). No lines: float32 travels."""


KIND, STEP, LINES, SOON, BYTES, ASKS, PLACE, SLOPE = range(8)
"""Of a header: what it is, of which step; late rows or gradients, early rows, bytes of requests; how many those are,
the place of the first among the sender's items; its gradient of the offset."""
ROWS, GRADIENTS = 1, 2
HEADER, BODY, TAKEN = range(3)
RANK, STAGE, LOST, CODE, NEXT, AFTER, SENT_LINES, SENT_BYTES, ROOM, WAITED, CLOCK = range(11)
"""Places of ``control`` (int64): this rank; the stage to call next; which peer is lost and the system's number for it
(LOST is -1 before); whether there are a next step and one after that; what has been sent so far; ratings of a batch at
most; nanoseconds spent in :func:`take`, and two places for the clock."""
OUT_OF_STEP = -(1 << 21)
"""In CODE: a message is not the one that is due."""


# Lines of a segment, see ``hosts``


@kernel
def own_lines(wire: Any, control: Any, rank: Any, step: Any) -> Any:
    """The first line of ``rows`` for what ``rank``, which shares this memory, asks for in ``step``."""
    return (4 * wire.segment[rank] + (step & 1)) * control[ROOM]


@kernel
def lines_for_others(wire: Any, control: Any, step: Any) -> Any:
    """The first line of ``rows`` for what ranks elsewhere ask this one for in ``step``."""
    return (4 * wire.segment[control[RANK]] + 2 + (step & 1)) * control[ROOM]


@kernel
def own_gradients(wire: Any, control: Any, rank: Any) -> Any:
    """The first line of ``gradients`` of what ``rank``, which shares this memory, has asked for."""
    return 2 * wire.segment[rank] * control[ROOM]


@kernel
def gradients_from_others(wire: Any, control: Any) -> Any:
    """The first line of ``gradients`` of what ranks elsewhere have asked this one for."""
    return (2 * wire.segment[control[RANK]] + 1) * control[ROOM]


# Requests -----------------------------------------------------------------------------------------


@kernel
def write_requests(ring: Any, wire: Any, control: Any, step: Any) -> None:
    """Group the items of ``step``, and write down whom to ask for which."""
    place, rank = step % RING, control[RANK]
    grouped, mine, number = ring.by_item[place], ring.bounds[place, MINE], ring.counts[place, RATINGS]
    items = grouped[DISTINCT]
    found = group(ring.item[place, :number], grouped[ORDER], ring.pairs, items, grouped[STARTS], grouped[SLOT])
    ring.counts[place, ITEMS] = found
    bound(items, found, wire.ends, mine)
    ids, byte = wire.ids_out, 0
    for owner in range(wire.ends.size):
        wire.id_bounds[owner] = byte
        before = np.int64(wire.ends[owner - 1]) if owner > 0 else 0
        if owner != rank:
            for k in range(mine[owner], mine[owner + 1]):
                left = items[k] - before
                before = np.int64(items[k])
                while left >= 128:
                    ids[byte] = left & 127 | 128
                    left >>= 7
                    byte += 1
                ids[byte] = left
                byte += 1
    wire.id_bounds[wire.ends.size] = byte


@kernel
def read_requests(ring: Any, wire: Any, control: Any, step: Any) -> None:
    """Group what all ranks ask for in ``step``, tell early rows from late ones, and give each request its lines."""
    place, rank = step % RING, control[RANK]
    grouped, asked, mine = ring.by_owner[place], ring.bounds[place, ASKED], ring.bounds[place, MINE]
    items, requested = ring.by_item[place, DISTINCT], grouped[REQUESTED]
    first = np.int64(wire.ends[rank - 1]) if rank > 0 else 0
    number = 0
    for peer in range(wire.ends.size):
        asked[peer] = number
        if peer == rank:
            for k in range(mine[rank], mine[rank + 1]):
                requested[number] = items[k] - first
                number += 1
        else:
            ids, byte, row = wire.ids_in[peer], 0, np.int64(0)
            for _ in range(np.int64(wire.heads_in[peer, ASKS])):
                shift = 0
                while ids[byte] >= 128:
                    row += np.int64(ids[byte] & 127) << shift
                    shift += 7
                    byte += 1
                row += np.int64(ids[byte]) << shift
                byte += 1
                requested[number] = row
                number += 1
    asked[wire.ends.size] = number
    ring.counts[place, REQUESTS] = number
    ring.counts[place, OWNED] = group(
        requested[:number], grouped[ORDER], ring.pairs, grouped[DISTINCT], grouped[STARTS], grouped[SLOT]
    )
    _split(ring, step)
    _give_lines(ring, wire, control, step)


@kernel
def _split(ring: Any, step: Any) -> None:
    """Which rows this rank can send before the step before ``step`` has moved its own; of the first step none."""
    place, before = step % RING, (step - 1) % RING
    grouped, counts = ring.by_owner[place], ring.counts[place]
    rows, late, moved = grouped[DISTINCT], grouped[LATE], ring.by_owner[before, DISTINCT]
    number, j, early = ring.counts[before, OWNED] if step > 0 else 0, 0, 0
    for k in range(counts[OWNED]):
        while j < number and moved[j] < rows[k]:
            j += 1
        late[k] = step == 0 or (j < number and moved[j] == rows[k])
        early += 1 - late[k]
    counts[EARLY] = early
    at, behind = 0, early
    for k in range(counts[OWNED]):
        if late[k]:
            to, behind = behind, behind + 1
        else:
            to, at = at, at + 1
        grouped[SPLIT, to] = rows[k]
        grouped[FIRSTS, to], grouped[ENDS, to] = grouped[STARTS, k], grouped[STARTS, k + 1]


@kernel
def _give_lines(ring: Any, wire: Any, control: Any, step: Any) -> None:
    """Where each request's row goes and its gradient comes."""
    place, rank = step % RING, control[RANK]
    grouped, asked, early_out = ring.by_owner[place], ring.bounds[place, ASKED], ring.bounds[place, EARLY_OUT]
    slot, late, to, back = grouped[SLOT], grouped[LATE], grouped[TO], grouped[BACK]
    for peer in range(wire.ends.size):
        begin, end = asked[peer], asked[peer + 1]
        early_out[peer] = 0
        if wire.segment[peer] >= 0:
            first = ring.bounds[place, MINE, rank] if peer == rank else np.int64(wire.heads_in[peer, PLACE])
            for q in range(begin, end):
                to[q] = own_lines(wire, control, peer, step) + first + q - begin
                back[q] = own_gradients(wire, control, peer) + first + q - begin
            continue
        bits = wire.bits_out[peer]
        bits[: (end - begin + 7) // 8] = 0
        for q in range(begin, end):
            if not late[slot[q]]:
                early_out[peer] += 1
                bits[(q - begin) >> 3] |= 1 << ((q - begin) & 7)
        at, behind = begin, begin + early_out[peer]
        for q in range(begin, end):
            if late[slot[q]]:
                line, behind = behind, behind + 1
            else:
                line, at = at, at + 1
            to[q] = lines_for_others(wire, control, step) + line
            back[q] = gradients_from_others(wire, control) + line


@kernel
def find_lines(ring: Any, wire: Any, control: Any, step: Any) -> None:
    """The lines of this rank's own items of ``step``, now that it knows which come early."""
    place = step % RING
    mine, line = ring.bounds[place, MINE], ring.line[place]
    for owner in range(wire.ends.size):
        begin, end = mine[owner], mine[owner + 1]
        if wire.segment[owner] >= 0:
            for k in range(begin, end):
                line[k] = k
            continue
        at, behind, bits = begin, begin + ring.bounds[place, EARLY_IN, owner], wire.bits_in[owner]
        for k in range(begin, end):
            if bits[(k - begin) >> 3] >> ((k - begin) & 7) & 1:
                line[k], at = at, at + 1
            else:
                line[k], behind = behind, behind + 1


# Sending ------------------------------------------------------------------------------------------


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
    code = push(wire.connections[peer], sections, state)
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
            code = push(wire.connections[peer], wire.sent[peer], wire.sent_state[peer])
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
    code = pull(wire.connections[peer], sections, state)
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
            code = pull(wire.connections[peer], sections, state)
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
