"""What happens to the rows of a group of users: order, duplicates, minimum counts, the split. No file, no id.

Rows are sorted by (user, given as validation, item, time, rating); the place within equal (user, item) pairs is the
*occurrence*. A rating's fate is a hash of (seed, user id, item id, occurrence) and so independent of file order:

    base = mix(mix(mix(seed + U) + I) + occurrence),   validation where mix(base + 1) / 2^64 < fraction,
    order within its lane by mix(base + 2)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from mfdist.prepare.ids import U64, RowTable, mix
from mfdist.prepare.spill import Arrays

U = np.uint64
_RUN = 16


@numba.njit(nogil=True, cache=True, inline="always")
def _less(i: Any, j: Any, user: Any, val: Any, item: Any, time: Any, rating: Any) -> Any:
    if user[i] != user[j]:
        return user[i] < user[j]
    if val[i] != val[j]:
        return val[i] < val[j]
    if item[i] != item[j]:
        return item[i] < item[j]
    if time.size and time[i] != time[j]:
        return time[i] < time[j]
    return rating[i] < rating[j]


@numba.njit(nogil=True, cache=True)
def _sort_range(order: Any, low: Any, high: Any, spare: Any, user: Any, val: Any, item: Any, time: Any,
                rating: Any) -> None:  # fmt: skip
    """Merge sort of ``order[low:high]``: runs of 16 by insertion, then merges through ``spare``."""
    for a in range(low, high, _RUN):
        for k in range(a + 1, min(a + _RUN, high)):
            row, p = order[k], k
            while p > a and _less(row, order[p - 1], user, val, item, time, rating):
                order[p] = order[p - 1]
                p -= 1
            order[p] = row
    width = _RUN
    while width < high - low:
        for a in range(low, high, 2 * width):
            middle, end = min(a + width, high), min(a + 2 * width, high)
            i, j = a, middle
            for k in range(a, end):
                if j >= end or (i < middle and not _less(order[j], order[i], user, val, item, time, rating)):
                    spare[k] = order[i]
                    i += 1
                else:
                    spare[k] = order[j]
                    j += 1
            for k in range(a, end):
                order[k] = spare[k]
        width *= 2


@numba.njit(nogil=True, cache=True)
def sort_order(user: Any, val: Any, item: Any, time: Any, rating: Any, low: Any, shift: Any, num_fine: Any) -> Any:
    """The order (int64) of rows by (user, val, item, time, rating); fine bucket b holds (user - low) >> shift == b."""
    n = user.size
    edges = np.zeros(num_fine + 1, np.int64)
    for i in range(n):
        edges[np.int64((user[i] - low) >> shift) + 1] += 1
    for fine in range(num_fine):
        edges[fine + 1] += edges[fine]
    cursor = edges[:-1].copy()
    order, spare = np.empty(n, np.int64), np.empty(n, np.int64)
    for i in range(n):
        b = np.int64((user[i] - low) >> shift)
        order[cursor[b]] = i
        cursor[b] += 1
    for fine in range(num_fine):
        if edges[fine + 1] - edges[fine] > 1:
            _sort_range(order, edges[fine], edges[fine + 1], spare, user, val, item, time, rating)
    return order


def sorted_rows(rows: Arrays, low: int, high: int) -> Arrays:
    """Rows whose user hashes lie in [low, high), sorted; 'time' becomes an empty column where there is none."""
    time = rows.get("time", np.zeros(0, np.int64))
    width = max(1, (high - low - 1).bit_length())
    fine_bits = min(width, max(1, (rows["user"].size // 8).bit_length()))
    order = sort_order(rows["user"], rows["val"], rows["item"], time, rows["rating"], U(low), U(width - fine_bits),
                       1 << fine_bits)  # fmt: skip
    return {name: values[order] for name, values in rows.items()}


@numba.njit(nogil=True, cache=True)
def occurrences(user: Any, val: Any, item: Any) -> Any:
    """Place of each sorted row within its equal (user, val, item): int64, (n,)."""
    out = np.zeros(user.size, np.int64)
    for i in range(1, user.size):
        if user[i] == user[i - 1] and item[i] == item[i - 1] and val[i] == val[i - 1]:
            out[i] = out[i - 1] + 1
    return out


class Duplicates(Exception):
    """``--duplicates error`` met a pair twice; carries the hashes (user, item) of the first."""

    def __init__(self, user: int, item: int) -> None:
        super().__init__(user, item)
        self.user, self.item = user, item


def merged(rows: Arrays, policy: str) -> Arrays:
    """Sorted rows with equal pairs treated as ``policy`` says, and their 'occurrence'."""
    occurrence = occurrences(rows["user"], rows["val"], rows["item"])
    repeated = np.flatnonzero(occurrence)
    if policy == "keep" or repeated.size == 0:
        return {**rows, "occurrence": occurrence}
    if policy == "error":
        raise Duplicates(int(rows["user"][repeated[0]]), int(rows["item"][repeated[0]]))
    last = np.append(occurrence[1:] == 0, True)
    kept = {name: values[last] for name, values in rows.items()}
    if policy == "mean":
        first = np.flatnonzero(occurrence == 0)
        sums = np.add.reduceat(rows["rating"].astype(np.float64), first)
        kept["rating"] = (sums / (occurrence[last] + 1)).astype(np.float32)
    return {**kept, "occurrence": np.zeros(first_count(last), np.int64)}


def first_count(mask: npt.NDArray[np.bool_]) -> int:
    return int(np.count_nonzero(mask))


@numba.njit(nogil=True, cache=True)
def fates(user: Any, item: Any, occurrence: Any, seed: Any, chance: Any, order: Any) -> None:
    """``chance`` (decides the split) and ``order`` (place within the lane) of every row: uint64, (n,)."""
    for i in range(user.size):
        base = mix(mix(mix(seed + user[i]) + item[i]) + U(occurrence[i]))
        chance[i] = mix(base + U(1))
        order[i] = mix(base + U(2))


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """How validation rows are chosen. ``kind``: random, last-n, time or given; ``time_cut``: later rows validate."""

    kind: str
    fraction: float
    seed: int
    last: int = 1
    time_cut: int = 0


def choose(rows: Arrays, rule: SplitRule) -> Arrays:
    """Merged rows with 'is_val' (bool) and 'key' (uint64, order within the lane) added."""
    chance, key = np.empty(rows["user"].size, np.uint64), np.empty(rows["user"].size, np.uint64)
    fates(rows["user"], rows["item"], rows["occurrence"], U(rule.seed % 2**64), chance, key)
    if rule.kind == "given":
        is_val = rows["val"].astype(np.bool_)
    elif rule.kind == "random":
        limit = int(rule.fraction * 2.0**64)
        is_val = chance < U(limit) if limit < 2**64 else np.ones(chance.size, np.bool_)
    elif rule.kind == "time":
        is_val = rows["time"] > rule.time_cut
    else:
        is_val = _last_of_each(rows, chance, rule.last)
    return {**rows, "is_val": is_val, "key": key}


def _last_of_each(rows: Arrays, chance: U64, last: int) -> npt.NDArray[np.bool_]:
    """The ``last`` newest rows of every user, equal times by chance; the oldest row of a user always trains."""
    first, count = user_runs(rows["user"])
    user = np.repeat(np.arange(first.size), count)
    order = np.lexsort((chance, rows["time"], user))
    place = np.arange(user.size) - np.repeat(first, count)
    from_end = np.repeat(count, count) - 1 - place
    is_val = np.zeros(user.size, np.bool_)
    is_val[order] = (from_end < last) & (place > 0)
    return is_val


@numba.njit(nogil=True, cache=True)
def _val_in_train(user: Any, val: Any, item: Any, time: Any, rating: Any) -> Any:
    pairs = rows = first = 0
    while first < user.size:
        middle = first
        while middle < user.size and user[middle] == user[first] and val[middle] == 0:
            middle += 1
        end = middle
        pair, same = first, first  # the first training rows that are not before the validation row
        while end < user.size and user[end] == user[first]:
            while pair < middle and item[pair] < item[end]:
                pair += 1
            while same < middle and _before(same, end, item, time, rating):
                same += 1
            if pair < middle and item[pair] == item[end]:
                pairs += 1
                rows += same < middle and not _before(end, same, item, time, rating)
            end += 1
        first = end
    return pairs, rows


@numba.njit(nogil=True, cache=True)
def _before(i: Any, j: Any, item: Any, time: Any, rating: Any) -> Any:
    if item[i] != item[j]:
        return item[i] < item[j]
    if time.size and time[i] != time[j]:
        return time[i] < time[j]
    return rating[i] < rating[j]


def val_in_train(rows: Arrays) -> tuple[int, int]:
    """Of sorted rows, those given as validation whose pair trains too, and those that do with time and rating."""
    time = rows.get("time", np.zeros(0, np.int64))
    pairs, same = _val_in_train(rows["user"], rows["val"], rows["item"], time, rows["rating"])
    return int(pairs), int(same)


def user_runs(user: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(first row, number of rows) of every user in rows sorted by user."""
    if user.size == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    first = np.flatnonzero(np.append(True, user[1:] != user[:-1]))
    return first, np.diff(np.append(first, user.size))


def core(
    count: Callable[[npt.NDArray[np.bool_]], npt.NDArray[np.int64]], num_items: int, min_item: int
) -> npt.NDArray[np.bool_]:
    """Which items remain when users and items with too few ratings are removed until nothing changes (k-core).

    ``count`` gives, for the items that are alive, the rows of each that remain (see :func:`core_items`).
    """
    alive = np.ones(num_items, np.bool_)
    while True:
        counts = count(alive)
        remaining = alive & (counts >= min_item) & (counts > 0)
        if np.array_equal(remaining, alive):
            return alive
        alive = remaining


def core_items(rows: Arrays, items: RowTable, alive: npt.NDArray[np.bool_], min_user: int) -> npt.NDArray[np.int64]:
    """The item row of every merged row that remains. Rows given as validation neither count nor are removed."""
    kept = core_rows(rows, items, alive, min_user) & (rows["val"] == 0)
    return items.rows(rows["item"][kept])


def core_rows(rows: Arrays, items: RowTable, alive: npt.NDArray[np.bool_], min_user: int) -> npt.NDArray[np.bool_]:
    """Which merged rows remain, given the items that do."""
    given = rows["val"] != 0
    kept = alive[items.rows(rows["item"])] & ~given
    first, count = user_runs(rows["user"])
    enough = np.add.reduceat(kept, first, dtype=np.int64) >= max(min_user, 1) if first.size else np.zeros(0, np.bool_)
    result: npt.NDArray[np.bool_] = (kept & np.repeat(enough, count)) | given
    return result


def time_cut(count: Callable[[int, int, int], npt.NDArray[np.int64]], low: int, high: int, fraction: float) -> int:
    """The earliest time that at most ``fraction`` of the rows are later than, counted in ever finer bins.

    ``count`` of (low, high, width): how many rows have a time in each bin (see :func:`time_bins`).
    """
    later, total = 0, -1
    while True:
        width = max(1, -(-(high - low + 1) // (1 << 16)))
        counts = count(low, high, width)
        total = int(counts.sum()) if total < 0 else total
        after = later + np.cumsum(counts[::-1])[::-1] - counts  # rows later than the end of each bin
        chosen = int(np.argmax(after <= fraction * total))
        if width == 1:
            return low + chosen
        later = int(after[chosen])
        low, high = low + chosen * width, min(low + (chosen + 1) * width - 1, high)


def time_bins(rows: Arrays, low: int, high: int, width: int) -> npt.NDArray[np.int64]:
    """How many rows have a time in each bin of ``width`` from ``low`` to ``high``, both included."""
    inside = rows["time"][(rows["time"] >= low) & (rows["time"] <= high)]
    return np.bincount((inside - low) // width, minlength=(high - low) // width + 1)
