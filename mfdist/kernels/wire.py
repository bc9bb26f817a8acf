"""Where the batches at hand and the messages in work lie (``hosts`` says what for), and which lines are whose."""

from __future__ import annotations

from typing import Any, NamedTuple

from mfdist.kernels.numba_intrinsics import kernel

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
