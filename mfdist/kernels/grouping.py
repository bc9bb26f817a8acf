"""The ratings of a batch by row: a stable radix sort, and ranges of equal load."""

from __future__ import annotations

from typing import Any

import numpy as np

from mfdist.kernels.numba_intrinsics import kernel

ROW_LOAD = 4
"""Work on a row beside the work on one of its ratings, to cut ranges."""


@kernel
def group(ids: Any, order: Any, pairs: Any, rows: Any, starts: Any, slot: Any) -> int:
    """Sort ``ids`` (int32, not negative) stably: distinct ``rows`` ascending, and where each starts in ``order``.

    ``slot[k]``: position of ``ids[k]`` among the rows. Returns the number of rows; ``starts`` has one entry more.
    ``pairs`` int64 (2, at least len(ids)): space for (id, k), which go from pass to pass together.
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
    mask = (1 << width) - 1
    place = np.zeros((passes, 1 << width), np.int32)
    source, target = pairs[0], pairs[1]
    for k in range(n):
        found = np.int64(ids[k])
        source[k] = found << 32 | k
        for turn in range(passes):
            place[turn, (found >> turn * width) & mask] += 1
    for turn in range(passes):
        shift = 32 + turn * width
        total = 0
        for b in range(mask + 1):
            count = place[turn, b]
            place[turn, b] = total
            total += count
        for q in range(n):
            pair = source[q]
            b = (pair >> shift) & mask
            target[place[turn, b]] = pair
            place[turn, b] += 1
        source, target = target, source
    number, last = -1, np.int64(-1)
    starts[0] = 0
    for q in range(n):
        row, k = source[q] >> 32, source[q] & 0xFFFFFFFF
        number += row != last
        last = row
        rows[number], starts[number + 1] = row, q + 1
        order[q], slot[k] = k, number
    return number + 1


@kernel
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
