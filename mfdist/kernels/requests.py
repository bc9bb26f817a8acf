"""Who asks whom for which rows, as it travels, and the lines that rows and gradients take.

Requests of a rank are the items of its batch, ascending, each as the difference to the one before (from the owner's
first item on), seven bits a byte, low ones first: Electronics' at 65,536 ratings take 1.1 bytes each. An owner counts
requests in rank order. It sends a peer's early rows first and then the late ones, each by item; the peer learns which
are early by a bit a request, and keeps its gradients in the same order. Example, two hosts of one rank: rank 0 asks
rank 1 for items 12, 15 and 19, of which the step before moves 15: bits 1, 0, 1; lines of 12, 19, 15.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mfdist.kernels.grouping import group
from mfdist.kernels.numba_intrinsics import kernel
from mfdist.kernels.ranks import bound
from mfdist.kernels.wire import (
    ASKED,
    ASKS,
    BACK,
    DISTINCT,
    EARLY,
    EARLY_IN,
    EARLY_OUT,
    ENDS,
    FIRSTS,
    ITEMS,
    LATE,
    MINE,
    ORDER,
    OWNED,
    PLACE,
    RANK,
    RATINGS,
    REQUESTED,
    REQUESTS,
    RING,
    SLOT,
    SPLIT,
    STARTS,
    TO,
    gradients_from_others,
    lines_for_others,
    own_gradients,
    own_lines,
)  # fmt: skip


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
