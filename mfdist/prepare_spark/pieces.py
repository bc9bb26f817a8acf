"""What a task reads: whole files, or the pieces of a large one, cut exactly as the reader of one machine cuts them.

A plain text of many gigabytes is read once by one task, which finds the beginning of every piece (an open quote carries
over from one to the next, so nobody else can know it) and the fingerprint; then many tasks read pieces by their bytes.
A large Parquet file is cut by row groups. What is packed, and one JSON document, has one task: it is read in order.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from mfdist import storage
from mfdist.prepare.layout import Layout
from mfdist.prepare.read_pass import timed
from mfdist.prepare.readers import chunks, parse
from mfdist.prepare.row_checks import Block, Rules
from mfdist.prepare.sources import Reopened, Source, file_fingerprint
from mfdist.prepare.tables import row_group_batches
from mfdist.prepare.times import TimeUnit

TASK_BYTES = 64 << 20
"""What a task reads, where files can be cut or put together; a file of more than twice as much is cut."""
_BOM = codecs.BOM_UTF8


class Piece(NamedTuple):
    """Whole records of a plain text: where they begin, their bytes, and how many of these are the file's head."""

    offset: int
    size: int
    head: int


@dataclass(frozen=True)
class Cut:
    """A large file as it is shared out: pieces or row groups for each task; none where it cannot be cut."""

    shares: tuple[tuple[Any, ...], ...]
    fingerprint: str
    unit: TimeUnit | None


@dataclass(frozen=True)
class Work:
    """A file, or a share of one, in the order ``place`` in which one machine reads them.

    ``source`` is the number of the file; ``share`` its pieces or row groups, None: all of it; ``unit`` of a share's
    times, which the file's beginning has shown.
    """

    place: int
    source: int
    file: Source
    layout: Layout
    share: tuple[Any, ...] | None = None
    unit: TimeUnit | None = None


def found_from_anywhere(source: Source) -> Source:
    """The source with an absolute path, shown as it was given."""
    return replace(source, path=storage.absolute(source.path), given=source.given or source.path)


def is_large(source: Source, layout: Layout) -> bool:
    """Whether a file is shared out among tasks, if it can be."""
    plain = source.packing == "text" and layout.kind in ("delimited", "json", "python")
    return (plain or source.packing == "parquet") and source.bytes > 2 * TASK_BYTES


def cut(source: Source, layout: Layout, rules: Rules) -> Cut:
    """How a large file is shared out; DataError as the reader's."""
    unit: TimeUnit | None = None
    if source.packing == "parquet":
        for piece in chunks(source, layout):
            if isinstance(piece, str):
                return Cut(_row_group_shares(source), piece, unit)
            if unit is None and rules.with_time:
                unit = timed(parse(piece, layout, rules), None, rules)[1]
            if unit is not None or not rules.with_time:
                break
        return Cut(_row_group_shares(source), file_fingerprint(source), unit)
    with Reopened(source.path) as stream:
        mark = stream.read(len(_BOM))
    if mark.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return Cut((), "", None)
    place = len(_BOM) if mark == _BOM else 0
    found: list[Piece] = []
    for piece in chunks(source, layout):
        if isinstance(piece, str):
            return Cut(tuple(_shares(found)), piece, unit)
        content, _, head = piece
        if unit is None and rules.with_time:
            unit = timed(parse(piece, layout, rules), None, rules)[1]
        found.append(Piece(place, min(len(content), source.bytes - place), head))
        place += len(content)
    raise AssertionError("the last piece is the fingerprint")


def _shares(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, ...]]:
    share: list[Piece] = []
    for piece in pieces:
        share.append(piece)
        if sum(p.size for p in share) >= TASK_BYTES:
            yield tuple(share)
            share = []
    if share:
        yield tuple(share)


def _row_group_shares(source: Source) -> tuple[tuple[int, ...], ...]:
    fs, inner = storage.arrow_filesystem(source.path)
    with pq.ParquetFile(inner, filesystem=fs) as file:
        sizes = [file.metadata.row_group(k).total_byte_size for k in range(file.metadata.num_row_groups)]
    shares, share, size = [], [], 0
    for group, group_bytes in enumerate(sizes):
        share.append(group)
        size += group_bytes
        if size >= TASK_BYTES:
            shares.append(tuple(share))
            share, size = [], 0
    return (*shares, tuple(share)) if share else tuple(shares)


def blocks(work: Work, rules: Rules) -> Iterator[tuple[Block | str, TimeUnit | None]]:
    """(block, unit of the times so far) of all that a task reads of a file; the fingerprint last, of a whole file."""
    unit = work.unit
    for piece in _pieces(work):
        if isinstance(piece, str):
            yield piece, unit
            return
        block, unit = timed(parse(piece, work.layout, rules), unit, rules)
        yield block, unit


def _pieces(work: Work) -> Iterator[Any]:
    if work.share is None:
        yield from chunks(work.file, work.layout)
    elif work.file.packing == "parquet":
        yield from row_group_batches(work.file, work.layout, work.share)
    else:
        with Reopened(work.file.path) as stream:
            for offset, size, head in work.share:
                stream.seek(offset)
                content = _exactly(stream, size)
                yield (content if content.endswith(b"\n") else content + b"\n"), 0, head


def _exactly(stream: Reopened, size: int) -> bytes:
    parts: list[bytes] = []
    while size and (part := stream.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def works(sources: Sequence[Source], layouts: Sequence[Layout], cuts: dict[int, Cut]) -> list[Work]:
    """All that is to be read, in order; ``cuts`` of large files by their numbers."""
    found: list[Work] = []
    for number, (source, layout) in enumerate(zip(sources, layouts, strict=True)):
        own = cuts.get(number, Cut((), "", None))
        for share in own.shares or (None,):
            found.append(Work(len(found), number, source, layout, share, own.unit))
    return found


def tasks(all_works: Sequence[Work]) -> list[list[Work]]:
    """Works for each task: small files together, up to TASK_BYTES."""
    found: list[list[Work]] = []
    room = 0
    for work in all_works:
        size = TASK_BYTES if work.share else work.file.bytes
        if not found or size > room:
            found.append([])
            room = TASK_BYTES
        found[-1].append(work)
        room -= size
    return found


def expected_bytes(sources: Iterable[Source]) -> int:
    """About the bytes of all rows as plain text."""
    return sum(source.bytes * (1 if source.packing == "text" else 4) for source in sources)
