"""What a step, or many without a gradient, does to a packed row; the numbers that kernels take.

``shape`` describes a row, see :func:`shape_of`; ``table`` and ``base`` say where it lies; ``numbers`` are those of the
step (:data:`STEP_FIELDS`), ``rules`` those of the run (:func:`rule_arrays`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mfdist.kernels import BIAS_COLUMN, stride_of
from mfdist.kernels.missed_steps import NODES, SHORT_GAP, AdamRules
from mfdist.kernels.numba_intrinsics import inlined
from mfdist.kernels.row_arithmetic import copy, full, row_buffer
from mfdist.kernels.vectors import LANES, ONE, SIXTEEN, fma, load, root, spread, store, total

ADAMW, SPARSE_ADAM, ROWWISE_ADAGRAD, SGD = range(4)
KINDS = {"adamw": ADAMW, "sparse_adam": SPARSE_ADAM, "rowwise_adagrad": ROWWISE_ADAGRAD, "sgd": SGD}
FORGOTTEN = 1e-25
"""A momentum that has shrunk by this much is none: float32 numbers below 1e-38 would cost a hundred cycles each."""
LOG_DECAY, AMPLITUDE, SPREAD = range(3)
"""Columns of ``by_step``, see :func:`rule_arrays`."""
TERMS = 2 * max(NODES, SHORT_GAP)
"""Room for the terms of a sum (:func:`terms_of`)."""

STEP_FIELDS = ("decay", "rate1", "root2", "rest1", "beta2", "eps", "rate", "scale", "low", "span", "sigmoid", "offset",
               "rest2", "implicit")  # fmt: skip
"""The float32 ``numbers`` of one step. rate1: lr / (1 - b1^t); root2: 1 / sqrt(1 - b2^t); scale: twice the weight of a
rating's squared error in the loss; rest1, rest2: 1 - beta1, 1 - beta2, rounded after the subtraction (float32 0.999
taken from 1 would be off by 1.3e-5). implicit: ``model.Form.implicit``; users' rows hold bag and pull then."""


def shape_of(dim: int, bias: bool, members: int, kind: int) -> tuple[int, int, int, int, int, int, int]:
    """(factors of a member, width, stride, kind, members, user's bias, item's bias) of a model under an optimizer.

    ``kind``: of :data:`KINDS`. The last two: the member's first column that is added to the score as a bias, -1 where
    there is none (``kernels.BIAS_COLUMN`` where members hold them inside).
    """
    width = dim + int(bias and not members)
    state = {ADAMW: 2 * width, SPARSE_ADAM: 2 * width, ROWWISE_ADAGRAD: 1, SGD: 0}[kind]
    user_bias, item_bias = BIAS_COLUMN if members else (dim, dim) if bias else (-1, -1)
    return dim // max(members, 1), width, stride_of(width, state), kind, max(members, 1), user_bias, item_bias


@inlined
def decays_between(by_step: Any, first: Any, end: Any) -> Any:
    """(D_end / D_first, D_first / D_end), see ``kernels.missed_steps``."""
    log = by_step[end, LOG_DECAY] - by_step[first, LOG_DECAY]
    if abs(log) < 0.01:  # five terms are exact to 1e-12 there, at a tenth of the time
        even, odd = 1.0 + log * log * (0.5 + log * log * (1.0 / 24.0)), log * (1.0 + log * log * (1.0 / 6.0))
        return even + odd, even - odd
    return np.exp(log), np.exp(-log)


@inlined
def catch_up(
    shape: Any, table: Any, base: Any, last: Any, now: Any, rules: Any, numbers: Any, terms: Any, out: Any
) -> None:  # fmt: skip
    """Bring the row at ``base``, which stands after step abs(``last``), to the state after step ``now``, and copy its
    weights to ``out`` (width,).

    ``last`` is not written; ``terms`` is space (2, TERMS). See ``kernels.missed_steps`` for the sums.
    """
    width, kind = shape[1], shape[3]
    if abs(last) == now:
        copy(table, base, out, width)
    else:
        by_step, by_gap, polynomials, _early, horizon, plain_below = rules
        ratio, inverse = decays_between(by_step, abs(last), now)
        decay = np.float32(ratio)
        if kind == ADAMW and last > 0:
            gap, eps = now - last, numbers[5]
            s1, s2 = np.float32(by_gap[gap, 0]), np.float32(by_gap[gap, 1])
            if gap > SHORT_GAP and last >= plain_below:
                first = polynomials[last]
                if gap >= horizon:
                    for d in range(0, full(width), LANES):
                        lost = one_rule(root(load(SIXTEEN, table, base + d + 2 * width)), eps, first)
                        forget(SIXTEEN, table, base, d, width, lost, decay, s1, s2, out)
                    for d in range(full(width), width):
                        lost = one_rule(root(load(ONE, table, base + d + 2 * width)), eps, first)
                        forget(ONE, table, base, d, width, lost, decay, s1, s2, out)
                else:
                    second, shrink = polynomials[now], np.float32(by_gap[gap, 2])
                    gain = np.float32(-by_gap[gap, 0] * inverse)
                    for d in range(0, full(width), LANES):
                        deviation = root(load(SIXTEEN, table, base + d + 2 * width))
                        lost = two_rules(deviation, eps, first, second, shrink, gain)
                        forget(SIXTEEN, table, base, d, width, lost, decay, s1, s2, out)
                    for d in range(full(width), width):
                        deviation = root(load(ONE, table, base + d + 2 * width))
                        lost = two_rules(deviation, eps, first, second, shrink, gain)
                        forget(ONE, table, base, d, width, lost, decay, s1, s2, out)
            else:
                count = terms_of(gap, last, now, rules, inverse, terms)
                for d in range(0, full(width), LANES):
                    lost = sum_terms(SIXTEEN, root(load(SIXTEEN, table, base + d + 2 * width)), eps, terms, count)
                    forget(SIXTEEN, table, base, d, width, lost, decay, s1, s2, out)
                for d in range(full(width), width):
                    lost = sum_terms(ONE, root(load(ONE, table, base + d + 2 * width)), eps, terms, count)
                    forget(ONE, table, base, d, width, lost, decay, s1, s2, out)
        elif decay != 1:
            for d in range(0, full(width), LANES):
                fade(SIXTEEN, table, base, d, decay, out)
            for d in range(full(width), width):
                fade(ONE, table, base, d, decay, out)
        else:
            copy(table, base, out, width)


@inlined
def forget(
    lanes: Any, table: Any, base: Any, d: Any, width: Any, lost: Any, decay: Any, s1: Any, s2: Any, out: Any
) -> None:  # fmt: skip
    """The missed steps at once, in the lanes from column ``d`` on: w <- decay (w - m lost), m <- s1 m, v <- s2 v."""
    place = base + d
    m = load(lanes, table, place + width)
    w = decay * fma(lost * np.float32(-1), m, load(lanes, table, place))
    store(lanes, out, d, w)
    store(lanes, table, place, w)
    store(lanes, table, place + width, m * s1)
    store(lanes, table, place + 2 * width, load(lanes, table, place + 2 * width) * s2)


@inlined
def fade(lanes: Any, table: Any, base: Any, d: Any, decay: Any, out: Any) -> None:
    """Missed steps that only decay, in the lanes from column ``d`` on."""
    w = load(lanes, table, base + d) * decay
    store(lanes, out, d, w)
    store(lanes, table, base + d, w)


@inlined
def polynomial(r: Any, rule: Any) -> Any:
    """p0 + p1 r + ... of a rule, see ``AdamRules.polynomials``."""
    high = fma(r, fma(r, fma(r, rule[7], rule[6]), rule[5]), rule[4])
    return fma(r, fma(r, fma(r, high, rule[3]), rule[2]), rule[1])


@inlined
def one_rule(deviation: Any, eps: Any, rule: Any) -> Any:
    """What is left from a step on, at the roots of second moments."""
    a = deviation * rule[0]
    inverse = np.float32(1) / (a + eps)
    return inverse * polynomial(a * inverse, rule)


@inlined
def two_rules(deviation: Any, eps: Any, first: Any, second: Any, shrink: Any, gain: Any) -> Any:
    """What is left from the ``first`` step on, and ``gain`` times that from the ``second``, its points shrunk.

    eps squared must be a float32 well above zero: both denominators are eps where the second moment is zero.
    """
    a, b = deviation * first[0], deviation * (second[0] * shrink)
    under, other = a + eps, b + eps
    both = np.float32(1) / (under * other)
    p, q = both * other, both * under
    return fma(p, polynomial(a * p, first), gain * q * polynomial(b * q, second))


@inlined
def terms_of(gap: Any, last: Any, now: Any, rules: Any, inverse: Any, terms: Any) -> Any:
    """Weights and points of the sum where the gap is short (each step) or began early (nodes); returns their number."""
    by_step, by_gap, _polynomials, early, horizon, _plain_below = rules
    count = 0
    if gap <= SHORT_GAP:
        for j in range(1, gap + 1):
            t = last + j
            terms[0, count] = by_step[t, AMPLITUDE] * by_gap[j, 0] * decays_between(by_step, last, t)[1]
            terms[1, count] = by_gap[j, 2] * by_step[t, SPREAD]
            count += 1
    else:
        for k in range(early.shape[2]):
            terms[0, count], terms[1, count] = early[last, 1, k], early[last, 0, k]
            count += 1
        if gap < horizon:
            shrink, gain = by_gap[gap, 2], -by_gap[gap, 0] * inverse
            for k in range(early.shape[2]):
                terms[0, count], terms[1, count] = early[now, 1, k] * gain, early[now, 0, k] * shrink
                count += 1
    return count


@inlined
def sum_terms(lanes: Any, deviation: Any, eps: Any, terms: Any, count: Any) -> Any:
    """sum_k a_k / (deviation x_k + eps)."""
    found = spread(lanes, np.float32(0))
    for k in range(count):
        found = found + terms[0, k] / fma(deviation, terms[1, k], eps)
    return found


@inlined
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


@inlined
def move_adam(lanes: Any, table: Any, base: Any, d: Any, width: Any, grad: Any, numbers: Any) -> None:
    """Adam's step with decoupled decay on the lanes from column ``d`` on."""
    decay, rate1, root2, rest1, beta2 = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    eps, rest2 = numbers[5], numbers[12]
    place = base + d
    g, m = load(lanes, grad, d), load(lanes, table, place + width)
    m = fma(rest1, g - m, m)
    v = fma(rest2 * g, g, load(lanes, table, place + 2 * width) * beta2)
    w = fma(load(lanes, table, place), decay, -rate1 * m / fma(root(v), root2, eps))
    store(lanes, table, place, w)
    store(lanes, table, place + width, m)
    store(lanes, table, place + 2 * width, v)


@inlined
def penalise(grad: Any, weight: Any, count: Any, penalties: Any, shares: Any, row: Any, scale: Any) -> None:
    """Add the gradient of the penalty of ``count`` ratings: ``penalties`` (2, width) float32, see ``objective``.

    Empty ``penalties``: none. ``shares`` float32 (rows,): one over the training ratings of each row.
    """
    if penalties.size > 0:
        times = scale * np.float32(count)
        always, once = penalties[0], penalties[1]
        share = times * shares[row]
        for d in range(0, full(grad.size), LANES):
            pull = fma(times, load(SIXTEEN, always, d), share * load(SIXTEEN, once, d))
            store(SIXTEEN, grad, d, fma(pull, load(SIXTEEN, weight, d), load(SIXTEEN, grad, d)))
        for d in range(full(grad.size), grad.size):
            grad[d] = fma(fma(times, always[d], share * once[d]), weight[d], grad[d])


def rule_arrays(rules: AdamRules) -> tuple[Any, ...]:
    """What kernels take: ``by_step`` float64 (steps + 1, 3), ``by_gap`` float64 (steps + 1, 3): powers of the betas and
    the root of the second, ``polynomials`` float32 (steps + 1, at least DEGREE + 2), ``early`` float64 (plain_below +
    horizon, 2, NODES): nodes and weights, horizon, plain_below."""
    steps = np.arange(len(rules.log_decay))
    power1 = rules.betas[0] ** steps
    power1[power1 < FORGOTTEN] = 0
    found = rules.polynomials()
    polynomials = row_buffer(*found.shape)
    polynomials[:, : found.shape[1]] = found
    early = min(rules.plain_below + rules.horizon, len(steps))
    return (
        np.column_stack([rules.log_decay, rules.amplitude, rules.spread]),
        np.column_stack([power1, rules.betas[1] ** steps, rules.betas[1] ** (steps / 2)]),
        polynomials, np.stack([rules.nodes[:early], rules.weights[:early]], axis=1), rules.horizon, rules.plain_below,
    )  # fmt: skip
