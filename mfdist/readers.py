"""Sources to blocks of checked rows: what every format becomes, and what is refused with its reason.

An id is its text: 7 in JSON or Parquet and "7" in CSV are one id, "007" is another. A whole float id (12.0, as
pandas makes of integers beside a missing one) is "12"; other floats are their shortest decimal text. Timestamps are
whole numbers as given (fractions are cut off); dates and times of Parquet become seconds since 1970.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mfdist import storage, text_rows
from mfdist.errors import DataError
from mfdist.ids import U64, hash_ids
from mfdist.layouts import Layout
from mfdist.sources import Source, Text

CHUNK_BYTES = 4 << 20
BATCH_ROWS = 1 << 17
MAX_RAW_TEXT = 10_000
REASONS = {
    text_rows.FIELDS: "wrong number of fields",
    text_rows.QUOTE: "quote that is not closed",
    text_rows.USER: "empty user id",
    text_rows.ITEM: "empty item id",
    text_rows.UTF8: "not valid UTF-8",
}
NOT_A_NUMBER, NOT_FINITE, BAD_TIME = "rating is not a number", "rating is not finite", "timestamp is not a number"
OUT_OF_SCALE, NOT_JSON, MISSING = "rating is outside the scale", "not valid JSON", "missing field"
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
_NOT_FINITE = re.compile(r"(?i)\s*[+-]?(nan|inf|infinity)\s*")


@dataclass(frozen=True)
class Rules:
    """How ids are hashed and ratings judged; ``scale`` None: any finite rating."""

    salt: int
    scale: tuple[float, float] | None
    with_time: bool


@dataclass
class Block:
    """Checked rows: (2, n) spans of user and item ids in ``content``, their hashes, ratings, times; and the refused.

    ``rejects`` holds (line or row, counted from the block's first as 0; reason; raw text). ``lines`` is what the next
    block's lines begin after.
    """

    content: npt.NDArray[np.uint8]
    start: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    rating: npt.NDArray[np.float32]
    time: npt.NDArray[np.int64] | None
    lines: int
    num_in: int
    rejects: list[tuple[int, str, str]] = field(default_factory=list)
    hashes: list[tuple[U64, U64]] = field(default_factory=list)
    packed_bytes: int = 0


def chunks(source: Source, layout: Layout) -> Iterator[Any]:
    """Pieces of a source that :func:`parse` turns into blocks, in order; the last one is the fingerprint (str)."""
    if layout.kind == "parquet":
        yield from _parquet_batches(source, layout)
        return
    with Text(source) as text:
        yield from _text_chunks(text, source, layout)
        yield text.fingerprint


def parse(piece: Any, layout: Layout, rules: Rules) -> Block:
    """One piece as a block; runs in any thread."""
    if layout.kind == "delimited":
        block = _parse_delimited(piece[0], piece[1], piece[2], layout, rules)
    elif layout.kind == "json":
        block = _parse_json(piece[0], piece[1], layout, rules)
    else:
        block = _parse_table(piece[0], piece[1], layout, rules)
    for side in range(2):
        first, second = (np.empty(block.rating.size, np.uint64) for _ in range(2))
        hash_ids(block.content, block.start[side], block.length[side], np.uint64(rules.salt), first, second)
        block.hashes.append((first, second))
    return block


# Text ---------------------------------------------------------------------------------------------


def _separators(layout: Layout) -> tuple[int, int, bool]:
    sep = layout.separator.encode()
    return sep[0], sep[1] if len(sep) > 1 else 0, len(sep) == 1


def _text_chunks(text: Text, source: Source, layout: Layout) -> Iterator[tuple[bytes, int, bool]]:
    """(whole records, bytes read so far from the packed file, whether the header comes first)."""
    carried, first = b"", True
    while True:
        more = text.read(CHUNK_BYTES)
        content = carried + more if carried else more
        final = not more
        if final and content and not content.endswith(b"\n"):
            content += b"\n"
        if first and not final and len(content) < 4:
            carried = content
            continue
        if first and content.startswith(b"\xef\xbb\xbf"):
            content = content[3:]
        cut = _cut(content, layout, final)
        if cut:
            yield content[:cut], text.packed_place, first and layout.header
            first = False
        carried = content[cut:]
        if final:
            return


def _cut(content: bytes, layout: Layout, final: bool) -> int:
    if layout.kind == "json" or b'"' not in content or not _separators(layout)[2]:
        return content.rfind(b"\n") + 1
    view = np.frombuffer(content, np.uint8)
    return int(text_rows.last_record_end(view, view.size, *_separators(layout), final))


def _parse_delimited(content: bytes, packed: int, header: bool, layout: Layout, rules: Rules) -> Block:
    view = np.frombuffer(content, np.uint8)
    sep0, sep1, quotes = _separators(layout)
    at = int(text_rows.record_end(view, 0, view.size, sep0, sep1, quotes, True)) if header else 0
    skipped = content[:at].count(b"\n")
    view = view[at:]
    most = content.count(b"\n", at)
    begin, end, line, time = (np.empty(most, np.int64) for _ in range(4))
    start, length = np.zeros((4, most), np.int64), np.zeros((4, most), np.int64)
    rating, status = np.zeros(most, np.float64), np.zeros(most, np.uint8)
    extra = np.empty(view.size if quotes and b'""' in content else 0, np.uint8)
    with_time = rules.with_time
    columns = np.array([*layout.columns[:3], layout.columns[3] if with_time else -1], np.int64)
    n, lines, used = text_rows.scan_delimited(
        view, view.size, sep0, sep1, quotes, layout.num_fields, columns, begin, end, line, start, length, rating, time,
        status, extra,
    )  # fmt: skip
    both = np.concatenate([view, extra[:used]]) if used else view
    start, length, status, rating, time = start[:, :n], length[:, :n], status[:n], rating[:n], time[:n]
    reasons: dict[int, str] = {}
    for i in np.flatnonzero((status == text_rows.RATING) | (status == text_rows.TIME)):
        reasons |= _read_slowly(int(i), both, start, length, rating, time, status, with_time)
    text_rows.check_ids(both, start[0], length[0], status, text_rows.USER)
    text_rows.check_ids(both, start[1], length[1], status, text_rows.ITEM)
    bad = np.flatnonzero(status != text_rows.OK)
    rejects = [
        (int(line[i]) + skipped, reasons.get(int(i)) or REASONS[int(status[i])], _raw(view[begin[i] : end[i]]))
        for i in bad
    ]
    good = status == text_rows.OK
    good &= _judge(rating, good, rules, lambda i: (int(line[i]) + skipped, _raw(view[begin[i] : end[i]])), rejects)
    return Block(both, start[:2, good], length[:2, good], rating[good].astype(np.float32),
                 time[good] if with_time else None, int(lines) + skipped, int(n), rejects, [], packed)  # fmt: skip


def _raw(content: npt.NDArray[np.uint8]) -> str:
    return content[:MAX_RAW_TEXT].tobytes().decode("utf-8", "replace")


def _read_slowly(i: int, content: Any, start: Any, length: Any, rating: Any, time: Any, status: Any,
                 with_time: bool) -> dict[int, str]:  # fmt: skip
    """Read a number that the compiled parser does not know; the reason where it is none."""
    texts = [_raw(content[start[c, i] : start[c, i] + length[c, i]]) for c in (2, 3)]
    value = parse_number(texts[0])
    if isinstance(value, str):
        return {i: value}
    rating[i] = value
    if with_time:
        when = parse_time(texts[1])
        if when is None:
            return {i: BAD_TIME}
        time[i] = when
    status[i] = text_rows.OK
    return {}


def parse_number(text: str) -> float | str:
    """A finite decimal number, or the reason why it is none."""
    if not _NUMBER.fullmatch(text):
        return NOT_FINITE if _NOT_FINITE.fullmatch(text) else NOT_A_NUMBER
    return float(text)


def parse_time(text: str) -> int | None:
    """A whole number of 64 bits, fractions cut off; None where it is none."""
    if not _NUMBER.fullmatch(text):
        return None
    try:
        value = int(text) if re.fullmatch(r"\s*[+-]?\d+\s*", text) else int(float(text))
    except (OverflowError, ValueError):
        return None
    return value if -(2**63) <= value < 2**63 else None


def _judge(rating: npt.NDArray[np.float64], good: npt.NDArray[np.bool_], rules: Rules, where: Any,
           rejects: list[tuple[int, str, str]]) -> npt.NDArray[np.bool_]:  # fmt: skip
    """Which ratings are finite as float32 and inside the scale; the others are added to ``rejects``."""
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(rating.astype(np.float32))
        inside = (rating >= rules.scale[0]) & (rating <= rules.scale[1]) if rules.scale else finite
    for i in np.flatnonzero(good & ~(finite & inside)):
        line, raw = where(int(i))
        rejects.append((line, OUT_OF_SCALE if finite[i] else NOT_FINITE, raw))
    rejects.sort(key=lambda reject: reject[0])
    return finite & inside


# JSON lines ---------------------------------------------------------------------------------------


def _parse_json(content: bytes, packed: int, layout: Layout, rules: Rules) -> Block:
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
    good = _judge(rating, np.ones(rating.size, np.bool_), rules, raw, rejects)
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
        return REASONS[text_rows.UTF8]
    except (ValueError, RecursionError):
        return NOT_JSON
    if not isinstance(record, dict):
        return NOT_JSON
    if any(record.get(key) is None for key in keys[: 4 if with_time else 3]):
        return MISSING
    user, item = (_json_id(record[key]) for key in keys[:2])
    if not user or not item:
        return REASONS[text_rows.ITEM if user else text_rows.USER]
    rating = parse_number(_number_text(record[keys[2]]))
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
        value = "" if not math.isfinite(value) else _float_id(value)
    text = str(value)
    try:
        return text.encode() if text.strip(" \t") else b""
    except UnicodeEncodeError:  # a lone surrogate
        return b""


def _float_id(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _joined(ids: tuple[list[bytes], list[bytes]]) -> tuple[Any, Any, Any]:
    length = np.array([[len(i) for i in side] for side in ids], np.int64).reshape(2, -1)
    start = (np.cumsum(length.reshape(-1)) - length.reshape(-1)).reshape(2, -1)
    return np.frombuffer(b"".join(ids[0] + ids[1]), np.uint8), start, length


# Parquet and data frames --------------------------------------------------------------------------


def _parquet_batches(source: Source, layout: Layout) -> Iterator[Any]:
    from mfdist.sources import file_fingerprint

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


def _parse_table(table: pa.Table, packed: int, layout: Layout, rules: Rules) -> Block:
    names = [str(c) for c in layout.columns]
    n = table.num_rows
    status = np.zeros(n, np.uint8)
    spans = [_id_spans(table.column(name)) for name in names[:2]]
    both = np.concatenate([content for content, _, _ in spans]) if n else np.zeros(0, np.uint8)
    start = np.stack([spans[0][1], spans[1][1] + spans[0][0].size])
    length = np.stack([spans[0][2], spans[1][2]])
    text_rows.check_ids(both, start[0], length[0], status, text_rows.USER)
    text_rows.check_ids(both, start[1], length[1], status, text_rows.ITEM)
    rating, bad_rating = _numbers(table.column(names[2]), pa.float64(), parse_number)
    time, bad_time = np.zeros(n, np.int64), np.zeros(n, np.bool_)
    if rules.with_time:
        time, bad_time = _numbers(_seconds(table.column(names[3])), pa.int64(), parse_time)

    def raw(i: int) -> str:
        return json.dumps({m: _shown(table.column(m)[i]) for m in names if m}, ensure_ascii=False)[:MAX_RAW_TEXT]

    rejects = []
    for i in np.flatnonzero((status != text_rows.OK) | bad_rating | bad_time):
        reason = REASONS[int(status[i])] if status[i] else (NOT_A_NUMBER if bad_rating[i] else BAD_TIME)
        rejects.append((int(i), reason, raw(int(i))))
    good = (status == text_rows.OK) & ~bad_rating & ~bad_time
    good &= _judge(rating, good, rules, lambda i: (i, raw(i)), rejects)
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
        texts = pa.array([None if v is None or not math.isfinite(v) else _float_id(v) for v in values], pa.large_utf8())
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
