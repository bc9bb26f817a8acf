"""The training step on a GPU, fused, in Triton: the same arithmetic as ``reference``, on packed rows as in ``cpu``.

A step works on a batch sorted twice, by user and by item (``gpu_batch.Sorted``); a *segment* is one row's ratings,
consecutive in that order. Programs take tiles of segments, so that a short segment is a few turns of a loop:

    gather      item rows as they are now (caught up), copied out; their owner may be another rank
    user_pass   user rows: catch up, copy out; score their ratings, add up the gradient, update
    long_parts  segments of more than CHUNK ratings: sums over aligned blocks of CHUNK positions of the order
    long_rows   their sums over blocks, then the update
    row_pass    item rows: add up the gradient from the user rows as they were, update

A block of CHUNK positions can hold ratings of two long segments at most, those of its first and its last position, so
that a row with 10^5 ratings of a batch is read by thousands of programs. No atomics: every sum has a fixed order, and
results repeat bitwise. A program that updates rows in place passes a barrier before its first store: a value such as a
row's last step is loaded by several warps, in the layouts that they need it in, and the quickest must not write it
first. Sizes known to the device alone (how many rows a batch has) bound no launch: grids are for the most there can
be, and programs past the end leave at once. Nothing waits for the device.

``SHAPE`` is (factors, bias, stride, kind, tile width, sigmoid, penalty, members, bags, column of the side's own bias in
a member), with FACTORS to OWN_BIAS as the names of its places. Factors and bias are apart in the kernels: a tile of
next_power_of_2(32 + 1) columns would be half empty. With members the bias is a column of each (``gpu_members``); with
bags a user's row that is copied out goes on with its bag gradient and the weight of an item in its bag. ``rules`` is
the tuple of ``gpu_arguments.rules_on``. Pointers are to packed float32 rows (``table``), to the same memory as int32
(``lasts``), to the arrays of ``gpu_batch.Sorted``, and to rows copied out, PITCH floats apart. ``clock`` (1,) int32:
steps taken so far.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mfdist.kernels.gpu_members import (
    COLUMNS,
    FACTORS,
    HAS_BAGS,
    HAS_BIAS,
    MEMBERS,
    STRIDE,
    bag_weight,
    item_terms,
    load_columns,
    load_slopes,
    member_slopes,
    of_own_bias,
    over_parts,
    renewed,
    store_columns,
    store_slopes,
)
from mfdist.kernels.gpu_rows import (
    brought_up,
    load_row,
    load_state,
    moved_on,
    penalty,
    shrunk,
    slopes,
    step_rows,
    store_row,
    store_state,
)


@triton.jit
def gather(
    table: tl.tensor, lasts: tl.tensor, rows: tl.tensor, count: tl.tensor, out: tl.tensor, clock: tl.tensor,
    rules: tl.tensor, SHAPE: tl.constexpr, PITCH: tl.constexpr, R: tl.constexpr,
) -> None:  # fmt: skip
    """The weights of ``rows[: count]`` after step ``clock``, to ``out`` (rows, PITCH); the table stays as it is."""
    j = tl.program_id(0) * R + tl.arange(0, R)
    number = tl.load(count)
    if tl.program_id(0) * R >= number:
        return
    live = j < number
    base = tl.load(rows + j, mask=live, other=0).to(tl.int64) * SHAPE[STRIDE]
    last = tl.load(lasts + base + SHAPE[STRIDE] - 1, mask=live, other=0)
    w, wb = load_row(table, base, live, SHAPE)
    m, v, mb, vb = load_state(table, base, live, SHAPE)
    w, wb = brought_up(w, wb, m, v, mb, vb, last, tl.load(clock), rules, SHAPE)
    store_row(out, j.to(tl.int64) * PITCH, w, wb, live, SHAPE)


@triton.jit
def settle(
    table: tl.tensor, lasts: tl.tensor, number: tl.tensor, clock: tl.tensor, rules: tl.tensor, SHAPE: tl.constexpr,
    R: tl.constexpr,
) -> None:  # fmt: skip
    """Bring all ``number`` rows of a table to the present, in place."""
    j = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live = j < number
    base = j * SHAPE[STRIDE]
    now = tl.load(clock)
    last = tl.load(lasts + base + SHAPE[STRIDE] - 1, mask=live, other=0)
    w, wb = load_row(table, base, live, SHAPE)
    m, v, mb, vb = load_state(table, base, live, SHAPE)
    w, wb = brought_up(w, wb, m, v, mb, vb, last, now, rules, SHAPE)
    m, v, mb, vb = shrunk(m, v, mb, vb, last, now, rules, SHAPE)
    tl.debug_barrier()
    store_row(table, base, w, wb, live, SHAPE)
    store_state(table, base, m, v, mb, vb, live, SHAPE)
    tl.store(lasts + base + SHAPE[STRIDE] - 1, tl.where(last > 0, now, -now), mask=live)


@triton.jit
def user_pass(
    table: tl.tensor, lasts: tl.tensor, rows: tl.tensor, starts: tl.tensor, count: tl.tensor, order: tl.tensor,
    item_slot: tl.tensor, items: tl.tensor, rating: tl.tensor, offset: tl.tensor, before: tl.tensor, slope: tl.tensor,
    error: tl.tensor, clock: tl.tensor, scale: tl.tensor, low: tl.tensor, span: tl.tensor, penalties: tl.tensor,
    rules: tl.tensor, SHAPE: tl.constexpr, ITEM_PITCH: tl.constexpr, PITCH: tl.constexpr,
    LONG: tl.constexpr, R: tl.constexpr,
) -> None:  # fmt: skip
    """Users ``rows[: count]``: weights as they were to ``before`` (rows, PITCH); the step of those with at most LONG
    ratings, and per rating the error and ``slope``, the derivative of the loss by the score."""
    j = tl.program_id(0) * R + tl.arange(0, R)
    number = tl.load(count)
    if tl.program_id(0) * R >= number:
        return
    live = j < number
    row = tl.load(rows + j, mask=live, other=0).to(tl.int64)
    base = row * SHAPE[STRIDE]
    first = tl.load(starts + j, mask=live, other=0)
    end = tl.load(starts + j + 1, mask=live, other=0)
    now = tl.load(clock)
    last = tl.load(lasts + base + SHAPE[STRIDE] - 1, mask=live, other=0)
    w, wb = load_row(table, base, live, SHAPE)
    m, v, mb, vb = load_state(table, base, live, SHAPE)
    w, wb = brought_up(w, wb, m, v, mb, vb, last, now, rules, SHAPE)
    short = live & (end - first <= LONG)
    g, gb = penalty(w, wb, end - first, row, live, scale, penalties, SHAPE)
    if SHAPE[HAS_BAGS]:
        share, weight = bag_weight(row, live, penalties)
        bag = load_columns(table + SHAPE[FACTORS], base, live, SHAPE)
        running = load_columns(table + 2 * SHAPE[FACTORS], base, live, SHAPE)
        user = w + bag
        rated = tl.zeros_like(w)
        learned = tl.zeros_like(w)
        to = j.to(tl.int64) * PITCH
        store_row(before, to, user, wb, live, SHAPE)
        store_columns(before + SHAPE[FACTORS], to, running, live, SHAPE)
        tl.store(before + to + 2 * SHAPE[FACTORS], weight, mask=live)
    else:
        weight = tl.zeros_like(wb)
        user = w
        store_row(before, j.to(tl.int64) * PITCH, w, wb, live, SHAPE)
    bias_of_all = tl.load(offset)
    most = tl.max(tl.where(short, end - first, 0), 0)
    for turn in range(most):
        use = short & (first + turn < end)
        k = tl.load(order + first + turn, mask=use, other=0)
        place = tl.load(item_slot + k, mask=use, other=0).to(tl.int64) * ITEM_PITCH
        item, item_b = load_row(items, place, use, SHAPE)
        truth = tl.load(rating + k, mask=use, other=0.0)
        if SHAPE[MEMBERS]:
            e, c = member_slopes(user, item, weight, bias_of_all, truth, scale, low, span, SHAPE)
            store_slopes(slope, k, c, use, SHAPE)
            c = over_parts(tl.where(use[:, None], c, 0.0), SHAPE)
            g += c * (item + of_own_bias(SHAPE)[None, :])
            if SHAPE[HAS_BAGS]:
                rated += item
                learned += c * item
        else:
            e, c = slopes(w, wb, item, item_b, bias_of_all, truth, scale, low, span, SHAPE)
            tl.store(slope + k, c, mask=use)
            c = tl.where(use, c, 0.0)
            g += c[:, None] * item
            gb += c
        tl.store(error + k, e, mask=use)
    m, v, mb, vb = shrunk(m, v, mb, vb, last, now, rules, SHAPE)
    w, wb, m, v, mb, vb = moved_on(w, wb, m, v, mb, vb, g, gb, now, rules, SHAPE)
    tl.debug_barrier()
    if SHAPE[HAS_BAGS]:
        bag, running = renewed(bag, running, end - first, share, weight, rated, learned, SHAPE)
        store_columns(table + SHAPE[FACTORS], base, bag, short, SHAPE)
        store_columns(table + 2 * SHAPE[FACTORS], base, running, short, SHAPE)
    store_row(table, base, w, wb, short, SHAPE)
    store_state(table, base, m, v, mb, vb, short, SHAPE)
    tl.store(lasts + base + SHAPE[STRIDE] - 1, now + 1 + tl.zeros_like(last), mask=short)


@triton.jit
def row_pass(
    table: tl.tensor, lasts: tl.tensor, rows: tl.tensor, starts: tl.tensor, count: tl.tensor, order: tl.tensor,
    user_slot: tl.tensor, own: tl.tensor, before: tl.tensor, slope: tl.tensor, out: tl.tensor, clock: tl.tensor,
    scale: tl.tensor, penalties: tl.tensor, rules: tl.tensor, SHAPE: tl.constexpr, OWN_PITCH: tl.constexpr,
    PITCH: tl.constexpr, OUT_PITCH: tl.constexpr, LONG: tl.constexpr, UPDATE: tl.constexpr, R: tl.constexpr,
) -> None:  # fmt: skip
    """Items ``rows[: count]`` with at most LONG ratings, gathered before (``own``): gradient from the users'
    ``before``, then the step; without UPDATE the gradient alone, for an owner elsewhere, to ``out`` (rows,
    OUT_PITCH)."""
    j = tl.program_id(0) * R + tl.arange(0, R)
    number = tl.load(count)
    if tl.program_id(0) * R >= number:
        return
    live = j < number
    first = tl.load(starts + j, mask=live, other=0)
    end = tl.load(starts + j + 1, mask=live, other=0)
    live = live & (end - first <= LONG)
    row = tl.load(rows + j, mask=live, other=0).to(tl.int64)
    w, wb = load_row(own, j.to(tl.int64) * OWN_PITCH, live, SHAPE)
    g, gb = penalty(w, wb, end - first, row, live, scale, penalties, SHAPE)
    most = tl.max(tl.where(live, end - first, 0), 0)
    for turn in range(most):
        use = live & (first + turn < end)
        k = tl.load(order + first + turn, mask=use, other=0)
        place = tl.load(user_slot + k, mask=use, other=0).to(tl.int64) * PITCH
        user, _user_b = load_row(before, place, use, SHAPE)
        if SHAPE[MEMBERS]:
            g += item_terms(load_slopes(slope, k, use, SHAPE), user, before, place, w, use, SHAPE)
        else:
            c = tl.load(slope + k, mask=use, other=0.0)
            g += c[:, None] * user
            gb += c
    if UPDATE:
        step_rows(table, lasts, row * SHAPE[STRIDE], live, w, wb, g, gb, tl.load(clock), rules, SHAPE)
    else:
        store_row(out, j.to(tl.int64) * OUT_PITCH, g, gb, live, SHAPE)


@triton.jit(do_not_specialize=["n"])
def long_parts(
    number: tl.tensor, starts: tl.tensor, order: tl.tensor, other_slot: tl.tensor, others: tl.tensor, own: tl.tensor,
    rating: tl.tensor, offset: tl.tensor, slope: tl.tensor, error: tl.tensor, parts: tl.tensor, scale: tl.tensor,
    low: tl.tensor, span: tl.tensor, n: tl.tensor, SHAPE: tl.constexpr, OTHER_PITCH: tl.constexpr,
    OWN_PITCH: tl.constexpr, PITCH: tl.constexpr, SCORE: tl.constexpr, C: tl.constexpr,
) -> None:  # fmt: skip
    """Of each block of C positions, the sums of slope times other row over the long segment of its first position and,
    where that is another one, of its last: ``parts`` (2 blocks, PITCH). With SCORE the slopes are found here first."""
    block = tl.program_id(0)
    low_segment = tl.load(number + block * C)
    high_segment = tl.load(number + tl.minimum(block * C + C, n) - 1)
    low_long = tl.load(starts + low_segment + 1) - tl.load(starts + low_segment) > C
    high_long = tl.load(starts + high_segment + 1) - tl.load(starts + high_segment) > C
    high_long = high_long & (high_segment != low_segment)
    if (low_long | high_long) == 0:
        return
    q = block * C + tl.arange(0, C)
    segment = tl.load(number + q, mask=q < n, other=-1)
    in_low = segment == tl.where(low_long, low_segment, -2)
    in_high = segment == tl.where(high_long, high_segment, -2)
    use = in_low | in_high
    k = tl.load(order + q, mask=use, other=0)
    place = tl.load(other_slot + k, mask=use, other=0).to(tl.int64) * OTHER_PITCH
    other, other_b = load_row(others, place, use, SHAPE)
    if SCORE | (SHAPE[HAS_BAGS] > 0):
        w, wb = load_row(own, segment.to(tl.int64) * OWN_PITCH, use, SHAPE)
    if SCORE:
        truth = tl.load(rating + k, mask=use, other=0.0)
        if SHAPE[MEMBERS]:
            weight = tl.zeros_like(truth)
            if SHAPE[HAS_BAGS]:
                weight = tl.load(own + segment.to(tl.int64) * OWN_PITCH + 2 * SHAPE[FACTORS], mask=use, other=0.0)
            e, c = member_slopes(w, other, weight, tl.load(offset), truth, scale, low, span, SHAPE)
            store_slopes(slope, k, c, use, SHAPE)
        else:
            e, c = slopes(w, wb, other, other_b, tl.load(offset), truth, scale, low, span, SHAPE)
            tl.store(slope + k, c, mask=use)
        tl.store(error + k, e, mask=use)
    elif SHAPE[MEMBERS]:
        c = load_slopes(slope, k, use, SHAPE)
    else:
        c = tl.load(slope + k, mask=use, other=0.0)
    if SHAPE[MEMBERS] == 0:
        terms = c[:, None] * other
    elif SCORE:
        terms = over_parts(c, SHAPE) * (other + of_own_bias(SHAPE)[None, :])
    else:
        terms = item_terms(c, other, others, place, w if SHAPE[HAS_BAGS] else other, use, SHAPE)
    one = tl.arange(0, 1)
    always = one == 0
    for which in tl.static_range(2):
        mine = in_low if which == 0 else in_high
        g = tl.sum(tl.where(mine[:, None], terms, 0.0), axis=0)[None, :]
        gb = one.to(tl.float32)
        if SHAPE[HAS_BIAS]:
            gb += tl.sum(tl.where(mine, c, 0.0), axis=0)
        to = (2 * block.to(tl.int64) + which) * PITCH + one
        store_row(parts, to, g, gb, always, SHAPE)
        if SCORE & (SHAPE[HAS_BAGS] > 0):
            store_columns(
                parts + SHAPE[FACTORS], to, tl.sum(tl.where(mine[:, None], other, 0.0), axis=0)[None, :], always, SHAPE
            )


@triton.jit(do_not_specialize=["n"])
def long_rows(
    table: tl.tensor, lasts: tl.tensor, rows: tl.tensor, number: tl.tensor, starts: tl.tensor, own: tl.tensor,
    parts: tl.tensor, out: tl.tensor, clock: tl.tensor, scale: tl.tensor, penalties: tl.tensor, n: tl.tensor,
    rules: tl.tensor, SHAPE: tl.constexpr, OWN_PITCH: tl.constexpr, PITCH: tl.constexpr, OUT_PITCH: tl.constexpr,
    UPDATE: tl.constexpr, BAGS: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
) -> None:  # fmt: skip
    """The long segment that begins in a block, if one does: the sum of its ``parts``, then as :func:`row_pass`; with
    BAGS a user's, whose bag is renewed as in :func:`user_pass`."""
    block = tl.program_id(0)
    segment = tl.load(number + tl.minimum(block * C + C, n) - 1)
    first = tl.load(starts + segment)
    end = tl.load(starts + segment + 1)
    if (end - first <= C) | (first < block * C):
        return
    one = tl.arange(0, 1)
    always = one == 0
    g, gb = load_row(parts, (2 * block.to(tl.int64) + (first > block * C)) * PITCH + one, always, SHAPE)
    D: tl.constexpr = SHAPE[COLUMNS]
    sums = tl.zeros((T, D), tl.float32)
    sums_b = tl.zeros((T,), tl.float32)
    blocks = (end - 1) // C - block
    for turn in range((blocks + T - 1) // T):
        b = turn * T + tl.arange(0, T)
        part, part_b = load_row(parts, 2 * (block + 1 + b).to(tl.int64) * PITCH, b < blocks, SHAPE)
        sums += part
        sums_b += part_b
    g += tl.sum(sums, axis=0)[None, :]
    gb += tl.sum(sums_b, axis=0)
    w, wb = load_row(own, segment.to(tl.int64) * OWN_PITCH + one, always, SHAPE)
    row = tl.load(rows + segment).to(tl.int64) + one
    if BAGS:
        base = row * SHAPE[STRIDE]
        share, weight = bag_weight(row, always, penalties)
        bag = load_columns(table + SHAPE[FACTORS], base, always, SHAPE)
        running = load_columns(table + 2 * SHAPE[FACTORS], base, always, SHAPE)
        begin = (2 * block.to(tl.int64) + (first > block * C)) * PITCH + one
        rated = load_columns(parts + SHAPE[FACTORS], begin, always, SHAPE)
        sums = tl.zeros((T, D), tl.float32)
        for turn in range((blocks + T - 1) // T):
            b = turn * T + tl.arange(0, T)
            sums += load_columns(parts + SHAPE[FACTORS], 2 * (block + 1 + b).to(tl.int64) * PITCH, b < blocks, SHAPE)
        rated += tl.sum(sums, axis=0)[None, :]
        bag, running = renewed(bag, running, end - first + one, share, weight, rated, g, SHAPE)
        w, wb = load_row(table, base, always, SHAPE)  # ``own`` is with the bag
        last = tl.load(lasts + base + SHAPE[STRIDE] - 1)
        m, v, mb, vb = load_state(table, base, always, SHAPE)
        w, wb = brought_up(w, wb, m, v, mb, vb, last, tl.load(clock), rules, SHAPE)
    penalty_g, penalty_b = penalty(w, wb, end - first + one, row, always, scale, penalties, SHAPE)
    g += penalty_g
    gb += penalty_b
    if UPDATE:
        step_rows(table, lasts, row * SHAPE[STRIDE], always, w, wb, g, gb, tl.load(clock), rules, SHAPE)
        if BAGS:
            store_columns(table + SHAPE[FACTORS], base, bag, always, SHAPE)
            store_columns(table + 2 * SHAPE[FACTORS], base, running, always, SHAPE)
    else:
        store_row(out, segment.to(tl.int64) * OUT_PITCH + one, g, gb, always, SHAPE)


@triton.jit
def update(
    table: tl.tensor, lasts: tl.tensor, rows: tl.tensor, count: tl.tensor, own: tl.tensor, grads: tl.tensor,
    clock: tl.tensor, rules: tl.tensor, SHAPE: tl.constexpr, OWN_PITCH: tl.constexpr, PITCH: tl.constexpr,
    R: tl.constexpr,
) -> None:  # fmt: skip
    """Take the step on ``rows[: count]``, gathered before (``own``), with gradients from elsewhere (rows, PITCH)."""
    j = tl.program_id(0) * R + tl.arange(0, R)
    live = j < tl.load(count)
    w, wb = load_row(own, j.to(tl.int64) * OWN_PITCH, live, SHAPE)
    g, gb = load_row(grads, j.to(tl.int64) * PITCH, live, SHAPE)
    base = tl.load(rows + j, mask=live, other=0).to(tl.int64) * SHAPE[STRIDE]
    step_rows(table, lasts, base, live, w, wb, g, gb, tl.load(clock), rules, SHAPE)


@triton.jit(do_not_specialize=["n"])
def block_sums(
    error: tl.tensor, slope: tl.tensor, out: tl.tensor, n: tl.tensor, blocks: tl.tensor, M: tl.constexpr,
    B: tl.constexpr,
) -> None:  # fmt: skip
    """Of each block of B ratings the sum of squared errors, and of the slopes of M members: float64 ``out``
    (2, blocks)."""
    k = tl.program_id(0) * B + tl.arange(0, B)
    e = tl.load(error + k, mask=k < n, other=0.0).to(tl.float64)
    c = tl.load(slope + k * M, mask=k < n, other=0.0).to(tl.float64)
    for member in tl.static_range(1, M):
        c += tl.load(slope + k * M + member, mask=k < n, other=0.0).to(tl.float64)
    tl.store(out + tl.program_id(0), tl.sum(e * e, axis=0))
    tl.store(out + blocks + tl.program_id(0), tl.sum(c, axis=0))
