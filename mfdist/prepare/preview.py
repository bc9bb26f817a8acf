"""What was understood of the sources, shown before they are read: the first records, and what is odd about them.

Each kind of layout is shown once, by the first source that has it. What is only odd is said and goes on: a file sorted
by item may begin with a thousand users, and ratings may be of any kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone

import numpy as np

from mfdist.errors import DataError
from mfdist.log import Console
from mfdist.prepare.layout import Layout
from mfdist.prepare.plausible import EARLIEST_TIME, MIN_ROWS_OF_DISTINCT
from mfdist.prepare.readers import chunks, parse
from mfdist.prepare.row_checks import Block, Rules
from mfdist.prepare.sources import Source
from mfdist.prepare.times import in_seconds, unit_of

SHOWN_RECORDS = 3
SAMPLE_ROWS = 1000
MAX_SHOWN_ID = 40


def show(sources: Sequence[Source], layouts: Sequence[Layout], scale: tuple[float, float] | None, console: Console, *,
         strict: bool = False) -> None:  # fmt: skip
    """Say each source's layout and notes, and the first records of each kind of layout.

    ``scale``: of valid ratings. ``strict``: DataError where none of the first rows can be read.
    """
    shown = set()
    with_time = all(layout.has_time for layout in layouts)
    for source, layout in zip(sources, layouts, strict=True):
        console.info(f"{source.shown}: {layout.name}")
        for note in layout.notes:
            console.warn(note)
        kind = (layout.kind, layout.columns, layout.separator)
        if kind in shown:
            continue
        shown.add(kind)
        block = _beginning(source, layout, scale, with_time)
        for line in _records(block):
            console.info(f"  {line}")
        for oddity in _oddities(block):
            console.warn(f"{source.shown}: {oddity}")
        if strict and block is not None and block.rejects and not block.rating.size:
            _, reason, text = block.rejects[0]
            raise DataError(f"none of the first {block.num_in:,} rows of {source.shown} can be read, for example "
                            f"{text[:120]!r}: {reason}. Set --columns, or mend the source.")  # fmt: skip


def _beginning(source: Source, layout: Layout, scale: tuple[float, float] | None, with_time: bool) -> Block | None:
    """The first piece of a source, read as the read pass reads it; None where there is none."""
    for piece in chunks(source, layout):
        if not isinstance(piece, str):
            block = parse(piece, layout, Rules(0, scale, with_time))
            unit = unit_of(block)
            return block if unit is None else in_seconds(block, unit)
    return None


def _records(block: Block | None) -> Iterator[str]:
    """A line for each of the first records, and one for what the first rows hold."""
    if block is None or not block.rating.size:
        return
    for i in range(min(SHOWN_RECORDS, block.rating.size)):
        user, item = (_id(block, side, i) for side in range(2))
        time = "" if block.time is None else f", time {_time(int(block.time[i]))}"
        yield f"user {user}, item {item}, rating {block.rating[i]:g}{time}"
    rows = min(SAMPLE_ROWS, block.rating.size)
    users, items = (np.unique(block.hashes[side][0][:rows]).size for side in range(2))
    ratings = np.unique(block.rating[:rows])
    yield (f"{'the first ' if rows < block.rating.size else ''}{rows:,} rows: {users:,} users, {items:,} items, "
           f"{ratings.size:,} different ratings from {ratings[0]:g} to {ratings[-1]:g}")  # fmt: skip


def _id(block: Block, side: int, i: int) -> str:
    start, length = int(block.start[side, i]), int(block.length[side, i])
    text = block.content[start : start + length].tobytes().decode("utf-8", "replace")
    return repr(text if len(text) <= MAX_SHOWN_ID else text[: MAX_SHOWN_ID - 3] + "...")


def _time(value: int) -> str:
    """Seconds since 1970, and the date that they are."""
    try:
        date = datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=value)
    except OverflowError:
        return str(value)
    return f"{value} ({date:%Y-%m-%d %H:%M})"


def _oddities(block: Block | None) -> Iterator[str]:
    """What somebody should look at, in whole sentences without a full stop."""
    if block is None:
        return
    if block.rejects:
        _, reason, text = block.rejects[0]
        refused = f"{len(block.rejects):,} of the first {block.num_in:,} rows are refused"
        yield f"{refused}, for example {text[:120]!r}: {reason}"
    rows = min(SAMPLE_ROWS, block.rating.size)
    rating = block.rating[:rows]
    if rows and float(np.median(rating)) >= EARLIEST_TIME:
        yield f"the ratings are numbers like times, such as {rating[0]:.0f}; name the columns with --columns"
    if rows < MIN_ROWS_OF_DISTINCT:
        return
    if np.unique(block.hashes[0][0][:rows]).size == rows:
        yield (f"each of the first {rows:,} rows has another user, as in a file sorted by item; if that column is not "
               "the user, name the columns with --columns")  # fmt: skip
    if np.unique(rating).size == rows:
        yield f"each of the first {rows:,} rows has another rating; if that column is not the rating, use --columns"
