"""The step of several ranks: as in ``cpu``, but item rows come from their owners and gradients go back."""

from __future__ import annotations

from typing import Any

import numpy as np

from mfdist.kernels.columns import FAR, add_times, aligned, ask, ask_line, ask_to_write, clear, copy
from mfdist.kernels.cpu import gradient, user_pass
from mfdist.kernels.grouping import cut, group
from mfdist.kernels.machine import arrive, arrived_at, bare, kernel, meet, numbers_of, unsigned
from mfdist.kernels.packed import TERMS, catch_up, move
from mfdist.kernels.vectors import LANES

ASK, GATHER, LEARN, UPDATE, DONE = range(5)
"""Stages of a step of several ranks; between two of them something goes from rank to rank."""
USERS, ITEMS, OWNED, REQUESTS, STAGE = range(5)
"""Places of ``counts`` (int64, 5): rows of the batch, rows that this rank was asked for, by how many requests; what
comes next."""


@kernel
def gather_for_ranks(
    shape: Any, table: Any, lasts: Any, rows: Any, starts: Any, order: Any, low: Any, high: Any, lines: Any, out: Any,
    now: Any, rules: Any, numbers: Any,
) -> None:  # fmt: skip
    """Bring ``rows[low:high]`` to the present, in place, and copy their weights to whoever asked for them.

    Requests are grouped by row (:func:`group`); ``lines[q]``: where ``out`` (lines, width) takes the row of request q.
    """
    shape = numbers_of(shape)
    width, stride = shape[1], shape[2]
    table, lasts, rows, starts, order = bare(table), bare(lasts), bare(rows), bare(starts), bare(order)
    lines, out, numbers = bare(lines), bare(out), bare(numbers)
    rules = (bare(rules[0]), bare(rules[1]), bare(rules[2]), bare(rules[3]), rules[4], rules[5])
    space = np.empty((2, TERMS), np.float32)
    terms = bare(space)
    for j in range(low, high):
        ask(table, rows, j, high, stride)
        if j + FAR < high:
            ask_to_write(out, lines[order[starts[j + FAR]]], width)
        base = np.int64(rows[unsigned(j)]) * stride
        place = unsigned(base + stride - 1)
        last = lasts[place]
        catch_up(shape, table, base, last, now, rules, numbers, terms, out[lines[order[starts[j]]]])
        lasts[place] = now if last > 0 else -now
        for q in range(starts[j] + 1, starts[j + 1]):
            copy(table, base, out[lines[order[q]]], width)
    space[0, 0] = 0  # it lives until here


@kernel
def update_from_ranks(
    shape: Any, table: Any, lasts: Any, rows: Any, starts: Any, order: Any, low: Any, high: Any, lines: Any, grads: Any,
    now: Any, numbers: Any,
) -> None:  # fmt: skip
    """Take one step on ``rows[low:high]``, which stand after step ``now``, with the sum of their gradients.

    Requests as for :func:`gather_for_ranks`: the gradients of a row are added in the order of the ranks.
    """
    shape = numbers_of(shape)
    width, stride = shape[1], shape[2]
    one = np.float32(1)
    table, lasts, rows, starts, order = bare(table), bare(lasts), bare(rows), bare(starts), bare(order)
    lines, grads, numbers = bare(lines), bare(grads), bare(numbers)
    unaligned = np.empty(width + LANES, np.float32)
    grad = aligned(bare(unaligned), width)
    for j in range(low, high):
        ask(table, rows, j, high, stride)
        if j + FAR < high:
            ask_line(grads, lines[order[starts[j + FAR]]], width)
        clear(grad, width)
        for q in range(starts[j], starts[j + 1]):
            add_times(grad, one, grads[lines[order[q]]], 0, width)
        base = np.int64(rows[unsigned(j)]) * stride
        move(shape, table, base, grad, numbers)
        lasts[unsigned(base + stride - 1)] = now + 1
    unaligned[0] = 0  # it lives until here


@kernel
def step_of_ranks(
    thread: Any, threads: Any, gate: Any, stage: Any, shape: Any, user: Any, item: Any, rating: Any, by_user: Any,
    by_item: Any, by_owner: Any, counts: Any, user_table: Any, user_lasts: Any, item_table: Any, item_lasts: Any,
    before: Any, slope: Any, error: Any, user_pulls: Any, item_pulls: Any, user_shares: Any, item_shares: Any,
    now: Any, rules: Any, numbers: Any, requests: Any, lines: Any, rows: Any, own: Any, gradient_: Any, gradients: Any,
    meeting: Any,
) -> None:  # fmt: skip
    """The step of one rank from ``stage`` on, by ``threads`` threads that all call this; ``gate`` is 0 at the start.

    The arrays of the last lines are those of ``exchange``. Where the ranks share memory (``meeting``) the stages follow
    each other, and it returns before one whose data do not come within a millisecond a rank; else it returns before
    each. ``counts[STAGE]``: the stage to call next.
    """
    signals, rank, ends, first_row, bounds, wanted = meeting
    shared = signals.shape[0] > 0
    passed = 0
    if stage == ASK:
        if thread == 0:
            counts[ITEMS] = group(item, by_item[0], by_item[1], by_item[2], by_item[3], by_item[4])
            if shared:
                post(by_item[2], counts[ITEMS], ends, bounds[rank], wanted[rank])
                arrive(signals[rank])
        if thread == threads - 1:
            counts[USERS] = group(user, by_user[0], by_user[1], by_user[2], by_user[3], by_user[4])
        stage = GATHER
        if not shared:
            counts[STAGE] = stage
            return
    if stage == GATHER:
        if thread == 0:
            counts[STAGE] = stage
            number = counts[REQUESTS]
            if shared:
                number = collect(signals, rank, first_row, bounds, wanted, requests, lines)
            if number >= 0:
                counts[REQUESTS], counts[STAGE] = number, LEARN
                counts[OWNED] = group(
                    requests[:number], by_owner[0], by_owner[1], by_owner[2], by_owner[3], by_owner[4]
                )
        passed = meet(gate, threads, passed)
        if counts[STAGE] != LEARN:
            return
        low, high = counts[OWNED] * thread // threads, counts[OWNED] * (thread + 1) // threads
        gather_for_ranks(
            shape, item_table, item_lasts, by_owner[2], by_owner[3], by_owner[0], low, high, lines, rows, now, rules,
            numbers,
        )  # fmt: skip
        stage = LEARN
        if not shared:
            return
        passed = meet(gate, threads, passed)
        if thread == 0:
            arrive(signals[rank])
    if stage == LEARN:
        if thread == 0:
            counts[STAGE] = UPDATE if not shared or arrived_at(signals, signals[rank, 0]) else LEARN
        passed = meet(gate, threads, passed)
        if counts[STAGE] != UPDATE:
            return
        users, items = counts[USERS], counts[ITEMS]
        low, high = cut(by_user[3], users, thread, threads), cut(by_user[3], users, thread + 1, threads)
        user_pass(
            shape, user_table, user_lasts, by_user[2], by_user[3], by_user[0], low, high, by_item[4], own, rating,
            before, slope, error, user_pulls, user_shares, now, rules, numbers,
        )  # fmt: skip
        passed = meet(gate, threads, passed)
        low, high = cut(by_item[3], items, thread, threads), cut(by_item[3], items, thread + 1, threads)
        gradient(
            shape, by_item[2], by_item[3], by_item[0], low, high, by_user[4], own, before, slope, item_pulls,
            item_shares, numbers, gradient_,
        )  # fmt: skip
        stage = UPDATE
        if not shared:
            return
        passed = meet(gate, threads, passed)
        if thread == 0:
            arrive(signals[rank])
    if stage == UPDATE:
        if thread == 0:
            counts[STAGE] = DONE if not shared or arrived_at(signals, signals[rank, 0]) else UPDATE
        passed = meet(gate, threads, passed)
        if counts[STAGE] != DONE:
            return
        low, high = counts[OWNED] * thread // threads, counts[OWNED] * (thread + 1) // threads
        update_from_ranks(
            shape, item_table, item_lasts, by_owner[2], by_owner[3], by_owner[0], low, high, lines, gradients, now,
            numbers,
        )  # fmt: skip


@kernel
def post(items: Any, number: Any, ends: Any, bounds: Any, wanted: Any) -> None:
    """Show the other ranks ascending ``items[:number]``: where each owner's begin, and themselves where they fit."""
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
    if number <= wanted.size:
        wanted[:number] = items[:number]


@kernel
def collect(
    signals: Any, rank: Any, first_row: Any, bounds: Any, wanted: Any, requests: Any, lines: Any
) -> int:  # fmt: skip
    """What all ranks ask this one for, in rank order: local rows to ``requests``, their places among all ranks' lines
    to ``lines``. Returns their number; -1 where not every rank has asked yet, or not every rank's items fit."""
    if not arrived_at(signals, signals[rank, 0]):
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
