"""Passes over the parts that count: rows of items for minimum counts, times for a time split, users and rows that stay.

Numbers of each place (an item, a bin of time) are added up by Spark: each part sends those that are not zero to the
partition of their range of places, which adds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mfdist.prepare.count_pass import survivors
from mfdist.prepare.ids import RowTable
from mfdist.prepare.spill import Arrays
from mfdist.prepare.split import core_items, time_bins, user_runs
from mfdist.prepare_spark.gather_stage import PartFacts, opened, rows_and_ids
from mfdist.prepare_spark.messages import (
    COUNTS,
    Message,
    fact,
    from_batches,
    packed,
    row_messages,
    to_batches,
    unpacked,
)
from mfdist.prepare_spark.read_stage import Batches, Parts, Task
from mfdist.prepare_spark.shared import SharedArray, shared_table

Places = npt.NDArray[np.int64]
RANGES = 16
"""Partitions that add numbers up."""


@dataclass(frozen=True)
class Core:
    """Which items are alive in a count: all of ``items`` where ``alive`` is None."""

    items: SharedArray
    alive: SharedArray | None
    min_user: int

    def survivors(self, rows: Arrays) -> Arrays:
        """The merged rows that minimum counts leave."""
        return rows if self.alive is None else survivors(rows, self.table, self.alive.array, self.min_user)

    @property
    def table(self) -> RowTable:
        return shared_table(self.items)


def range_of(places: Places, size: int) -> Places:
    """The partition that adds up each of ``size`` places."""
    return places * RANGES // max(size, 1)


def sparse(places: Places, counts: Places, size: int) -> Iterator[Message]:
    """Numbers of some places, in order and once each, as messages to their ranges."""
    edges = np.searchsorted(range_of(places, size), np.arange(RANGES + 1))
    for k in np.flatnonzero(np.diff(edges)).tolist():
        columns = {"place": places[edges[k] : edges[k + 1]], "count": counts[edges[k] : edges[k + 1]]}
        yield from row_messages(k, COUNTS, 0, columns)


def occurring(places: Places) -> tuple[Places, Places]:
    """(places that occur, in order; how often)."""
    found, counts = np.unique(places, return_counts=True)
    return found, counts.astype(np.int64)


def count_task(parts: Parts, count: Callable[[int, Arrays], Iterator[Message]]) -> Task:
    """``count`` of (part, merged rows) of every part of the users, as messages."""

    def run(batches: Batches) -> Iterator[pa.RecordBatch]:
        target, messages = opened(batches)
        if 0 <= target < parts.users:
            yield from to_batches(count(target, rows_and_ids(messages)[0]))

    return run


def sum_task(batches: Batches) -> Iterator[pa.RecordBatch]:
    """The sums of one range of places; facts for the driver pass through."""
    places: list[Places] = []
    counts: list[Places] = []

    def summed() -> Iterator[Message]:
        for message in from_batches(batches):
            if message.kind == COUNTS:
                columns = unpacked(message.data)
                places.append(columns["place"])
                counts.append(columns["count"])
            else:
                yield message
        if places:
            yield Message(0, COUNTS, 0, 0, packed(added(np.concatenate(places), np.concatenate(counts))))

    yield from to_batches(summed())


def added(places: Places, counts: Places) -> Arrays:
    """Each place once, with the sum of its counts."""
    found, inverse = np.unique(places, return_inverse=True)
    sums = np.zeros(found.size, np.int64)
    np.add.at(sums, inverse, counts)
    return {"place": found, "count": sums}


def core_count(core: Core) -> Callable[[int, Arrays], Iterator[Message]]:
    """Of each item that is alive, the rows that remain (a pass of ``split.core``)."""

    def count(_: int, rows: Arrays) -> Iterator[Message]:
        assert core.alive is not None
        items = core_items(rows, core.table, core.alive.array, core.min_user)
        yield from sparse(*occurring(items), core.items.size)

    return count


def kept_count(core: Core) -> Callable[[int, Arrays], Iterator[Message]]:
    """What minimum counts leave: rows of each item, and rows and users of each part as facts."""

    def count(part: int, rows: Arrays) -> Iterator[Message]:
        kept = core.survivors(rows)
        yield from sparse(*occurring(core.table.rows(kept["item"])), core.items.size)
        users = user_runs(kept["user"])[0].size
        yield fact(PartFacts(part, rows["user"].size, kept["user"].size, users), 0, part)

    return count


def time_count(core: Core, low: int, high: int, width: int) -> Callable[[int, Arrays], Iterator[Message]]:
    """Rows in each bin of time (a pass of ``split.time_cut``)."""

    def count(_: int, rows: Arrays) -> Iterator[Message]:
        bins = time_bins(core.survivors(rows), low, high, width)
        found = np.flatnonzero(bins)
        yield from sparse(found, bins[found], bins.size)

    return count
