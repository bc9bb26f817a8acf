"""Batch order: which rows of which lane form batch s. Plain integers; no data, no rank, no randomness.

Row j of lane l (j counts in that lane's epoch order) has the key ((2j + 1) / (2 n_l), l), n_l being the lane's
rows: the middle of the j-th of n_l equal pieces of the epoch. All rows sorted by key make one sequence, batches
cut it, so that every lane gives its proportional share to every batch. Keys are compared as integers, never as floats.

Worked example: three lanes of 4, 2 and 1 rows, batch size 3.

    lane 0:  1/8, 3/8, 5/8, 7/8      lane 1:  1/4, 3/4      lane 2:  1/2

    sorted   1/8 1/4 3/8 | 1/2 5/8 3/4 | 7/8
    lane      0   1   0  |  2   0   1  |  0        batches of 3, 3 and 1 rows

    cut(0) = [0, 0, 0]   cut(3) = [2, 1, 0]   cut(6) = [3, 2, 1]   cut(7) = [4, 2, 1]

``cut(p)[l]`` is the number of rows of lane l among the first p of the sequence. Batch s takes from lane l its rows
cut(s B)[l] to cut((s + 1) B)[l]; a rank takes those of its own lanes, and may get none:

    >>> order = BatchOrder((4, 2, 1), 3)
    >>> [order.cut(position) for position in (0, 3, 6, 7)]
    [[0, 0, 0], [2, 1, 0], [3, 2, 1], [4, 2, 1]]
    >>> order.cuts(0, order.num_steps).tolist()
    [[0, 0, 0], [2, 1, 0], [3, 2, 1], [4, 2, 1]]
    >>> [list(lanes_of_rank(3, rank, 2)) for rank in range(2)]
    [[0], [1, 2]]
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

import mfdist.kernels  # noqa: F401 (before the first compiled function: where they are kept)
from mfdist.errors import UsageError

ORDER_VERSION = 1
"""Raised whenever a batch of the same dataset, seed, batch size, epoch and step would hold other rows or another
order of them (here or in ``shuffle``); a run cannot be continued across a change."""

_SMALL = 1 << 31
"""Lanes below this many rows are compared in int64 without overflow; larger ones go through Python integers."""


@dataclass(frozen=True)
class BatchOrder:
    """The sequence of batches of one epoch: ``lane_rows`` rows of each lane, ``batch_size`` rows a global batch."""

    lane_rows: tuple[int, ...]
    batch_size: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"--batch-size: expected at least one row, got {self.batch_size}.")
        assert all(rows >= 0 for rows in self.lane_rows)

    @property
    def num_rows(self) -> int:
        return sum(self.lane_rows)

    @property
    def num_steps(self) -> int:
        """Batches of an epoch; the last one may be short."""
        return -(-self.num_rows // self.batch_size)

    def rows_of_step(self, step: int) -> int:
        """Global rows of batch ``step``: the batch size, or what is left."""
        return min(self.batch_size, self.num_rows - step * self.batch_size)

    def cut(self, position: int) -> list[int]:
        """Rows of each lane among the first ``position`` rows of the sequence; O(lanes log lanes), any size.

        All rows with a key below position / num_rows are counted in closed form; that is at most half a row a
        lane off, and the rows between are taken or given back one by one in key order.
        """
        assert 0 <= position <= self.num_rows
        total = self.num_rows
        counts = [max(0, -((total - 2 * rows * position) // (2 * total))) if rows else 0 for rows in self.lane_rows]
        short = position - sum(counts)
        step, offset = (1, 0) if short > 0 else (-1, -1)
        heap = [self._entry(lane, counts[lane] + offset, step) for lane in range(len(counts))]
        heap = [entry for entry in heap if entry is not None]
        heapq.heapify(heap)
        for _ in range(abs(short)):
            lane = abs(heap[0][1]) - 1
            counts[lane] += step
            entry = self._entry(lane, counts[lane] + offset, step)
            heapq.heappop(heap) if entry is None else heapq.heapreplace(heap, entry)
        return counts

    def cuts(self, first_step: int, end_step: int) -> npt.NDArray[np.int64]:
        """``cut`` at the start of every step of [first_step, end_step] at once: int64 (end - first + 1, lanes)."""
        total = self.num_rows
        positions = [min(step * self.batch_size, total) for step in range(first_step, end_step + 1)]
        if max(self.lane_rows, default=0) >= _SMALL:
            return np.array([self.cut(position) for position in positions], np.int64)
        cuts = np.zeros((len(positions), len(self.lane_rows)), np.int64)
        if total:
            _cuts(np.array(self.lane_rows, np.int64), total, np.array(positions, np.int64), cuts)
        return cuts

    def _entry(self, lane: int, row: int, sign: int) -> Any:
        """Heap entry of row ``row`` of a lane, smallest key first (largest with ``sign`` -1); None past its ends."""
        rows = self.lane_rows[lane]
        return (sign * Fraction(2 * row + 1, 2 * rows), sign * (lane + 1)) if 0 <= row < rows else None


def lanes_of_rank(num_lanes: int, rank: int, world_size: int) -> range:
    """The lanes that a rank owns: consecutive ones, whole, one more or less than any other rank's."""
    return range(rank * num_lanes // world_size, (rank + 1) * num_lanes // world_size)


# The same in compiled int64. Products stay below 2 (2^31)^2 = 2^63: lane rows are below 2^31. ------------------------

_GRID = 1 << 30


@numba.njit(cache=True, nogil=True)
def _cuts(lane_rows: Any, total: int, positions: Any, cuts: Any) -> None:
    lanes = len(lane_rows)
    heap = np.empty(lanes, np.int64)
    for index in range(len(positions)):
        counts = cuts[index]
        # Any start near position / total serves, so a float may choose it: what follows is exact.
        grid = np.int64(np.float64(positions[index]) / np.float64(total) * _GRID)
        taken = np.int64(0)
        for lane in range(lanes):
            # Rows with (2j + 1) / (2 n) < grid / GRID.
            counts[lane] = min(lane_rows[lane], max(0, (2 * lane_rows[lane] * grid + _GRID - 1) // (2 * _GRID)))
            taken += counts[lane]
        if taken < positions[index]:
            _move(lane_rows, counts, heap, positions[index] - taken, 1)
        elif taken > positions[index]:
            _move(lane_rows, counts, heap, taken - positions[index], -1)


@numba.njit(cache=True, nogil=True)
def _move(lane_rows: Any, counts: Any, heap: Any, number: int, sign: int) -> None:
    """Take the ``number`` next rows in key order (sign 1) or give the last ones back (sign -1)."""
    size = 0
    for lane in range(len(lane_rows)):
        if _has(lane_rows, counts, lane, sign):
            heap[size] = lane
            size += 1
    for root in range(size // 2 - 1, -1, -1):
        _sift(lane_rows, counts, heap[:size], root, sign)
    for _ in range(number):
        counts[heap[0]] += sign
        if not _has(lane_rows, counts, heap[0], sign):
            size -= 1
            heap[0] = heap[size]
        _sift(lane_rows, counts, heap[:size], 0, sign)


@numba.njit(cache=True, nogil=True)
def _has(lane_rows: Any, counts: Any, lane: int, sign: int) -> Any:
    return counts[lane] < lane_rows[lane] if sign > 0 else counts[lane] > 0


@numba.njit(cache=True, nogil=True)
def _before(lane_rows: Any, counts: Any, a: int, b: int, sign: int) -> Any:
    """Whether lane a's candidate row comes before lane b's (after it with sign -1)."""
    shift = 1 if sign > 0 else -1  # the candidate is row counts, or row counts - 1
    left = (2 * counts[a] + shift) * lane_rows[b]
    right = (2 * counts[b] + shift) * lane_rows[a]
    if left == right:
        return sign * a < sign * b
    return sign * left < sign * right


@numba.njit(cache=True, nogil=True)
def _sift(lane_rows: Any, counts: Any, heap: Any, root: int, sign: int) -> None:
    while True:
        child = 2 * root + 1
        if child >= len(heap):
            return
        if child + 1 < len(heap) and _before(lane_rows, counts, heap[child + 1], heap[child], sign):
            child += 1
        if not _before(lane_rows, counts, heap[child], heap[root], sign):
            return
        heap[root], heap[child] = heap[child], heap[root]
        root = child
