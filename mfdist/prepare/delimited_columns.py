"""The layout of delimited text: its separator, whether it begins with names, and which column is what."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from mfdist.errors import DataError, UsageError
from mfdist.prepare import plausible
from mfdist.prepare.headers import ROLES, is_header, named_places, numbered
from mfdist.prepare.layout import BLANKS, COMMENT, Layout
from mfdist.prepare.sources import Source

SEPARATORS = ("::", "\t", ",", ";", "|", BLANKS)
KINDS = {",": "CSV", "\t": "TSV", BLANKS: "text separated by blanks"}
_SEPARATOR_LINE = re.compile(r'"?sep=(::|[\t,;|])"?', re.IGNORECASE)
_AMAZON_USER, _ASIN = re.compile(r"A[0-9A-Z]{11,20}"), re.compile(r"[0-9A-Z]{10}")

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class _Head:
    """The beginning of a text: names (None: it has none; those of its folders behind them), rows of one width."""

    shown: str
    names: list[str] | None
    rows: list[list[str]]
    separator: str

    @property
    def plain(self) -> Rows:
        """The rows with decimal points where decimal commas may be."""
        return _with_points(self.rows, self.separator)


def delimited_layout(source: Source, lines: list[str], columns: tuple[str, ...] | None, pairs: bool) -> Layout:
    """The layout of a text that begins with these lines, none of them blank; see ``columns.recognise``."""
    comment = COMMENT if lines[0].startswith(COMMENT) else ""
    if comment:
        lines = [line for line in lines if not line.lstrip().startswith(comment)]
    if not lines:
        raise DataError(f"{source.shown} holds comments and no rows.")
    marked = _SEPARATOR_LINE.fullmatch(lines[0].strip(" "))
    lines = lines[1:] if marked else lines
    if not lines:
        raise DataError(f"{source.shown} holds no rows of ratings.")
    separator = marked[1] if marked else _separator(lines, 2 if pairs or source.partition else 3)
    rows = [_fields(line, separator) for line in lines]
    outside = [(name, value) for name, value in source.partition if name not in rows[0]]
    inside = tuple(c for c in columns or () if c not in dict(outside))
    header = is_header(rows[0], _with_points(rows[1:], separator), inside, pairs)
    outside = outside if header else []
    names, width = rows[0], _usual_width(rows[header:]) or len(rows[0])
    if header:
        names = ["", *names] if width == len(names) + 1 else names  # row names, as R writes them, have no name
        width = len(names)
    body = [[*row, *(value for _, value in outside)] for row in rows[header:] if len(row) == width]
    head = _Head(source.shown, [*names, *(name for name, _ in outside)] if header else None, body, separator)
    places, told, notes = _places(head, columns, pairs)
    constants = tuple((role, outside[place - width][1]) for role, place in enumerate(places) if place >= width)
    if header and numbered(names):
        line = ",".join(names)[:40]
        notes += (f"{source.shown}: the first line, {line}, is taken for the numbers of its columns; if it is "
                  "a rating, move it to another line",)  # fmt: skip
    point = _point(separator, [row[places[2]] for row in body]) if places[2] >= 0 else "."
    first = f"header {', '.join(names[:8])}" if header else "no header"
    kind = KINDS.get(separator, f"text separated by {separator!r}")
    name = f"{kind}, {first}{told}{', decimal commas' * (point == ',')}"
    places = tuple(place if place < width else -1 for place in places)
    return Layout("delimited", name, places, separator, header + bool(marked), width, constants, comment, point,
                  notes=notes)  # fmt: skip


def _fields(line: str, separator: str) -> list[str]:
    if separator == BLANKS:
        return line.split()
    fields = line.split(separator)
    if len(separator) == 1 and '"' in line:
        with suppress(csv.Error):  # a quote that is not closed: the scanner refuses the row, here any cut will do
            fields = next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])
    return [field.strip() for field in fields]


def _separator(lines: list[str], least: int = 3) -> str:
    """The separator that cuts most of the lines into the same number (``least``, or else two, or more) of fields."""

    def agreement(separator: str, least: int = least) -> int:
        widths = [len(_fields(line, separator)) for line in lines]
        return max((widths.count(w) for w in set(widths) if w >= least), default=0)

    best = max(SEPARATORS, key=agreement)  # the first of equals: '::' before ','
    return best if agreement(best) else max(SEPARATORS, key=lambda separator: agreement(separator, 2))


def _usual_width(rows: Rows) -> int:
    widths = [len(row) for row in rows]
    return max(sorted(set(widths)), key=widths.count, default=0)


def _with_points(rows: Rows, separator: str) -> Rows:
    return [[field.replace(",", ".") for field in row] for row in rows] if separator == ";" else rows


def _point(separator: str, ratings: list[str]) -> str:
    """What divides the whole from the fraction: a comma in text separated by semicolons, where most have one."""
    commas = sum(bool(re.fullmatch(r"\s*[+-]?\d*,\d+\s*", text)) for text in ratings)
    return "," if separator == ";" and commas and commas >= sum("." in text for text in ratings) else "."


def _places(head: _Head, columns: tuple[str, ...] | None, pairs: bool) -> tuple[tuple[int, ...], str, tuple[str, ...]]:
    """The four places, what is said of them, and notes."""
    names = head.names
    notes: tuple[str, ...] = ()
    if names is not None and (columns or not numbered(names)):
        where = {name: k for k, name in enumerate(names)}

        def values(name: str) -> list[str]:
            return [row[where[name]] for row in head.rows]

        places, notes = named_places(names, columns, head.shown, values, pairs, head.plain)
    elif columns:
        places = _given_without_header(head.shown, columns, head.rows)
    elif pairs and len(head.rows[0]) == 2:
        return (0, 1, -1, -1), ": user, item", ()
    else:
        first = sum(not name.isdigit() for name in names or ())
        places, told = _headerless(head, first)
        return places, f", {told}", ()
    return places, f"; user, item, rating, time in columns {', '.join(map(str, places))} (from 0)", notes


def _given_without_header(shown: str, columns: tuple[str, ...], rows: Rows) -> tuple[int, ...]:
    """Places of ``--columns`` in a file without names: positions, or the roles of its columns in their order."""
    width = len(rows[0])
    if all(c.isdigit() for c in columns if c):
        places = tuple(int(c) if c else -1 for c in columns)
        if max(places) >= width:
            raise UsageError(f"--columns {','.join(columns)}: {shown} has {width} columns, counted from 0.")
    elif set(columns) - set(ROLES) or len(columns) != width:
        raise UsageError(f"{shown} has no header with the columns {','.join(columns)}; its first line is "
                         f"{','.join(rows[0])[:200]!r}. Give positions such as --columns 0,1,2,3.")  # fmt: skip
    else:
        places = tuple(columns.index(role) for role in ROLES if role in columns)
    return (*places, -1)[:4]


def _headerless(head: _Head, first: int) -> tuple[tuple[int, ...], str]:
    """The places in a file that names no columns, ``first`` of them left out; DataError where they make no sense."""
    rows = [row[first:] for row in head.plain]
    width = len(rows[0]) if rows else 0
    guess = plausible.guess(rows, first) if width > 2 else ""
    if width < 3 or width > 4:
        raise DataError(f"{head.shown} has {width} column{'s' * (width != 1)} and no header that is known; say which "
                        f"is which with --columns, for example {guess or '0,1,2,3'} (positions from 0).")  # fmt: skip
    time = 3 if width == 4 else -1

    def share(pattern: re.Pattern[str], place: int) -> float:
        return sum(bool(pattern.fullmatch(row[place])) for row in rows) / len(rows)

    places = (0, 1, 2, time)
    known = {"::": "MovieLens ratings.dat", "\t": "MovieLens u.data or alike"}.get(
        head.separator, "Amazon 2014 or alike"
    )
    if share(_ASIN, 0) > 0.8 and share(_AMAZON_USER, 1) > 0.8 and share(_AMAZON_USER, 0) < 0.5:
        places, known = (1, 0, 2, time), "Amazon 2018 ratings"
    doubt = plausible.doubt(rows, places)
    if doubt:
        raise DataError(f"{head.shown} has no header, and {doubt}. Say which column is which with --columns "
                        f"{guess or 'USER,ITEM,RATING[,TIME]'} (positions count from 0).")  # fmt: skip
    order = "item, user" if places[0] else "user, item"
    told = f"{known}: {order}, rating{', timestamp' * (time > 0)}"
    return tuple(place + first if place >= 0 else -1 for place in places), told
