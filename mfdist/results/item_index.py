"""The best items of many users: items are made ready once, then thousands of users are searched at a time::

    index = ItemIndex(item_factors, item_bias, user_norms=np.linalg.norm(some_users, axis=1))
    rows, scores = index.search(user_factors, k=10, hidden=seen)     # (users, 10) each, best first

Lists are exact and the same bits for any number of threads, users at a time, order of users, and device: what a score
is, and how equal ones are ordered, ``kernels.top_n`` defines.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from mfdist.kernels import top_n
from mfdist.kernels.dot_tiles import HAS_BYTES, ITEMS, USERS
from mfdist.kernels.worker_threads import Workers
from mfdist.results.item_lists import ItemLists

BATCH_USERS = 170 * USERS
"""Users that a thread takes at a time: their factors and lists stay in its second cache."""
GPU_USERS = 4096
KNOTS = 31

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Floats32 = npt.NDArray[np.float32]


class ItemIndex:
    """Items made ready for :meth:`search`."""

    def __init__(
        self, factors: Array, bias: Array | None, *, rows: Ints | None = None, user_norms: Array | None = None,
        threads: int | None = None, in_bytes: bool = HAS_BYTES, device: Any = None,
    ) -> None:  # fmt: skip
        """``factors`` float32 (items, dim), ``bias`` (items,) or None.

        ``rows``: ascending rows that may be found, None: all. ``user_norms``: lengths of some users' factors, whose
        spread decides the order of the items and how tight bounds are (not what is found). ``in_bytes``: filter by
        bytes, where the processor can. ``device``: a CUDA device that filters in the processor's place.
        """
        self.dim, self.num_rows = factors.shape[1], len(factors)
        self.threads = threads or usable_processors()
        self.in_bytes = in_bytes
        rows = np.arange(len(factors)) if rows is None else rows
        chosen = np.ascontiguousarray(factors[rows], np.float32)
        biases = np.zeros(len(rows), np.float32) if bias is None else np.asarray(bias[rows], np.float32)
        length = _lengths(chosen)
        norms = np.sort(np.asarray([1.0] if user_norms is None or not len(user_norms) else user_norms, np.float64))
        self._knots = np.unique(np.quantile(norms, np.linspace(0, 1, KNOTS))) * (1 + 1e-6)
        order = np.argsort(-(np.median(norms) * length + biases), kind="stable")
        self.rows = rows[order].astype(np.int64)
        self.factors, self.bias = chosen[order], biases[order]
        self._place: Ints | None = None
        self._make_blocks(length[order])
        self._filter = None
        if device is not None and device.type == "cuda":
            from mfdist.results.item_index_gpu import GpuFilter

            self._filter = GpuFilter(self.factors, self.bias, device)

    def search(
        self, users: Array, k: int, hidden: ItemLists | None = None, listed: ItemLists | None = None
    ) -> tuple[Ints, Floats32]:
        """Item rows and scores of each user's ``k`` best items: (users, k) each, best first.

        ``users``: float32 (users, dim). ``hidden``: item rows left out for each user. ``listed``: the only item rows
        that each user may get. Where fewer than k are left, row -1 and score -inf fill up.
        """
        hidden = ItemLists.none(len(users)) if hidden is None else hidden.ordered()
        if self._filter is not None and listed is None and len(self.rows):
            return self._search_filtered(users, k, hidden)
        return self._search(users, k, hidden, None if listed is None else self._positions(listed))

    def _search(self, users: Array, k: int, hidden: ItemLists, places: ItemLists | None) -> tuple[Ints, Floats32]:
        rows, scores = np.empty((len(users), k), np.int64), np.empty((len(users), k), np.float32)
        # neighbours in a tile should have much the same bounds
        order = np.argsort(_lengths(users), kind="stable") if places is None else np.arange(len(users))
        firsts = range(0, len(users), BATCH_USERS)

        def batch(number: int) -> None:
            mine = order[firsts[number] : firsts[number] + BATCH_USERS]
            heaps = np.zeros((len(mine), k), np.uint64)
            factors = np.ascontiguousarray(users[mine], np.float32)
            left_out = hidden.of(mine)
            if places is None:
                self._fill(factors, left_out, heaps)
            else:
                top_n.add_listed(0, len(mine), factors, tuple(places.of(mine)), self._items, left_out, heaps)
            found = np.empty((len(mine), k), np.int64), np.empty((len(mine), k), np.float32)
            top_n.finish(0, len(mine), heaps, *found)
            rows[mine], scores[mine] = found

        share_out(len(firsts), self.threads, batch)
        return rows, scores

    def _search_filtered(self, users: Array, k: int, hidden: ItemLists) -> tuple[Ints, Floats32]:
        """Candidates from the device, computed exactly here; users whose candidates may lack one are searched anew."""
        assert self._filter is not None
        rows, scores = np.empty((len(users), k), np.int64), np.empty((len(users), k), np.float32)
        slack = top_n.ROUNDING * (self.dim + 8)
        most, largest = self._blocks[1].max(initial=0), self._blocks[3].max(initial=0)
        for first in range(0, len(users), GPU_USERS):
            part = slice(first, min(first + GPU_USERS, len(users)))
            factors, left_out = np.ascontiguousarray(users[part], np.float32), hidden.cut(part)
            places, cutoff = self._filter.candidates(factors, k, self._positions(left_out))
            width = places.shape[1]
            listed = ItemLists(np.arange(len(factors) + 1) * width, places.ravel())
            rows[part], scores[part] = self._search(factors, k, left_out, listed)
            reach = cutoff + slack * (_lengths(factors) * most + largest)
            unsure = np.flatnonzero((scores[part][:, -1] <= reach) & (cutoff > -np.inf))
            if len(unsure):
                again = self._search(factors[unsure], k, left_out.of(unsure), None)
                rows[first + unsure], scores[first + unsure] = again
        return rows, scores

    def _fill(self, factors: Floats32, hidden: ItemLists, heaps: Array) -> None:
        search = top_n.search_by_bytes if self.in_bytes else top_n.search_by_floats
        tiles = -(-len(factors) // USERS)
        search(0, tiles, self._users(factors), self._items, self._blocks, tuple(hidden), heaps)

    def _users(self, factors: Floats32) -> tuple[Array, ...]:
        """What the kernel takes of users."""
        norm = _lengths(factors)
        knot = np.searchsorted(self._knots, norm)
        order = _padded(len(factors), USERS)
        if not self.in_bytes:
            none = np.zeros(len(factors))
            return (_packed(factors, order, USERS, 1), none.astype(np.float32), factors, norm, none, none, knot)
        small, scale = _as_bytes(factors, np.abs(factors).max(axis=1, initial=0))
        back = small * scale[:, None].astype(np.float64)
        error, byte_norm = np.linalg.norm(factors - back, axis=1), np.linalg.norm(back, axis=1)
        words = _packed((small.astype(np.int16) + 128).astype(np.uint8).view(np.int8), order, USERS, 4)
        return words, scale, factors, norm, byte_norm, error, knot

    def _make_blocks(self, length: Array) -> None:
        """Words, scales, errors and bounds of the blocks of items."""
        block, items = top_n.BLOCK, len(self.rows)
        blocks = -(-items // block)
        order = _padded(items, block)
        in_block = order.reshape(blocks, block)
        lengths = np.where(in_block < 0, 0.0, length[in_block]) if items else np.zeros((0, block))
        biases = np.where(in_block < 0, -np.inf, self.bias[in_block]) if items else np.zeros((0, block))
        amounts = np.where(in_block < 0, 0.0, np.abs(biases))
        slack = top_n.ROUNDING * (self.dim + 8)
        bounds = np.full((blocks, len(self._knots) + 1), np.inf, np.float32)
        for number, knot in enumerate(self._knots):
            most = (knot * lengths * (1 + slack) + biases + slack * amounts).max(axis=1, initial=-np.inf)
            bounds[:, number] = np.nextafter(most.astype(np.float32), np.float32(np.inf))
        later = np.maximum.accumulate(bounds[::-1], axis=0)[::-1].copy()
        scale, errors = np.zeros(blocks, np.float32), np.zeros(blocks)
        start = np.zeros(blocks * block, np.int32)
        if self.in_bytes:
            largest = np.zeros(blocks * block, np.float32)
            largest[:items] = np.abs(self.factors).max(axis=1, initial=0)
            largest = np.repeat(largest.reshape(blocks, block).max(axis=1, initial=0), block)
            small, scales = _as_bytes(self.factors, largest[:items])
            scale = (largest[::block] / 127).astype(np.float32)
            error = np.zeros(blocks * block)
            for first in range(0, items, 1 << 16):
                part = slice(first, first + (1 << 16))
                back = small[part] * scales[part, None].astype(np.float64)
                error[:items][part] = np.linalg.norm(self.factors[part] - back, axis=1)
            errors = error.reshape(blocks, block).max(axis=1, initial=0)
            start[:items] = -128 * small.sum(axis=1, dtype=np.int32)
            words = _packed(small, order, ITEMS, 4)
        else:
            words = _packed(self.factors, order, ITEMS, 1)
        padded_bias = np.full(blocks * block, -np.inf, np.float32)
        padded_bias[:items] = self.bias
        self._items = (words, start, padded_bias, self.factors, self.rows)
        norms, amounts = lengths.max(axis=1, initial=0), amounts.max(axis=1, initial=0)
        self._blocks = (scale, norms, errors, amounts, bounds, later)

    def _positions(self, lists: ItemLists) -> ItemLists:
        """Item rows as positions here, -1 where the row may not be found."""
        if self._place is None:
            self._place = np.full(self.num_rows, -1, np.int64)
            self._place[self.rows] = np.arange(len(self.rows))
        ordered = lists.ordered()
        return ItemLists(ordered.starts, self._place[ordered.items])


def usable_processors() -> int:
    """Processors of this process; its share where several ranks run on this host."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, found // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def share_out(tasks: int, threads: int, task: Callable[[int], None]) -> None:
    """``task(number)`` for every number below ``tasks``, each thread taking the next one when it is free."""
    numbers, lock = count(), threading.Lock()

    def work(_: int) -> None:
        while True:
            with lock:
                number = next(numbers)
            if number >= tasks:
                return
            task(number)

    workers = Workers(min(threads, max(tasks, 1)))
    try:
        workers.all(work)
    finally:
        workers.close()


def _lengths(rows: Array) -> Array:
    """Euclidean lengths, float64 (rows,), without a float64 copy of all of ``rows``."""
    squares: Array = np.einsum("nd,nd->n", rows, rows, dtype=np.float64)
    return np.sqrt(squares) * (1 + 1e-6)


def _as_bytes(rows: Array, largest: Array) -> tuple[Array, Floats32]:
    """int8 (rows, dim) and the scale of each row that takes it back; ``largest`` (rows,) is at least its values."""
    scale = (largest / 127).astype(np.float32)
    step = np.where(scale > 0, scale, 1)[:, None]
    return np.rint(rows / step).clip(-127, 127).astype(np.int8), scale


def _padded(rows: int, block: int) -> Ints:
    """Row numbers up to a whole number of blocks, -1 behind the last."""
    order = np.full(-(-rows // block) * block, -1, np.int64)
    order[:rows] = np.arange(rows)
    return order


def _packed(rows: Array, order: Ints, tile: int, group_size: int) -> Array:
    groups = -(-rows.shape[1] // group_size)
    words = np.zeros(len(order) * groups * group_size, rows.dtype)
    top_n.pack(rows, order, tile, group_size, words)
    return words.view(np.int32) if group_size > 1 else words
