"""JSON objects and Python dictionaries, one a line or in a document, to blocks of checked rows."""

from __future__ import annotations

import ast
import codecs
import json
import math
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from mfdist.data.id_text import float_text
from mfdist.prepare import delimited_text
from mfdist.prepare.json_records import record_spans
from mfdist.prepare.layout import Layout
from mfdist.prepare.row_checks import (
    BAD_TIME,
    MAX_RAW_TEXT,
    MISSING,
    NOT_JSON,
    NOT_LITERAL,
    REASONS,
    Block,
    Rules,
    judge,
    parse_number,
    parse_time,
)

Record = tuple[int, bytes]
"""A record's line (0: the piece's first) and its text."""

_LITERALS = threading.Lock()
_MAX_BITS = 4096


class _Unread(str):
    """Why a text is no record."""


def parse_json_lines(piece: tuple[bytes, int, int], layout: Layout, rules: Rules) -> Block:
    """Lines of one JSON object each as a block."""
    return _parsed(_lines_of(piece[0]), loaded, piece, layout, rules)


def parse_document(piece: tuple[bytes, int, int], layout: Layout, rules: Rules) -> Block:
    """Whole records of a JSON document as a block."""
    content = piece[0]
    begin, end, line, _, _, _ = record_spans(content + b"\n")  # which ends a last word
    spans = zip(line.tolist(), begin.tolist(), end.tolist(), strict=True)
    return _parsed([(number, content[a:b]) for number, a, b in spans], loaded, piece, layout, rules)


def parse_literal_lines(piece: tuple[bytes, int, int], layout: Layout, rules: Rules) -> Block:
    """Lines of one Python dictionary each as a block; read as literals, nothing is evaluated.

    One thread at a time: it holds the GIL anyway, and the warnings of odd escapes can only be silenced for all.
    """
    with _LITERALS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _parsed(_lines_of(piece[0]), literal, piece, layout, rules)


def literal(line: bytes) -> Any:
    """What a line of Python literals says, or why it says nothing."""
    try:
        return ast.literal_eval(line.decode().strip())
    except UnicodeDecodeError:
        return _Unread(REASONS[delimited_text.UTF8])
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return _Unread(NOT_LITERAL)


def loaded(line: bytes) -> Any:
    """What a JSON text says, or why it says nothing."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError:
        return _Unread(REASONS[delimited_text.UTF8])
    except (ValueError, RecursionError):
        return _Unread(NOT_JSON)


def _lines_of(content: bytes) -> list[Record]:
    lines = (line.removeprefix(codecs.BOM_UTF8) for line in content.split(b"\n"))  # joined files have marks within
    return [(number, line) for number, line in enumerate(lines) if line.strip()]


def _parsed(records: list[Record], load: Callable[[bytes], Any], piece: tuple[bytes, int, int], layout: Layout,
            rules: Rules) -> Block:  # fmt: skip
    ids: tuple[list[bytes], list[bytes]] = ([], [])
    ratings: list[float] = []
    times: list[tuple[int, bool]] = []
    rejects: list[tuple[int, str, str]] = []
    place: list[int] = []
    constants = [(str(layout.columns[role]), text) for role, text in layout.constants]
    for number, (line, content) in enumerate(records):
        row = _row(load(content), layout.columns, constants, rules.with_time)
        if isinstance(row, str):
            rejects.append((line, row, _shown(content)))
            continue
        ids[0].append(row[0])
        ids[1].append(row[1])
        ratings.append(row[2])
        times.append(row[3])
        place.append(number)

    def where(i: int) -> tuple[int, str]:
        line, content = records[place[i]]
        return line, _shown(content)

    rating = np.array(ratings, np.float64)
    good = judge(rating, np.ones(rating.size, np.bool_), rules, where, rejects)
    kept = np.flatnonzero(good)
    both, start, length = _joined(ids)
    with_time = rules.with_time
    return Block(both, start[:, good], length[:, good], rating[good].astype(np.float32),
                 np.array([time for time, _ in times], np.int64)[good] if with_time else None,
                 np.array([dated for _, dated in times], np.bool_)[good] if with_time else None,
                 piece[0].count(b"\n"), len(records), rejects, lambda i: where(int(kept[i])), piece[1])  # fmt: skip


def _shown(content: bytes) -> str:
    return content[:MAX_RAW_TEXT].decode("utf-8", "replace")


def _row(
    record: Any, keys: tuple[Any, ...], constants: list[tuple[str, str]], with_time: bool
) -> tuple[bytes, bytes, float, tuple[int, bool]] | str:
    """(user, item, rating, (time, dated)) of what was loaded, or the reason why it is no row."""
    if not isinstance(record, dict):
        return str(record) if isinstance(record, _Unread) else NOT_JSON
    for key, value in constants:
        record.setdefault(key, value)
    if any(record.get(key) is None for key in keys[: 4 if with_time else 3] if key):
        return MISSING
    user, item = (_json_id(record[key]) for key in keys[:2])
    if not user or not item:
        return REASONS[delimited_text.ITEM if user else delimited_text.USER]
    stars = record[keys[2]] if keys[2] else 0
    rating = float(stars) if isinstance(stars, bool) else parse_number(_text_of(stars))
    if isinstance(rating, str):
        return rating
    when = parse_time(_text_of(record[keys[3]])) if with_time else (0, False)
    return BAD_TIME if when is None else (user, item, rating, when)


def _text_of(value: Any) -> str:
    """A text, or a number that is finite and no longer than one can be, as text; empty for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= _MAX_BITS:
        return str(value)
    return repr(value) if isinstance(value, float) else ""


def _json_id(value: Any) -> bytes:
    """The id's text, empty where there is none."""
    if isinstance(value, float):
        value = "" if not math.isfinite(value) else float_text(value)
    text = _text_of(value)
    try:
        return text.encode() if text.strip(" \t") else b""
    except UnicodeEncodeError:  # a lone surrogate
        return b""


def _joined(ids: tuple[list[bytes], list[bytes]]) -> tuple[Any, Any, Any]:
    length = np.array([[len(i) for i in side] for side in ids], np.int64).reshape(2, -1)
    start = (np.cumsum(length.reshape(-1)) - length.reshape(-1)).reshape(2, -1)
    return np.frombuffer(b"".join(ids[0] + ids[1]), np.uint8), start, length
