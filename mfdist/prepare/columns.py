"""Which column of a source is what: known layouts recognised from the first lines, ``--columns`` for the others."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass, replace

import pyarrow.parquet as pq

from mfdist import storage
from mfdist.errors import DataError, UsageError
from mfdist.prepare.sources import Source, Text, check_text

ROLES = ("user_id", "item_id", "rating", "timestamp")
NAMES = {
    "user_id": ("user_id", "userId", "user", "reviewerID", "uid", "customer_id"),
    "item_id": ("item_id", "itemId", "item", "movieId", "parent_asin", "asin", "iid", "product_id", "book_id"),
    "rating": ("rating", "overall", "score", "stars", "star_rating"),
    "timestamp": ("timestamp", "unixReviewTime", "time", "unix_time"),
}
SEPARATORS = ("::", "\t", ",", ";", "|")
_AMAZON_USER, _ASIN = re.compile(r"A[0-9A-Z]{11,20}"), re.compile(r"[0-9A-Z]{10}")


@dataclass(frozen=True)
class Layout:
    """Where user, item, rating and timestamp stand: field numbers of text, names in JSON and Parquet (-1, '': none)."""

    kind: str  # "delimited", "json" or "parquet"
    name: str  # said aloud
    columns: tuple[int | str, ...]
    separator: str = ""
    header: bool = False
    num_fields: int = 0

    @property
    def has_rating(self) -> bool:
        return self.columns[2] not in (-1, "")

    @property
    def has_time(self) -> bool:
        return self.columns[3] not in (-1, "")

    def without_time(self) -> Layout:
        """The same layout with its timestamps left out."""
        return replace(self, columns=(*self.columns[:3], -1 if self.kind == "delimited" else ""))


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
    lines = head.decode("utf-8-sig", "replace").splitlines()
    lines = [line for line in lines[: max(1, len(lines) - 1)] if line][:1000]
    first = lines[0].lstrip() if lines else ""
    if first.startswith("{"):
        return _json_layout(source, lines, columns, pairs)
    if first.startswith("["):
        raise DataError(f"{source.shown} is one JSON array; write one JSON object a line (jq -c '.[]').")
    return _delimited_layout(source, lines, columns, pairs)


def _parquet_layout(source: Source, columns: tuple[str, ...] | None, pairs: bool) -> Layout:
    try:
        fs, inner = storage.arrow_filesystem(source.path)
        names = pq.read_schema(inner, filesystem=fs).names
    except (OSError, ValueError) as error:
        raise DataError(f"{source.shown} is a damaged Parquet file: {error}.") from None
    chosen = _by_name(names, columns, source, pairs)
    return Layout("parquet", "Parquet columns " + ", ".join(c for c in chosen if c), chosen)


def frame_layout(names: list[str], columns: tuple[str, ...] | None) -> Layout:
    """The layout of a data frame with these column names."""
    return Layout("parquet", "data frame", _by_name(names, columns, Source("the data frame", 0, "parquet")))


def _by_name(names: list[str], columns: tuple[str, ...] | None, source: Source, pairs: bool = False) -> tuple[str, ...]:
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


def _json_layout(source: Source, lines: list[str], columns: tuple[str, ...] | None, pairs: bool) -> Layout:
    names: dict[str, None] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            names.update(dict.fromkeys(record))
    chosen = (*columns, "")[:4] if columns else _by_name(list(names), None, source, pairs)
    if columns and not set(columns) & set(names):
        _by_name(list(names), columns, source, pairs)
    known = {"reviewerID": "Amazon 2014 and 2018 reviews", "parent_asin": "Amazon 2023 reviews"}
    name = next((text for key, text in known.items() if key in chosen), "keys " + ", ".join(c for c in chosen if c))
    return Layout("json", f"JSON lines, {name}", chosen)


def _fields(line: str, separator: str) -> list[str]:
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
    separator = _separator(lines, 2 if pairs else 3)
    rows = [_fields(line, separator) for line in lines]
    names = [name.strip() for name in rows[0]]
    header = (
        set(columns) - {""} <= set(names) if columns and not all(c.isdigit() for c in columns if c)
        else bool(_known("item_id" if pairs else "rating", names)) and not any(_is_number(name) for name in names)
    )  # fmt: skip
    widths = [len(row) for row in (rows[1:] if header and len(rows) > 1 else rows)]
    width = len(names) if header else max(sorted(set(widths)), key=widths.count)
    if columns or header:
        chosen, name = _chosen(source, names, header, columns, width, pairs)
    elif pairs and width == 2:
        chosen, name = (0, 1, -1, -1), "no header: user, item"
    else:
        chosen, name = _headerless(source, [row for row in rows if len(row) == width], separator)
    kind = {",": "CSV", "\t": "TSV"}.get(separator, f"text separated by '{separator}'")
    return Layout("delimited", f"{kind}, {name}", chosen, separator, header, width)


def _chosen(
    source: Source, names: list[str], header: bool, columns: tuple[str, ...] | None, width: int, pairs: bool
) -> tuple[tuple[int, ...], str]:
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
        named = _by_name(names, columns, source, pairs)
        places = tuple(names.index(name) if name else -1 for name in named)
    head = "header " + ", ".join(names[:8]) if header else "no header"
    return (*places, -1)[:4], f"{head}; user, item, rating, time in columns {', '.join(map(str, places))} (from 0)"


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
