"""JSON lines to blocks of checked rows."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from mfdist.data.id_text import float_id
from mfdist.prepare import delimited_text
from mfdist.prepare.columns import Layout
from mfdist.prepare.row_blocks import (
    BAD_TIME,
    MAX_RAW_TEXT,
    MISSING,
    NOT_JSON,
    REASONS,
    Block,
    Rules,
    judge,
    parse_number,
    parse_time,
)


def parse_json(content: bytes, packed: int, layout: Layout, rules: Rules) -> Block:
    ids: tuple[list[bytes], list[bytes]] = ([], [])
    ratings: list[float] = []
    times: list[int] = []
    rejects: list[tuple[int, str, str]] = []
    lines = content.split(b"\n")[:-1]
    num_in, place = 0, []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        num_in += 1
        row = _json_row(line, layout.columns, rules.with_time)
        if isinstance(row, str):
            rejects.append((number, row, line[:MAX_RAW_TEXT].decode("utf-8", "replace")))
            continue
        ids[0].append(row[0])
        ids[1].append(row[1])
        ratings.append(row[2])
        times.append(row[3])
        place.append(number)
    rating = np.array(ratings, np.float64)
    raw = lambda i: (place[i], lines[place[i]][:MAX_RAW_TEXT].decode("utf-8", "replace"))  # noqa: E731
    good = judge(rating, np.ones(rating.size, np.bool_), rules, raw, rejects)
    both, start, length = _joined(ids)
    return Block(both, start[:, good], length[:, good], rating[good].astype(np.float32),
                 np.array(times, np.int64)[good] if rules.with_time else None, len(lines), num_in, rejects, [],
                 packed)  # fmt: skip


def _json_row(  # noqa: PLR0911
    line: bytes, keys: tuple[Any, ...], with_time: bool
) -> tuple[bytes, bytes, float, int] | str:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return REASONS[delimited_text.UTF8]
    except (ValueError, RecursionError):
        return NOT_JSON
    if not isinstance(record, dict):
        return NOT_JSON
    if any(record.get(key) is None for key in keys[: 4 if with_time else 3] if key):
        return MISSING
    user, item = (_json_id(record[key]) for key in keys[:2])
    if not user or not item:
        return REASONS[delimited_text.ITEM if user else delimited_text.USER]
    rating = parse_number(_number_text(record[keys[2]])) if keys[2] else 0.0
    if isinstance(rating, str):
        return rating
    when = parse_time(_number_text(record[keys[3]])) if with_time else 0
    return BAD_TIME if when is None else (user, item, rating, when)


def _number_text(value: Any) -> str:
    return "" if isinstance(value, bool) else str(value)


def _json_id(value: Any) -> bytes:
    """The id's text, empty where there is none."""
    if isinstance(value, (bool, list, dict)):
        return b""
    if isinstance(value, float):
        value = "" if not math.isfinite(value) else float_id(value)
    text = str(value)
    try:
        return text.encode() if text.strip(" \t") else b""
    except UnicodeEncodeError:  # a lone surrogate
        return b""


def _joined(ids: tuple[list[bytes], list[bytes]]) -> tuple[Any, Any, Any]:
    length = np.array([[len(i) for i in side] for side in ids], np.int64).reshape(2, -1)
    start = (np.cumsum(length.reshape(-1)) - length.reshape(-1)).reshape(2, -1)
    return np.frombuffer(b"".join(ids[0] + ids[1]), np.uint8), start, length
