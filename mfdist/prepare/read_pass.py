"""The read pass: blocks are parsed in threads and kept, in order, as hashed rows, ids once each, and refused rows.

:class:`Found` is what the rows add up to, and :func:`keep` takes in one block: on whatever engine blocks are read.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mfdist.errors import DataError
from mfdist.log import Console
from mfdist.prepare.ids import SeenIds
from mfdist.prepare.layout import Layout
from mfdist.prepare.readers import chunks, parse
from mfdist.prepare.row_checks import Block, Rules
from mfdist.prepare.sources import Source
from mfdist.prepare.spill import Arrays, IdSpill, RowSpill
from mfdist.prepare.tables import BATCH_ROWS
from mfdist.prepare.times import SECONDS, TimeUnit, in_seconds, unit_of

REJECTED_SCHEMA = pa.schema(
    [("source", pa.string()), ("line", pa.int64()), ("reason", pa.string()), ("text", pa.string())]
)
SLOT_BYTES = 16


@dataclass(frozen=True)
class FrameSource:
    """A data frame as an Arrow table, in the place of a file."""

    table: pa.Table
    val: bool = False
    shown: str = "data frame"
    bytes: int = 0

    def chunks(self) -> Iterator[Any]:
        for batch in self.table.to_batches(max_chunksize=BATCH_ROWS):
            yield pa.Table.from_batches([batch]), 0
        yield "data frame"


class Refused(NamedTuple):
    """A refused row as it is shown."""

    shown: str
    line: int
    reason: str
    text: str

    def __str__(self) -> str:
        return f"{self.shown} line {self.line}: {self.reason}: {self.text[:120]!r}"


@dataclass(kw_only=True)
class Found:
    """What the read rows add up to. ``sources``: the manifest's entries; ``examples``: the first refused rows.

    ``float_ids``: rows whose user id, and whose item id, was a whole number written as a float.
    """

    rules: Rules
    num_in: int = 0
    num_rows: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    examples: list[Refused] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    rating_range: tuple[float, float] = (np.inf, -np.inf)
    time_range: tuple[int, int] = (2**63 - 1, -(2**63))
    seen_bytes: dict[tuple[Any, ...], str] = field(default_factory=dict)
    float_ids: tuple[int, int] = (0, 0)

    @property
    def num_rejected(self) -> int:
        return sum(self.rejected.values())


@dataclass(kw_only=True)
class Ingest(Found):
    """What the read pass found, and its rows and ``ids`` (users, items)."""

    rows: RowSpill
    ids: tuple[IdSpill, IdSpill]
    rejected_path: str


class Kept(NamedTuple):
    """Where a block goes: ``rows``, ``ids`` of users and items, those ``seen`` before, and a writer of refused rows."""

    rows: Any
    ids: tuple[Any, Any]
    seen: tuple[SeenIds, SeenIds]
    rejected: Any


def ingest(
    sources: Sequence[Source | FrameSource],
    layouts: Sequence[Layout],
    rules: Rules,
    scratch: str,
    memory: int,
    console: Console,
) -> Ingest:
    """Read every source once. Needs about a quarter of ``memory`` for rows and an eighth for ids before it spills."""
    rejected_path = os.path.join(scratch, "rejected.parquet")
    spills = (IdSpill(scratch, "users", memory // 16), IdSpill(scratch, "items", memory // 16))
    result = Ingest(rules=rules, rows=RowSpill(scratch, memory // 6), ids=spills, rejected_path=rejected_path)
    seen = seen_ids(memory)
    threads = os.cpu_count() or 1
    total = sum(source.bytes for source in sources)
    with (
        ThreadPoolExecutor(threads) as pool,
        pq.ParquetWriter(rejected_path, REJECTED_SCHEMA, compression="lz4") as rejected,
        console.progress("read", total, unit="bytes") as progress,
    ):
        for source, layout in zip(sources, layouts, strict=True):
            kept = Kept(result.rows, result.ids, seen, rejected)
            _ingest_one(source, layout, result, kept, pool, progress, threads + 1)
            check_source(source, layout, result, console)
    with console.busy("sorting what was read"):
        for spill in (result.rows, *result.ids):  # the last runs side by side
            spill.close()
    return result


def seen_ids(memory: int) -> tuple[SeenIds, SeenIds]:
    """Of users and items, together within a sixteenth of ``memory``."""
    slots = 1 << (memory // 32 // SLOT_BYTES).bit_length() - 1
    return SeenIds(slots), SeenIds(slots)


def timed(block: Block, unit: TimeUnit | None, rules: Rules) -> tuple[Block, TimeUnit | None]:
    """The block with times in seconds, and the unit of its file: ``unit``, or what the block is the first to show."""
    unit = unit or unit_of(block)
    return (block if unit is None else in_seconds(block, unit, rules.time_unit)), unit


def source_entry(source: Source | FrameSource, rows: int, fingerprint: str, unit: TimeUnit | None) -> dict[str, Any]:
    """What the manifest says of a source."""
    return {"path": source.shown, "bytes": source.bytes, "rows": rows, "fingerprint": fingerprint,
            **({"times": unit.name} if unit else {})}  # fmt: skip


def _ingest_one(source: Source | FrameSource, layout: Layout, result: Ingest, kept: Kept, pool: ThreadPoolExecutor,
                progress: Any, window: int) -> None:  # fmt: skip
    waiting: deque[Future[Block]] = deque()
    line, before, placed, fingerprint = 1, result.num_in, 0, ""
    unit: TimeUnit | None = None

    def take() -> None:
        nonlocal line, placed, unit
        block, unit = timed(waiting.popleft().result(), unit, result.rules)
        keep(block, source, line, result, kept)
        line += block.lines
        progress.advance(max(block.packed_bytes - placed, 0))
        placed = max(placed, block.packed_bytes)

    pieces = source.chunks() if isinstance(source, FrameSource) else chunks(source, layout)
    for piece in pieces:
        if isinstance(piece, str):
            fingerprint = piece
            break
        waiting.append(pool.submit(parse, piece, layout, result.rules))
        if len(waiting) >= window:
            take()
    while waiting:
        take()
    result.sources.append(source_entry(source, result.num_in - before, fingerprint, unit))


def check_source(source: Source | FrameSource, layout: Layout, result: Found, console: Console) -> None:
    """Say the unit of a source's times; DataError where it lacks rows or has the bytes of another source.

    Parts of a table may be equal: a table has the rows that it has.
    """
    entry = result.sources[-1]
    if entry.get("times", SECONDS.name) != SECONDS.name:
        console.info(f"{source.shown}: times are {entry['times']}; they are stored as seconds since 1970")
    if layout.matrix and entry["rows"] != layout.matrix.entries:
        raise DataError(f"{source.shown} says that it has {layout.matrix.entries:,} entries, and holds "
                        f"{entry['rows']:,}: it is cut off or damaged.")  # fmt: skip
    if isinstance(source, FrameSource) or not entry["rows"]:
        return
    kind = (entry["fingerprint"], source.val, source.partition, source.part)
    twin = result.seen_bytes.setdefault(kind, source.shown)
    if twin != source.shown:
        raise DataError(
            f"{twin} and {source.shown} hold the same bytes: their rows would count twice. Name one of them."
        )


def keep(block: Block, source: Source | FrameSource, line: int, found: Found, kept: Kept) -> None:
    """Take in a block whose first line is ``line``: counts to ``found``, rows, new ids and refused rows to ``kept``."""
    found.num_in += block.num_in
    if block.rejects:
        _keep_rejects(block, source.shown, line, found, kept.rejected)
    n = block.rating.size
    if n == 0:
        return
    found.num_rows += n
    found.float_ids = found.float_ids[0] + block.float_ids[0], found.float_ids[1] + block.float_ids[1]
    for side in range(2):
        first, second = block.hashes[side]
        new = kept.seen[side].admit(first, second)
        kept.ids[side].add(first[new], block.start[side][new], block.length[side][new], block.content)
    columns: Arrays = {"user": block.hashes[0][0], "item": block.hashes[1][0], "rating": block.rating,
                       "val": np.full(n, source.val, np.uint8)}  # fmt: skip
    low, high = found.rating_range
    found.rating_range = min(low, float(block.rating.min())), max(high, float(block.rating.max()))
    if block.time is not None:
        columns["time"] = block.time
        early, late = found.time_range
        found.time_range = min(early, int(block.time.min())), max(late, int(block.time.max()))
    kept.rows.add(columns)


def _keep_rejects(block: Block, shown: str, line: int, found: Found, rejected: Any) -> None:
    lines, reasons, texts = zip(*block.rejects, strict=True)
    for reason in reasons:
        found.rejected[reason] = found.rejected.get(reason, 0) + 1
    for number, reason, text in block.rejects[: 5 - len(found.examples)]:
        found.examples.append(Refused(shown, line + number, reason, text))
    table = {"source": [shown] * len(lines), "line": [line + number for number in lines], "reason": list(reasons),
             "text": list(texts)}  # fmt: skip
    rejected.write_table(pa.table(table, schema=REJECTED_SCHEMA))
