"""Rows on a GPU, in Triton: load and store them, make up for the steps they missed, take a step (see ``gpu``).

The arithmetic of ``packed`` and ``rules`` on tiles of rows. SHAPE, ``table``, ``lasts`` and ``rules`` as in ``gpu``.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from mfdist.kernels import missed_steps, packed
from mfdist.kernels.gpu_members import (
    COLUMNS,
    FACTORS,
    HAS_BIAS,
    HAS_PENALTY,
    KIND,
    MEMBERS,
    STRIDE,
    error_and_slope,
    of_factors,
    of_own_bias,
)

SPARSE_ADAM = tl.constexpr(packed.SPARSE_ADAM)
ADAMW = tl.constexpr(packed.ADAMW)
ADAGRAD = tl.constexpr(packed.ROWWISE_ADAGRAD)
SHORT_GAP = tl.constexpr(missed_steps.SHORT_GAP)
NODES = tl.constexpr(missed_steps.NODES)

STEP_COLUMNS = tl.constexpr(16)
"""Floats of a row of ``by_step``: see ``gpu_arguments.step_table``."""
RULE = tl.constexpr(2)
PACE = tl.constexpr(10)


# Rows -----------------------------------------------------------------------------------------------


@triton.jit
def load_row(source: tl.tensor, base: tl.tensor, live: tl.tensor, SHAPE: tl.constexpr) -> Any:
    """Factors (R, D) and biases (R,) at ``source + base``, zeros where not ``live``."""
    d = tl.arange(0, SHAPE[COLUMNS])
    factors = tl.load(
        source + base[:, None] + d[None, :], mask=live[:, None] & (d < SHAPE[FACTORS])[None, :], other=0.0
    )
    bias = tl.zeros_like(live.to(tl.float32))
    if SHAPE[HAS_BIAS]:
        bias = tl.load(source + base + SHAPE[FACTORS], mask=live, other=0.0)
    return factors, bias


@triton.jit
def store_row(
    target: tl.tensor, base: tl.tensor, factors: tl.tensor, bias: tl.tensor, live: tl.tensor, SHAPE: tl.constexpr
) -> None:
    d = tl.arange(0, SHAPE[COLUMNS])
    tl.store(target + base[:, None] + d[None, :], factors, mask=live[:, None] & (d < SHAPE[FACTORS])[None, :])
    if SHAPE[HAS_BIAS]:
        tl.store(target + base + SHAPE[FACTORS], bias, mask=live)


@triton.jit
def load_state(table: tl.tensor, base: tl.tensor, live: tl.tensor, SHAPE: tl.constexpr) -> Any:
    """First and second moment of rows, as factors and biases; of rowwise Adagrad the accumulator, as ``mb``."""
    WIDTH: tl.constexpr = SHAPE[FACTORS] + SHAPE[HAS_BIAS]
    if SHAPE[KIND] <= SPARSE_ADAM:
        m, mb = load_row(table + WIDTH, base, live, SHAPE)
        v, vb = load_row(table + 2 * WIDTH, base, live, SHAPE)
    else:
        m = tl.zeros_like(base[:, None] + tl.arange(0, SHAPE[COLUMNS])[None, :]).to(tl.float32)
        v = m
        vb = tl.zeros_like(base).to(tl.float32)
        mb = vb
        if SHAPE[KIND] == ADAGRAD:
            mb = tl.load(table + base + WIDTH, mask=live, other=0.0)
    return m, v, mb, vb


@triton.jit
def store_state(
    table: tl.tensor, base: tl.tensor, m: tl.tensor, v: tl.tensor, mb: tl.tensor, vb: tl.tensor, live: tl.tensor,
    SHAPE: tl.constexpr,
) -> None:  # fmt: skip
    WIDTH: tl.constexpr = SHAPE[FACTORS] + SHAPE[HAS_BIAS]
    if SHAPE[KIND] <= SPARSE_ADAM:
        store_row(table + WIDTH, base, m, mb, live, SHAPE)
        store_row(table + 2 * WIDTH, base, v, vb, live, SHAPE)
    elif SHAPE[KIND] == ADAGRAD:
        tl.store(table + base + WIDTH, mb, mask=live)


# Missed steps, see kernels.missed_steps --------------------------------------------------------------------


@triton.jit
def expm1(x: tl.tensor) -> Any:
    """exp(x) - 1, as exact near zero as elsewhere."""
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720))))))
    return tl.where(tl.abs(x) < 0.25, series, tl.exp(x) - 1)


@triton.jit
def left(
    a: tl.tensor, eps: tl.tensor, p0: tl.tensor, p1: tl.tensor, p2: tl.tensor, p3: tl.tensor, p4: tl.tensor,
    p5: tl.tensor, p6: tl.tensor,
) -> Any:  # fmt: skip
    """A rule by its polynomial (``AdamRules.polynomials``); ``a`` is sqrt(v) c."""
    inverse = 1 / (a + eps)
    r = a * inverse
    return inverse * (p0 + r * (p1 + r * (p2 + r * (p3 + r * (p4 + r * (p5 + r * p6))))))


@triton.jit
def add_rule(
    total: tl.tensor, total_b: tl.tensor, root: tl.tensor, root_b: tl.tensor, step: tl.tensor, use: tl.tensor,
    shrink: tl.tensor, gain: tl.tensor, by_step: tl.tensor, eps: tl.tensor,
) -> Any:  # fmt: skip
    """Add the rules of steps ``step`` (R,), points times ``shrink`` and weights times ``gain``, where in ``use``."""
    row = by_step + step * STEP_COLUMNS + RULE
    c = shrink * tl.load(row, mask=use, other=1.0)
    p0 = gain * tl.load(row + 1, mask=use, other=0.0)
    p1 = gain * tl.load(row + 2, mask=use, other=0.0)
    p2 = gain * tl.load(row + 3, mask=use, other=0.0)
    p3 = gain * tl.load(row + 4, mask=use, other=0.0)
    p4 = gain * tl.load(row + 5, mask=use, other=0.0)
    p5 = gain * tl.load(row + 6, mask=use, other=0.0)
    p6 = gain * tl.load(row + 7, mask=use, other=0.0)
    total += left(
        root * c[:, None], eps, p0[:, None], p1[:, None], p2[:, None], p3[:, None], p4[:, None], p5[:, None],
        p6[:, None],
    )  # fmt: skip
    total_b += left(root_b * c, eps, p0, p1, p2, p3, p4, p5, p6)
    return total, total_b


@triton.jit
def add_nodes(
    total: tl.tensor, total_b: tl.tensor, root: tl.tensor, root_b: tl.tensor, step: tl.tensor, use: tl.tensor,
    shrink: tl.tensor, gain: tl.tensor, early: tl.tensor, eps: tl.tensor,
) -> Any:  # fmt: skip
    """:func:`add_rule` for early steps, whose rules have more nodes."""
    for k in range(NODES):
        row = early + step * (2 * NODES) + k
        x = shrink * tl.load(row, mask=use, other=1.0)
        a = gain * tl.load(row + NODES, mask=use, other=0.0)
        total += a[:, None] / (root * x[:, None] + eps)
        total_b += a / (root_b * x + eps)
    return total, total_b


@triton.jit
def momentum_left(
    root: tl.tensor, root_b: tl.tensor, last: tl.tensor, gap: tl.tensor, moved: tl.tensor, now: tl.tensor,
    log_gain: tl.tensor, rules: tl.tensor,
) -> Any:  # fmt: skip
    """S of rows whose sqrt(v) is ``root``: what their momentum did in the ``gap`` missed steps; zero unless moved."""
    log_decay, by_step, by_gap, early, horizon, plain_below, eps, _c1, _c2 = rules
    total = tl.zeros_like(root)
    total_b = tl.zeros_like(root_b)
    short = moved & (gap <= SHORT_GAP)
    longest = tl.max(tl.where(short, gap, 0), 0)
    log_last = tl.load(log_decay + last, mask=short, other=0.0)
    for j in range(1, longest + 1):
        use = short & (gap >= j)
        at = by_step + (last + j) * STEP_COLUMNS
        behind = (log_last - tl.load(log_decay + last + j, mask=use, other=0.0)).to(tl.float32)
        power = tl.load(by_gap + 4 * j)
        a = tl.load(at, mask=use, other=0.0) * power * (1 + expm1(behind))
        x = tl.load(at + 1, mask=use, other=1.0) * tl.load(by_gap + 4 * j + 2)
        total += a[:, None] / (root * x[:, None] + eps)
        total_b += a / (root_b * x + eps)
    far = moved & (gap > SHORT_GAP)
    if tl.max(far.to(tl.int32), 0) > 0:
        one = tl.full(gap.shape, 1.0, tl.float32)
        later = far & (last >= plain_below)
        if tl.max(later.to(tl.int32), 0) > 0:
            total, total_b = add_rule(total, total_b, root, root_b, last, later, one, one, by_step, eps)
        first = far & (last < plain_below)
        if tl.max(first.to(tl.int32), 0) > 0:
            total, total_b = add_nodes(total, total_b, root, root_b, last, first, one, one, early, eps)
        near = far & (gap < horizon)
        if tl.max(near.to(tl.int32), 0) > 0:
            shrink = tl.load(by_gap + 4 * gap + 2, mask=near, other=1.0)
            power = tl.load(by_gap + 4 * gap, mask=near, other=0.0)
            gain = tl.where(near, -power * (1 + expm1(-log_gain)), 0.0)
            end = tl.zeros_like(gap) + now
            if now >= plain_below:
                total, total_b = add_rule(total, total_b, root, root_b, end, near, shrink, gain, by_step, eps)
            else:
                total, total_b = add_nodes(total, total_b, root, root_b, end, near, shrink, gain, early, eps)
    return total, total_b


@triton.jit
def log_of_decay(last: tl.tensor, now: tl.tensor, rules: tl.tensor) -> Any:
    """log(D_now / D_last) of rows that stand after step abs(last)."""
    return (tl.load(rules[0] + now) - tl.load(rules[0] + tl.abs(last))).to(tl.float32)


@triton.jit
def shrunk(
    m: tl.tensor, v: tl.tensor, mb: tl.tensor, vb: tl.tensor, last: tl.tensor, now: tl.tensor, rules: tl.tensor,
    SHAPE: tl.constexpr,
) -> Any:  # fmt: skip
    """Moments after the steps that rows missed."""
    if SHAPE[KIND] == ADAMW:
        moved = (last > 0) & (last < now)
        gap = tl.where(moved, now - last, 0)
        s1 = tl.load(rules[2] + 4 * gap)
        s2 = tl.load(rules[2] + 4 * gap + 1)
        m *= s1[:, None]
        v *= s2[:, None]
        mb *= s1
        vb *= s2
    return m, v, mb, vb


@triton.jit
def brought_up(
    w: tl.tensor, wb: tl.tensor, m: tl.tensor, v: tl.tensor, mb: tl.tensor, vb: tl.tensor, last: tl.tensor,
    now: tl.tensor, rules: tl.tensor, SHAPE: tl.constexpr,
) -> Any:  # fmt: skip
    """Weights of rows, which stand after step abs(last), after step ``now``; their moments are only read."""
    log_gain = log_of_decay(last, now, rules)
    if SHAPE[KIND] == ADAMW:
        moved = (last > 0) & (last < now)
        gap = tl.where(moved, now - last, 0)
        if tl.max(gap, 0) > 0:
            sums, sums_b = momentum_left(tl.sqrt(v), tl.sqrt(vb), last, gap, moved, now, log_gain, rules)
            w -= m * sums
            wb -= mb * sums_b
    lost = expm1(log_gain)
    return w + w * lost[:, None], wb + wb * lost


# One step -------------------------------------------------------------------------------------------


@triton.jit
def moved_on(
    w: tl.tensor, wb: tl.tensor, m: tl.tensor, v: tl.tensor, mb: tl.tensor, vb: tl.tensor, g: tl.tensor,
    gb: tl.tensor, now: tl.tensor, rules: tl.tensor, SHAPE: tl.constexpr,
) -> Any:  # fmt: skip
    """One optimizer step of rows that stand after step ``now``, with gradients ``g`` and ``gb``."""
    _log_decay, by_step, _by_gap, _early, _horizon, _plain_below, eps, c1, c2 = rules
    pace = by_step + (now + 1) * STEP_COLUMNS + PACE
    shift, rate1, root2, rate = tl.load(pace), tl.load(pace + 1), tl.load(pace + 2), tl.load(pace + 3)
    if SHAPE[KIND] <= SPARSE_ADAM:
        m += c1 * (g - m)
        v += c2 * (g * g - v)
        mb += c1 * (gb - mb)
        vb += c2 * (gb * gb - vb)
        w += w * shift - rate1 * m / (tl.sqrt(v) * root2 + eps)
        wb += wb * shift - rate1 * mb / (tl.sqrt(vb) * root2 + eps)
    elif SHAPE[KIND] == ADAGRAD:
        squares = tl.sum(g * g, axis=1)
        if SHAPE[HAS_BIAS]:
            squares += gb * gb
        mb += squares / (SHAPE[FACTORS] + SHAPE[HAS_BIAS])
        steps = rate / (tl.sqrt(mb) + eps)
        w += w * shift - steps[:, None] * g
        wb += wb * shift - steps * gb
    else:
        w += w * shift - rate * g
        wb += wb * shift - rate * gb
    return w, wb, m, v, mb, vb


@triton.jit
def step_rows(
    table: tl.tensor, lasts: tl.tensor, base: tl.tensor, live: tl.tensor, w: tl.tensor, wb: tl.tensor, g: tl.tensor,
    gb: tl.tensor, now: tl.tensor, rules: tl.tensor, SHAPE: tl.constexpr,
) -> None:  # fmt: skip
    """Take the step on rows whose current weights ``w``, ``wb`` are known, and whose stored ones may be old."""
    last = tl.load(lasts + base + SHAPE[STRIDE] - 1, mask=live, other=0)
    m, v, mb, vb = load_state(table, base, live, SHAPE)
    m, v, mb, vb = shrunk(m, v, mb, vb, last, now, rules, SHAPE)
    w, wb, m, v, mb, vb = moved_on(w, wb, m, v, mb, vb, g, gb, now, rules, SHAPE)
    tl.debug_barrier()
    store_row(table, base, w, wb, live, SHAPE)
    store_state(table, base, m, v, mb, vb, live, SHAPE)
    tl.store(lasts + base + SHAPE[STRIDE] - 1, now + 1 + tl.zeros_like(last), mask=live)


@triton.jit
def penalty(
    w: tl.tensor, wb: tl.tensor, ratings: tl.tensor, rows: tl.tensor, live: tl.tensor, scale: tl.tensor,
    penalties: tl.tensor, SHAPE: tl.constexpr,
) -> Any:  # fmt: skip
    """Gradient of the penalty of ``ratings`` (R,) ratings of ``rows``: zeros without one.

    ``penalties``: shares (rows,) float32, one over the training ratings of each row; the weights of factors, of biases
    and of members' scales at each rating, each as (always, times the share); then what ``bag_weight`` takes.
    """
    if SHAPE[HAS_PENALTY]:
        shares, factors, factors_once, biases, biases_once, scales, scales_once, _implicit = penalties
        share = tl.load(shares + rows, mask=live, other=0.0)
        times = scale * ratings.to(tl.float32)
        if SHAPE[MEMBERS]:
            factor = of_factors(SHAPE)
            bias = of_own_bias(SHAPE)
            always = factor * factors + bias * biases + (1 - factor - bias) * scales
            once = factor * factors_once + bias * biases_once + (1 - factor - bias) * scales_once
            g = times[:, None] * (always[None, :] + share[:, None] * once[None, :]) * w
        else:
            g = (times * (factors + share * factors_once))[:, None] * w
        gb = times * (biases + share * biases_once) * wb
    else:
        g = tl.zeros_like(w)
        gb = tl.zeros_like(wb)
    return g, gb


@triton.jit
def slopes(
    w: tl.tensor, wb: tl.tensor, item: tl.tensor, item_b: tl.tensor, offset: tl.tensor, rating: tl.tensor,
    scale: tl.tensor, low: tl.tensor, span: tl.tensor, SHAPE: tl.constexpr,
) -> Any:  # fmt: skip
    """Per rating (R,): the error, and the derivative of the loss by the score."""
    score = tl.sum(w * item, axis=1) + wb + item_b + offset
    return error_and_slope(score, rating, scale, low, span, SHAPE)
