"""What kind of text a file is, told from its beginning: the one place that decides it. A name's ending says nothing.

JSON lines, one JSON document, lines of Python literals, Matrix Market, or delimited text; and the records that the
beginning of the first three holds, from which the columns are recognised.
"""

from __future__ import annotations

import warnings
from typing import Any

from mfdist.errors import DataError
from mfdist.prepare import matrix_market
from mfdist.prepare.json_records import record_spans
from mfdist.prepare.json_rows import literal, loaded

MAX_LINES = 1000


def kind_of(head: str, shown: str) -> str:
    """'json', 'json document', 'python', 'matrix market' or 'delimited'; DataError for JSON that holds no records."""
    begin = head.lstrip()
    if begin.lower().startswith(matrix_market.BANNER.lower()):
        return "matrix market"
    if begin.startswith("["):
        inside = begin[1:].lstrip()
        if inside and not inside.startswith(("{", "]")):
            raise DataError(f"{shown} is a JSON array of {inside[:40]!r} ..., not of objects with named values; write "
                            "one object a rating.")  # fmt: skip
        return "json document"
    lines = [line for line in begin.splitlines()[:MAX_LINES] if line.strip()]
    opened = sum(line.lstrip().startswith("{") for line in lines)
    if not begin.startswith("{") and 2 * opened <= len(lines):  # the first of many records may be damaged
        return "delimited"
    lines = lines[: max(1, len(lines) - 1)]  # the last one may be cut off
    json_lines = sum(isinstance(loaded(line.encode()), dict) for line in lines)
    if isinstance(loaded(lines[0].encode()), dict) or 0 < len(lines) <= 2 * json_lines:
        return "json"
    if any(isinstance(record, dict) for record in _literals(lines)):
        return "python"
    return "json document" if any(isinstance(record, dict) for record in _document(begin)) else "json"


def records(head: str, kind: str) -> list[dict[str, Any]]:
    """The objects that the beginning of a file holds."""
    lines = [line for line in head.splitlines()[:MAX_LINES] if line.strip()]
    found = {"json": lambda: [loaded(line.encode()) for line in lines], "python": lambda: _literals(lines),
             "json document": lambda: _document(head)}[kind]()  # fmt: skip
    return [record for record in found if isinstance(record, dict)]


def _literals(lines: list[str]) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [literal(line.encode()) for line in lines]


def _document(head: str) -> list[Any]:
    content = head.lstrip().removeprefix("[").encode()
    begin, end, _, _, _, _ = record_spans(content)
    return [loaded(content[a:b]) for a, b in zip(begin[:MAX_LINES].tolist(), end[:MAX_LINES].tolist(), strict=True)]
