"""Delimited text to blocks of checked rows: separated by a character, by '::', or by runs of blanks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mfdist.prepare import delimited_text
from mfdist.prepare.blank_text import plain_lines
from mfdist.prepare.layout import BLANKS, Layout
from mfdist.prepare.matrix_market import inside
from mfdist.prepare.row_checks import BAD_TIME, MAX_RAW_TEXT, REASONS, Block, Rules, judge, parse_number, parse_time


def cut_delimited(content: bytes, layout: Layout, final: bool) -> int:
    """Place after the last whole record; ``final``: no more follows."""
    if b'"' not in content or not _separators(layout)[2]:
        return content.rfind(b"\n") + 1
    view = np.frombuffer(content, np.uint8)
    return int(delimited_text.last_record_end(view, view.size, *_separators(layout), final))


def _separators(layout: Layout) -> tuple[int, int, bool]:
    """(first byte, second or 0, whether fields may be quoted)."""
    if layout.separator == BLANKS:
        return ord("\t"), 0, False
    sep = layout.separator.encode()
    return sep[0], sep[1] if len(sep) > 1 else 0, len(sep) == 1


def parse_delimited(piece: tuple[bytes, int, int], layout: Layout, rules: Rules) -> Block:
    """(whole records, bytes read so far, how many bytes at their beginning are the file's head) as a block."""
    content, packed, head = piece
    skipped = content[:head].count(b"\n")
    content = content[head:]
    view = np.frombuffer(content, np.uint8)
    rewritten = bool(layout.comment) or layout.separator == BLANKS
    if rewritten:
        view = plain_lines(content, layout.comment, layout.separator == BLANKS)
    scanned = _scan(view, content, layout, rules)
    raw = _raw_lines(content) if rewritten else None

    line, begin, end = scanned.line, scanned.begin, scanned.end  # a block keeps these, and not all that was scanned

    def where(i: int) -> tuple[int, str]:
        at = int(line[i])
        return at + skipped, raw(at) if raw else _text(view[begin[i] : end[i]])

    status, start, length = scanned.status, scanned.start, scanned.length
    both = _with_constants(scanned, layout, rules)
    if not layout.has_rating:
        status[status == delimited_text.RATING] = delimited_text.OK
    if layout.point != ".":
        status[(status == delimited_text.OK) | (status == delimited_text.TIME)] = delimited_text.RATING
    delimited_text.reread(both, start, length, scanned.rating, scanned.time, scanned.dated, status,
                          ord(layout.point), rules.with_time)  # fmt: skip
    reasons = {
        int(i): _read_slowly(int(i), both, scanned, layout, rules)
        for i in np.flatnonzero((status == delimited_text.RATING) | (status == delimited_text.TIME))
    }
    delimited_text.check_ids(both, start[0], length[0], status, delimited_text.USER)
    delimited_text.check_ids(both, start[1], length[1], status, delimited_text.ITEM)
    good = status == delimited_text.OK
    rejects = []
    for i in np.flatnonzero(~good).tolist():
        at, text = where(i)
        rejects.append((at, reasons.get(i) or REASONS[int(status[i])], text))
    good &= judge(scanned.rating, good, rules, where, rejects)
    kept = np.flatnonzero(good)
    with_time = rules.with_time
    block = Block(both, start[:2, good], length[:2, good], scanned.rating[good].astype(np.float32),
                  scanned.time[good] if with_time else None, scanned.dated[good] if with_time else None,
                  scanned.lines + skipped, status.size, rejects, lambda i: where(int(kept[i])), packed)  # fmt: skip
    return inside(block, layout.matrix) if layout.matrix else block


@dataclass
class _Scanned:
    """What the scanner found of n records; see ``delimited_text.scan_delimited``. ``content`` has rewritten ids too."""

    content: npt.NDArray[np.uint8]
    begin: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    line: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    rating: npt.NDArray[np.float64]
    time: npt.NDArray[np.int64]
    dated: npt.NDArray[np.bool_]
    status: npt.NDArray[np.uint8]
    lines: int


def _scan(view: npt.NDArray[np.uint8], content: bytes, layout: Layout, rules: Rules) -> _Scanned:
    """Scan whole records: ``view`` is ``content`` as the scanner wants it."""
    most = content.count(b"\n")
    sep0, sep1, quotes = _separators(layout)
    begin, end, line, time = (np.empty(most, np.int64) for _ in range(4))
    start, length = np.zeros((4, most), np.int64), np.zeros((4, most), np.int64)
    rating, status = np.zeros(most, np.float64), np.zeros(most, np.uint8)
    extra = np.empty(view.size if quotes and b'""' in content else 0, np.uint8)
    columns = np.array([*layout.columns[:3], layout.columns[3] if rules.with_time else -1], np.int64)
    n, lines, used = delimited_text.scan_delimited(
        view, view.size, sep0, sep1, quotes, layout.num_fields, columns, begin, end, line, start, length, rating, time,
        status, extra,
    )  # fmt: skip
    both = np.concatenate([view, extra[:used]]) if used else view
    dated = np.zeros(n, np.bool_)
    return _Scanned(both, begin[:n], end[:n], line[:n], start[:, :n], length[:, :n], rating[:n], time[:n], dated,
                    status[:n], int(lines))  # fmt: skip


def head_bytes(content: bytes, layout: Layout, final: bool) -> int:
    """How many bytes at a file's beginning are no rows: its header, or a matrix's size; -1: they go on behind it."""
    place = 0
    if layout.matrix:
        for _ in range(layout.matrix.line + 1):
            place = content.find(b"\n", place) + 1
            if place == 0:
                return -1
        return place
    comment, view = layout.comment.encode(), np.frombuffer(content, np.uint8)
    for _ in range(layout.header):
        while place < len(content):
            end = content.find(b"\n", place) + 1 or len(content)
            line = content[place:end].lstrip()
            if line and not (comment and line.startswith(comment)):
                break
            place = end
        place = int(delimited_text.record_end(view, place, view.size, *_separators(layout), final))
        if place < 0:
            return -1
    return place


def _with_constants(scanned: _Scanned, layout: Layout, rules: Rules) -> npt.NDArray[np.uint8]:
    """The content with the columns that are one value for the whole file behind it, and spans that point there."""
    content = scanned.content
    for role, text in layout.constants:
        if role == 3 and not rules.with_time:
            continue
        value = np.frombuffer(text.encode(), np.uint8)
        scanned.start[role], scanned.length[role] = content.size, value.size
        content = np.concatenate([content, value])
        if role > 1:
            good = scanned.status == delimited_text.OK
            scanned.status[good] = delimited_text.TIME if role == 3 else delimited_text.RATING
    return content


def _raw_lines(content: bytes) -> Callable[[int], str]:
    """The text of a line by its number."""
    ends = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n"))

    def raw(line: int) -> str:
        first = int(ends[line - 1]) + 1 if line else 0
        end = int(ends[line]) if line < ends.size else len(content)
        return content[first:end][:MAX_RAW_TEXT].decode("utf-8", "replace").removesuffix("\r")

    return raw


def _text(content: npt.NDArray[np.uint8]) -> str:
    return content[:MAX_RAW_TEXT].tobytes().decode("utf-8", "replace")


def _read_slowly(i: int, content: npt.NDArray[np.uint8], scanned: _Scanned, layout: Layout, rules: Rules) -> str | None:
    """Read numbers that the compiled parser does not know; the reason where one is none."""
    start, length = scanned.start[:, i], scanned.length[:, i]
    rating, time = (_text(content[start[c] : start[c] + length[c]]) for c in (2, 3))
    if layout.has_rating:
        value = parse_number(rating if layout.point == "." else rating.replace(".", " ").replace(layout.point, "."))
        if isinstance(value, str):
            return value
        scanned.rating[i] = value
    if rules.with_time:
        when = parse_time(time)
        if when is None:
            return BAD_TIME
        scanned.time[i], scanned.dated[i] = when
    scanned.status[i] = delimited_text.OK
    return None
