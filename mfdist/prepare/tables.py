"""Parquet files and data frames to blocks of checked rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mfdist import storage
from mfdist.data.id_text import float_id
from mfdist.errors import DataError
from mfdist.prepare import delimited_text
from mfdist.prepare.columns import Layout
from mfdist.prepare.row_blocks import (
    BAD_TIME,
    MAX_RAW_TEXT,
    NOT_A_NUMBER,
    REASONS,
    Block,
    Rules,
    judge,
    parse_number,
    parse_time,
)
from mfdist.prepare.sources import Source, file_fingerprint

BATCH_ROWS = 1 << 17


def parquet_batches(source: Source, layout: Layout) -> Iterator[Any]:
    names = [str(c) for c in layout.columns if c]
    try:
        fs, inner = storage.arrow_filesystem(source.path)
        with pq.ParquetFile(inner, filesystem=fs) as file:
            rows = max(file.metadata.num_rows, 1)
            done = 0
            for batch in file.iter_batches(BATCH_ROWS, columns=names, use_threads=False):
                done += batch.num_rows
                yield pa.Table.from_batches([batch]), source.bytes * done // rows
    except (OSError, ValueError) as error:
        raise DataError(f"{source.shown} is a damaged Parquet file: {error}.") from None
    yield file_fingerprint(source)


def parse_table(table: pa.Table, packed: int, layout: Layout, rules: Rules) -> Block:
    names = [str(c) for c in layout.columns]
    n = table.num_rows
    status = np.zeros(n, np.uint8)
    spans = [_id_spans(table.column(name)) for name in names[:2]]
    both = np.concatenate([content for content, _, _ in spans]) if n else np.zeros(0, np.uint8)
    start = np.stack([spans[0][1], spans[1][1] + spans[0][0].size])
    length = np.stack([spans[0][2], spans[1][2]])
    delimited_text.check_ids(both, start[0], length[0], status, delimited_text.USER)
    delimited_text.check_ids(both, start[1], length[1], status, delimited_text.ITEM)
    rating, bad_rating = np.zeros(n), np.zeros(n, np.bool_)
    if layout.has_rating:
        rating, bad_rating = _numbers(table.column(names[2]), pa.float64(), parse_number)
    time, bad_time = np.zeros(n, np.int64), np.zeros(n, np.bool_)
    if rules.with_time:
        time, bad_time = _numbers(_seconds(table.column(names[3])), pa.int64(), parse_time)

    def raw(i: int) -> str:
        return json.dumps({m: _shown(table.column(m)[i]) for m in names if m}, ensure_ascii=False)[:MAX_RAW_TEXT]

    rejects = []
    for i in np.flatnonzero((status != delimited_text.OK) | bad_rating | bad_time):
        reason = REASONS[int(status[i])] if status[i] else (NOT_A_NUMBER if bad_rating[i] else BAD_TIME)
        rejects.append((int(i), reason, raw(int(i))))
    good = (status == delimited_text.OK) & ~bad_rating & ~bad_time
    good &= judge(rating, good, rules, lambda i: (i, raw(i)), rejects)
    return Block(both, start[:, good], length[:, good], rating[good].astype(np.float32),
                 time[good] if rules.with_time else None, n, n, rejects, [], packed)  # fmt: skip


def _shown(value: pa.Scalar) -> Any:
    plain = value.as_py()
    return plain if isinstance(plain, (str, int, float, type(None))) else str(plain)


def _id_spans(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(bytes, start, length) of a column's ids as text; a null is empty."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if pa.types.is_floating(kind):
        values = column.cast(pa.float64()).to_pylist()
        texts = pa.array([None if v is None or not math.isfinite(v) else float_id(v) for v in values], pa.large_utf8())
    elif pa.types.is_nested(kind) or pa.types.is_boolean(kind):
        raise DataError(f"an id column of type {kind} cannot be used: ids are texts or whole numbers.")
    else:
        to = pa.large_binary() if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else pa.large_utf8()
        texts = column.cast(to).combine_chunks()
        texts = pa.concat_arrays(texts.chunks) if isinstance(texts, pa.ChunkedArray) else texts
    if texts.null_count:
        texts = texts.fill_null(b"" if pa.types.is_large_binary(texts.type) else "")
    if len(texts) == 0:
        return np.zeros(0, np.uint8), np.zeros(0, np.int64), np.zeros(0, np.int64)
    buffers = texts.buffers()
    offsets = np.frombuffer(buffers[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    content = (
        np.frombuffer(buffers[2], np.uint8) if buffers[2] is not None and buffers[2].size else np.zeros(0, np.uint8)
    )
    content = content[offsets[0] : offsets[-1]]
    return content, offsets[:-1] - offsets[0], np.diff(offsets)


def _numbers(column: pa.ChunkedArray, to: pa.DataType, parse_text: Any) -> tuple[Any, npt.NDArray[np.bool_]]:
    """(values, which rows hold none) of a column of numbers or of texts."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        values = [None if v is None else parse_text(v) for v in column.to_pylist()]
        column = pa.chunked_array([pa.array([None if isinstance(v, str) else v for v in values], to)])
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        return np.zeros(len(column), to.to_pandas_dtype()), np.ones(len(column), np.bool_)
    elif pa.types.is_integer(to) and not pa.types.is_integer(kind):
        column = column.cast(pa.float64())
        usable = pc.fill_null(pc.less(pc.abs(column), 9.2e18), False)
        column = pc.if_else(usable, pc.trunc(column), pa.scalar(None, pa.float64()))
    bad = column.is_null().to_numpy()
    values = pc.fill_null(column.cast(to, safe=False), 0).to_numpy()
    return values, bad


def _seconds(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_timestamp(column.type):
        return column.cast(pa.timestamp("s", column.type.tz), safe=False).cast(pa.int64())
    if pa.types.is_date(column.type):
        return column.cast(pa.timestamp("s")).cast(pa.int64())
    return column
