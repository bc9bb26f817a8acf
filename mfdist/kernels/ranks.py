"""The step of several ranks: as in ``cpu``, but item rows come from their owners and gradients go back.

The parts of a step that every way between ranks has in common, and the whole of it where the ranks of a host share
memory or go by the process group (``hosts`` has the step by messages).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mfdist.kernels.cpu import gradient, user_pass
from mfdist.kernels.grouping import cut, group
from mfdist.kernels.numba_intrinsics import all_arrived, arrive, bare, barrier, inlined, kernel, numbers_of, unsigned
from mfdist.kernels.packed import TERMS, catch_up, move
from mfdist.kernels.row_arithmetic import (
    FAR,
    add_times,
    aligned,
    clear,
    copy,
    prefetch_line,
    prefetch_row,
    prefetch_to_write,
)
from mfdist.kernels.vectors import LANES

REQUEST, GATHER, LEARN, UPDATE, DONE = range(5)
"""Stages of a step of several ranks; between two of them something goes from rank to rank."""
USERS, ITEMS, OWNED, REQUESTS, STAGE = range(5)
"""Places of ``counts`` (int64, 5): rows of the batch, rows that this rank was asked for, by how many requests; what
comes next."""


@kernel
def gather_for_ranks(
    shape: Any, tables: Any, rows: Any, firsts: Any, ends: Any, order: Any, low: Any, high: Any, lines: Any, out: Any,
    now: Any, rules: Any, numbers: Any,
) -> None:  # fmt: skip
    """Bring item ``rows[low:high]`` to the present, in place, and copy their weights to whoever asked for them.

    ``order[firsts[j] : ends[j]]``: the requests for ``rows[j]``; ``lines[q]``: where ``out`` (lines, width) takes the
    row of request q. ``tables``: see :func:`learn`.
    """
    shape = numbers_of(shape)
    width, stride = shape[1], shape[2]
    table, lasts, rows, firsts, ends = bare(tables[2]), bare(tables[3]), bare(rows), bare(firsts), bare(ends)
    order, lines, out, numbers = bare(order), bare(lines), bare(out), bare(numbers)
    rules = (bare(rules[0]), bare(rules[1]), bare(rules[2]), bare(rules[3]), rules[4], rules[5])
    space = np.empty((2, TERMS), np.float32)
    terms = bare(space)
    for j in range(low, high):
        prefetch_row(table, rows, j, high, stride)
        if j + FAR < high:
            prefetch_to_write(out, lines[order[firsts[j + FAR]]], width)
        base = np.int64(rows[unsigned(j)]) * stride
        place = unsigned(base + stride - 1)
        last = lasts[place]
        catch_up(shape, table, base, last, now, rules, numbers, terms, out[lines[order[firsts[j]]]])
        lasts[place] = now if last > 0 else -now
        for q in range(firsts[j] + 1, ends[j]):
            copy(table, base, out[lines[order[q]]], width)
    space[0, 0] = 0  # it lives until here


@kernel
def update_from_ranks(
    shape: Any, tables: Any, rows: Any, firsts: Any, ends: Any, order: Any, low: Any, high: Any, lines: Any, grads: Any,
    now: Any, numbers: Any,
) -> None:  # fmt: skip
    """Take one step on item ``rows[low:high]``, which stand after step ``now``, with the sum of their gradients.

    Requests as for :func:`gather_for_ranks`: the gradients of a row are added in the order of the ranks.
    """
    shape = numbers_of(shape)
    width, stride = shape[1], shape[2]
    one = np.float32(1)
    table, lasts, rows, firsts, ends = bare(tables[2]), bare(tables[3]), bare(rows), bare(firsts), bare(ends)
    order, lines, grads, numbers = bare(order), bare(lines), bare(grads), bare(numbers)
    unaligned = np.empty(width + LANES, np.float32)
    grad = aligned(bare(unaligned), width)
    for j in range(low, high):
        prefetch_row(table, rows, j, high, stride)
        if j + FAR < high:
            prefetch_line(grads, lines[order[firsts[j + FAR]]], width)
        clear(grad, width)
        for q in range(firsts[j], ends[j]):
            add_times(grad, one, grads[lines[order[q]]], 0, width)
        base = np.int64(rows[unsigned(j)]) * stride
        move(shape, table, base, grad, numbers)
        lasts[unsigned(base + stride - 1)] = now + 1
    unaligned[0] = 0  # it lives until here


@kernel
def learn(
    thread: Any, threads: Any, gate: Any, passed: Any, shape: Any, rating: Any, by_user: Any, users: Any, by_item: Any,
    items: Any, lines: Any, tables: Any, learned: Any, penalties: Any, own: Any, out: Any, now: Any, rules: Any,
    numbers: Any,
) -> Any:  # fmt: skip
    """Score the batch, move its users, and write its items' gradients to ``out``; returns the arrivals at ``gate``.

    ``by_user``, ``by_item``: (order, rows, starts, slot) of :func:`group`; ``slot`` of items counts lines of ``own``.
    ``tables``: users' packed rows as float32 and as int32, and items' likewise. ``learned``: before, slope and error;
    ``penalties``: of users and items, their shares (see ``cpu.user_pass``)."""
    low, high = cut(by_user[2], users, thread, threads), cut(by_user[2], users, thread + 1, threads)
    user_pass(
        shape, tables[0], tables[1], by_user[1], by_user[2], by_user[0], low, high, by_item[3], own, rating, learned[0],
        learned[1], learned[2], penalties[0], penalties[2], now, rules, numbers,
    )  # fmt: skip
    passed = barrier(gate, threads, passed)
    low, high = cut(by_item[2], items, thread, threads), cut(by_item[2], items, thread + 1, threads)
    gradient(
        shape, by_item[1], by_item[2], by_item[0], low, high, by_user[3], lines, own, learned[0], learned[1],
        penalties[1], penalties[3], numbers, out,
    )  # fmt: skip
    return barrier(gate, threads, passed)


@kernel
def step_of_ranks(
    thread: Any, threads: Any, gate: Any, stage: Any, shape: Any, batch: Any, by_user: Any, by_item: Any, by_owner: Any,
    counts: Any, in_order: Any, tables: Any, learned: Any, penalties: Any, now: Any, rules: Any, numbers: Any,
    requests: Any, lines: Any, rows: Any, own: Any, gradient_: Any, gradients: Any, shared_memory: Any,
) -> None:  # fmt: skip
    """The step of one rank from ``stage`` on, by ``threads`` threads that all call this; ``gate`` is 0 at the start.

    The arrays of the last line are those of ``exchange``; ``in_order``: 0, 1, 2, ... Where the ranks have
    ``shared_memory`` the stages follow each other, and it returns before one whose data do not come within a
    millisecond a rank; else it returns before each. ``counts[STAGE]``: the stage to call next.
    """
    signals, rank = shared_memory[0], shared_memory[1]
    shared = signals.shape[0] > 0
    passed = 0
    if stage == REQUEST:
        group_batch(thread, threads, batch, by_user, by_item, counts, shared_memory)
        stage = GATHER
        if not shared:
            return
    if stage == GATHER:
        if thread == 0:
            take_requests(by_owner, counts, requests, lines, shared_memory)
        passed = barrier(gate, threads, passed)
        if counts[STAGE] != LEARN:
            return
        low, high = counts[OWNED] * thread // threads, counts[OWNED] * (thread + 1) // threads
        gather_for_ranks(
            shape, tables, by_owner[2], by_owner[3], by_owner[3][1:], by_owner[0], low, high, lines, rows, now, rules,
            numbers,
        )  # fmt: skip
        stage = LEARN
        if not shared:
            return
        passed = barrier(gate, threads, passed)
        if thread == 0:
            arrive(signals[rank])
    if stage == LEARN:
        if thread == 0:
            counts[STAGE] = UPDATE if not shared or all_arrived(signals, signals[rank, 0]) else LEARN
        passed = barrier(gate, threads, passed)
        if counts[STAGE] != UPDATE:
            return
        passed = learn(
            thread, threads, gate, passed, shape, batch[2], without_pairs(by_user), counts[USERS],
            without_pairs(by_item), counts[ITEMS], in_order, tables, learned, penalties, own, gradient_, now, rules,
            numbers,
        )  # fmt: skip
        stage = UPDATE
        if not shared:
            return
        if thread == 0:
            arrive(signals[rank])
    if stage == UPDATE:
        if thread == 0:
            counts[STAGE] = DONE if not shared or all_arrived(signals, signals[rank, 0]) else UPDATE
        passed = barrier(gate, threads, passed)
        if counts[STAGE] != DONE:
            return
        low, high = counts[OWNED] * thread // threads, counts[OWNED] * (thread + 1) // threads
        update_from_ranks(
            shape, tables, by_owner[2], by_owner[3], by_owner[3][1:], by_owner[0], low, high, lines, gradients, now,
            numbers,
        )  # fmt: skip


@inlined
def without_pairs(grouped: Any) -> Any:
    """(order, rows, starts, slot) of the arrays of :func:`group`."""
    return grouped[0], grouped[2], grouped[3], grouped[4]


@kernel
def group_batch(
    thread: Any, threads: Any, batch: Any, by_user: Any, by_item: Any, counts: Any, shared_memory: Any
) -> None:  # fmt: skip
    """Group the batch by both sides, and show the other ranks of a host which items this one asks for."""
    signals, rank, ends, _first_row, bounds, wanted = shared_memory
    if thread == 0:
        counts[ITEMS] = group(batch[1], by_item[0], by_item[1], by_item[2], by_item[3], by_item[4])
        counts[STAGE] = GATHER
        if signals.shape[0] > 0:
            post(by_item[2], counts[ITEMS], ends, bounds[rank], wanted[rank])
            arrive(signals[rank])
    if thread == threads - 1:
        counts[USERS] = group(batch[0], by_user[0], by_user[1], by_user[2], by_user[3], by_user[4])


@kernel
def take_requests(by_owner: Any, counts: Any, requests: Any, lines: Any, shared_memory: Any) -> None:
    """Group what all ranks ask this one for, where all have asked."""
    signals, rank, _ends, first_row, bounds, wanted = shared_memory
    counts[STAGE] = GATHER
    number = counts[REQUESTS]
    if signals.shape[0] > 0:
        number = collect(signals, rank, first_row, bounds, wanted, requests, lines)
    if number >= 0:
        counts[REQUESTS], counts[STAGE] = number, LEARN
        counts[OWNED] = group(requests[:number], by_owner[0], by_owner[1], by_owner[2], by_owner[3], by_owner[4])


@kernel
def post(items: Any, number: Any, ends: Any, bounds: Any, wanted: Any) -> None:
    """Show the other ranks ascending ``items[:number]``: where each owner's begin, and themselves where they fit."""
    bound(items, number, ends, bounds)
    if number <= wanted.size:
        wanted[:number] = items[:number]


@kernel
def bound(items: Any, number: Any, ends: Any, bounds: Any) -> None:
    """Where each owner's begin among ascending ``items[:number]``: int64 ``bounds`` (ranks + 1)."""
    place = 0
    bounds[0] = 0
    for rank in range(ends.size):
        high = number
        while place < high:
            middle = (place + high) // 2
            if items[middle] < ends[rank]:
                place = middle + 1
            else:
                high = middle
        bounds[rank + 1] = place


@kernel
def collect(
    signals: Any, rank: Any, first_row: Any, bounds: Any, wanted: Any, requests: Any, lines: Any
) -> int:  # fmt: skip
    """What all ranks ask this one for, in rank order: local rows to ``requests``, their places among all ranks' lines
    to ``lines``. Returns their number; -1 where not every rank has asked yet, or not every rank's items fit."""
    if not all_arrived(signals, signals[rank, 0]):
        return -1
    ranks, room = wanted.shape
    number = 0
    for other in range(ranks):
        if bounds[other, ranks] > room:
            return -1
    for other in range(ranks):
        for k in range(bounds[other, rank], bounds[other, rank + 1]):
            requests[number] = wanted[other, k] - first_row
            lines[number] = other * room + k
            number += 1
    return number
