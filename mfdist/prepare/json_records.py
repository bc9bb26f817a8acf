"""Where the records of a JSON document begin and end: of one array, or of objects printed over several lines.

A record is whatever stands between the brackets and commas of the top level; whether it is an object is for the parser
to say. What is never closed is an error of the file and not of a row: all that follows would be lost in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numba
import numpy as np

from mfdist.errors import DataError
from mfdist.prepare.sources import Text

MAX_RECORD = 16 << 20
"""Bytes that a record may be long."""
_NL, _QUOTE, _BACKSLASH, _COMMA = 10, 34, 92, 44
_OPEN, _CLOSE, _OPEN_ARRAY, _CLOSE_ARRAY = 123, 125, 91, 93

Spans = tuple[Any, Any, Any, int, int, int]


def document_pieces(text: Text, shown: str, piece_bytes: int) -> Iterator[tuple[bytes, int, int]]:
    """(whole records, bytes read so far from the packed file, 0)."""
    carried, first, array, closed, lines = b"", True, False, False, 1
    while True:
        more = text.read(piece_bytes)
        content = carried + more if more else carried + b"\n"[: len(carried)]
        if first:
            content, array = _opened(content, array)
            if not content.strip() and more:
                carried = content
                continue
        if closed and content.strip():
            raise DataError(f"{shown} line {lines} goes on after its JSON array has ended; write one array.")
        _, _, _, used, more_lines, end = record_spans(content)
        if end >= 0:
            closed = array
            if not array or content[end + 1 :].strip():
                raise DataError(
                    f"{shown} has a bracket too many after line {lines + more_lines - 1}: it is no JSON array."
                )
            used = len(content)
        if used:
            yield content[:used], text.packed_place, 0
            first, lines = False, lines + content[:used].count(b"\n")
        carried = content[used:]
        if len(carried) > MAX_RECORD or (not more and carried.strip()):
            raise DataError(
                f"{shown}: the record that begins at or after line {lines} is not closed; the file is cut off, or a "
                "quote or bracket is missing."
            )
        if not more:
            if array and not closed:
                raise DataError(f"{shown}: its JSON array is not closed; the file is cut off.")
            return


def _opened(content: bytes, array: bool) -> tuple[bytes, bool]:
    """The beginning of a file with the array's bracket blanked out, and whether there was one."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    place = len(content) - len(content.lstrip())
    if array or content[place : place + 1] != b"[":
        return content, array
    return content[:place] + b" " + content[place + 1 :], True


def record_spans(content: bytes) -> Spans:
    """(begin, end, line, bytes used, lines in them, place of a closing bracket of the top level or -1).

    ``begin``, ``end`` and ``line`` (0: the first) are int64, (records,). A record that is cut off at the end is not
    used; the scan stops at a bracket that closes nothing.
    """
    view = np.frombuffer(content, np.uint8)
    most = content.count(b"{") + content.count(b"[") + content.count(b",") + content.count(b"\n") + 2
    begin, end, line = (np.empty(most, np.int64) for _ in range(3))
    n, used, lines, closing = _spans(view, begin, end, line)
    return begin[:n], end[:n], line[:n], int(used), int(lines), int(closing)


@numba.njit(nogil=True, cache=True)
def _value_end(content: Any, p: Any) -> Any:
    """Place behind the value at ``p``; -1 where it is cut off. A word ends at a comma, bracket or line end."""
    size = content.size
    depth, inside = 0, False
    structured = content[p] in (_OPEN, _OPEN_ARRAY, _QUOTE)
    while p < size:
        c = content[p]
        if inside:
            if c == _BACKSLASH:
                p += 1
            elif c == _QUOTE:
                inside = False
                if depth == 0:
                    return p + 1
            elif c == _NL:  # no text goes over a line end: its quote is missing, which spoils this record alone
                inside = False
                if depth == 0:
                    return p
        elif c == _QUOTE and structured:
            inside = True
        elif structured and c in (_OPEN, _OPEN_ARRAY):
            depth += 1
        elif structured and c in (_CLOSE, _CLOSE_ARRAY):
            depth -= 1
            if depth == 0:
                return p + 1
        elif not structured and c in (_COMMA, _NL, _OPEN, _OPEN_ARRAY, _CLOSE_ARRAY):
            return p
        p += 1
    return -1


@numba.njit(nogil=True, cache=True)
def _spans(content: Any, begin: Any, end: Any, line: Any) -> Any:
    p, n, lines, used, used_lines = 0, 0, 0, 0, 0
    while p < content.size:
        c = content[p]
        if c == _CLOSE_ARRAY:
            return n, used, lines, p
        if c in (_NL, 32, 9, 13, _COMMA):
            lines += c == _NL
            p += 1
            used, used_lines = p, lines
            continue
        stop = _value_end(content, p)
        if stop < 0:
            break
        begin[n], end[n], line[n] = p, stop, lines
        n += 1
        for q in range(p, stop):
            lines += content[q] == _NL
        p = stop
        used, used_lines = p, lines
    return n, used, used_lines, -1
