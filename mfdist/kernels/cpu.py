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
from numba import njit

from mfdist.kernels import stride_of
from mfdist.kernels.machine import bare, prefetch, prefetch_read, wait_for_all
from mfdist.kernels.rules import SHORT_GAP, AdamRules
from mfdist.objective import BIAS_COLUMN

ADAMW, SPARSE_ADAM, ROWWISE_ADAGRAD, SGD = range(4)
KINDS = {"adamw": ADAMW, "sparse_adam": SPARSE_ADAM, "rowwise_adagrad": ROWWISE_ADAGRAD, "sgd": SGD}
AHEAD = 8
"""Rows between the one in work and the one whose memory is asked for."""

ROW_LOAD = 4
"""Work on a row beside the work on one of its ratings, to cut ranges."""
FORGOTTEN = 1e-25
"""A momentum that has shrunk by this much is none: float32 numbers below 1e-38 would cost a hundred cycles each."""


# Grouping -----------------------------------------------------------------------------------------


@njit(nogil=True, error_model="numpy", cache=True)
def group(ids: Any, order: Any, scratch: Any, rows: Any, starts: Any, slot: Any) -> int:
    """Sort ``ids`` (int32, not negative) stably: distinct ``rows`` ascending, and where each starts in ``order``.

    ``slot[k]``: position of ``ids[k]`` among the rows. Returns the number of rows; ``starts`` has one entry more.
    """
    n = ids.size
    top = 0
    for k in range(n):
        top = max(top, ids[k])
    bits = 1
    while (top >> bits) > 0:
        bits += 1
    passes = (bits + 10) // 11
    width = (bits + passes - 1) // passes
    histogram = np.zeros(1 << width, np.int32)
    source, target = scratch, order
    for k in range(n):
        source[k] = k
    for turn in range(passes):
        shift = turn * width
        mask = (1 << width) - 1
        histogram[:] = 0
        for k in range(n):
            histogram[(ids[k] >> shift) & mask] += 1
        total = 0
        for b in range(histogram.size):
            count = histogram[b]
            histogram[b] = total
            total += count
        for k in range(n):
            j = source[k]
            b = (ids[j] >> shift) & mask
            target[histogram[b]] = j
            histogram[b] += 1
        source, target = target, source
    number, last = -1, -1
    for q in range(n):
        k = source[q]
        order[q] = k
        if ids[k] != last:
            number += 1
            last = ids[k]
            rows[number] = last
            starts[number] = q
        slot[k] = number
    starts[number + 1] = n
    return number + 1


# Kernels: ``shape`` is what describes a row, see :func:`shape_of` --------------------------
# Slices, not sums of indices, and numpy's error model: LLVM makes vector instructions of the loops only so.

STEP_FIELDS = ("decay", "rate1", "root2", "rest1", "beta2", "eps", "rate", "scale", "low", "span", "sigmoid", "offset",
               "rest2", "implicit")  # fmt: skip
"""The float32 ``numbers`` of one step. rate1: lr / (1 - b1^t); root2: 1 / sqrt(1 - b2^t); scale: twice the weight of a
rating's squared error in the loss; rest1, rest2: 1 - beta1, 1 - beta2, rounded after the subtraction (float32 0.999
taken from 1 would be off by 1.3e-5). implicit: ``model.Form.implicit``; users' rows hold bag and pull then."""


def shape_of(dim: int, bias: bool, members: int, kind: int) -> tuple[int, int, int, int, int, int, int]:
    """(factors of a member, width, stride, kind, members, user's bias, item's bias) of a model under an optimizer.

    ``kind``: of :data:`KINDS`. The last two: the member's first column that is added to the score as a bias, -1 where
    there is none (``objective.BIAS_COLUMN`` where members hold them inside).
    """
    width = dim + int(bias and not members)
    state = {ADAMW: 2 * width, SPARSE_ADAM: 2 * width, ROWWISE_ADAGRAD: 1, SGD: 0}[kind]
    user_bias, item_bias = BIAS_COLUMN if members else (dim, dim) if bias else (-1, -1)
    return dim // max(members, 1), width, stride_of(width, state), kind, max(members, 1), user_bias, item_bias


@njit(nogil=True, inline="always")
def stride_with_bag(shape: Any) -> Any:
    """The stride of users' rows where they have bags, which only sgd moves."""
    return -(-(shape[1] + 2 * shape[0] * shape[4] + 1) // 4) * 4


_kernel = njit(nogil=True, fastmath=True, error_model="numpy", cache=True)
_inlined = njit(nogil=True, fastmath=True, error_model="numpy", inline="always")
LOG_DECAY, AMPLITUDE, SPREAD, RATIO = range(4)
"""Columns of ``by_step``, see :func:`rule_arrays`."""


@_inlined
def ask(array: Any, first: Any, size: Any) -> None:
    """Ask for the cache lines of ``array[first : first + size]``."""
    for k in range(first, first + size, 16):
        prefetch(array, k)
    prefetch(array, first + size - 1)


@_inlined
def ask_row(buffer: Any, slot: Any, order: Any, q: Any, number: Any) -> None:
    """Ask for the row of ``buffer`` that rating ``order[q]`` of ``number`` will read."""
    if q < number:
        ahead = buffer[slot[order[q]]]
        for k in range(0, ahead.size, 16):
            prefetch_read(ahead, k)


@_inlined
def decay_between(by_step: Any, first: Any, end: Any) -> Any:
    """D_end / D_first, see ``kernels.rules``."""
    log = by_step[end, LOG_DECAY] - by_step[first, LOG_DECAY]
    if abs(log) < 0.01:  # four terms are exact to 1e-12 there, at a tenth of the time
        return 1.0 + log * (1.0 + log * (0.5 + log * (1.0 / 6.0 + log / 24.0)))
    return np.exp(log)


@_inlined
def catch_up(shape: Any, table: Any, base: Any, last: Any, now: Any, rules: Any, numbers: Any, work: Any) -> None:
    """Bring the row at ``base``, which stands after step abs(``last``), to the state after step ``now``.

    ``last`` is not written; ``work`` is space (2, width). See ``kernels.rules`` for the sums.
    """
    if abs(last) != now:
        width, kind = shape[1], shape[3]
        by_step, by_gap, _early, horizon, plain_below = rules
        ratio = decay_between(by_step, abs(last), now)
        decay = np.float32(ratio)
        w = table[base : base + width]
        if kind == ADAMW and last > 0:
            m, v = table[base + width : base + 2 * width], table[base + 2 * width : base + 3 * width]
            gap, eps = now - last, numbers[5]
            s1, s2 = np.float32(by_gap[gap, 0]), np.float32(by_gap[gap, 1])
            if gap > SHORT_GAP and last >= plain_below:
                c, p0, p1, p2, p3, q1, q2, q3, q4 = fraction(by_step, last, 1.0, 1.0)
                if gap >= horizon:
                    for d in range(width):
                        lost = value(np.sqrt(v[d]), eps, c, p0, p1, p2, p3, q1, q2, q3, q4)
                        w[d] = decay * (w[d] - m[d] * lost)
                        m[d] *= s1
                        v[d] *= s2
                else:
                    shrink, gain = np.sqrt(by_gap[gap, 1]), -by_gap[gap, 0] / ratio
                    c_, p0_, p1_, p2_, p3_, q1_, q2_, q3_, q4_ = fraction(by_step, now, shrink, gain)
                    for d in range(width):
                        root = np.sqrt(v[d])
                        lost = value(root, eps, c, p0, p1, p2, p3, q1, q2, q3, q4)
                        lost += value(root, eps, c_, p0_, p1_, p2_, p3_, q1_, q2_, q3_, q4_)
                        w[d] = decay * (w[d] - m[d] * lost)
                        m[d] *= s1
                        v[d] *= s2
            else:
                sum_terms(width, v, gap, last, now, rules, ratio, eps, work)
                total = work[1]
                for d in range(width):
                    w[d] = decay * (w[d] - m[d] * total[d])
                    m[d] *= s1
                    v[d] *= s2
        elif decay != 1:
            for d in range(width):
                w[d] *= decay


@_inlined
def fraction(by_step: Any, s: Any, shrink: Any, gain: Any) -> Any:
    """The float32 coefficients of the rule of step ``s``, its points times ``shrink``, its weights times ``gain``."""
    return (
        np.float32(by_step[s, RATIO] * shrink), np.float32(by_step[s, RATIO + 1] * gain),
        np.float32(by_step[s, RATIO + 2] * gain), np.float32(by_step[s, RATIO + 3] * gain),
        np.float32(by_step[s, RATIO + 4] * gain), np.float32(by_step[s, RATIO + 5]), np.float32(by_step[s, RATIO + 6]),
        np.float32(by_step[s, RATIO + 7]), np.float32(by_step[s, RATIO + 8]),
    )  # fmt: skip


@_inlined
def value(root: Any, eps: Any, c: Any, p0: Any, p1: Any, p2: Any, p3: Any, q1: Any, q2: Any, q3: Any, q4: Any) -> Any:
    """A rule as one fraction, at the root of a second moment (``AdamRules.ratios``)."""
    one = np.float32(1)
    a = root * c
    inverse = one / (a + eps)
    r = a * inverse
    return inverse * (p0 + r * (p1 + r * (p2 + r * p3))) / (one + r * (q1 + r * (q2 + r * (q3 + r * q4))))


@_inlined
def sum_terms(width: Any, v: Any, gap: Any, last: Any, now: Any, rules: Any, ratio: Any, eps: Any, work: Any) -> None:
    """``work[1]``: the sum where the gap is short (term by term) or began early (by nodes); ``work[0]``: roots."""
    by_step, by_gap, early, horizon, plain_below = rules
    root, total = work[0], work[1]
    for d in range(width):
        root[d] = np.sqrt(v[d])
        total[d] = 0
    if gap <= SHORT_GAP:
        for j in range(1, gap + 1):
            t = last + j
            a = np.float32(by_step[t, AMPLITUDE] * by_gap[j, 0] / decay_between(by_step, last, t))
            x = np.float32(np.sqrt(by_gap[j, 1]) * by_step[t, SPREAD])
            for d in range(width):
                total[d] += a / (root[d] * x + eps)
    else:
        for k in range(early.shape[2]):
            x, a = np.float32(early[last, 0, k]), np.float32(early[last, 1, k])
            if a != 0:
                for d in range(width):
                    total[d] += a / (root[d] * x + eps)
        if gap < horizon:
            shrink, gain = np.sqrt(by_gap[gap, 1]), -by_gap[gap, 0] / ratio
            if now < plain_below:
                for k in range(early.shape[2]):
                    x, a = np.float32(early[now, 0, k] * shrink), np.float32(early[now, 1, k] * gain)
                    if a != 0:
                        for d in range(width):
                            total[d] += a / (root[d] * x + eps)
            else:
                c, p0, p1, p2, p3, q1, q2, q3, q4 = fraction(by_step, now, shrink, gain)
                for d in range(width):
                    total[d] += value(root[d], eps, c, p0, p1, p2, p3, q1, q2, q3, q4)


@_inlined
def move(shape: Any, row: Any, grad: Any, numbers: Any) -> None:
    """One optimizer step of a packed ``row``."""
    width, kind = shape[1], shape[3]
    decay, rate1, root2, rest1, beta2 = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    eps, rate, rest2 = numbers[5], numbers[6], numbers[12]
    w = row[:width]
    if kind <= SPARSE_ADAM:
        m, v = row[width : 2 * width], row[2 * width : 3 * width]
        for d in range(width):
            g = grad[d]
            m1 = m[d] + rest1 * (g - m[d])
            v1 = v[d] * beta2 + rest2 * g * g
            m[d] = m1
            v[d] = v1
            w[d] = w[d] * decay - rate1 * m1 / (np.sqrt(v1) * root2 + eps)
    elif kind == ROWWISE_ADAGRAD:
        squares = np.float32(0)
        for d in range(width):
            squares += grad[d] * grad[d]
        accumulator = row[width] + squares / np.float32(width)
        row[width] = accumulator
        pace = rate / (np.sqrt(accumulator) + eps)
        for d in range(width):
            w[d] = w[d] * decay - pace * grad[d]
    else:
        for d in range(width):
            w[d] = w[d] * decay - rate * grad[d]


@_kernel
def gather(
    shape: Any, table: Any, lasts: Any, rows: Any, low: Any, high: Any, out: Any, now: Any, rules: Any, numbers: Any
) -> None:
    """Bring ``rows[low:high]`` to the present, in place, and copy their weights to ``out``."""
    width, stride = shape[1], shape[2]
    table, lasts, rows, out, numbers = bare(table), bare(lasts), bare(rows), bare(out), bare(numbers)
    rules = (bare(rules[0]), bare(rules[1]), bare(rules[2]), rules[3], rules[4])
    space = np.empty((2, width), np.float32)
    work = bare(space)
    for j in range(low, high):
        if j + AHEAD < high:
            ask(table, np.int64(rows[j + AHEAD]) * stride, stride)
        base = np.int64(rows[j]) * stride
        row, place = table[base : base + stride], base + stride - 1
        last = lasts[place]
        catch_up(shape, table, base, last, now, rules, numbers, work)
        lasts[place] = now if last > 0 else -now
        copy = out[j]
        for d in range(width):
            copy[d] = row[d]
    space[0, 0] = 0  # it lives until here


@_kernel
def user_pass(
    shape: Any, table: Any, lasts: Any, rows: Any, starts: Any, order: Any, low: Any, high: Any, item_slot: Any,
    items: Any, rating: Any, before: Any, slope: Any, error: Any, pulls: Any, shares: Any, now: Any, rules: Any,
    numbers: Any,
) -> None:  # fmt: skip
    """Users ``rows[low:high]``: catch up, score, update. Writes their weights as they were to ``before`` (row
    by row), per rating the error, and per rating and member ``slope``, the derivative of the loss by the score.

    ``pulls`` and ``shares``: see :func:`penalise`."""
    part, width, stride, _kind, members, user_bias, item_bias = shape
    number = rating.size
    one = np.float32(1)
    scale, base_rating, span, sigmoid, offset = numbers[7], numbers[8], numbers[9], numbers[10], numbers[11]
    share_of_members = one / np.float32(members)
    implicit = numbers[13]
    if implicit > 0:
        stride = stride_with_bag(shape)
    lead = leading_biases(shape)
    pulls, shares = bare(pulls), bare(shares)
    table, lasts, rows, starts, order = bare(table), bare(lasts), bare(rows), bare(starts), bare(order)
    item_slot, items, rating, before = bare(item_slot), bare(items), bare(rating), bare(before)
    slope, error, numbers = bare(slope), bare(error), bare(numbers)
    rules = (bare(rules[0]), bare(rules[1]), bare(rules[2]), rules[3], rules[4])
    space = np.empty((3, width), np.float32)
    work = bare(space)
    grad = work[2]
    for j in range(low, high):
        if j + AHEAD < high:
            ask(table, np.int64(rows[j + AHEAD]) * stride, stride)
        base = np.int64(rows[j]) * stride
        row, was = table[base : base + stride], before[j]
        catch_up(shape, table, base, lasts[base + stride - 1], now, rules, numbers, work)
        for d in range(width):
            was[d] = row[d]
            grad[d] = 0
        penalise(grad, was, starts[j + 1] - starts[j], pulls, shares, rows[j], scale)
        bag_weight = np.float32(0)
        if implicit > 0:
            bag_weight = implicit * np.sqrt(shares[rows[j]])
            join_bag(shape, was, row, bag_weight)
        for place in range(starts[j], starts[j + 1]):
            k = order[place]
            ask_row(items, item_slot, order, place + AHEAD, number)
            item = items[item_slot[k]]
            mean = np.float32(0)
            for member in range(members):
                first = member * part
                p, q, g = was[first : first + part], item[first : first + part], grad[first : first + part]
                score = offset
                for d in range(part):
                    score += p[d] * q[d]
                if user_bias >= 0:
                    score += was[first + user_bias] + item[first + item_bias]
                if implicit > 0:
                    own = np.float32(0)
                    for d in range(lead, part):
                        own += q[d] * q[d]
                    score -= bag_weight * own
                if sigmoid > 0:
                    s = one / (one + np.exp(-score))
                    e = base_rating + span * s - rating[k]
                    c = scale * e * span * s * (one - s)
                else:
                    e = score - rating[k]
                    c = scale * e
                mean += e
                slope[k * members + member] = c
                for d in range(part):
                    g[d] += c * q[d]
                if user_bias >= 0:
                    grad[first + user_bias] += c
            error[k] = mean * share_of_members
        if implicit > 0:
            refill(shape, row, items, item_slot, order, starts[j], starts[j + 1], slope, shares[rows[j]], bag_weight)
        move(shape, row, grad, numbers)
        lasts[base + stride - 1] = now + 1
    space[0, 0] = 0  # it lives until here


@_inlined
def leading_biases(shape: Any) -> Any:
    """Columns at the start of a member's part that are no factors."""
    return len(BIAS_COLUMN) if 0 <= shape[6] < shape[0] else 0


@_inlined
def join_bag(shape: Any, was: Any, row: Any, weight: Any) -> None:
    """Add the bag of ``row`` to the factors in ``was``, and put the pull and ``weight`` behind them."""
    dim, width = shape[0] * shape[4], shape[1]
    for d in range(dim):
        was[d] += row[width + d]
        was[width + d] = row[width + dim + d]
    was[width + dim] = weight


@_inlined
def refill(
    shape: Any, row: Any, items: Any, item_slot: Any, order: Any, first: Any, end: Any, slope: Any, share: Any,
    weight: Any,
) -> None:  # fmt: skip
    """Renew a user's bag and pull by the ratings ``order[first:end]``, see ``model.Form.implicit``."""
    part, width, members, lead = shape[0], shape[1], shape[4], leading_biases(shape)
    dim = part * members
    bag, pull = row[width : width + dim], row[width + dim : width + 2 * dim]
    kept = np.float32(1) - np.float32(end - first) * share
    for d in range(dim):
        bag[d] *= kept
        pull[d] *= kept
    for place in range(first, end):
        k = order[place]
        item = items[item_slot[k]]
        for member in range(members):
            c = slope[k * members + member]
            for d in range(member * part + lead, (member + 1) * part):
                come = weight * item[d]
                bag[d] += come
                pull[d] += c * come


@_inlined
def add_pull(shape: Any, grad: Any, own: Any, user: Any, slope: Any, k: Any) -> None:
    """Add to an item's ``grad`` what rating ``k`` brings through its user's bag, the item's own part in it left out."""
    part, width, members, lead = shape[0], shape[1], shape[4], leading_biases(shape)
    weight = user[width + part * members]
    for member in range(members):
        c = weight * slope[k * members + member]
        for d in range(member * part + lead, (member + 1) * part):
            grad[d] += user[width + d] - c * own[d]


@_inlined
def penalise(grad: Any, weight: Any, count: Any, pulls: Any, shares: Any, row: Any, scale: Any) -> None:
    """Add the gradient of the penalty of ``count`` ratings: ``pulls`` (2, width) float32, see ``objective``.

    Empty ``pulls``: none. ``shares`` float32 (rows,): one over the training ratings of each row.
    """
    if pulls.size > 0:
        times = scale * np.float32(count)
        always, once = pulls[0], pulls[1]
        share = times * shares[row]
        for d in range(grad.size):
            grad[d] += (times * always[d] + share * once[d]) * weight[d]


@_inlined
def add_up(
    shape: Any, grad: Any, own: Any, first: Any, end: Any, order: Any, user_slot: Any, before: Any, slope: Any,
    number: Any, implicit: Any,
) -> None:  # fmt: skip
    """Add to ``grad`` (width,) the gradient of one item from its ratings ``order[first:end]``, of ``number``."""
    part, _width, _stride, _kind, members, _user_bias, item_bias = shape
    for place in range(first, end):
        k = order[place]
        ask_row(before, user_slot, order, place + AHEAD, number)
        user = before[user_slot[k]]
        for member in range(members):
            begin, c = member * part, slope[k * members + member]
            p, g = user[begin : begin + part], grad[begin : begin + part]
            for d in range(part):
                g[d] += c * p[d]
            if item_bias >= 0:
                grad[begin + item_bias] += c
        if implicit > 0:
            add_pull(shape, grad, own, user, slope, k)


@_kernel
def item_pass(
    shape: Any, table: Any, lasts: Any, rows: Any, starts: Any, order: Any, low: Any, high: Any, user_slot: Any,
    own: Any, before: Any, slope: Any, pulls: Any, shares: Any, now: Any, numbers: Any,
) -> None:  # fmt: skip
    """Items ``rows[low:high]``, gathered before (``own``): gradient from the users' ``before``, then update."""
    width, stride = shape[1], shape[2]
    table, lasts, rows, starts, order = bare(table), bare(lasts), bare(rows), bare(starts), bare(order)
    user_slot, own, before, slope, numbers = bare(user_slot), bare(own), bare(before), bare(slope), bare(numbers)
    pulls, shares = bare(pulls), bare(shares)
    number = slope.size // shape[4]
    space = np.empty(width, np.float32)
    grad = bare(space)
    for j in range(low, high):
        if j + AHEAD < high:
            ask(table, np.int64(rows[j + AHEAD]) * stride, stride)
        for d in range(width):
            grad[d] = 0
        penalise(grad, own[j], starts[j + 1] - starts[j], pulls, shares, rows[j], numbers[7])
        add_up(shape, grad, own[j], starts[j], starts[j + 1], order, user_slot, before, slope, number, numbers[13])
        base = np.int64(rows[j]) * stride
        move(shape, table[base : base + stride], grad, numbers)
        lasts[base + stride - 1] = now + 1
    space[0] = 0  # it lives until here


@_kernel
def gradient(
    shape: Any, rows: Any, starts: Any, order: Any, low: Any, high: Any, user_slot: Any, own: Any, before: Any,
    slope: Any, pulls: Any, shares: Any, numbers: Any, out: Any,
) -> None:  # fmt: skip
    """The gradients of items ``low`` to ``high`` alone, for an owner elsewhere: float32 ``out`` (items, width)."""
    rows, starts, order, user_slot, own = bare(rows), bare(starts), bare(order), bare(user_slot), bare(own)
    before, slope, numbers, out = bare(before), bare(slope), bare(numbers), bare(out)
    pulls, shares = bare(pulls), bare(shares)
    number = slope.size // shape[4]
    for j in range(low, high):
        grad = out[j]
        for d in range(grad.size):
            grad[d] = 0
        penalise(grad, own[j], starts[j + 1] - starts[j], pulls, shares, rows[j], numbers[7])
        add_up(shape, grad, own[j], starts[j], starts[j + 1], order, user_slot, before, slope, number, numbers[13])


@_kernel
def update(
    shape: Any, table: Any, lasts: Any, rows: Any, low: Any, high: Any, grads: Any, now: Any, numbers: Any
) -> None:
    """Take one step on ``rows[low:high]``, which stand after step ``now``, with gradients from elsewhere."""
    stride = shape[2]
    table, lasts, rows = bare(table), bare(lasts), bare(rows)
    grads, numbers = bare(grads), bare(numbers)
    for j in range(low, high):
        if j + AHEAD < high:
            ask(table, np.int64(rows[j + AHEAD]) * stride, stride)
        base = np.int64(rows[j]) * stride
        move(shape, table[base : base + stride], grads[j], numbers)
        lasts[base + stride - 1] = now + 1


@_kernel
def cut(starts: Any, rows: Any, part: Any, parts: Any) -> int:
    """The row where range ``part`` of ``parts`` begins: ranges of equal load."""
    aim = (np.int64(starts[rows]) + ROW_LOAD * rows) * part // parts
    low, high = 0, rows
    while low < high:
        middle = (low + high) // 2
        if starts[middle] + ROW_LOAD * middle < aim:
            low = middle + 1
        else:
            high = middle
    return low


@_kernel
def whole_step(
    thread: Any, threads: Any, gate: Any, shape: Any, user: Any, item: Any, rating: Any, by_user: Any, by_item: Any,
    counts: Any, user_table: Any, user_lasts: Any, item_table: Any, item_lasts: Any, own: Any, before: Any, slope: Any,
    error: Any, user_pulls: Any, item_pulls: Any, user_shares: Any, item_shares: Any, now: Any, rules: Any,
    numbers: Any,
) -> None:  # fmt: skip
    """The step of one process, by ``threads`` threads that all call this; ``gate`` (int64, 1) is 0 at the start.

    ``by_user``, ``by_item``: the arrays of :func:`group` for each side; ``counts`` (int64, 2): their rows.
    """
    if thread == 0:
        counts[0] = group(user, by_user[0], by_user[1], by_user[2], by_user[3], by_user[4])
    if thread == threads - 1:
        counts[1] = group(item, by_item[0], by_item[1], by_item[2], by_item[3], by_item[4])
    if threads > 1:
        wait_for_all(gate, threads)
    users, items = counts[0], counts[1]
    low, high = items * thread // threads, items * (thread + 1) // threads
    gather(shape, item_table, item_lasts, by_item[2], low, high, own, now, rules, numbers)
    if threads > 1:
        wait_for_all(gate, 2 * threads)
    low, high = cut(by_user[3], users, thread, threads), cut(by_user[3], users, thread + 1, threads)
    user_pass(
        shape, user_table, user_lasts, by_user[2], by_user[3], by_user[0], low, high, by_item[4], own, rating, before,
        slope, error, user_pulls, user_shares, now, rules, numbers,
    )  # fmt: skip
    if threads > 1:
        wait_for_all(gate, 3 * threads)
    low, high = cut(by_item[3], items, thread, threads), cut(by_item[3], items, thread + 1, threads)
    item_pass(
        shape, item_table, item_lasts, by_item[2], by_item[3], by_item[0], low, high, by_user[4], own, before, slope,
        item_pulls, item_shares, now, numbers,
    )  # fmt: skip


@_kernel
def sums(error: Any, slope: Any) -> tuple[float, float]:
    """(sum of squared errors, sum of slopes), float64."""
    squares, slopes = 0.0, 0.0
    for k in range(error.size):
        squares += np.float64(error[k]) * np.float64(error[k])
    for k in range(slope.size):
        slopes += np.float64(slope[k])
    return squares, slopes


def rule_arrays(rules: AdamRules) -> tuple[Any, ...]:
    """The tuple that the kernels take: ``by_step`` float64 (steps + 1, RATIO + 9), ``by_gap`` float64 (steps + 1, 2)
    (powers of the betas), ``early`` float64 (plain_below, 2, NODES) (nodes, weights), horizon, plain_below."""
    steps = np.arange(len(rules.log_decay))
    power1 = rules.betas[0] ** steps
    power1[power1 < FORGOTTEN] = 0
    early = min(rules.plain_below, len(steps))
    by_step = np.column_stack([rules.log_decay, rules.amplitude, rules.spread, rules.ratios()])
    return (
        by_step, np.column_stack([power1, rules.betas[1] ** steps]),
        np.stack([rules.nodes[:early], rules.weights[:early]], axis=1), rules.horizon, rules.plain_below,
    )  # fmt: skip
