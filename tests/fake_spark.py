"""Frames that do what prepare asks of Spark's, in this process: the stages are tested where there is no Java.

Every task runs twice, as if it had been repeated, and the rows of a partition come in another order each time, as far
as Spark leaves it open: a result that depends on either differs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pyarrow as pa
import pytest

from mfdist.prepare_spark.messages import SCHEMA

Rows = list[tuple[Any, ...]]
COLUMNS = ("target", "kind", "place", "number", "data")


class Condition:
    """A column, or a test of rows."""

    def __init__(self, holds: Callable[[tuple[Any, ...]], Any]) -> None:
        self.holds = holds

    def isin(self, *values: Any) -> Condition:
        return Condition(lambda row: self.holds(row) in values)

    def __eq__(self, value: object) -> Condition:  # type: ignore[override]
        return Condition(lambda row: self.holds(row) == value)

    def __and__(self, other: Condition) -> Condition:
        return Condition(lambda row: self.holds(row) and other.holds(row))


class Frame:
    """Partitions of rows."""

    def __init__(self, partitions: list[Rows], schema: pa.Schema) -> None:
        self.partitions, self.schema = partitions, schema

    def __getitem__(self, name: str) -> Condition:
        return Condition(lambda row: row[COLUMNS.index(name)])

    def mapInArrow(self, task: Any, columns: str) -> Frame:
        found = []
        for rows in self.partitions:
            for _ in range(2):  # the first is lost
                made = [tuple(row.values()) for batch in task(self._batches(rows)) for row in batch.to_pylist()]
            found.append(made)
        return Frame(found, SCHEMA)

    def _batches(self, rows: Rows) -> Iterator[pa.RecordBatch]:
        for first in range(0, len(rows), 3):
            columns = zip(*rows[first : first + 3], strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, self.schema, strict=True)]
            yield pa.RecordBatch.from_arrays(arrays, schema=self.schema)

    def repartitionById(self, partitions: int, column: Condition) -> Frame:
        rows = [row for own in self.partitions for row in own]
        random.shuffle(rows)
        return Frame([[r for r in rows if column.holds(r) == k] for k in range(partitions)], self.schema)

    def sortWithinPartitions(self, *names: str) -> Frame:
        places = [COLUMNS.index(name) for name in names]
        return Frame([sorted(rows, key=lambda row: [row[k] for k in places]) for rows in self.partitions], self.schema)

    def where(self, condition: Condition) -> Frame:
        return Frame([[row for row in rows if condition.holds(row)] for rows in self.partitions], self.schema)

    def collect(self) -> Rows:
        return [row for rows in self.partitions for row in rows]

    def unpersist(self) -> None:
        self.partitions = []  # who still needs them fails

    def toLocalIterator(self, prefetchPartitions: bool) -> Iterator[tuple[Any, ...]]:
        yield from self.collect()


class Spark:
    """The part of a session that prepare uses."""

    defaultParallelism = 2

    def __init__(self) -> None:
        self.sparkContext, self.files = self, {}

    def addFile(self, path: str) -> None:
        self.files[path.rpartition("/")[2]] = path

    def range(self, first: int, end: int, step: int, partitions: int) -> Frame:
        assert partitions == end - first
        return Frame([[(k,)] for k in range(first, end)], pa.schema([("id", pa.int64())]))


def pretend(patch: pytest.MonkeyPatch) -> None:
    """Every session of prepare's is one of these."""
    from mfdist.prepare_spark import driver, engine, session, shared

    spark, attempts = Spark(), count()

    @contextmanager
    def own(master: str | None) -> Iterator[Spark]:
        yield spark

    patch.setattr(engine, "session", own)
    patch.setattr(engine, "check_installed", lambda: None)
    patch.setattr(driver, "kept", lambda frame: frame)
    patch.setattr(session, "attempt", lambda: next(attempts))
    patch.setattr(shared, "path_of", lambda name: spark.files[name])
