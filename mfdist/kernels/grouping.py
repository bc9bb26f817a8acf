"""The ratings of a batch by row: a stable radix sort, and ranges of equal load."""

from __future__ import annotations

from typing import Any

import numpy as np

from mfdist.kernels.machine import kernel

ROW_LOAD = 4
"""Work on a row beside the work on one of its ratings, to cut ranges."""


@kernel
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
