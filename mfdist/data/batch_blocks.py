"""From the units of a rank's lanes to blocks of finished batches, one epoch at a time.

A unit is decoded, permuted while it is in the cache, and cut into the slices that consecutive batches take from it.
Many steps are assembled at once into a *block* of about 2^18 rows: a slice of 128 rows alone would cost a cache miss or
two a column, and the slices of many steps follow one another in the unit.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mfdist.data import shuffle
from mfdist.data.batch_order import BatchOrder
from mfdist.data.prefetch import Block
from mfdist.data.row_groups import Columns, RatingFile, Unit

BLOCK_ROWS = 1 << 18
AHEAD_BYTES = 64 << 20
POSITION = np.int32
"""What the positions of rows that lie on a device are."""

Ints = npt.NDArray[np.int64]


class Piece(NamedTuple):
    """A unit of a lane: where it is read from and how many of its rows take part (stop rows do not)."""

    file: RatingFile
    unit: Unit
    rows: int


class Pool:
    """Memory used again: the page faults of fresh memory cost as much as the copy. At most ``keep_bytes`` wait."""

    def __init__(self, keep_bytes: int) -> None:
        self._keep_bytes = keep_bytes
        self._waiting_bytes = 0
        self._free: dict[int, list[npt.NDArray[np.uint8]]] = {}
        self._lock = threading.RLock()  # a collection inside may run another array's end

    def take(self, rows: int, dtype: Any) -> npt.NDArray[Any]:
        """An array whose memory comes back when it, and every tensor on it, is gone."""
        size = 1 << max(12, (rows * np.dtype(dtype).itemsize - 1).bit_length())
        with self._lock:
            waiting = self._free.setdefault(size, [])
            memory = waiting.pop() if waiting else None
            self._waiting_bytes -= 0 if memory is None else size
        memory = np.empty(size, np.uint8) if memory is None else memory
        array = np.frombuffer(memory.data, dtype, rows)  # on a memoryview: views of the array keep the array itself
        weakref.finalize(array, self._give, memory).atexit = False
        return array

    def _give(self, memory: npt.NDArray[np.uint8]) -> None:
        with self._lock:
            if self._waiting_bytes + memory.nbytes <= self._keep_bytes:
                self._free[memory.nbytes].append(memory)
                self._waiting_bytes += memory.nbytes


@dataclass(frozen=True, kw_only=True)
class Source:
    """What an epoch is made of. ``pieces``: of each of the rank's ``lanes``; ``read(i, unit)``: the decoded rows of a
    unit of the i-th of them; ``block_rows``: rows that stay together in the order ``blocks``, else 0; ``types``: of
    user, item and rating."""

    order: BatchOrder
    lanes: range
    pieces: list[list[Piece]]
    read: Callable[[int, int], Columns]
    seed: int
    stop_fraction: float
    block_rows: int
    types: tuple[Any, Any, Any]
    pool: Pool


@dataclass(frozen=True, slots=True)
class AssembledBlock:
    """Consecutive steps of a rank, one after the other. ``columns``: user, item and rating, or the rows' positions
    alone (``device_rows``); ``sizes``: the rank's rows of each step."""

    columns: tuple[torch.Tensor, ...]
    first_step: int
    sizes: list[int]


class OpenUnit:
    """A place for a unit's permuted rows; it lives as long as a block that needs it."""

    __slots__ = ("columns", "first", "layout")

    def __init__(self, first: int) -> None:
        self.first = first  # its first row's number in the lane's epoch order
        self.columns: list[npt.NDArray[Any]]
        self.layout: tuple[int, ...]  # first row, rows, the address of each column: for ``scatter_units``

    def fill(self, columns: list[npt.NDArray[Any]]) -> None:
        self.columns = columns
        self.layout = (self.first, len(columns[0]), *(column.ctypes.data for column in columns))


class EpochPlan:
    """One pass over an epoch: the calls that load units and assemble blocks, in the order of the blocks.

    ``firsts``: where given, blocks hold positions (POSITION) alone: of the u-th unit of the i-th lane from
    ``firsts[i][u]`` on, in file order without stop rows.
    """

    def __init__(self, source: Source, epoch: int, start_step: int, firsts: list[list[int]] | None = None) -> None:
        self._source, self._epoch, self._start = source, epoch, start_step
        self._positions = firsts
        self._types = source.types if firsts is None else (POSITION,)
        self._turns = [self._turn(index) for index in range(len(source.lanes))]
        self._firsts = [
            np.cumsum([0, *(source.pieces[index][unit].rows for unit in turn)], dtype=np.int64)
            for index, turn in enumerate(self._turns)
        ]
        self._scratch = threading.local()
        self._pool = source.pool
        rows_of_step = max(1, source.order.batch_size * len(source.lanes) // max(1, len(source.order.lane_rows)))
        self._steps = max(1, BLOCK_ROWS // rows_of_step)
        self.ahead = max(3, min(16, AHEAD_BYTES // (self._steps * rows_of_step * 12)))

    def blocks(self) -> Iterator[Block[AssembledBlock]]:
        """Blocks from the start step on: the units to load first, and the call that assembles the steps."""
        order, lanes = self._source.order, self._source.lanes
        newest: list[list[OpenUnit]] = [[] for _ in lanes]  # of every lane the last unit asked for
        held = np.zeros(len(lanes), np.int64)  # of every lane the rows up to the end of that unit
        for first_step in range(self._start, order.num_steps, self._steps):
            end_step = min(first_step + self._steps, order.num_steps)
            cuts = np.ascontiguousarray(order.cuts(first_step, end_step)[:, lanes.start : lanes.stop].T)
            parts: list[Callable[[], None]] = []
            needed = list(newest)
            for index in np.flatnonzero((cuts[:, -1] > held) & (cuts[:, -1] > cuts[:, 0])).tolist():
                places = self._places(index, cuts[index, 0], cuts[index, -1])
                units = list(newest[index]) if cuts[index, 0] < held[index] else []
                for place in places[len(units) :]:
                    units.append(OpenUnit(int(self._firsts[index][place])))
                    parts.append(self._load_call(index, place, units[-1]))
                needed[index], newest[index] = units, units[-1:]
                held[index] = self._firsts[index][places[-1] + 1]
            yield parts, self._assemble_call(first_step, cuts, needed)

    def _turn(self, index: int) -> Sequence[int]:
        source = self._source
        key = shuffle.key_of(shuffle.UNITS, source.seed, self._epoch, source.lanes[index])
        return shuffle.permutation(len(source.pieces[index]), key).tolist()  # type: ignore[no-any-return]

    def _places(self, index: int, low: int, high: int) -> range:
        """The places of a lane's turn whose units hold any of its epoch rows low to high; low < high."""
        firsts = self._firsts[index]
        return range(
            int(np.searchsorted(firsts, low, side="right")) - 1, int(np.searchsorted(firsts, high, side="left"))
        )

    def _load_call(self, index: int, place: int, unit: OpenUnit) -> Callable[[], None]:
        return lambda: self._load(index, self._turns[index][place], unit)

    def _assemble_call(self, step: int, cuts: Ints, needed: list[list[OpenUnit]]) -> Callable[[], AssembledBlock]:
        return lambda: self._assemble(step, cuts, needed)

    def _load(self, index: int, number: int, unit: OpenUnit) -> None:
        """Decode unit ``number`` of a lane and permute its rows, or their positions alone, while they are cached."""
        source = self._source
        rows = source.pieces[index][number].rows
        key = shuffle.key_of(shuffle.ROWS, source.seed, self._epoch, source.lanes[index], number)
        order = self._order_buffer(rows)
        shuffle.permute_into(order, np.uint64(key), source.block_rows)
        if self._positions is not None:
            positions = self._pool.take(rows, self._types[0])
            np.add(order, self._positions[index][number], out=positions, casting="unsafe")
            unit.fill([positions])
            return
        columns = source.read(index, number)
        if source.stop_fraction:
            shuffle.compose(select(columns, source.seed, source.stop_fraction, stop=False), order)
        permuted = [self._pool.take(rows, column.dtype) for column in columns[:3]]
        for given, target in zip(columns[:3], permuted, strict=True):
            shuffle.gather(given, order, target)
        unit.fill(permuted)

    def _assemble(self, first_step: int, cuts: Ints, needed: list[list[OpenUnit]]) -> AssembledBlock:
        """``cuts``: int64 (lanes, steps + 1)."""
        starts = np.empty(cuts.shape[1], np.int64)
        where = shuffle.destinations(cuts, starts)
        targets = [self._pool.take(int(starts[-1]), dtype) for dtype in self._types]
        units = [(index, *unit.layout) for index, of_lane in enumerate(needed) for unit in of_lane]
        layouts = np.array(units, np.uint64).reshape(-1, 3 + len(targets))
        for column, target in enumerate(targets):
            shuffle.scatter_units(layouts, column, target, cuts, where)
        return AssembledBlock(tuple(map(torch.from_numpy, targets)), first_step, np.diff(starts).tolist())

    def _order_buffer(self, rows: int) -> npt.NDArray[np.uint32]:
        kept: npt.NDArray[np.uint32] | None = getattr(self._scratch, "order", None)
        if kept is None or len(kept) < rows:
            kept = self._scratch.order = np.empty(rows, np.uint32)
        return kept[:rows]


def select(columns: Columns, seed: int, fraction: float, *, stop: bool) -> npt.NDArray[np.uint32]:
    """Positions of the stop rows, or of all others: uint32, ascending. Decided by a hash of (seed, user, item)."""
    chosen = np.empty(len(columns.user) + 1, np.uint32)
    key, threshold = shuffle.key_of(shuffle.STOP, seed), shuffle.stop_threshold(fraction)
    count = shuffle.select_rows(columns.user, columns.item, np.uint64(key), np.uint64(threshold), stop, chosen)
    return chosen[:count]
