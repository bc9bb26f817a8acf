"""Parquet files and data frames to blocks of checked rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mfdist import storage
from mfdist.data.id_text import float_text
from mfdist.errors import DataError
from mfdist.prepare import delimited_text
from mfdist.prepare.ids import text_spans
from mfdist.prepare.layout import Layout
from mfdist.prepare.row_checks import (
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
from mfdist.prepare.sources import Source, file_fingerprint, one_line

BATCH_ROWS = 1 << 17


def parquet_batches(source: Source, layout: Layout) -> Iterator[Any]:
    """(table, bytes read so far) of a Parquet file, piece by piece, and its fingerprint at the end."""
    yield from row_group_batches(source, layout, None)
    yield file_fingerprint(source)


def row_group_batches(source: Source, layout: Layout, groups: Sequence[int] | None) -> Iterator[tuple[pa.Table, int]]:
    """(table, bytes read so far) of these row groups of a Parquet file, of all where None, piece by piece."""
    constant = {role for role, _ in layout.constants}
    names = [str(name) for role, name in enumerate(layout.columns) if name and role not in constant]
    try:
        fs, inner = storage.arrow_filesystem(source.path)
        with pq.ParquetFile(inner, filesystem=fs) as file:
            uuids = {column.path for column in file.schema if column.logical_type.type == "UUID"}
            rows = max(file.metadata.num_rows, 1)
            done = 0
            for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=names, use_threads=False):
                done += batch.num_rows
                yield _with_uuids(pa.Table.from_batches([batch]), uuids), source.bytes * done // rows
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{source.shown} is a damaged Parquet file: {one_line(error)}.") from None


def check_id_types(schema: pa.Schema, names: Sequence[str], shown: str) -> None:
    """DataError where a column of ids is of a type that no id has."""
    for name in names:
        try:
            _texts(pa.chunked_array([], schema.field(name).type))
        except (pa.ArrowException, TypeError):
            kind = schema.field(name).type
            raise DataError(
                f"{shown}: column '{name}' is of type {kind}, which is no id: ids are texts or whole numbers."
            ) from None


def parse_table(piece: tuple[pa.Table, int], layout: Layout, rules: Rules) -> Block:
    """Rows of a table, and the bytes read so far, as a block."""
    table, packed = piece
    names = [str(c) for c in layout.columns]
    n = table.num_rows
    for role, text in layout.constants:
        table = table.append_column(names[role], pa.repeat(pa.scalar(text), n))
    status = np.zeros(n, np.uint8)
    spans = [text_spans(_texts(table.column(name))) for name in names[:2]]
    both = np.concatenate([content for content, _, _ in spans]) if n else np.zeros(0, np.uint8)
    start = np.stack([spans[0][1], spans[1][1] + spans[0][0].size])
    length = np.stack([spans[0][2], spans[1][2]])
    delimited_text.check_ids(both, start[0], length[0], status, delimited_text.USER)
    delimited_text.check_ids(both, start[1], length[1], status, delimited_text.ITEM)
    rating, bad_rating = np.zeros(n), np.zeros(n, np.bool_)
    if layout.has_rating:
        rating, bad_rating = _ratings(table.column(names[2]))
    time, bad_time, dated = np.zeros(n, np.int64), np.zeros(n, np.bool_), np.zeros(n, np.bool_)
    if rules.with_time:
        time, bad_time, dated = _times(table.column(names[3]))

    def where(i: int) -> tuple[int, str]:
        shown = {m: _shown(table.column(m)[i]) for m in names if m}
        return i, json.dumps(shown, ensure_ascii=False)[:MAX_RAW_TEXT]

    rejects = []
    for i in np.flatnonzero((status != delimited_text.OK) | bad_rating | bad_time):
        reason = REASONS[int(status[i])] if status[i] else (NOT_A_NUMBER if bad_rating[i] else BAD_TIME)
        rejects.append((int(i), reason, where(int(i))[1]))
    good = (status == delimited_text.OK) & ~bad_rating & ~bad_time
    good &= judge(rating, good, rules, where, rejects)
    kept = np.flatnonzero(good)
    return Block(both, start[:, good], length[:, good], rating[good].astype(np.float32),
                 time[good] if rules.with_time else None, dated[good] if rules.with_time else None, n, n, rejects,
                 lambda i: where(int(kept[i])), packed)  # fmt: skip


def _shown(value: pa.Scalar) -> Any:
    """A value as a rejected row shows it; bytes of a damaged text that are no UTF-8 are replaced."""
    try:
        plain = value.as_py()
    except UnicodeDecodeError:
        text = value.value if isinstance(value, pa.DictionaryScalar) else value
        if not hasattr(text, "as_buffer"):
            return f"{value.type} with damaged text"
        plain = text.as_buffer().to_pybytes().decode(errors="replace")
    return plain if isinstance(plain, (str, int, float, type(None))) else str(plain)


Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column without dictionaries, run lengths and wrappings of its type."""
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        storage_type = kind.storage_type
        if kind.extension_name == "arrow.uuid":
            return _uuid_texts(column.cast(storage_type))
        return _plain(column.cast(storage_type))
    if pa.types.is_run_end_encoded(kind):
        return _plain(pa.chunked_array([pc.run_end_decode(chunk) for chunk in column.chunks], kind.value_type))
    return _plain(column.cast(kind.value_type)) if pa.types.is_dictionary(kind) else column


def _with_uuids(table: pa.Table, names: set[str]) -> pa.Table:
    """The table with columns that Parquet calls UUIDs, and Arrow bytes, as text."""
    for place, field in enumerate(table.schema):
        if field.name in names and field.type == pa.binary(16):
            table = table.set_column(place, field.name, _uuid_texts(table.column(place)))
    return table


def _uuid_texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Columns of 16 bytes as 8-4-4-4-12 hexadecimal digits."""
    texts = [None if value is None else str(UUID(bytes=value)) for value in column.to_pylist()]
    return pa.chunked_array([pa.array(texts, pa.large_utf8())])


def _texts(column: pa.ChunkedArray) -> pa.Array:
    """A column's ids as one array of large_utf8 or large_binary, a null empty; an ArrowException where it has none."""
    column = _plain(column)
    kind = column.type
    if pa.types.is_nested(kind) or pa.types.is_boolean(kind):
        raise pa.ArrowTypeError(str(kind))
    if pa.types.is_floating(kind):
        values = column.cast(pa.float64()).to_pylist()
        finite = [None if v is None or not math.isfinite(v) else float_text(v) for v in values]
        texts = pa.array(finite, pa.large_utf8())
    else:
        if pa.types.is_fixed_size_binary(kind):
            column = column.cast(pa.binary())
        binary = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
        texts = column.cast(pa.large_binary() if binary else pa.large_utf8()).combine_chunks()
        texts = pa.concat_arrays(texts.chunks) if isinstance(texts, pa.ChunkedArray) else texts
    if texts.null_count:
        texts = texts.fill_null(b"" if pa.types.is_large_binary(texts.type) else "")
    return texts


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _ratings(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.float64], Flags]:
    """(ratings, which rows hold none) of a column of numbers, texts, or true (1) and false (0)."""
    column = _plain(column)
    if _is_text(column.type):
        rating, _, _, status = _read_texts(column, delimited_text.RATING)
        slow = np.flatnonzero(status != delimited_text.OK)
        for i in slow:
            value = parse_number(column[i].as_py() or "")
            if not isinstance(value, str):
                rating[i], status[i] = value, delimited_text.OK
        return rating, status != delimited_text.OK
    if not _is_number(column.type) and not pa.types.is_boolean(column.type):
        return np.zeros(len(column)), np.ones(len(column), np.bool_)
    return pc.fill_null(column.cast(pa.float64(), safe=False), 0).to_numpy(), column.is_null().to_numpy()


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _times(column: pa.ChunkedArray) -> tuple[Ints, Flags, Flags]:
    """(times, which rows hold none, which are seconds of a date) of a column of numbers, texts, dates or timestamps."""
    column = _plain(column)
    kind, n = column.type, len(column)
    if _is_text(kind):
        _, time, dated, status = _read_texts(column, delimited_text.TIME)
        for i in np.flatnonzero(status != delimited_text.OK):
            when = parse_time(column[i].as_py() or "")
            if when is not None:
                (time[i], dated[i]), status[i] = when, delimited_text.OK
        return time, status != delimited_text.OK, dated
    bad, dated = column.is_null().to_numpy(), np.zeros(n, np.bool_)
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        whole = column.cast(pa.int32() if pa.types.is_date32(kind) else pa.int64())
        values = pc.fill_null(whole, 0).to_numpy().astype(np.int64)
        return values * 86400 if pa.types.is_date32(kind) else values // _per_second(kind), bad, ~dated
    if not _is_number(kind):
        return np.zeros(n, np.int64), np.ones(n, np.bool_), dated
    if not pa.types.is_integer(kind):
        column = column.cast(pa.float64(), safe=False)
        usable = pc.fill_null(pc.less(pc.abs(column), 9.2e18), False)
        column = pc.if_else(usable, pc.trunc(column), pa.scalar(None, pa.float64()))
        bad = column.is_null().to_numpy()
    return pc.fill_null(column.cast(pa.int64(), safe=False), 0).to_numpy(), bad, dated


def _per_second(kind: pa.DataType) -> int:
    """Ticks per second of a timestamp or of a date in milliseconds."""
    return 10**3 if pa.types.is_date(kind) else {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[kind.unit]


def _read_texts(column: pa.ChunkedArray, status_of: int) -> tuple[Any, Ints, Flags, npt.NDArray[np.uint8]]:
    """(ratings, times, dated, status) of texts that the compiled parsers know, as ``delimited_text.reread`` does."""
    content, begin, size = text_spans(_texts(column))
    n = begin.size
    start, length = np.zeros((4, n), np.int64), np.zeros((4, n), np.int64)
    role = 2 if status_of == delimited_text.RATING else 3
    start[role], length[role] = begin, size
    rating, time, dated = np.zeros(n), np.zeros(n, np.int64), np.zeros(n, np.bool_)
    status = np.full(n, status_of, np.uint8)
    delimited_text.reread(content, start, length, rating, time, dated, status, ord("."), role == 3)
    return rating, time, dated, status
