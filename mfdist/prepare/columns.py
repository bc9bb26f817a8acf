"""Which column of a source is what: read from names and first lines, or from ``--columns``; never guessed in silence.

What names say stands in ``headers``, delimited text in ``delimited_columns``, and what a file without names can be in
``plausible``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mfdist import storage
from mfdist.errors import DataError, UsageError
from mfdist.prepare.delimited_columns import delimited_layout
from mfdist.prepare.headers import Values, named_places
from mfdist.prepare.layout import BLANKS, COMMENT, Layout
from mfdist.prepare.matrix_market import matrix_of
from mfdist.prepare.sources import Source, Text, check_text, one_line
from mfdist.prepare.tables import check_id_types
from mfdist.prepare.text_kinds import kind_of, records

SAMPLE_LINES = 1000
MARK = "\ufeff"


def parse_columns(text: str) -> tuple[str, ...]:
    """'user,item,stars[,time]' or '0,1,2,3' (positions count from 0)."""
    parts = tuple(part.strip() for part in text.split(","))
    if len(parts) not in (3, 4) or not all(parts) or len(set(parts)) != len(parts):
        raise ValueError("expected three or four different columns: user,item,rating[,timestamp]")
    return parts


def parse_pair_columns(text: str) -> tuple[str, ...]:
    """'user,item[,stars]' or '0,1[,2]' (positions count from 0)."""
    parts = tuple(part.strip() for part in text.split(","))
    if len(parts) not in (2, 3) or not all(parts) or len(set(parts)) != len(parts):
        raise ValueError("expected two or three different columns: user,item[,rating]")
    return parts


def parse_rating_columns(text: str) -> tuple[str, ...]:
    """'user,item,stars' or '0,1,2' (positions count from 0)."""
    parts = parse_columns(text)
    if len(parts) != 3:
        raise ValueError("expected three different columns: user,item,rating")
    return parts


def recognise(source: Source, columns: tuple[str, ...] | None, *, pairs: bool = False) -> Layout:
    """The layout of a source; DataError where it is not recognised or a named column is missing.

    ``pairs``: ratings may be absent, and are where ``columns`` names two.
    """
    columns = source.columns or columns
    if pairs:
        columns = None if columns is None else (*columns, "")[:3]
    if source.packing == "parquet":
        return _parquet_layout(source, columns, pairs)
    with Text(source) as text:
        head = b""
        while len(head) < 1 << 16 and (more := text.read(1 << 16)):
            head += more
    if not head.strip():
        raise DataError(f"{source.shown} is empty.")
    check_text(head, source.shown)
    beginning = head.decode("utf-8", "replace").lstrip(MARK).replace(f"\n{MARK}", "\n")
    kind = kind_of(beginning, source.shown)
    if kind == "matrix market":
        return _matrix_layout(source, beginning, columns)
    if kind != "delimited":
        return _json_layout(source, kind, records(beginning, kind), columns, pairs)
    lines = [line.rstrip("\r") for line in beginning.split("\n")]
    lines = [line for line in lines[: max(1, len(lines) - 1)] if line.strip()][:SAMPLE_LINES]
    return delimited_layout(source, lines, columns, pairs)


def _matrix_layout(source: Source, head: str, columns: tuple[str, ...] | None) -> Layout:
    matrix = matrix_of(head, source.shown)
    places = (0, 1, 2, -1)
    if columns:
        if any(c not in ("0", "1", "2", "") for c in columns):
            raise UsageError(f"--columns: {source.shown} is a Matrix Market file; its columns are 0, 1 and 2.")
        places = tuple(int(c) if c else -1 for c in (*columns, "")[:4])  # type: ignore[assignment]
    name = (
        f"Matrix Market, {matrix.rows:,} rows (users) by {matrix.columns:,} columns (items), {matrix.entries:,} entries"
    )
    return Layout("delimited", name, places, BLANKS, 0, 3, comment=COMMENT, matrix=matrix)


def _parquet_layout(source: Source, columns: tuple[str, ...] | None, pairs: bool) -> Layout:
    try:
        fs, inner = storage.arrow_filesystem(source.path)
        schema = pq.read_schema(inner, filesystem=fs)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{source.shown} is a damaged Parquet file: {one_line(error)}.") from None

    def values(name: str) -> list[str]:
        if name not in schema.names:
            return [dict(source.partition)[name]]
        with pq.ParquetFile(inner, filesystem=fs) as file:
            batch = next(file.iter_batches(SAMPLE_LINES, columns=[name], use_threads=False), None)
        return [] if batch is None else _times(batch, name)

    chosen, notes = _by_name(
        [*schema.names, *_partition_names(source, schema.names)], columns, source.shown, values, pairs
    )
    constants = _constants(source, chosen, schema.names)
    check_id_types(schema, [name for name in chosen[:2] if name in schema.names], source.shown)
    told = "Parquet columns " + ", ".join(c for c in chosen if c)
    return Layout("parquet", told, chosen, constants=constants, notes=notes)


def _partition_names(source: Source, names: Sequence[str]) -> list[str]:
    """Names that the file's folders give to columns which it does not have itself."""
    return [name for name, _ in source.partition if name not in names]


def _constants(source: Source, chosen: Sequence[str], names: Sequence[str]) -> tuple[tuple[int, str], ...]:
    """Values of the chosen columns that the file's folders give."""
    values = dict(source.partition)
    return tuple((role, values[name]) for role, name in enumerate(chosen) if name in values and name not in names)


def frame_layout(table: pa.Table, columns: tuple[str, ...] | None, shown: str = "the data frame") -> Layout:
    """The layout of a data frame, as a table."""
    head = table.slice(0, SAMPLE_LINES)
    chosen, notes = _by_name(table.column_names, columns, shown, lambda name: _times(head, name))
    return Layout("parquet", "data frame", chosen, notes=notes)


def _times(table: pa.Table | pa.RecordBatch, name: str) -> list[str]:
    """The texts of a column that may be the time; of one that holds times by its type, '0' for each."""
    column = table.column(name)
    if pa.types.is_temporal(column.type):
        return ["0"] * len(column)
    return [str(value) for value in column.to_pylist() if value is not None]


def _by_name(
    names: list[str],
    columns: tuple[str, ...] | None,
    shown: str,
    values: Values,
    pairs: bool = False,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the four columns, '' where there is none, and notes; ``values`` gives a column's first texts."""
    places, notes = named_places(names, columns, shown, values, pairs)
    return tuple(names[place] if place >= 0 else "" for place in places), notes


def _json_layout(
    source: Source, kind: str, found: list[dict[str, Any]], columns: tuple[str, ...] | None, pairs: bool
) -> Layout:
    own = [*dict.fromkeys(name for record in found for name in record)]
    if not own:
        what = "is a JSON array or document" if kind == "json document" else "looks like lines of JSON, but begins"
        raise DataError(f"{source.shown} {what} without an object that has named values.")
    names = [*own, *_partition_names(source, own)]

    def values(name: str) -> list[str]:
        if name not in own:
            return [dict(source.partition)[name]]
        return [str(record[name]) for record in found if record.get(name) is not None]

    chosen, notes = _by_name(names, columns, source.shown, values, pairs)
    known = {"reviewerID": "Amazon 2014 and 2018 reviews", "parent_asin": "Amazon 2023 reviews"}
    name = next((text for key, text in known.items() if key in chosen), "keys " + ", ".join(c for c in chosen if c))
    shown = {"json": "JSON lines", "json document": "one JSON document", "python": "lines of Python literals"}[kind]
    return Layout(kind, f"{shown}, {name}", chosen, constants=_constants(source, chosen, own), notes=notes)
