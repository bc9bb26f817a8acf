"""What kernels do with the columns of a row: whole vectors, then the rest one by one; and where rows lie."""

from __future__ import annotations

from typing import Any

import numpy as np

from mfdist.kernels.numba_intrinsics import inlined, prefetch, prefetch_far, unsigned
from mfdist.kernels.vectors import LANES, SIXTEEN, fma, load, spread, store, total

FAR, NEAR = 16, 8
"""Rows between the one in work and the one that is fetched ahead into the second cache, and into the first."""
FAR_RATINGS = 8
"""The same in ratings, whose rows lie in buffers of this batch."""


@inlined
def full(width: Any) -> Any:
    """Columns that whole vectors cover; the rest goes one by one."""
    return width & -LANES


@inlined
def aligned(space: Any, width: Any) -> Any:
    """``width`` floats of ``space`` (width + LANES,) that begin where a cache line does."""
    first = (-(space.ctypes.data >> 2)) & (LANES - 1)
    return space[first : first + width]


@inlined
def prefetch_pages(table: Any, rows: Any, j: Any, size: Any, high: Any, stride: Any) -> None:
    """Prefetch where ``size`` rows begin, those that :func:`prefetch_row` comes to next, after ``rows[j]``.

    An access to a page whose address is not known holds up all that follows it; several in a row wait together.
    """
    for ahead in range(min(j + FAR, high), min(j + FAR + size, high)):
        prefetch_far(table, np.int64(rows[unsigned(ahead)]) * stride)


@inlined
def prefetch_row(table: Any, rows: Any, j: Any, high: Any, stride: Any) -> None:
    """Prefetch the packed rows of ``table`` that follow ``rows[j]`` at some distance, before ``rows[high]``."""
    if j + FAR < high:
        first = np.int64(rows[unsigned(j + FAR)]) * stride
        for k in range(first, first + stride, LANES):
            prefetch_far(table, k)
        prefetch_far(table, first + stride - 1)
    if j + NEAR < high:
        first = np.int64(rows[unsigned(j + NEAR)]) * stride
        for k in range(first, first + stride, LANES):
            prefetch(table, k)
        prefetch(table, first + stride - 1)


@inlined
def prefetch_line(buffer: Any, line: Any, width: Any) -> None:
    """Prefetch the first ``width`` columns of ``buffer[line]``."""
    ahead = buffer[unsigned(line)]
    for k in range(0, width, LANES):
        prefetch_far(ahead, k)


@inlined
def prefetch_to_write(buffer: Any, line: Any, width: Any) -> None:
    """Prefetch the first ``width`` columns of ``buffer[line]``, to write them: another processor has read them."""
    ahead = buffer[unsigned(line)]
    for k in range(0, width, LANES):
        prefetch(ahead, k)


@inlined
def prefetch_of_rating(buffer: Any, slot: Any, order: Any, q: Any, number: Any, width: Any) -> None:
    """Prefetch the row of ``buffer`` that rating ``order[q]`` of ``number`` will read."""
    if q < number:
        prefetch_line(buffer, slot[unsigned(order[unsigned(q)])], width)


@inlined
def copy(source: Any, first: Any, target: Any, width: Any) -> None:
    """``target[:width] = source[first : first + width]``."""
    for d in range(0, full(width), LANES):
        store(SIXTEEN, target, d, load(SIXTEEN, source, first + d))
    for d in range(full(width), width):
        target[d] = source[first + d]


@inlined
def clear(array: Any, width: Any) -> None:
    """``array[:width] = 0``."""
    for d in range(0, full(width), LANES):
        store(SIXTEEN, array, d, spread(SIXTEEN, np.float32(0)))
    for d in range(full(width), width):
        array[d] = 0


@inlined
def dot(a: Any, b: Any, first: Any, size: Any) -> Any:
    """sum_d a[d] b[d] over ``size`` columns from ``first`` on."""
    lanes = spread(SIXTEEN, np.float32(0))
    for d in range(first, first + full(size), LANES):
        lanes = fma(load(SIXTEEN, a, d), load(SIXTEEN, b, d), lanes)
    found = total(lanes)
    for d in range(first + full(size), first + size):
        found = fma(a[d], b[d], found)
    return found


@inlined
def add_times(target: Any, c: Any, source: Any, first: Any, size: Any) -> None:
    """``target += c source`` in ``size`` columns from ``first`` on."""
    for d in range(first, first + full(size), LANES):
        store(SIXTEEN, target, d, fma(c, load(SIXTEEN, source, d), load(SIXTEEN, target, d)))
    for d in range(first + full(size), first + size):
        target[d] = fma(c, source[d], target[d])


@inlined
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


def pitch_of(width: int) -> int:
    """Floats from one row of a buffer to the next: whole cache lines."""
    return -(-width // LANES) * LANES


def row_buffer(rows: int, width: int) -> Any:
    """float32 (rows, at least width), each row of it where a cache line begins: vectors across lines cost more."""
    stride = pitch_of(width)
    space = np.empty(rows * stride + LANES, np.float32)
    first = (-(space.ctypes.data // 4)) % LANES
    return space[first : first + rows * stride].reshape(rows, stride)
