"""Which column of a source is what: known layouts recognised from the first lines, ``--columns`` for the others."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mfdist import storage
from mfdist.errors import DataError, UsageError
from mfdist.prepare.layout import BLANKS, COMMENT, Layout
from mfdist.prepare.matrix_market import matrix_of
from mfdist.prepare.sources import Source, Text, check_text, one_line
from mfdist.prepare.tables import check_id_types
from mfdist.prepare.text_kinds import kind_of, records

ROLES = ("user_id", "item_id", "rating", "timestamp")
NAMES = {
    "user_id": ("user_id", "userId", "user", "reviewerID", "uid", "customer_id"),
    "item_id": ("item_id", "itemId", "item", "movieId", "parent_asin", "asin", "iid", "product_id", "book_id",
                "business_id"),
    "rating": ("rating", "overall", "score", "stars", "star_rating"),
    "timestamp": ("timestamp", "unixReviewTime", "time", "unix_time", "date", "date_updated", "date_added"),
}  # fmt: skip
SEPARATORS = ("::", "\t", ",", ";", "|", BLANKS)
_AMAZON_USER, _ASIN = re.compile(r"A[0-9A-Z]{11,20}"), re.compile(r"[0-9A-Z]{10}")


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
    beginning = head.decode("utf-8-sig", "replace")
    kind = kind_of(beginning, source.shown)
    if kind == "matrix market":
        return _matrix_layout(source, beginning, columns)
    if kind != "delimited":
        return _json_layout(source, kind, records(beginning, kind), columns, pairs)
    lines = beginning.splitlines()
    lines = [line for line in lines[: max(1, len(lines) - 1)] if line][:1000]
    return _delimited_layout(source, lines, columns, pairs)


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
    return Layout("delimited", name, places, BLANKS, False, 3, comment=COMMENT, matrix=matrix)


def _parquet_layout(source: Source, columns: tuple[str, ...] | None, pairs: bool) -> Layout:
    try:
        fs, inner = storage.arrow_filesystem(source.path)
        schema = pq.read_schema(inner, filesystem=fs)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{source.shown} is a damaged Parquet file: {one_line(error)}.") from None
    chosen = _by_name([*schema.names, *_partition_names(source, schema.names)], columns, source, pairs)
    constants = _constants(source, chosen, schema.names)
    check_id_types(schema, [name for name in chosen[:2] if name in schema.names], source.shown)
    return Layout("parquet", "Parquet columns " + ", ".join(c for c in chosen if c), chosen, constants=constants)


def _partition_names(source: Source, names: Sequence[str]) -> list[str]:
    """Names that the file's folders give to columns which it does not have itself."""
    return [name for name, _ in source.partition if name not in names]


def _constants(source: Source, chosen: Sequence[str], names: Sequence[str]) -> tuple[tuple[int, str], ...]:
    """Values of the chosen columns that the file's folders give."""
    values = dict(source.partition)
    return tuple((role, values[name]) for role, name in enumerate(chosen) if name in values and name not in names)


def frame_layout(names: list[str], columns: tuple[str, ...] | None) -> Layout:
    """The layout of a data frame with these column names."""
    return Layout("parquet", "data frame", _by_name(names, columns, Source("the data frame", 0, "parquet")))


def _by_name(names: list[str], columns: tuple[str, ...] | None, source: Source, pairs: bool = False) -> tuple[str, ...]:
    """The four names; DataError where one is missing, is not known, or stands there twice."""
    chosen = _named(names, columns, source, pairs)
    twice = [name for name in chosen if name and names.count(name) > 1]
    if twice:
        raise DataError(f"{source.shown} has {names.count(twice[0])} columns named '{twice[0]}'; rename all but one.")
    return chosen


def _named(names: list[str], columns: tuple[str, ...] | None, source: Source, pairs: bool) -> tuple[str, ...]:
    if columns and all(c.isdigit() and c not in names for c in columns if c):
        if max(int(c) for c in columns if c) >= len(names):
            raise UsageError(f"--columns: {source.shown} has {len(names)} columns, counted from 0.")
        columns = tuple(names[int(c)] if c else "" for c in columns)
    if columns:
        missing = [c for c in columns if c and c not in names]
        if missing:
            raise DataError(f"{source.shown} has no column '{missing[0]}'; it has {', '.join(names[:12])}.")
        return (*columns, "")[:4]
    found = tuple(_known(role, names) for role in ROLES)
    lacking = [role for role, name in zip(ROLES[: 2 if pairs else 3], found, strict=False) if not name]
    if lacking:
        raise DataError(f"{source.shown}: no column is known as {lacking[0]} among {', '.join(names[:12])}; name "
                        "them with --columns user,item,rating[,timestamp].")  # fmt: skip
    return found


def _plain(name: str) -> str:
    return name.strip().strip('"').lower().replace("_", "").replace(" ", "")


def _known(role: str, names: list[str]) -> str:
    plain = {_plain(name): name for name in reversed(names)}
    return next((plain[_plain(known)] for known in NAMES[role] if _plain(known) in plain), "")


def _json_layout(
    source: Source, kind: str, found: list[dict[str, Any]], columns: tuple[str, ...] | None, pairs: bool
) -> Layout:
    own = [*dict.fromkeys(name for record in found for name in record)]
    if not own and kind == "json document":
        raise DataError(f"{source.shown} is a JSON array or document without an object that has named values.")
    names = [*own, *_partition_names(source, own)]
    chosen = (*columns, "")[:4] if columns else _by_name(names, None, source, pairs)
    if columns and not set(columns) & set(names):
        _by_name(names, columns, source, pairs)
    known = {"reviewerID": "Amazon 2014 and 2018 reviews", "parent_asin": "Amazon 2023 reviews"}
    name = next((text for key, text in known.items() if key in chosen), "keys " + ", ".join(c for c in chosen if c))
    shown = {"json": "JSON lines", "json document": "one JSON document", "python": "lines of Python literals"}[kind]
    return Layout(kind, f"{shown}, {name}", chosen, constants=_constants(source, chosen, own))


def _fields(line: str, separator: str) -> list[str]:
    if separator == BLANKS:
        return line.split()
    if len(separator) > 1 or '"' not in line:
        return line.split(separator)
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:
        return line.split(separator)


def _separator(lines: list[str], least: int = 3) -> str:
    """The separator that cuts most of the lines into the same number (``least`` or more) of fields."""

    def agreement(separator: str) -> int:
        widths = [len(_fields(line, separator)) for line in lines]
        return max((widths.count(w) for w in set(widths) if w >= least), default=0)

    return max(SEPARATORS, key=agreement)  # the first of equals: '::' before ','


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _delimited_layout(source: Source, lines: list[str], columns: tuple[str, ...] | None, pairs: bool) -> Layout:
    comment = COMMENT if lines[0].startswith(COMMENT) else ""
    if comment:
        lines = [line for line in lines if not line.lstrip().startswith(comment)]
    if not lines:
        raise DataError(f"{source.shown} holds comments and no rows.")
    separator = _separator(lines, 2 if pairs or source.partition else 3)
    rows = [_fields(line, separator) for line in lines]
    names = [name.strip() for name in rows[0]]
    header = (
        set(columns) - {""} <= {*names, *_partition_names(source, names)}
        if columns and not all(c.isdigit() for c in columns if c)
        else bool(_known("item_id" if pairs else "rating", names)) and not any(_is_number(name) for name in names)
    )  # fmt: skip
    widths = [len(row) for row in (rows[1:] if header and len(rows) > 1 else rows)]
    width = len(names) if header else max(sorted(set(widths)), key=widths.count)
    constants: tuple[tuple[int, str], ...] = ()
    if columns or header:
        chosen, constants, name = _chosen(source, names, header, columns, width, pairs)
    elif pairs and width == 2:
        chosen, name = (0, 1, -1, -1), "no header: user, item"
    else:
        chosen, name = _headerless(source, [row for row in rows if len(row) == width], separator)
    kind = {",": "CSV", "\t": "TSV", BLANKS: "text separated by blanks"}.get(
        separator, f"text separated by '{separator}'"
    )
    point = _point(separator, [row[chosen[2]] for row in rows[header:] if len(row) == width] if chosen[2] >= 0 else [])
    return Layout("delimited", f"{kind}, {name}{', decimal commas' * (point == ',')}", chosen, separator, header, width,
                  constants, comment, point)  # fmt: skip


def _point(separator: str, ratings: list[str]) -> str:
    """What divides the whole from the fraction: a comma in text separated by semicolons, where most have one."""
    commas = sum(bool(re.fullmatch(r"\s*[+-]?\d*,\d+\s*", text)) for text in ratings)
    return "," if separator == ";" and commas and commas >= sum("." in text for text in ratings) else "."


def _chosen(
    source: Source, names: list[str], header: bool, columns: tuple[str, ...] | None, width: int, pairs: bool
) -> tuple[tuple[int, ...], tuple[tuple[int, str], ...], str]:
    """Field numbers, constants, and what is said of them."""
    constants: tuple[tuple[int, str], ...] = ()
    if columns and all(c.isdigit() for c in columns if c):
        places = tuple(int(c) if c else -1 for c in columns)
        if max(places) >= width:
            raise DataError(f"{source.shown} has {width} columns (positions count from 0); --columns asks for "
                            f"{max(places)}.")  # fmt: skip
    elif not header:
        # a headerless file of exactly these columns, in this order
        if set(columns or ()) - set(ROLES) or len(columns or ()) != width:
            raise DataError(f"{source.shown} has no header with the columns {','.join(columns or ())}; its first line "
                            f"is {','.join(names)[:200]!r}. Give positions such as --columns 0,1,2,3.")  # fmt: skip
        places = tuple((columns or ()).index(role) for role in ROLES if role in (columns or ()))
    else:
        named = _by_name([*names, *_partition_names(source, names)], columns, source, pairs)
        places = tuple(names.index(name) if name in names else -1 for name in named)
        constants = _constants(source, named, names)
    head = "header " + ", ".join(names[:8]) if header else "no header"
    return (
        (*places, -1)[:4],
        constants,
        f"{head}; user, item, rating, time in columns {', '.join(map(str, places))} (from 0)",
    )


def _headerless(source: Source, rows: list[list[str]], separator: str) -> tuple[tuple[int, ...], str]:
    width = len(rows[0])
    if width < 3 or width > 4:
        raise DataError(f"{source.shown} has {width} column{'s' * (width != 1)} and no header that is known; say which "
                        "is which with --columns, e.g. --columns 0,1,2,3 (positions count from 0).")  # fmt: skip
    time = 3 if width == 4 else -1

    def share(pattern: re.Pattern[str], place: int) -> float:
        return sum(bool(pattern.fullmatch(row[place])) for row in rows) / len(rows)

    if share(_ASIN, 0) > 0.8 and share(_AMAZON_USER, 1) > 0.8 and share(_AMAZON_USER, 0) < 0.5:
        return (1, 0, 2, time), "no header, Amazon 2018 ratings: item, user, rating, timestamp"
    known = {"::": "MovieLens ratings.dat", "\t": "MovieLens u.data or alike"}.get(separator, "Amazon 2014 or alike")
    return (0, 1, 2, time), f"no header, {known}: user, item, rating{', timestamp' * (time > 0)}"
