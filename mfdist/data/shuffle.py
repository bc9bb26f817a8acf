"""Compiled pieces of the loader: random numbers that never change, permutations, checks, gathers. No Python objects.

The generator is splitmix64 (Steele, Lea, Flood 2014) used as a counter: number i of a stream is ``mix(key + i G)``.
A key is made from a purpose and integers, one after the other: ``key = mix((key + G) ^ value)``. Both are stable for
ever; a change here raises ``schedule.ORDER_VERSION``.

The order of a lane's epoch: its *units* (row groups, tiny ones taken together) permuted with the key (seed, epoch,
lane), and the rows of each unit permuted with the key (seed, epoch, lane, unit). In a dataset prepared with
``--order blocks`` a unit's rows are cut into blocks of consecutive rows; blocks are permuted, and rows within a block,
so that the users of a batch lie close together.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import intrinsic

import mfdist.kernels  # noqa: F401 (before the first compiled function: where they are kept)

UNITS, ROWS, STOP = 1, 2, 3
"""Purposes: the order of a lane's units, the order of a unit's rows, the choice of stop rows."""

OK, BAD_USER, BAD_ITEM, BAD_RATING = 0, 1, 2, 3

_G = np.uint64(0x9E3779B97F4A7C15)
_A = np.uint64(0xBF58476D1CE4E5B9)
_B = np.uint64(0x94D049BB133111EB)
_LOW = np.uint64(0xFFFFFFFF)


def key_of(*values: int) -> int:
    """The 64-bit key of a purpose and integers, such as ``key_of(ROWS, seed, epoch, lane, unit)``."""
    key = np.uint64(0)
    for value in values:
        key = np.uint64(_chain(key, np.uint64(value & 0xFFFFFFFFFFFFFFFF)))
    return int(key)


def permutation(size: int, key: int, block_rows: int = 0) -> npt.NDArray[np.uint32]:
    """A permutation of ``size`` rows, uint32; with ``block_rows`` of blocks and of the rows within each block."""
    assert size < 1 << 32
    order = np.empty(size, np.uint32)
    permute_into(order, np.uint64(key), block_rows)
    return order


def stop_threshold(fraction: float) -> int:
    """Rows whose hash lies below this are stop rows."""
    return min(int(fraction * 2.0**64), (1 << 64) - 1)


@numba.njit(cache=True, nogil=True, inline="always")
def _mix(value: Any) -> Any:
    value = (value ^ (value >> np.uint64(30))) * _A
    value = (value ^ (value >> np.uint64(27))) * _B
    return value ^ (value >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def _chain(key: Any, value: Any) -> Any:
    return _mix((key + _G) ^ value)


@numba.njit(cache=True, nogil=True)
def permute_into(order: Any, key: Any, block_rows: Any) -> None:
    """Fill ``order`` (uint32) with a permutation of its positions.

    Fisher-Yates; number i of the stream decides two swaps, one with each half: ``j = half * (i + 1) >> 32``.
    """
    size = len(order)
    if block_rows <= 0 or size <= block_rows:
        for row in range(size):
            order[row] = row
        _swaps(order, key)
        return
    blocks = (size + block_rows - 1) // block_rows
    turn = np.arange(blocks).astype(np.uint32)
    _swaps(turn, key)
    start = 0
    for block in turn:
        first = block * block_rows
        length = min(block_rows, size - first)
        part = order[start : start + length]
        for row in range(length):
            part[row] = first + row
        _swaps(part, _chain(key, np.uint64(block)))
        start += length


@numba.njit(cache=True, nogil=True)
def _swaps(order: Any, key: Any) -> None:
    counter = key
    last = len(order) - 1
    while last > 0:
        counter += _G
        random = _mix(counter)
        other = ((random >> np.uint64(32)) * np.uint64(last + 1)) >> np.uint64(32)
        order[last], order[other] = order[other], order[last]
        last -= 1
        if last > 0:
            other = ((random & _LOW) * np.uint64(last + 1)) >> np.uint64(32)
            order[last], order[other] = order[other], order[last]
            last -= 1


@numba.njit(cache=True, nogil=True)
def is_stop_row(seed_key: Any, user: Any, item: Any, threshold: Any) -> Any:
    return _chain(_chain(seed_key, np.uint64(user)), np.uint64(item)) < threshold


@numba.njit(cache=True, nogil=True)
def select_rows(user: Any, item: Any, seed_key: Any, threshold: Any, stop: bool, chosen: Any) -> int:
    """Positions of the stop rows (``stop``) or of all others into ``chosen`` (uint32); their number."""
    count = 0
    for row in range(len(user)):
        chosen[count] = row
        count += is_stop_row(seed_key, user[row], item[row], threshold) == stop
    return count


@numba.njit(cache=True, nogil=True)
def check_rows(user: Any, item: Any, rating: Any, first_user: int, end_user: int, num_items: int) -> int:
    """OK, or the first fault found: an id out of range, a rating that is NaN or infinite."""
    bad_user = False
    bad_item = False
    for row in range(len(user)):
        bad_user |= (user[row] < first_user) | (user[row] >= end_user)
        bad_item |= (item[row] < 0) | (item[row] >= num_items)
    if bad_user:
        return BAD_USER
    if bad_item:
        return BAD_ITEM
    bits = rating.view(np.uint32)
    bad_rating = False
    for row in range(len(bits)):
        bad_rating |= (bits[row] & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    return BAD_RATING if bad_rating else OK


@numba.njit(cache=True, nogil=True)
def gather(source: Any, order: Any, target: Any) -> None:
    """target[i] = source[order[i]]; source and target stay in the cache for a unit of common size."""
    for row in range(len(order)):
        target[row] = source[order[row]]


@numba.njit(cache=True, nogil=True)
def compose(chosen: Any, order: Any) -> None:
    """order[i] = chosen[order[i]], in place."""
    for row in range(len(order)):
        order[row] = chosen[order[row]]


@numba.njit(cache=True, nogil=True)
def destinations(cuts: Any, starts: Any) -> Any:
    """Where each lane's slice of each step begins in a block: int64 (lanes, steps). ``cuts`` is (lanes, steps + 1).

    A block holds its steps one after the other (``starts``: steps + 1), and a step its lanes one after the other.
    """
    lanes, steps = cuts.shape[0], cuts.shape[1] - 1
    where = np.empty((lanes, steps), np.int64)
    position = 0
    for step in range(steps):
        starts[step] = position
        for lane in range(lanes):
            where[lane, step] = position
            position += cuts[lane, step + 1] - cuts[lane, step]
    starts[steps] = position
    return where


@numba.njit(cache=True, nogil=True)
def scatter_slices(source: Any, target: Any, first: int, cuts: Any, where: Any) -> None:
    """Copy a unit's slices of every step of a block to their places.

    ``source`` holds rows first, first + 1, ... of the lane's epoch order; step s takes rows cuts[s] to cuts[s + 1].
    """
    end = first + len(source)
    for step in range(len(where)):
        low = max(cuts[step], first)
        high = min(cuts[step + 1], end)
        if low < high:  # views from 0 on: an index that might be negative would keep the loop from being vectorised
            start = where[step] + low - cuts[step]
            given, place = source[low - first : high - first], target[start : start + high - low]
            for row in range(len(given)):
                place[row] = given[row]


@intrinsic
def _pointer(_context: Any, address: Any, like: Any) -> Any:
    """``address`` (uint64) as a pointer to elements of the array ``like``."""
    pointer = types.CPointer(like.dtype)  # type: ignore[no-untyped-call]

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(address, like), generate


@numba.njit(cache=True, nogil=True)
def scatter_units(units: Any, column: int, target: Any, cuts: Any, where: Any) -> None:
    """:func:`scatter_slices` of one column of many units at once: a call for each would cost as much as its copy.

    ``units``: uint64 (units, 3 + columns): the lane, the first row, the number of rows, the address of each column.
    """
    for unit in units:
        source = numba.carray(_pointer(unit[3 + column], target), (np.int64(unit[2]),))  # type: ignore
        lane = np.int64(unit[0])
        scatter_slices(source, target, np.int64(unit[1]), cuts[lane], where[lane])
