"""Tables that only Spark can read (Delta, Iceberg, ORC, a catalog's): their columns are copied to Parquet files.

Which rows of a table count is its own affair (a log, deleted rows, a version); Spark's reader knows. From the copy on
they are files like any others, cut among tasks, checked and numbered by the same code, so the dataset is that of one
machine on the same rows. The copy has only the columns that are taken, lies beside ``--out``, where all executors can
write, and is removed at the end; one that a killed job has left is replaced.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mfdist import storage
from mfdist.errors import DataError, UsageError
from mfdist.log import Console
from mfdist.prepare.columns import SAMPLE_LINES, frame_layout
from mfdist.prepare.config import PrepareConfig
from mfdist.prepare.sources import Source, recognised
from mfdist.prepare_spark.session import attempt, explained

CATALOG = "table"
"""The format of sources that are names in Spark's catalog."""


@contextmanager
def copied(spark: Any, config: PrepareConfig, console: Console) -> Iterator[list[Source]]:
    """The tables of ``config`` as Parquet files, shown by the tables' names; of ``--dry-run`` their first rows only.

    DataError where a table has no rows or its columns are not recognised, UsageError where Spark lacks the format.
    """
    assert config.source_format is not None
    folder = tempfile.mkdtemp(prefix="mfdist-tables-") if config.dry_run else f"{config.target.rstrip('/')}.tables"
    try:
        storage.remove(folder)
        found: list[Source] = []
        for names, val in ((config.sources, False), (config.val, True)):
            for name in names:
                place = storage.join(folder, str(len(found)))
                with (
                    explained(),
                    console.busy(f"copying {'the first rows of ' if config.dry_run else ''}{storage.redact(name)}"),
                ):
                    frame = opened(spark, config.source_format, name)
                    paths = copy_columns(frame, name, config.columns, place, first_rows=config.dry_run)
                parts = [recognised(path, val=val) for path in paths]
                found += [
                    replace(part, given=f"{name} part {number}" if len(parts) > 1 else name)
                    for number, part in enumerate(parts, 1)
                    if part is not None
                ]
        yield found
    finally:
        storage.remove(folder)


def opened(spark: Any, kind: str, name: str) -> Any:
    """The table as a DataFrame; nothing of its rows is read."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        return spark.table(name) if kind == CATALOG else spark.read.format(kind).load(name)
    except (PySparkException, Py4JError) as error:  # the text of both begins with the error's condition
        if "[TABLE_OR_VIEW_NOT_FOUND]" in str(error) or "[PATH_NOT_FOUND]" in str(error):
            raise DataError(f"{storage.redact(name)}: Spark finds no such table.") from None
        if "[DATA_SOURCE_NOT_FOUND]" in str(error):
            raise UsageError(
                f"--source-format {kind}: Spark has no reader of this name; name its package in Spark's settings "
                "(spark.jars.packages)."
            ) from None
        raise


def copy_columns(frame: Any, name: str, columns: tuple[str, ...] | None, place: str, *, first_rows: bool) -> list[str]:
    """The columns that are user, item, rating and time as Parquet files below ``place``; their paths in order."""
    head = frame.limit(SAMPLE_LINES).toArrow()
    if not head.num_rows:
        raise DataError(f"{storage.redact(name)} holds no rows of ratings.")
    chosen = [column for column in frame_layout(head, columns, storage.redact(name)).columns if column]
    storage.make_dirs(place)
    if first_rows:
        path = storage.join(place, "first.parquet")
        pq.write_table(head.select([str(column) for column in chosen]), path)
        return [path]
    quoted = ["`" + str(column).replace("`", "``") + "`" for column in chosen]
    written = frame.select(*quoted).mapInArrow(write_task(storage.absolute(place)), "part long, path string")
    return [path for _, path in sorted((row[0], row[1]) for row in written.collect())]


def write_task(place: str) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Write a partition to a file of the attempt's own name; (partition, path) says so, nothing where it is empty."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from pyspark import TaskContext

        context = TaskContext.get()
        assert context is not None
        part = context.partitionId()
        path = storage.join(place, f"{part:06d}-{attempt()}.parquet")
        filled = (batch for batch in batches if batch.num_rows)
        first = next(filled, None)
        if first is None:
            return
        filesystem, inner = storage.arrow_filesystem(path)
        with pq.ParquetWriter(inner, first.schema, filesystem=filesystem, compression="zstd") as writer:
            writer.write_batch(first)
            for batch in filled:
                writer.write_batch(batch)
        yield pa.RecordBatch.from_pydict({"part": pa.array([part], pa.int64()), "path": pa.array([path])})

    return run
