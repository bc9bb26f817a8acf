"""The step of ranks on several hosts: as in ``ranks``, with two messages a peer and a step, and work while they travel.

The batches of two steps ahead are known, so that requests travel with what is sent anyway, and an owner knows which of
the rows of the next step are moved by the step in work. Step n of a rank, and what its messages carry:

    look_ahead         gather the *early* rows of step n + 1 (nobody asks for them in step n); group items of n + 2
    -> ROWS n          wait for the late rows of step n
    learn              score, move users, add up item gradients
    GRADIENTS n ->     gradients of step n, early rows of n + 1 and which they are, requests of n + 2
    group users of n + 1
    -> GRADIENTS n     wait for them, group requests of n + 2
    update             items; then gather the *late* rows of step n + 1
    ROWS n + 1 ->      late rows of step n + 1

Steps -2 and -1 are the opening: of them there are only the requests of steps 0 and 1, and the rows of step 0, all late.
A row is brought to the same step before it is copied, early or late, so that the result has the bits of ``ranks``.

Rows lie in ``rows`` (lines, width), gradients in ``gradients``, without gaps, so that messages need no copy: of either
a *segment* for each rank of the host, of ``room`` lines a part. What goes to ranks elsewhere lies by rank:

    rows       own lines of even steps | of odd steps | rows for others, even steps | odd steps
    gradients  of own lines | from others
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mfdist.kernels.bfloat16 import narrow_lines, widen_lines
from mfdist.kernels.cpu import sums
from mfdist.kernels.grouping import group
from mfdist.kernels.messages import expect, post_gradients, post_rows, take
from mfdist.kernels.numba_intrinsics import barrier, kernel, numbers_of
from mfdist.kernels.ranks import gather_for_ranks, learn, update_from_ranks
from mfdist.kernels.requests import find_lines, read_requests, write_requests
from mfdist.kernels.wire import (
    AFTER,
    ASKED,
    BACK,
    DISTINCT,
    EARLY,
    EARLY_IN,
    EARLY_OUT,
    ENDS,
    FIRSTS,
    GRADIENTS,
    ITEMS,
    MINE,
    NEXT,
    ORDER,
    OWNED,
    RANK,
    RATINGS,
    RING,
    ROOM,
    ROWS,
    SLOT,
    SPLIT,
    STAGE,
    STARTS,
    TO,
    USERS,
    gradients_from_others,
    lines_for_others,
    own_gradients,
    own_lines,
)  # fmt: skip

BEGIN, WAIT_FOR_ROWS, WAIT_FOR_GRADIENTS, DONE = range(4)
"""Stages of a step; it returns to its caller where it has waited for a millisecond."""


@kernel
def step_of_hosts(
    thread: Any, threads: Any, gate: Any, stage: Any, step: Any, shape: Any, ring: Any, wire: Any, control: Any,
    rows: Any, gradients: Any, tables: Any, learned: Any, penalties: Any, now: Any, rules: Any, numbers: Any,
) -> None:  # fmt: skip
    """Step ``step`` of one rank from ``stage`` on, by ``threads`` threads that all call this; ``gate`` is 0 at first.

    ``control[STAGE]``: the stage to call next; a lost peer stands in ``control[LOST]``. ``now``: the step that rows
    stand after, -1 and less before the first. The other arguments are those of ``ranks`` and ``messages``.
    """
    passed = 0
    if stage == DONE:
        return
    if stage == BEGIN:
        passed = look_ahead(
            thread, threads, gate, passed, step, shape, ring, wire, control, rows, tables, now, rules, numbers
        )
        stage = WAIT_FOR_ROWS
    if stage == WAIT_FOR_ROWS:
        if step >= 0:
            if thread == 0:
                control[STAGE] = WAIT_FOR_ROWS
                if take(ROWS, step, ring, wire, control, rows, gradients):
                    control[STAGE] = WAIT_FOR_GRADIENTS
            passed = barrier(gate, threads, passed)
            if control[STAGE] == WAIT_FOR_ROWS:
                return
            passed = learn_here(
                thread, threads, gate, passed, step, shape, ring, wire, control, rows, gradients, tables, learned,
                penalties, now, rules, numbers,
            )  # fmt: skip
        send_gradients(thread, threads, step, shape, ring, wire, control, rows, gradients, learned)
        stage = WAIT_FOR_GRADIENTS
    if thread == 0:
        control[STAGE] = WAIT_FOR_GRADIENTS
        if take(GRADIENTS, step, ring, wire, control, rows, gradients):
            absorb(step, ring, wire, control, rows, gradients)
            control[STAGE] = DONE
    passed = barrier(gate, threads, passed)
    if control[STAGE] == DONE:
        passed = update_here(
            thread, threads, gate, passed, step, shape, ring, wire, control, rows, gradients, tables, now, rules,
            numbers,
        )  # fmt: skip


@kernel
def look_ahead(
    thread: Any, threads: Any, gate: Any, passed: Any, step: Any, shape: Any, ring: Any, wire: Any, control: Any,
    rows: Any, tables: Any, now: Any, rules: Any, numbers: Any,
) -> Any:  # fmt: skip
    """Early rows of the next step, and requests of the one after it."""
    if step >= 0 and control[NEXT] > 0:
        early = ring.counts[(step + 1) % RING, EARLY]
        gather_here(thread, threads, 0, early, step + 1, shape, ring, rows, tables, now + 1, rules, numbers)
    if thread == threads - 1 and control[AFTER] > 0:
        write_requests(ring, wire, control, step + 2)
    return barrier(gate, threads, passed)


@kernel
def gather_here(
    thread: Any, threads: Any, begin: Any, end: Any, step: Any, shape: Any, ring: Any, rows: Any, tables: Any, now: Any,
    rules: Any, numbers: Any,
) -> None:  # fmt: skip
    """This thread's part of rows ``begin`` to ``end`` of those that ``step`` needs of this rank."""
    grouped = ring.by_owner[step % RING]
    low = begin + (end - begin) * thread // threads
    high = begin + (end - begin) * (thread + 1) // threads
    gather_for_ranks(
        shape, tables, grouped[SPLIT], grouped[FIRSTS], grouped[ENDS], grouped[ORDER], low, high, grouped[TO], rows,
        now, rules, numbers,
    )  # fmt: skip


@kernel
def learn_here(
    thread: Any, threads: Any, gate: Any, passed: Any, step: Any, shape: Any, ring: Any, wire: Any, control: Any,
    rows: Any, gradients: Any, tables: Any, learned: Any, penalties: Any, now: Any, rules: Any, numbers: Any,
) -> Any:  # fmt: skip
    """Score the batch of ``step``, move users, and add up item gradients."""
    place, rank, room = step % RING, control[RANK], control[ROOM]
    counts, line, slot = ring.counts[place], ring.line[place], ring.by_item[place, SLOT]
    if thread == 0 and wire.narrow[0].shape[0] > 0:
        widen_rows(step, ring, wire, control, rows, True)
    ratings = counts[RATINGS]
    for k in range(ratings * thread // threads, ratings * (thread + 1) // threads):
        slot[k] = line[slot[k]]
    passed = barrier(gate, threads, passed)
    first, out = own_lines(wire, control, rank, step), own_gradients(wire, control, rank)
    users, items = ring.by_user[place], ring.by_item[place]
    return learn(
        thread, threads, gate, passed, shape, ring.rating[place, :ratings],
        (users[ORDER], users[DISTINCT], users[STARTS], users[SLOT]), counts[USERS],
        (items[ORDER], items[DISTINCT], items[STARTS], slot), counts[ITEMS], line, tables,
        (learned[0], learned[1][: ratings * numbers_of(shape)[4]], learned[2][:ratings]), penalties,
        rows[first : first + room], gradients[out : out + room], now, rules, numbers,
    )  # fmt: skip


@kernel
def send_gradients(
    thread: Any, threads: Any, step: Any, shape: Any, ring: Any, wire: Any, control: Any, rows: Any, gradients: Any,
    learned: Any,
) -> None:  # fmt: skip
    """Begin to send what ``GRADIENTS`` carries; meanwhile group the users of the next step."""
    place, soon = step % RING, (step + 1) % RING
    if thread == 0:
        if step >= 0:
            ratings = ring.counts[place, RATINGS]
            slopes = sums(learned[2][:ratings], learned[1][: ratings * numbers_of(shape)[4]])[1]
            wire.slopes[control[RANK]] = np.float32(slopes)
        if wire.narrow[0].shape[0] > 0:
            narrow_gradients(step, ring, wire, control, rows, gradients)
        expect(wire, control)
        post_gradients(ring, wire, control, step, rows, gradients)
    if thread == threads - 1 and control[NEXT] > 0:
        users, number = ring.by_user[soon], ring.counts[soon, RATINGS]
        ring.counts[soon, USERS] = group(
            ring.user[soon, :number], users[ORDER], ring.pairs, users[DISTINCT], users[STARTS], users[SLOT]
        )


@kernel
def absorb(step: Any, ring: Any, wire: Any, control: Any, rows: Any, gradients: Any) -> None:
    """Make sense of what has come with ``GRADIENTS``."""
    if wire.narrow[0].shape[0] > 0:
        if step >= 0:
            asked = ring.bounds[step % RING, ASKED]
            first = gradients_from_others(wire, control)
            for peer in range(wire.ends.size):
                if wire.segment[peer] < 0:
                    widen_lines(wire.narrow[3], wire.narrow[5], asked[peer], asked[peer + 1], first)
        if control[NEXT] > 0:
            widen_rows(step + 1, ring, wire, control, rows, False)
    total = wire.slopes[0]
    for rank in range(1, wire.ends.size):
        total += wire.slopes[rank]
    wire.slopes[wire.ends.size] = total
    if control[NEXT] > 0:
        find_lines(ring, wire, control, step + 1)
    if control[AFTER] > 0:
        read_requests(ring, wire, control, step + 2)


@kernel
def update_here(
    thread: Any, threads: Any, gate: Any, passed: Any, step: Any, shape: Any, ring: Any, wire: Any, control: Any,
    rows: Any, gradients: Any, tables: Any, now: Any, rules: Any, numbers: Any,
) -> Any:  # fmt: skip
    """Move this rank's items, and begin to send the rows of the next step that had to wait for it."""
    if step >= 0:
        grouped, owned = ring.by_owner[step % RING], ring.counts[step % RING, OWNED]
        update_from_ranks(
            shape, tables, grouped[SPLIT], grouped[FIRSTS], grouped[ENDS], grouped[ORDER], owned * thread // threads,
            owned * (thread + 1) // threads, grouped[BACK], gradients, now, numbers,
        )  # fmt: skip
        passed = barrier(gate, threads, passed)
    if control[NEXT] > 0:
        counts = ring.counts[(step + 1) % RING]
        gather_here(
            thread, threads, counts[EARLY], counts[OWNED], step + 1, shape, ring, rows, tables, now + 1, rules, numbers
        )
        passed = barrier(gate, threads, passed)
        if thread == 0:
            if wire.narrow[0].shape[0] > 0:
                narrow_rows(step + 1, ring, wire, control, True)
            expect(wire, control)
            post_rows(ring, wire, control, step + 1, rows)
    return passed


# The narrow wire ----------------------------------------------------------------------------------


@kernel
def narrow_rows(step: Any, ring: Any, wire: Any, control: Any, late: Any) -> None:
    """Round the early or the ``late`` rows of ``step`` for ranks elsewhere."""
    asked, early = ring.bounds[step % RING, ASKED], ring.bounds[step % RING, EARLY_OUT]
    first, half = lines_for_others(wire, control, step), (step & 1) * control[ROOM]
    for peer in range(wire.ends.size):
        if wire.segment[peer] < 0:
            middle = asked[peer] + early[peer]
            begin, end = (middle, asked[peer + 1]) if late else (asked[peer], middle)
            narrow_lines(wire.narrow[4], wire.narrow[0], first + begin, first + end, half + begin)


@kernel
def narrow_gradients(step: Any, ring: Any, wire: Any, control: Any, rows: Any, gradients: Any) -> None:
    """Round what ``GRADIENTS`` of ``step`` carries to ranks elsewhere."""
    if step >= 0:
        mine, first = ring.bounds[step % RING, MINE], own_gradients(wire, control, control[RANK])
        for peer in range(wire.ends.size):
            if wire.segment[peer] < 0:
                narrow_lines(wire.narrow[5], wire.narrow[1], first + mine[peer], first + mine[peer + 1], mine[peer])
    if control[NEXT] > 0:
        narrow_rows(step + 1, ring, wire, control, False)


@kernel
def widen_rows(step: Any, ring: Any, wire: Any, control: Any, rows: Any, late: Any) -> None:
    """The early or the ``late`` rows of ``step`` from ranks elsewhere as float32."""
    mine, early = ring.bounds[step % RING, MINE], ring.bounds[step % RING, EARLY_IN]
    first = own_lines(wire, control, control[RANK], step)
    for peer in range(wire.ends.size):
        if wire.segment[peer] < 0:
            middle = mine[peer] + early[peer]
            begin, end = (middle, mine[peer + 1]) if late else (mine[peer], middle)
            widen_lines(wire.narrow[2], wire.narrow[4], begin, end, first)
