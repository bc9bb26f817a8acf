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

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from mfdist.kernels import stride_of
from mfdist.kernels.rules import SHORT_GAP, AdamRules

ADAMW, SPARSE_ADAM, ROWWISE_ADAGRAD, SGD = range(4)
KINDS = {"adamw": ADAMW, "sparse_adam": SPARSE_ADAM, "rowwise_adagrad": ROWWISE_ADAGRAD, "sgd": SGD}
AHEAD = 8
"""Rows between the one in work and the one whose memory is asked for."""

Floats32 = npt.NDArray[np.float32]
Ints32 = npt.NDArray[np.int32]


@intrinsic
def _prefetch_line(typingctx: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of ``array[index]``, to be written soon."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        from llvmlite import ir

        insert: Any = cgutils.get_or_insert_function
        base = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        pointer = builder.bitcast(builder.gep(base, [arguments[1]]), ir.IntType(8).as_pointer())
        i32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, i32, i32, i32])
        function = insert(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [pointer, i32(1), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(array, index), generate


# Grouping -----------------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
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


# Kernels: ``shape`` is (factors, width, stride, kind), see :func:`shape_of` --------------------------

STEP_FIELDS = ("decay", "rate1", "root2", "beta1", "beta2", "eps", "rate", "scale", "l2_factors", "l2_biases", "low",
               "span", "sigmoid", "offset")  # fmt: skip
"""The float32 ``numbers`` of one step. rate1: lr / (1 - b1^t); root2: 1 / sqrt(1 - b2^t); scale: 2 / global rows."""


def shape_of(dim: int, bias: bool, kind: int) -> tuple[int, int, int, int]:
    """(factors, width, stride, kind) of the rows of a model under an optimizer of :data:`KINDS`."""
    width = dim + int(bias)
    state = {ADAMW: 2 * width, SPARSE_ADAM: 2 * width, ROWWISE_ADAGRAD: 1, SGD: 0}[kind]
    return dim, width, stride_of(width, state), kind


_prefetch: Any = _prefetch_line


@njit(nogil=True, fastmath=True, cache=True)
def ask(shape: Any, table: Any, row: Any) -> None:
    stride = shape[2]
    base = np.int64(row) * stride
    for k in range(0, stride, 16):
        _prefetch(table, base + k)
    _prefetch(table, base + stride - 1)


@njit(nogil=True, fastmath=True, cache=True)
def add_nodes(
    shape: Any, table: Any, base: Any, nodes: Any, weights: Any, shrink: Any, gain: Any, eps: Any, total: Any
) -> None:
    width = shape[1]
    for k in range(nodes.size):
        x, a = np.float32(nodes[k] * shrink), np.float32(weights[k] * gain)
        if a != 0:
            for d in range(width):
                total[d] += a / (np.sqrt(table[base + 2 * width + d]) * x + eps)


@njit(nogil=True, fastmath=True, cache=True)
def add_ratio(shape: Any, table: Any, base: Any, rule: Any, shrink: Any, gain: Any, eps: Any, total: Any) -> None:
    width = shape[1]
    one = np.float32(1)
    centre, g = np.float32(rule[0] * shrink), np.float32(gain)
    p0, p1, p2, p3 = g * rule[1], g * rule[2], g * rule[3], g * rule[4]
    q1, q2, q3, q4 = rule[5], rule[6], rule[7], rule[8]
    for d in range(width):
        a = np.sqrt(table[base + 2 * width + d]) * centre
        inverse = one / (a + eps)
        r = a * inverse
        top = p0 + r * (p1 + r * (p2 + r * p3))
        total[d] += inverse * top / (one + r * (q1 + r * (q2 + r * (q3 + r * q4))))


@njit(nogil=True, fastmath=True, cache=True)
def catch_up(shape: Any, table: Any, lasts: Any, base: Any, now: Any, rules: Any, numbers: Any, total: Any) -> None:
    """Bring the row at ``base`` to the state after step ``now``; ``last`` is not written."""
    _dim, width, stride, kind = shape
    ratios, nodes, weights, log_decay, power1, power2, horizon, plain_below, amplitude, spread = rules
    last = lasts[base + stride - 1]
    since = abs(last)
    if since == now:
        return
    decay = np.float32(np.exp(log_decay[now] - log_decay[since]))
    if kind == ADAMW and last > 0:
        gap = now - last
        eps = numbers[5]
        for d in range(width):
            total[d] = 0
        shrink1, shrink2 = power1[gap], power2[gap]
        if gap <= SHORT_GAP:
            for j in range(1, gap + 1):
                t = last + j
                a = np.float32(amplitude[t] * power1[j] * np.exp(log_decay[last] - log_decay[t]))
                x = np.float32(np.sqrt(power2[j]) * spread[t])
                for d in range(width):
                    total[d] += a / (np.sqrt(table[base + 2 * width + d]) * x + eps)
        elif last < plain_below:
            add_nodes(shape, table, base, nodes[last], weights[last], 1.0, 1.0, eps, total)
        else:
            add_ratio(shape, table, base, ratios[last], 1.0, 1.0, eps, total)
        if SHORT_GAP < gap < horizon:
            gain = -shrink1 * np.exp(log_decay[last] - log_decay[now])
            if now < plain_below:
                add_nodes(shape, table, base, nodes[now], weights[now], np.sqrt(shrink2), gain, eps, total)
            else:
                add_ratio(shape, table, base, ratios[now], np.sqrt(shrink2), gain, eps, total)
        s1, s2 = np.float32(shrink1), np.float32(shrink2)
        for d in range(width):
            m = table[base + width + d]
            table[base + d] = decay * (table[base + d] - m * total[d])
            table[base + width + d] = m * s1
            table[base + 2 * width + d] *= s2
    elif decay != 1:
        for d in range(width):
            table[base + d] *= decay


@njit(nogil=True, fastmath=True, cache=True)
def move(shape: Any, table: Any, lasts: Any, base: Any, grad: Any, step: Any, numbers: Any) -> None:
    """One optimizer step of the row at ``base``."""
    _dim, width, stride, kind = shape
    one = np.float32(1)
    decay, rate1, root2, beta1, beta2 = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    eps, rate = numbers[5], numbers[6]
    if kind <= SPARSE_ADAM:
        for d in range(width):
            g = grad[d]
            m = table[base + width + d]
            m = m + (one - beta1) * (g - m)
            v = table[base + 2 * width + d] * beta2 + (one - beta2) * g * g
            table[base + width + d] = m
            table[base + 2 * width + d] = v
            table[base + d] = table[base + d] * decay - rate1 * m / (np.sqrt(v) * root2 + eps)
    elif kind == ROWWISE_ADAGRAD:
        squares = np.float32(0)
        for d in range(width):
            squares += grad[d] * grad[d]
        accumulator = table[base + width] + squares / np.float32(width)
        table[base + width] = accumulator
        pace = rate / (np.sqrt(accumulator) + eps)
        for d in range(width):
            table[base + d] = table[base + d] * decay - pace * grad[d]
    else:
        for d in range(width):
            table[base + d] = table[base + d] * decay - rate * grad[d]
    lasts[base + stride - 1] = step


@njit(nogil=True, fastmath=True, cache=True)
def gather(
    shape: Any, table: Any, lasts: Any, rows: Any, low: Any, high: Any, out: Any, now: Any, rules: Any, numbers: Any
) -> None:
    """Bring ``rows[low:high]`` to the present, in place, and copy their weights to ``out``."""
    _dim, width, stride, _kind = shape
    total = np.empty(width, np.float32)
    for j in range(low, high):
        if j + AHEAD < high:
            ask(shape, table, rows[j + AHEAD])
        base = np.int64(rows[j]) * stride
        catch_up(shape, table, lasts, base, now, rules, numbers, total)
        lasts[base + stride - 1] = now if lasts[base + stride - 1] > 0 else -now
        for d in range(width):
            out[j, d] = table[base + d]


@njit(nogil=True, fastmath=True, cache=True)
def user_pass(
    shape: Any, table: Any, lasts: Any, rows: Any, starts: Any, order: Any, low: Any, high: Any, item_slot: Any,
    items: Any, rating: Any, before: Any, slope: Any, error: Any, now: Any, rules: Any, numbers: Any,
) -> None:  # fmt: skip
    """Users ``rows[low:high]``: catch up, score, update. Writes their weights as they were to ``before`` (row
    by row), and per rating the error and ``slope``, the derivative of the loss by the score."""
    dim, width, stride, _kind = shape
    one = np.float32(1)
    scale, l2_factors, l2_biases = numbers[7], numbers[8], numbers[9]
    base_rating, span, sigmoid, offset = numbers[10], numbers[11], numbers[12], numbers[13]
    grad, total = np.empty(width, np.float32), np.empty(width, np.float32)
    for j in range(low, high):
        if j + AHEAD < high:
            ask(shape, table, rows[j + AHEAD])
        base = np.int64(rows[j]) * stride
        catch_up(shape, table, lasts, base, now, rules, numbers, total)
        count = np.float32(starts[j + 1] - starts[j])
        for d in range(width):
            before[j, d] = table[base + d]
            grad[d] = count * (l2_factors if d < dim else l2_biases) * table[base + d]
        for q in range(starts[j], starts[j + 1]):
            k = order[q]
            i = item_slot[k]
            score = np.float32(0)
            for d in range(dim):
                score += table[base + d] * items[i, d]
            if width > dim:
                score += table[base + dim] + items[i, dim]
            score += offset
            if sigmoid > 0:
                s = one / (one + np.exp(-score))
                e = base_rating + span * s - rating[k]
                c = scale * e * span * s * (one - s)
            else:
                e = score - rating[k]
                c = scale * e
            error[k] = e
            slope[k] = c
            for d in range(dim):
                grad[d] += c * items[i, d]
            if width > dim:
                grad[dim] += c
        move(shape, table, lasts, base, grad, now + 1, numbers)


@njit(nogil=True, fastmath=True, cache=True)
def add_up(
    shape: Any,
    grad: Any,
    own: Any,
    j: Any,
    starts: Any,
    order: Any,
    user_slot: Any,
    before: Any,
    slope: Any,
    numbers: Any,
) -> None:
    dim, width, _stride, _kind = shape
    count = np.float32(starts[j + 1] - starts[j])
    for d in range(width):
        grad[d] = count * (numbers[8] if d < dim else numbers[9]) * own[j, d]
    for q in range(starts[j], starts[j + 1]):
        k = order[q]
        u, c = user_slot[k], slope[k]
        for d in range(dim):
            grad[d] += c * before[u, d]
        if width > dim:
            grad[dim] += c


@njit(nogil=True, fastmath=True, cache=True)
def item_pass(
    shape: Any, table: Any, lasts: Any, rows: Any, starts: Any, order: Any, low: Any, high: Any, user_slot: Any,
    own: Any, before: Any, slope: Any, now: Any, numbers: Any,
) -> None:  # fmt: skip
    """Items ``rows[low:high]``, gathered before (``own``): gradient from the users' ``before``, then update."""
    _dim, width, stride, _kind = shape
    grad = np.empty(width, np.float32)
    for j in range(low, high):
        if j + AHEAD < high:
            ask(shape, table, rows[j + AHEAD])
        add_up(shape, grad, own, j, starts, order, user_slot, before, slope, numbers)
        move(shape, table, lasts, np.int64(rows[j]) * stride, grad, now + 1, numbers)


@njit(nogil=True, fastmath=True, cache=True)
def gradient(
    shape: Any, starts: Any, order: Any, low: Any, high: Any, user_slot: Any, own: Any, before: Any, slope: Any,
    numbers: Any, out: Any,
) -> None:  # fmt: skip
    """The gradients of items ``low`` to ``high`` alone, for an owner elsewhere: float32 ``out`` (items, width)."""
    _dim, _width, _stride, _kind = shape
    for j in range(low, high):
        add_up(shape, out[j], own, j, starts, order, user_slot, before, slope, numbers)


@njit(nogil=True, fastmath=True, cache=True)
def update(
    shape: Any, table: Any, lasts: Any, rows: Any, low: Any, high: Any, grads: Any, now: Any, numbers: Any
) -> None:
    """Take one step on ``rows[low:high]``, which stand after step ``now``, with gradients from elsewhere."""
    stride = shape[2]
    for j in range(low, high):
        if j + AHEAD < high:
            ask(shape, table, rows[j + AHEAD])
        move(shape, table, lasts, np.int64(rows[j]) * stride, grads[j], now + 1, numbers)


def rule_arrays(rules: AdamRules) -> tuple[Any, ...]:
    """The tuple that the kernels take: ratios, nodes, weights, log_decay, powers of the betas, horizon, plain_below,
    amplitude, spread."""
    steps = np.arange(len(rules.log_decay))
    early = min(rules.plain_below, len(steps))
    return (
        rules.ratios(), np.ascontiguousarray(rules.nodes[:early]), np.ascontiguousarray(rules.weights[:early]),
        rules.log_decay, rules.betas[0] ** steps, rules.betas[1] ** steps, rules.horizon,
        rules.plain_below, rules.amplitude, rules.spread,
    )  # fmt: skip


class Workers:
    """``threads`` threads that share out ranges of rows; the caller is one of them."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="kernel") if threads > 1 else None

    def both(self, first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
        """Two independent calls, side by side where there are two threads."""
        if self._pool is None:
            return first(), second()
        pending = self._pool.submit(first)
        other = second()
        return pending.result(), other

    def ranges(self, cuts: list[int], call: Callable[[int, int], None]) -> None:
        """``call(low, high)`` for each pair of neighbours in ``cuts``."""
        pairs = list(pairwise(cuts))
        pending = [self._pool.submit(call, low, high) for low, high in pairs[1:]] if self._pool else []
        call(*pairs[0])
        wait(pending)
        for future in pending:
            future.result()

    def cuts(self, starts: Ints32, rows: int) -> list[int]:
        """Row numbers that cut ``rows`` rows into as many ranges as there are threads, equal in ratings plus rows."""
        if self.threads == 1:
            return [0, rows]
        load = starts[: rows + 1].astype(np.int64) + np.arange(rows + 1)
        aims = load[-1] * np.arange(1, self.threads) // self.threads
        return [0, *np.searchsorted(load, aims).tolist(), rows]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
