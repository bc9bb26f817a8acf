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
from mfdist.kernels.machine import arrive, arrived_at, bare, numbers_of, prefetch, prefetch_read, wait_for_all
from mfdist.kernels.rules import NODES, SHORT_GAP, AdamRules
from mfdist.kernels.vectors import LANES, ONE, SIXTEEN, fma, load, root, spread, store, total
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


_kernel = njit(nogil=True, error_model="numpy", cache=True)
_inlined = njit(nogil=True, error_model="numpy", inline="always")
LOG_DECAY, AMPLITUDE, SPREAD = range(3)
"""Columns of ``by_step``, see :func:`rule_arrays`."""
TERMS = 2 * max(NODES, SHORT_GAP)
"""Room for the terms of a sum (:func:`terms_of`)."""


@_inlined
def full(width: Any) -> Any:
    """Columns that whole vectors cover; the rest goes one by one."""
    return width & -LANES


@_inlined
def aligned(space: Any, width: Any) -> Any:
    """``width`` floats of ``space`` (width + LANES,) that begin where a cache line does."""
    first = (-(space.ctypes.data >> 2)) & (LANES - 1)
    return space[first : first + width]


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
def exponential(x: Any) -> Any:
    """exp of a float32, to two units in the last place, without a call (Cody and Waite; Taylor to r^7 / 7!)."""
    x = min(max(x, np.float32(-87)), np.float32(88))
    n = np.floor(fma(x, np.float32(1.44269504), np.float32(0.5)))
    r = fma(n, np.float32(-1.42860677e-6), fma(n, np.float32(-0.693145752), x))
    y = fma(r, np.float32(1 / 5040), np.float32(1 / 720))
    y = fma(y, r, np.float32(1 / 120))
    y = fma(y, r, np.float32(1 / 24))
    y = fma(y, r, np.float32(1 / 6))
    y = fma(y, r, np.float32(0.5))
    y = fma(y, r, np.float32(1))
    y = fma(y, r, np.float32(1))
    return y * np.int32((np.int64(n) + 127) << 23).view(np.float32)


@_inlined
def decay_between(by_step: Any, first: Any, end: Any) -> Any:
    """D_end / D_first, see ``kernels.rules``."""
    log = by_step[end, LOG_DECAY] - by_step[first, LOG_DECAY]
    if abs(log) < 0.01:  # four terms are exact to 1e-12 there, at a tenth of the time
        return 1.0 + log * (1.0 + log * (0.5 + log * (1.0 / 6.0 + log / 24.0)))
    return np.exp(log)


@_inlined
def catch_up(shape: Any, table: Any, base: Any, last: Any, now: Any, rules: Any, numbers: Any, terms: Any) -> None:
    """Bring the row at ``base``, which stands after step abs(``last``), to the state after step ``now``.

    ``last`` is not written; ``terms`` is space (2, TERMS). See ``kernels.rules`` for the sums.
    """
    if abs(last) != now:
        width, kind = shape[1], shape[3]
        by_step, by_gap, ratios, _early, horizon, plain_below = rules
        ratio = decay_between(by_step, abs(last), now)
        decay = np.float32(ratio)
        if kind == ADAMW and last > 0:
            gap, eps = now - last, numbers[5]
            s1, s2 = np.float32(by_gap[gap, 0]), np.float32(by_gap[gap, 1])
            if gap > SHORT_GAP and last >= plain_below:
                first = ratios[last]
                if gap >= horizon:
                    for d in range(base, base + full(width), LANES):
                        lost = one_rule(root(load(SIXTEEN, table, d + 2 * width)), eps, first)
                        forget(SIXTEEN, table, d, width, lost, decay, s1, s2)
                    for d in range(base + full(width), base + width):
                        lost = one_rule(root(load(ONE, table, d + 2 * width)), eps, first)
                        forget(ONE, table, d, width, lost, decay, s1, s2)
                else:
                    second, shrink = ratios[now], np.float32(np.sqrt(by_gap[gap, 1]))
                    gain = np.float32(-by_gap[gap, 0] / ratio)
                    for d in range(base, base + full(width), LANES):
                        lost = two_rules(root(load(SIXTEEN, table, d + 2 * width)), eps, first, second, shrink, gain)
                        forget(SIXTEEN, table, d, width, lost, decay, s1, s2)
                    for d in range(base + full(width), base + width):
                        lost = two_rules(root(load(ONE, table, d + 2 * width)), eps, first, second, shrink, gain)
                        forget(ONE, table, d, width, lost, decay, s1, s2)
            else:
                count = terms_of(gap, last, now, rules, ratio, terms)
                for d in range(base, base + full(width), LANES):
                    lost = sum_terms(SIXTEEN, root(load(SIXTEEN, table, d + 2 * width)), eps, terms, count)
                    forget(SIXTEEN, table, d, width, lost, decay, s1, s2)
                for d in range(base + full(width), base + width):
                    lost = sum_terms(ONE, root(load(ONE, table, d + 2 * width)), eps, terms, count)
                    forget(ONE, table, d, width, lost, decay, s1, s2)
        elif decay != 1:
            for d in range(base, base + full(width), LANES):
                store(SIXTEEN, table, d, load(SIXTEEN, table, d) * decay)
            for d in range(base + full(width), base + width):
                table[d] *= decay


@_inlined
def forget(lanes: Any, table: Any, d: Any, width: Any, lost: Any, decay: Any, s1: Any, s2: Any) -> None:
    """The missed steps at once: w <- decay (w - m lost), m <- s1 m, v <- s2 v, at ``table[d]`` and its state."""
    m = load(lanes, table, d + width)
    store(lanes, table, d, decay * (load(lanes, table, d) - m * lost))
    store(lanes, table, d + width, m * s1)
    store(lanes, table, d + 2 * width, load(lanes, table, d + 2 * width) * s2)


@_inlined
def above(r: Any, rule: Any) -> Any:
    """The numerator of a rule as one fraction (``AdamRules.ratios``)."""
    return fma(r, fma(r, fma(r, rule[4], rule[3]), rule[2]), rule[1])


@_inlined
def below(r: Any, rule: Any) -> Any:
    """Its denominator without the factor q."""
    return fma(r, fma(r, fma(r, fma(r, rule[8], rule[7]), rule[6]), rule[5]), np.float32(1))


@_inlined
def one_rule(deviation: Any, eps: Any, rule: Any) -> Any:
    """What is left from a step on, at the roots of second moments."""
    a = deviation * rule[0]
    inverse = np.float32(1) / (a + eps)
    r = a * inverse
    return inverse * above(r, rule) / below(r, rule)


@_inlined
def two_rules(deviation: Any, eps: Any, first: Any, second: Any, shrink: Any, gain: Any) -> Any:
    """What is left from the ``first`` step on, and ``gain`` times that from the ``second``, its points shrunk."""
    a, b = deviation * first[0], deviation * (second[0] * shrink)
    p, q = np.float32(1) / (a + eps), np.float32(1) / (b + eps)
    r, s = a * p, b * q
    under, other = below(r, first), below(s, second)
    return fma(p * above(r, first), other, gain * (q * above(s, second)) * under) / (under * other)


@_inlined
def terms_of(gap: Any, last: Any, now: Any, rules: Any, ratio: Any, terms: Any) -> Any:
    """Weights and points of the sum where the gap is short (each step) or began early (nodes); returns their number."""
    by_step, by_gap, _ratios, early, horizon, _plain_below = rules
    count = 0
    if gap <= SHORT_GAP:
        for j in range(1, gap + 1):
            t = last + j
            terms[0, count] = by_step[t, AMPLITUDE] * by_gap[j, 0] / decay_between(by_step, last, t)
            terms[1, count] = np.sqrt(by_gap[j, 1]) * by_step[t, SPREAD]
            count += 1
    else:
        for k in range(early.shape[2]):
            terms[0, count], terms[1, count] = early[last, 1, k], early[last, 0, k]
            count += 1
        if gap < horizon:
            shrink, gain = np.sqrt(by_gap[gap, 1]), -by_gap[gap, 0] / ratio
            for k in range(early.shape[2]):
                terms[0, count], terms[1, count] = early[now, 1, k] * gain, early[now, 0, k] * shrink
                count += 1
    return count


@_inlined
def sum_terms(lanes: Any, deviation: Any, eps: Any, terms: Any, count: Any) -> Any:
    """sum_k a_k / (deviation x_k + eps)."""
    found = spread(lanes, np.float32(0))
    for k in range(count):
        found = found + terms[0, k] / fma(deviation, terms[1, k], eps)
    return found


@_inlined
def move(shape: Any, table: Any, base: Any, grad: Any, numbers: Any) -> None:
    """One optimizer step of the packed row at ``base``."""
    width, kind = shape[1], shape[3]
    decay, rate, eps = numbers[0], numbers[6], numbers[5]
    if kind <= SPARSE_ADAM:
        for d in range(0, full(width), LANES):
            move_adam(SIXTEEN, table, base, d, width, grad, numbers)
        for d in range(full(width), width):
            move_adam(ONE, table, base, d, width, grad, numbers)
    else:
        pace = rate
        if kind == ROWWISE_ADAGRAD:
            squares = spread(SIXTEEN, np.float32(0))
            for d in range(0, full(width), LANES):
                squares = fma(load(SIXTEEN, grad, d), load(SIXTEEN, grad, d), squares)
            sum_of_squares = total(squares)
            for d in range(full(width), width):
                sum_of_squares += grad[d] * grad[d]
            accumulator = table[base + width] + sum_of_squares / np.float32(width)
            table[base + width] = accumulator
            pace = rate / (np.sqrt(accumulator) + eps)
        for d in range(0, full(width), LANES):
            store(SIXTEEN, table, base + d, load(SIXTEEN, table, base + d) * decay - pace * load(SIXTEEN, grad, d))
        for d in range(full(width), width):
            table[base + d] = table[base + d] * decay - pace * grad[d]


@_inlined
def move_adam(lanes: Any, table: Any, base: Any, d: Any, width: Any, grad: Any, numbers: Any) -> None:
    """Adam's step with decoupled decay on the lanes from column ``d`` on."""
    decay, rate1, root2, rest1, beta2 = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    eps, rest2 = numbers[5], numbers[12]
    place = base + d
    g, m = load(lanes, grad, d), load(lanes, table, place + width)
    m = fma(rest1, g - m, m)
    v = fma(rest2 * g, g, load(lanes, table, place + 2 * width) * beta2)
    w = load(lanes, table, place) * decay - rate1 * m / fma(root(v), root2, eps)
    store(lanes, table, place, w)
    store(lanes, table, place + width, m)
    store(lanes, table, place + 2 * width, v)


@_inlined
def copy(source: Any, first: Any, target: Any, width: Any) -> None:
    """``target[:width] = source[first : first + width]``."""
    for d in range(0, full(width), LANES):
        store(SIXTEEN, target, d, load(SIXTEEN, source, first + d))
    for d in range(full(width), width):
        target[d] = source[first + d]


@_inlined
def clear(array: Any, width: Any) -> None:
    """``array[:width] = 0``."""
    for d in range(0, full(width), LANES):
        store(SIXTEEN, array, d, spread(SIXTEEN, np.float32(0)))
    for d in range(full(width), width):
        array[d] = 0


@_inlined
def dot(a: Any, b: Any, first: Any, size: Any) -> Any:
    """sum_d a[d] b[d] over ``size`` columns from ``first`` on."""
    lanes = spread(SIXTEEN, np.float32(0))
    for d in range(first, first + full(size), LANES):
        lanes = fma(load(SIXTEEN, a, d), load(SIXTEEN, b, d), lanes)
    found = total(lanes)
    for d in range(first + full(size), first + size):
        found = fma(a[d], b[d], found)
    return found


@_inlined
def add_times(target: Any, c: Any, source: Any, first: Any, size: Any) -> None:
    """``target += c source`` in ``size`` columns from ``first`` on."""
    for d in range(first, first + full(size), LANES):
        store(SIXTEEN, target, d, fma(c, load(SIXTEEN, source, d), load(SIXTEEN, target, d)))
    for d in range(first + full(size), first + size):
        target[d] = fma(c, source[d], target[d])


@_kernel
def gather(
    shape: Any, table: Any, lasts: Any, rows: Any, low: Any, high: Any, out: Any, now: Any, rules: Any, numbers: Any
) -> None:
    """Bring ``rows[low:high]`` to the present, in place, and copy their weights to ``out``."""
    shape = numbers_of(shape)
    width, stride = shape[1], shape[2]
    table, lasts, rows, out, numbers = bare(table), bare(lasts), bare(rows), bare(out), bare(numbers)
    rules = (bare(rules[0]), bare(rules[1]), bare(rules[2]), bare(rules[3]), rules[4], rules[5])
    space = np.empty((2, TERMS), np.float32)
    terms = bare(space)
    for j in range(low, high):
        if j + AHEAD < high:
            ask(table, np.int64(rows[j + AHEAD]) * stride, stride)
        base = np.int64(rows[j]) * stride
        place = base + stride - 1
        last = lasts[place]
        catch_up(shape, table, base, last, now, rules, numbers, terms)
        lasts[place] = now if last > 0 else -now
        copy(table, base, out[j], width)
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
    shape = numbers_of(shape)
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
    rules = (bare(rules[0]), bare(rules[1]), bare(rules[2]), bare(rules[3]), rules[4], rules[5])
    space, unaligned = np.empty((2, TERMS), np.float32), np.empty(width + LANES, np.float32)
    terms, grad = bare(space), aligned(bare(unaligned), width)
    for j in range(low, high):
        if j + AHEAD < high:
            ask(table, np.int64(rows[j + AHEAD]) * stride, stride)
        base = np.int64(rows[j]) * stride
        was = before[j]
        catch_up(shape, table, base, lasts[base + stride - 1], now, rules, numbers, terms)
        copy(table, base, was, width)
        clear(grad, width)
        penalise(grad, was, starts[j + 1] - starts[j], pulls, shares, rows[j], scale)
        bag_weight = np.float32(0)
        if implicit > 0:
            bag_weight = implicit * np.sqrt(shares[rows[j]])
            join_bag(shape, was, table, base, bag_weight)
        for place in range(starts[j], starts[j + 1]):
            k = order[place]
            ask_row(items, item_slot, order, place + AHEAD, number)
            item = items[item_slot[k]]
            mean = np.float32(0)
            for member in range(members):
                first = member * part
                score = offset + dot(was, item, first, part)
                if user_bias >= 0:
                    score += was[first + user_bias] + item[first + item_bias]
                if implicit > 0:
                    square = dot(item, item, first, part)
                    for d in range(first, first + lead):
                        square -= item[d] * item[d]
                    score -= bag_weight * square
                if sigmoid > 0:
                    s = one / (one + exponential(-score))
                    e = base_rating + span * s - rating[k]
                    c = scale * e * span * s * (one - s)
                else:
                    e = score - rating[k]
                    c = scale * e
                mean += e
                slope[k * members + member] = c
                add_times(grad, c, item, first, part)
                if user_bias >= 0:
                    grad[first + user_bias] += c
            error[k] = mean * share_of_members
        if implicit > 0:
            refill(
                shape, table, base, items, item_slot, order, starts[j], starts[j + 1], slope, shares[rows[j]],
                bag_weight,
            )  # fmt: skip
        move(shape, table, base, grad, numbers)
        lasts[base + stride - 1] = now + 1
    space[0, 0] = unaligned[0] = 0  # they live until here


@_inlined
def leading_biases(shape: Any) -> Any:
    """Columns at the start of a member's part that are no factors."""
    return len(BIAS_COLUMN) if 0 <= shape[6] < shape[0] else 0


@_inlined
def join_bag(shape: Any, was: Any, table: Any, base: Any, weight: Any) -> None:
    """Add the bag of the row at ``base`` to the factors in ``was``, and put its pull and ``weight`` behind them."""
    dim, width = shape[0] * shape[4], shape[1]
    bag, behind = table[base + width : base + width + dim], was[width : width + dim]
    add_times(was, np.float32(1), bag, 0, dim)
    copy(table, base + width + dim, behind, dim)
    was[width + dim] = weight


@_inlined
def refill(
    shape: Any, table: Any, base: Any, items: Any, item_slot: Any, order: Any, first: Any, end: Any, slope: Any,
    share: Any, weight: Any,
) -> None:  # fmt: skip
    """Renew bag and pull of the row at ``base`` by the ratings ``order[first:end]``, see ``model.Form.implicit``."""
    part, width, members, lead = shape[0], shape[1], shape[4], leading_biases(shape)
    dim = part * members
    bag = table[base + width : base + width + dim]
    pull = table[base + width + dim : base + width + 2 * dim]
    gone = -np.float32(end - first) * share
    add_times(bag, gone, bag, 0, dim)
    add_times(pull, gone, pull, 0, dim)
    for place in range(first, end):
        k = order[place]
        item = items[item_slot[k]]
        add_times(bag, weight, item, 0, dim)
        for member in range(members):
            add_times(pull, weight * slope[k * members + member], item, member * part, part)
    for member in range(members):
        for d in range(member * part, member * part + lead):
            bag[d] = pull[d] = 0


@_inlined
def add_pull(shape: Any, grad: Any, own: Any, user: Any, slope: Any, k: Any) -> None:
    """Add to an item's ``grad`` what rating ``k`` brings through its user's bag, the item's own part in it left out."""
    part, width, members, lead = shape[0], shape[1], shape[4], leading_biases(shape)
    dim = part * members
    weight = user[width + dim]
    add_times(grad, np.float32(1), user[width : width + dim], 0, dim)
    for member in range(members):
        first, c = member * part, weight * slope[k * members + member]
        add_times(grad, -c, own, first, part)
        for d in range(first, first + lead):
            grad[d] += c * own[d]


@_inlined
def penalise(grad: Any, weight: Any, count: Any, pulls: Any, shares: Any, row: Any, scale: Any) -> None:
    """Add the gradient of the penalty of ``count`` ratings: ``pulls`` (2, width) float32, see ``objective``.

    Empty ``pulls``: none. ``shares`` float32 (rows,): one over the training ratings of each row.
    """
    if pulls.size > 0:
        times = scale * np.float32(count)
        always, once = pulls[0], pulls[1]
        share = times * shares[row]
        for d in range(0, full(grad.size), LANES):
            pull = fma(times, load(SIXTEEN, always, d), share * load(SIXTEEN, once, d))
            store(SIXTEEN, grad, d, fma(pull, load(SIXTEEN, weight, d), load(SIXTEEN, grad, d)))
        for d in range(full(grad.size), grad.size):
            grad[d] = fma(fma(times, always[d], share * once[d]), weight[d], grad[d])


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
            add_times(grad, c, user, begin, part)
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
    shape = numbers_of(shape)
    width, stride = shape[1], shape[2]
    table, lasts, rows, starts, order = bare(table), bare(lasts), bare(rows), bare(starts), bare(order)
    user_slot, own, before, slope, numbers = bare(user_slot), bare(own), bare(before), bare(slope), bare(numbers)
    pulls, shares = bare(pulls), bare(shares)
    number = slope.size // shape[4]
    space = np.empty(width + LANES, np.float32)
    grad = aligned(bare(space), width)
    for j in range(low, high):
        if j + AHEAD < high:
            ask(table, np.int64(rows[j + AHEAD]) * stride, stride)
        clear(grad, width)
        penalise(grad, own[j], starts[j + 1] - starts[j], pulls, shares, rows[j], numbers[7])
        add_up(shape, grad, own[j], starts[j], starts[j + 1], order, user_slot, before, slope, number, numbers[13])
        base = np.int64(rows[j]) * stride
        move(shape, table, base, grad, numbers)
        lasts[base + stride - 1] = now + 1
    space[0] = 0  # it lives until here


@_kernel
def gradient(
    shape: Any, rows: Any, starts: Any, order: Any, low: Any, high: Any, user_slot: Any, own: Any, before: Any,
    slope: Any, pulls: Any, shares: Any, numbers: Any, out: Any,
) -> None:  # fmt: skip
    """The gradients of items ``low`` to ``high`` alone, for an owner elsewhere: float32 ``out`` (items, width)."""
    shape = numbers_of(shape)
    width = shape[1]
    rows, starts, order, user_slot, own = bare(rows), bare(starts), bare(order), bare(user_slot), bare(own)
    before, slope, numbers, out = bare(before), bare(slope), bare(numbers), bare(out)
    pulls, shares = bare(pulls), bare(shares)
    number = slope.size // shape[4]
    for j in range(low, high):
        grad = out[j, :width]
        clear(grad, width)
        penalise(grad, own[j], starts[j + 1] - starts[j], pulls, shares, rows[j], numbers[7])
        add_up(shape, grad, own[j], starts[j], starts[j + 1], order, user_slot, before, slope, number, numbers[13])


@_kernel
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
        if j + AHEAD < high:
            ask(table, np.int64(rows[j + AHEAD]) * stride, stride)
            ask(out[lines[order[starts[j + AHEAD]]]], 0, width)
        base = np.int64(rows[j]) * stride
        place = base + stride - 1
        last = lasts[place]
        catch_up(shape, table, base, last, now, rules, numbers, terms)
        lasts[place] = now if last > 0 else -now
        for q in range(starts[j], starts[j + 1]):
            copy(table, base, out[lines[order[q]]], width)
    space[0, 0] = 0  # it lives until here


@_kernel
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
        if j + AHEAD < high:
            ask(table, np.int64(rows[j + AHEAD]) * stride, stride)
            ahead = grads[lines[order[starts[j + AHEAD]]]]
            for k in range(0, width, 16):
                prefetch_read(ahead, k)
        clear(grad, width)
        for q in range(starts[j], starts[j + 1]):
            add_times(grad, one, grads[lines[order[q]]], 0, width)
        base = np.int64(rows[j]) * stride
        move(shape, table, base, grad, numbers)
        lasts[base + stride - 1] = now + 1
    unaligned[0] = 0  # it lives until here


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


ASK, GATHER, LEARN, UPDATE, DONE = range(5)
"""Stages of a step of several ranks; between two of them something goes from rank to rank."""
USERS, ITEMS, OWNED, REQUESTS, STAGE = range(5)
"""Places of ``counts`` (int64, 5): rows of the batch, rows that this rank was asked for, by how many requests; what
comes next."""


@_kernel
def step_of_ranks(
    thread: Any, threads: Any, gate: Any, stage: Any, shape: Any, user: Any, item: Any, rating: Any, by_user: Any,
    by_item: Any, by_owner: Any, counts: Any, user_table: Any, user_lasts: Any, item_table: Any, item_lasts: Any,
    before: Any, slope: Any, error: Any, user_pulls: Any, item_pulls: Any, user_shares: Any, item_shares: Any,
    now: Any, rules: Any, numbers: Any, requests: Any, lines: Any, rows: Any, own: Any, gradient_: Any, gradients: Any,
    meeting: Any,
) -> None:  # fmt: skip
    """The step of one rank from ``stage`` on, by ``threads`` threads that all call this; ``gate`` is 0 at the start.

    The arrays of the last lines are those of ``exchange``. Where the ranks share memory (``meeting``) the stages follow
    each other, and it returns before one whose data do not come within a millisecond; else it returns before each.
    ``counts[STAGE]``: the stage to call next.
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
        passed += threads
        if threads > 1:
            wait_for_all(gate, passed)
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
        passed += threads
        if threads > 1:
            wait_for_all(gate, passed)
        if thread == 0:
            arrive(signals[rank])
    if stage == LEARN:
        if thread == 0:
            counts[STAGE] = UPDATE if not shared or arrived_at(signals, signals[rank, 0]) else LEARN
        passed += threads
        if threads > 1:
            wait_for_all(gate, passed)
        if counts[STAGE] != UPDATE:
            return
        users, items = counts[USERS], counts[ITEMS]
        low, high = cut(by_user[3], users, thread, threads), cut(by_user[3], users, thread + 1, threads)
        user_pass(
            shape, user_table, user_lasts, by_user[2], by_user[3], by_user[0], low, high, by_item[4], own, rating,
            before, slope, error, user_pulls, user_shares, now, rules, numbers,
        )  # fmt: skip
        passed += threads
        if threads > 1:
            wait_for_all(gate, passed)
        low, high = cut(by_item[3], items, thread, threads), cut(by_item[3], items, thread + 1, threads)
        gradient(
            shape, by_item[2], by_item[3], by_item[0], low, high, by_user[4], own, before, slope, item_pulls,
            item_shares, numbers, gradient_,
        )  # fmt: skip
        stage = UPDATE
        if not shared:
            return
        passed += threads
        if threads > 1:
            wait_for_all(gate, passed)
        if thread == 0:
            arrive(signals[rank])
    if stage == UPDATE:
        if thread == 0:
            counts[STAGE] = DONE if not shared or arrived_at(signals, signals[rank, 0]) else UPDATE
        passed += threads
        if threads > 1:
            wait_for_all(gate, passed)
        if counts[STAGE] != DONE:
            return
        low, high = counts[OWNED] * thread // threads, counts[OWNED] * (thread + 1) // threads
        update_from_ranks(
            shape, item_table, item_lasts, by_owner[2], by_owner[3], by_owner[0], low, high, lines, gradients, now,
            numbers,
        )  # fmt: skip


@_kernel
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


@_kernel
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


@njit(nogil=True, fastmath=True, error_model="numpy", cache=True)
def sums(error: Any, slope: Any) -> tuple[float, float]:
    """(sum of squared errors, sum of slopes), float64."""
    squares, slopes = 0.0, 0.0
    for k in range(error.size):
        squares += np.float64(error[k]) * np.float64(error[k])
    for k in range(slope.size):
        slopes += np.float64(slope[k])
    return squares, slopes


def pitch_of(width: int) -> int:
    """Floats from one row of a buffer to the next: whole cache lines."""
    return -(-width // LANES) * LANES


def row_buffer(rows: int, width: int) -> Any:
    """float32 (rows, at least width), each row of it where a cache line begins: vectors across lines cost more."""
    stride = pitch_of(width)
    space = np.empty(rows * stride + LANES, np.float32)
    first = (-(space.ctypes.data // 4)) % LANES
    return space[first : first + rows * stride].reshape(rows, stride)


def rule_arrays(rules: AdamRules) -> tuple[Any, ...]:
    """What kernels take: ``by_step`` float64 (steps + 1, 3), ``by_gap`` float64 (steps + 1, 2): powers of the betas,
    ``ratios`` float32 (steps + 1, at least 9), ``early`` float64 (plain_below + horizon, 2, NODES): nodes and weights,
    horizon, plain_below."""
    steps = np.arange(len(rules.log_decay))
    power1 = rules.betas[0] ** steps
    power1[power1 < FORGOTTEN] = 0
    found = rules.ratios()
    ratios = row_buffer(*found.shape)
    ratios[:, : found.shape[1]] = found
    early = min(rules.plain_below + rules.horizon, len(steps))
    return (
        np.column_stack([rules.log_decay, rules.amplitude, rules.spread]),
        np.column_stack([power1, rules.betas[1] ** steps]), ratios,
        np.stack([rules.nodes[:early], rules.weights[:early]], axis=1), rules.horizon, rules.plain_below,
    )  # fmt: skip
