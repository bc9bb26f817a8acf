"""The training step on a CPU, fused, in numba: the same arithmetic as ``reference``, one pass over each row.

Tables are *packed*: row j is ``table[j stride : (j + 1) stride]`` = weights (factors, then the bias), optimizer state,
and ``last`` as the bits of an int32 at the end, so that a row is one place in memory. A step is

    group       ratings sorted by user and by item (radix sort), so that rows are visited once and in memory order
    gather      item rows brought to the present and copied out (their owner may be another rank)
    user_pass   each user row: catch up, score its ratings, add up its gradient, update
    item_pass   each item row: add up its gradient from the user rows as they were, update

The order of every sum is the order of the sorted batch, whatever the number of threads: results repeat bitwise.
Threads are plain Python threads over ranges of rows; the kernels release the GIL.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mfdist.kernels.bags import add_bag_gradient, join_bag, leading_biases, refill, stride_with_bag
from mfdist.kernels.grouping import cut, group
from mfdist.kernels.numba_intrinsics import bare, barrier, inlined, kernel, numbers_of, short_kernel, unsigned
from mfdist.kernels.packed import TERMS, catch_up, move, penalise
from mfdist.kernels.row_arithmetic import (
    FAR,
    FAR_RATINGS,
    add_times,
    aligned,
    clear,
    dot,
    exponential,
    prefetch_of_rating,
    prefetch_pages,
    prefetch_row,
    prefetch_to_write,
)  # fmt: skip
from mfdist.kernels.vectors import LANES

CHUNK = 8
"""Users that are caught up before the first of them is scored: so many roots and divisions overlap."""


@kernel
def gather(
    shape: Any, table: Any, lasts: Any, rows: Any, low: Any, high: Any, out: Any, now: Any, rules: Any, numbers: Any
) -> None:
    """Bring ``rows[low:high]`` to the present, in place, and copy their weights to ``out``."""
    shape = numbers_of(shape)
    stride = shape[2]
    table, lasts, rows, out, numbers = bare(table), bare(lasts), bare(rows), bare(out), bare(numbers)
    rules = (bare(rules[0]), bare(rules[1]), bare(rules[2]), bare(rules[3]), rules[4], rules[5])
    space = np.empty((2, TERMS), np.float32)
    terms = bare(space)
    for j in range(low, high):
        prefetch_row(table, rows, j, high, stride)
        base = np.int64(rows[unsigned(j)]) * stride
        place = unsigned(base + stride - 1)
        last = lasts[place]
        catch_up(shape, table, base, last, now, rules, numbers, terms, out[unsigned(j)])
        lasts[place] = now if last > 0 else -now
    space[0, 0] = 0  # it lives until here


@inlined
def score_rating(
    shape: Any, user: Any, item: Any, grad: Any, rating: Any, slope: Any, first_slope: Any, bag_weight: Any,
    numbers: Any,
) -> Any:  # fmt: skip
    """Score one rating by every member: writes their slopes to ``slope`` from ``first_slope`` on, adds the user's
    gradient to ``grad`` (width,), and returns the sum of the members' errors."""
    part, _width, _stride, _kind, members, user_bias, item_bias = shape
    one = np.float32(1)
    scale, low, span, sigmoid, offset, implicit = (
        numbers[7], numbers[8], numbers[9], numbers[10], numbers[11], numbers[13],
    )  # fmt: skip
    errors = np.float32(0)
    for member in range(members):
        first = member * part
        score = offset + dot(user, item, first, part)
        if user_bias >= 0:
            score += user[unsigned(first + user_bias)] + item[unsigned(first + item_bias)]
        if implicit > 0:
            square = dot(item, item, first, part)
            for d in range(first, first + leading_biases(shape)):
                square -= item[d] * item[d]
            score -= bag_weight * square
        if sigmoid > 0:
            s = one / (one + exponential(-score))
            e = low + span * s - rating
            c = scale * e * span * s * (one - s)
        else:
            e = score - rating
            c = scale * e
        errors += e
        slope[unsigned(first_slope + member)] = c
        add_times(grad, c, item, first, part)
        if user_bias >= 0:
            grad[unsigned(first + user_bias)] += c
    return errors


@kernel
def user_pass(
    shape: Any, table: Any, lasts: Any, rows: Any, starts: Any, order: Any, low: Any, high: Any, item_slot: Any,
    items: Any, rating: Any, before: Any, slope: Any, error: Any, penalties: Any, shares: Any, now: Any, rules: Any,
    numbers: Any,
) -> None:  # fmt: skip
    """Users ``rows[low:high]``: catch up, score, update. Writes their weights as they were to ``before`` (row
    by row), per rating the error, and per rating and member ``slope``, the derivative of the loss by the score.

    ``penalties`` and ``shares``: see :func:`penalise`."""
    shape = numbers_of(shape)
    width, stride, members = shape[1], shape[2], shape[4]
    number = rating.size
    scale, implicit = numbers[7], numbers[13]
    share_of_members = np.float32(1) / np.float32(members)
    if implicit > 0:
        stride = stride_with_bag(shape)
    penalties, shares = bare(penalties), bare(shares)
    table, lasts, rows, starts, order = bare(table), bare(lasts), bare(rows), bare(starts), bare(order)
    item_slot, items, rating, before = bare(item_slot), bare(items), bare(rating), bare(before)
    slope, error, numbers = bare(slope), bare(error), bare(numbers)
    rules = (bare(rules[0]), bare(rules[1]), bare(rules[2]), bare(rules[3]), rules[4], rules[5])
    space, unaligned = np.empty((2, TERMS), np.float32), np.empty(width + LANES, np.float32)
    terms, grad = bare(space), aligned(bare(unaligned), width)
    for chunk in range(low, high, CHUNK):
        end = min(chunk + CHUNK, high)
        prefetch_pages(table, rows, chunk, CHUNK, high, stride)
        for j in range(chunk, end):
            prefetch_row(table, rows, j, high, stride)
            base = np.int64(rows[unsigned(j)]) * stride
            last = lasts[unsigned(base + stride - 1)]
            catch_up(shape, table, base, last, now, rules, numbers, terms, before[unsigned(j)])
        for j in range(chunk, end):
            base, was = np.int64(rows[unsigned(j)]) * stride, before[unsigned(j)]
            clear(grad, width)
            penalise(grad, was, starts[j + 1] - starts[j], penalties, shares, rows[j], scale)
            bag_weight = np.float32(0)
            if implicit > 0:
                bag_weight = implicit * np.sqrt(shares[rows[j]])
                join_bag(shape, was, table, base, bag_weight)
            for place in range(starts[unsigned(j)], starts[unsigned(j + 1)]):
                k = order[unsigned(place)]
                prefetch_of_rating(items, item_slot, order, place + FAR_RATINGS, number, width)
                item = items[unsigned(item_slot[unsigned(k)])]
                error[unsigned(k)] = share_of_members * score_rating(
                    shape, was, item, grad, rating[unsigned(k)], slope, k * members, bag_weight, numbers
                )
            if implicit > 0:
                refill(
                    shape, table, base, items, item_slot, order, starts[j], starts[j + 1], slope, shares[rows[j]],
                    bag_weight,
                )  # fmt: skip
            move(shape, table, base, grad, numbers)
            lasts[unsigned(base + stride - 1)] = now + 1
    space[0, 0] = unaligned[0] = 0  # they live until here


@inlined
def add_up(
    shape: Any, grad: Any, own: Any, first: Any, end: Any, order: Any, user_slot: Any, before: Any, slope: Any,
    number: Any, implicit: Any,
) -> None:  # fmt: skip
    """Add to ``grad`` (width,) the gradient of one item from its ratings ``order[first:end]``, of ``number``."""
    part, width, _stride, _kind, members, _user_bias, item_bias = shape
    reach = part * members if implicit <= 0 else width + part * members + 1
    for place in range(first, end):
        k = order[unsigned(place)]
        prefetch_of_rating(before, user_slot, order, place + FAR_RATINGS, number, reach)
        user = before[unsigned(user_slot[unsigned(k)])]
        for member in range(members):
            begin, c = member * part, slope[unsigned(k * members + member)]
            add_times(grad, c, user, begin, part)
            if item_bias >= 0:
                grad[unsigned(begin + item_bias)] += c
        if implicit > 0:
            add_bag_gradient(shape, grad, own, user, slope, k)


@kernel
def item_pass(
    shape: Any, table: Any, lasts: Any, rows: Any, starts: Any, order: Any, low: Any, high: Any, user_slot: Any,
    own: Any, before: Any, slope: Any, penalties: Any, shares: Any, now: Any, numbers: Any,
) -> None:  # fmt: skip
    """Items ``rows[low:high]``, gathered before (``own``): gradient from the users' ``before``, then update."""
    shape = numbers_of(shape)
    width, stride = shape[1], shape[2]
    table, lasts, rows, starts, order = bare(table), bare(lasts), bare(rows), bare(starts), bare(order)
    user_slot, own, before, slope, numbers = bare(user_slot), bare(own), bare(before), bare(slope), bare(numbers)
    penalties, shares = bare(penalties), bare(shares)
    number = slope.size // shape[4]
    space = np.empty(width + LANES, np.float32)
    grad = aligned(bare(space), width)
    for j in range(low, high):
        prefetch_row(table, rows, j, high, stride)
        clear(grad, width)
        penalise(grad, own[j], starts[j + 1] - starts[j], penalties, shares, rows[j], numbers[7])
        add_up(shape, grad, own[j], starts[j], starts[j + 1], order, user_slot, before, slope, number, numbers[13])
        base = np.int64(rows[unsigned(j)]) * stride
        move(shape, table, base, grad, numbers)
        lasts[unsigned(base + stride - 1)] = now + 1
    space[0] = 0  # it lives until here


@kernel
def gradient(
    shape: Any, rows: Any, starts: Any, order: Any, low: Any, high: Any, user_slot: Any, lines: Any, own: Any,
    before: Any, slope: Any, penalties: Any, shares: Any, numbers: Any, out: Any,
) -> None:  # fmt: skip
    """The gradients of items ``low`` to ``high`` alone, for an owner elsewhere: float32 ``out`` (lines, width).

    ``lines[j]``: the line of ``own`` where item j's weights stand, and of ``out`` where its gradient goes."""
    shape = numbers_of(shape)
    width = shape[1]
    rows, starts, order, user_slot, own = bare(rows), bare(starts), bare(order), bare(user_slot), bare(own)
    before, slope, numbers, out, lines = bare(before), bare(slope), bare(numbers), bare(out), bare(lines)
    penalties, shares = bare(penalties), bare(shares)
    number = slope.size // shape[4]
    for j in range(low, high):
        if j + FAR < high:
            prefetch_to_write(out, lines[j + FAR], width)
        line = lines[unsigned(j)]
        grad = out[unsigned(line), :width]
        clear(grad, width)
        penalise(grad, own[unsigned(line)], starts[j + 1] - starts[j], penalties, shares, rows[j], numbers[7])
        add_up(
            shape, grad, own[unsigned(line)], starts[j], starts[j + 1], order, user_slot, before, slope, number,
            numbers[13],
        )  # fmt: skip


@kernel
def whole_step(
    thread: Any, threads: Any, gate: Any, passed: Any, ratings: Any, now: Any, shape: Any, batch: Any, by_user: Any,
    by_item: Any, counts: Any, user_table: Any, user_lasts: Any, item_table: Any, item_lasts: Any, own: Any,
    before: Any, slope: Any, error: Any, user_penalties: Any, item_penalties: Any, user_shares: Any, item_shares: Any,
    rules: Any, numbers: Any,
) -> None:  # fmt: skip
    """The step of one process, by ``threads`` threads that all call this; ``gate[0]`` (int64) is ``passed`` before.

    ``batch``: users, items (int32) and ratings (float32), of which the first ``ratings`` count, as do those places of
    ``error`` and, for each member, of ``slope``. ``by_user``, ``by_item``: the arrays of :func:`group` for each side;
    ``counts`` (int64, at least 2): their rows.
    """
    user, item, rating = bare(batch[0])[:ratings], bare(batch[1])[:ratings], bare(batch[2])[:ratings]
    slope, error = bare(slope)[: ratings * numbers_of(shape)[4]], bare(error)[:ratings]
    if thread == 0:
        counts[0] = group(user, by_user[0], by_user[1], by_user[2], by_user[3], by_user[4])
    if thread == threads - 1:
        counts[1] = group(item, by_item[0], by_item[1], by_item[2], by_item[3], by_item[4])
    passed = barrier(gate, threads, passed)
    users, items = counts[0], counts[1]
    low, high = items * thread // threads, items * (thread + 1) // threads
    gather(shape, item_table, item_lasts, by_item[2], low, high, own, now, rules, numbers)
    passed = barrier(gate, threads, passed)
    low, high = cut(by_user[3], users, thread, threads), cut(by_user[3], users, thread + 1, threads)
    user_pass(
        shape, user_table, user_lasts, by_user[2], by_user[3], by_user[0], low, high, by_item[4], own, rating, before,
        slope, error, user_penalties, user_shares, now, rules, numbers,
    )  # fmt: skip
    passed = barrier(gate, threads, passed)
    low, high = cut(by_item[3], items, thread, threads), cut(by_item[3], items, thread + 1, threads)
    item_pass(
        shape, item_table, item_lasts, by_item[2], by_item[3], by_item[0], low, high, by_user[4], own, before, slope,
        item_penalties, item_shares, now, numbers,
    )  # fmt: skip
    barrier(gate, threads, passed)


@short_kernel
def sums(error: Any, slope: Any) -> tuple[float, float]:
    """(sum of squared errors, sum of slopes), float64."""
    squares, slopes = 0.0, 0.0
    for k in range(error.size):
        squares += np.float64(error[k]) * np.float64(error[k])
    for k in range(slope.size):
        slopes += np.float64(slope[k])
    return squares, slopes
