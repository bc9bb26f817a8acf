"""Tables that only Spark can read (Delta, Iceberg, ORC, a catalog's): their columns are copied to Parquet files.

Which rows of a table count is its own affair (a log, deleted rows, a version); Spark's reader knows. From the copy on
they are files like any others, cut among tasks, checked and numbered by the same code, so the dataset is that of one
machine on the same rows. The copy has only the columns that are taken, lies in ``OUT/.tables``, where all executors can
write, and is removed at the end; one that a killed job has left is replaced.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mfdist import storage
from mfdist.data.dataset import MANIFEST
from mfdist.errors import DataError, UsageError
from mfdist.log import Console
from mfdist.prepare.columns import SAMPLE_LINES, frame_layout
from mfdist.prepare.config import PrepareConfig
from mfdist.prepare.prepare import TABLES, check_target, refuse_other_settings
from mfdist.prepare.sources import Source, recognised
from mfdist.prepare.tables import check_id_types
from mfdist.prepare_spark.session import attempt, check_seen, check_shared, explained, put_back

CATALOG = "table"
"""The format of sources that are names in Spark's catalog."""
COPY_SETTINGS: dict[str, str | None] = {
    # Rows that a task gets at once: a session of ``prepare`` is set for messages of megabytes.
    "spark.sql.execution.arrow.maxRecordsPerBatch": str(1 << 14),
    # The parts of a table are the same on a cluster of any size, and so is what the dataset says of its sources.
    "spark.sql.files.minPartitionNum": "64",
}
"""How a session is set while a table is copied."""
GROUP_ROWS = 1 << 18
"""Of a row group of a copy."""


@contextmanager
def copied(spark: Any, config: PrepareConfig, console: Console) -> Iterator[list[Source]]:
    """The tables of ``config`` as Parquet files, shown by the tables' names; of ``--dry-run`` their first rows only.

    DataError where a table has no rows or its columns are not recognised, UsageError where Spark lacks the format, and
    where a table is named for training and validation.
    """
    assert config.source_format is not None
    if common := [*{*config.sources} & {*config.val}]:
        raise UsageError(f"{storage.redact(common[0])} is given as --val and to be trained on: choose one.")
    out, made = storage.absolute(config.target), False
    if config.dry_run:
        folder = tempfile.mkdtemp(prefix="mfdist-tables-")
    else:
        check_target(config.target)
        refuse_other_settings(config)
        folder = storage.join(out, TABLES)
        storage.remove(folder)
        made = storage.is_local(out) and not storage.exists(out)
    try:
        if not config.dry_run:
            check_shared(spark, folder, out)
        found: list[Source] = []
        for names, val in ((config.sources, False), (config.val, True)):
            for name in dict.fromkeys(names):
                place = storage.join(folder, str(len(found)))
                what = f"copying {'the first rows of ' if config.dry_run else ''}{storage.redact(name)}"
                with explained(), console.busy(what):
                    frame = opened(spark, config.source_format, name)
                    head = frame.limit(SAMPLE_LINES).toArrow()
                    chosen = copied_columns(head, name, config.columns)
                    storage.make_dirs(place)
                    paths = copy_head(head, chosen, place) if config.dry_run else copy(spark, frame, chosen, place)
                check_seen(paths, config.target)
                for number, path in enumerate(paths, 1):
                    shown = f"{name} part {number}" if len(paths) > 1 else name
                    if (part := recognised(path, val=val)) is not None:
                        found.append(replace(part, given=shown, columns=chosen, part=number))
        yield found
    finally:
        storage.remove(folder)
        if made and not storage.exists(storage.join(out, MANIFEST)):
            storage.remove(out)


_NO_TABLE = "NOT_FOUND|NOT_EXIST|MISSING_DELTA_TABLE|PARSE_SYNTAX_ERROR"


def opened(spark: Any, kind: str, name: str) -> Any:
    """The table as a DataFrame; nothing of its rows is read."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        return spark.table(name) if kind == CATALOG else spark.read.format(kind).load(name)
    except (PySparkException, Py4JError) as error:  # the text of both begins with the error's condition
        said = re.search(r"\[([A-Z_.]+)\]", str(error))
        condition = said[1] if said else ""
        if condition != "DATA_SOURCE_NOT_FOUND" and re.search(_NO_TABLE, condition):
            raise DataError(f"{storage.redact(name)}: Spark finds no such table ({condition}).") from None
        if condition == "DATA_SOURCE_NOT_FOUND":
            raise UsageError(
                f"--source-format {kind}: Spark has no reader of this name; name its package in Spark's settings "
                "(spark.jars.packages)."
            ) from None
        raise


def copied_columns(head: pa.Table, name: str, columns: tuple[str, ...] | None) -> tuple[str, ...]:
    """The names of the columns that are user, item, rating and, where there is one, time, by a table's first rows.

    DataError where it has none, and where no id is of a column's type: before anything is copied.
    """
    if not head.num_rows:
        raise DataError(f"{storage.redact(name)} holds no rows of ratings.")
    chosen = frame_layout(head, columns, storage.redact(name)).columns
    check_id_types(head.schema, [str(column) for column in chosen[:2]], storage.redact(name))
    return tuple(str(column) for column in chosen if column)


def copy_head(head: pa.Table, columns: tuple[str, ...], place: str) -> list[str]:
    """``columns`` of the first rows as a Parquet file in the folder ``place``; its path."""
    path = storage.join(place, "first.parquet")
    pq.write_table(head.select(list(columns)), path)
    return [path]


def copy(spark: Any, frame: Any, columns: tuple[str, ...], place: str) -> list[str]:
    """``columns`` of all rows as Parquet files below ``place``; their paths in order."""
    quoted = ["`" + column.replace("`", "``") + "`" for column in columns]
    before = {name: spark.conf.get(name, None) for name in COPY_SETTINGS}
    put_back(spark, COPY_SETTINGS)
    try:
        written = frame.select(*quoted).mapInArrow(write_task(place), "part long, path string").collect()
    finally:
        put_back(spark, before)
    return [path for _, path in sorted((row[0], row[1]) for row in written)]


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
        storage.make_dirs(place)
        filesystem, inner = storage.arrow_filesystem(path)
        held, rows = [first], first.num_rows
        with pq.ParquetWriter(inner, first.schema, filesystem=filesystem, compression="zstd") as writer:
            for batch in filled:
                if rows >= GROUP_ROWS:
                    writer.write_table(pa.Table.from_batches(held))
                    held, rows = [], 0
                held.append(batch)
                rows += batch.num_rows
            writer.write_table(pa.Table.from_batches(held))
        yield pa.RecordBatch.from_pydict({"part": pa.array([part], pa.int64()), "path": pa.array([path])})

    return run
