"""Sources to blocks of checked rows: pieces of a file, read in order, and parsed in any thread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from mfdist.prepare import delimited_text
from mfdist.prepare.columns import Layout
from mfdist.prepare.ids import hash_ids
from mfdist.prepare.json_lines import parse_json
from mfdist.prepare.row_blocks import BAD_TIME, MAX_RAW_TEXT, REASONS, Block, Rules, judge, parse_number, parse_time
from mfdist.prepare.sources import Source, Text
from mfdist.prepare.tables import parquet_batches, parse_table

CHUNK_BYTES = 4 << 20


def chunks(source: Source, layout: Layout) -> Iterator[Any]:
    """Pieces of a source that :func:`parse` turns into blocks, in order; the last one is the fingerprint (str)."""
    if layout.kind == "parquet":
        yield from parquet_batches(source, layout)
        return
    with Text(source) as text:
        yield from _text_chunks(text, source, layout)
        yield text.fingerprint


def parse(piece: Any, layout: Layout, rules: Rules) -> Block:
    """One piece as a block; runs in any thread."""
    if layout.kind == "delimited":
        block = _parse_delimited(piece[0], piece[1], piece[2], layout, rules)
    elif layout.kind == "json":
        block = parse_json(piece[0], piece[1], layout, rules)
    else:
        block = parse_table(piece[0], piece[1], layout, rules)
    for side in range(2):
        first, second = (np.empty(block.rating.size, np.uint64) for _ in range(2))
        hash_ids(block.content, block.start[side], block.length[side], np.uint64(rules.salt), first, second)
        block.hashes.append((first, second))
    return block


# Delimited text ----------------------------------------------------------------------------------


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
    return int(delimited_text.last_record_end(view, view.size, *_separators(layout), final))


def _parse_delimited(content: bytes, packed: int, header: bool, layout: Layout, rules: Rules) -> Block:
    view = np.frombuffer(content, np.uint8)
    sep0, sep1, quotes = _separators(layout)
    at = int(delimited_text.record_end(view, 0, view.size, sep0, sep1, quotes, True)) if header else 0
    skipped = content[:at].count(b"\n")
    view = view[at:]
    most = content.count(b"\n", at)
    begin, end, line, time = (np.empty(most, np.int64) for _ in range(4))
    start, length = np.zeros((4, most), np.int64), np.zeros((4, most), np.int64)
    rating, status = np.zeros(most, np.float64), np.zeros(most, np.uint8)
    extra = np.empty(view.size if quotes and b'""' in content else 0, np.uint8)
    with_time = rules.with_time
    columns = np.array([*layout.columns[:3], layout.columns[3] if with_time else -1], np.int64)
    n, lines, used = delimited_text.scan_delimited(
        view, view.size, sep0, sep1, quotes, layout.num_fields, columns, begin, end, line, start, length, rating, time,
        status, extra,
    )  # fmt: skip
    both = np.concatenate([view, extra[:used]]) if used else view
    if not layout.has_rating:
        rating[:n] = 0
        status[:n][status[:n] == delimited_text.RATING] = delimited_text.OK
    start, length, status, rating, time = start[:, :n], length[:, :n], status[:n], rating[:n], time[:n]
    reasons: dict[int, str] = {}
    for i in np.flatnonzero((status == delimited_text.RATING) | (status == delimited_text.TIME)):
        reasons |= _read_slowly(int(i), both, start, length, rating, time, status, with_time)
    delimited_text.check_ids(both, start[0], length[0], status, delimited_text.USER)
    delimited_text.check_ids(both, start[1], length[1], status, delimited_text.ITEM)
    bad = np.flatnonzero(status != delimited_text.OK)
    rejects = [
        (int(line[i]) + skipped, reasons.get(int(i)) or REASONS[int(status[i])], _raw(view[begin[i] : end[i]]))
        for i in bad
    ]
    good = status == delimited_text.OK
    good &= judge(rating, good, rules, lambda i: (int(line[i]) + skipped, _raw(view[begin[i] : end[i]])), rejects)
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
    status[i] = delimited_text.OK
    return {}
