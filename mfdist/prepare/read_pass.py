"""The read pass: blocks are parsed in threads and kept, in order, as hashed rows, ids once each, and refused rows."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

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


@dataclass
class Ingest:
    """What the read pass found. ``ids`` are users and items; ``sources`` the manifest's entries.

    ``float_ids``: rows whose user id, and whose item id, was a whole number written as a float.
    """

    rows: RowSpill
    ids: tuple[IdSpill, IdSpill]
    rules: Rules
    rejected_path: str
    num_in: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    rating_range: tuple[float, float] = (np.inf, -np.inf)
    time_range: tuple[int, int] = (2**63 - 1, -(2**63))
    seen_bytes: dict[tuple[Any, ...], str] = field(default_factory=dict)
    float_ids: tuple[int, int] = (0, 0)

    @property
    def num_rejected(self) -> int:
        return sum(self.rejected.values())


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
    result = Ingest(RowSpill(scratch, memory // 6), spills, rules, rejected_path)
    slots = 1 << (memory // 32 // SLOT_BYTES).bit_length() - 1
    seen = (SeenIds(slots), SeenIds(slots))
    threads = os.cpu_count() or 1
    total = sum(source.bytes for source in sources)
    with (
        ThreadPoolExecutor(threads) as pool,
        pq.ParquetWriter(rejected_path, REJECTED_SCHEMA, compression="lz4") as rejected,
        console.progress("read", total, unit="bytes") as progress,
    ):
        for source, layout in zip(sources, layouts, strict=True):
            _ingest_one(source, layout, result, seen, pool, rejected, progress, threads + 1)
            _check_source(source, layout, result, console)
    with console.busy("sorting what was read"):
        for spill in (result.rows, *result.ids):  # the last runs side by side
            spill.close()
    return result


def _ingest_one(source: Source | FrameSource, layout: Layout, result: Ingest, seen: tuple[SeenIds, SeenIds],
                pool: ThreadPoolExecutor, rejected: Any, progress: Any, window: int) -> None:  # fmt: skip
    waiting: deque[Future[Block]] = deque()
    line, before, placed, fingerprint = 1, result.num_in, 0, ""
    unit: TimeUnit | None = None

    def take() -> None:
        nonlocal line, placed, unit
        block = waiting.popleft().result()
        unit = unit or unit_of(block)
        if unit is not None:
            block = in_seconds(block, unit, result.rules.time_unit)
        _keep(block, source, line, result, seen, rejected)
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
    result.sources.append({"path": source.shown, "bytes": source.bytes, "rows": result.num_in - before,
                           "fingerprint": fingerprint, **({"times": unit.name} if unit else {})})  # fmt: skip


def _check_source(source: Source | FrameSource, layout: Layout, result: Ingest, console: Console) -> None:
    """Say the unit of a source's times; DataError where it lacks rows or has the bytes of another source."""
    entry = result.sources[-1]
    if entry.get("times", SECONDS.name) != SECONDS.name:
        console.info(f"{source.shown}: times are {entry['times']}; they are stored as seconds since 1970")
    if layout.matrix and entry["rows"] != layout.matrix.entries:
        raise DataError(f"{source.shown} says that it has {layout.matrix.entries:,} entries, and holds "
                        f"{entry['rows']:,}: it is cut off or damaged.")  # fmt: skip
    if isinstance(source, FrameSource) or not entry["rows"]:
        return
    kind = (entry["fingerprint"], source.val, source.partition)
    twin = result.seen_bytes.setdefault(kind, source.shown)
    if twin != source.shown:
        raise DataError(
            f"{twin} and {source.shown} hold the same bytes: their rows would count twice. Name one of them."
        )


def _keep(block: Block, source: Source | FrameSource, line: int, result: Ingest, seen: tuple[SeenIds, SeenIds],
          rejected: Any) -> None:  # fmt: skip
    result.num_in += block.num_in
    if block.rejects:
        _keep_rejects(block, source.shown, line, result, rejected)
    n = block.rating.size
    if n == 0:
        return
    result.float_ids = result.float_ids[0] + block.float_ids[0], result.float_ids[1] + block.float_ids[1]
    for side in range(2):
        first, second = block.hashes[side]
        new = seen[side].admit(first, second)
        result.ids[side].add(first[new], block.start[side][new], block.length[side][new], block.content)
    columns: Arrays = {"user": block.hashes[0][0], "item": block.hashes[1][0], "rating": block.rating,
                       "val": np.full(n, source.val, np.uint8)}  # fmt: skip
    low, high = result.rating_range
    result.rating_range = min(low, float(block.rating.min())), max(high, float(block.rating.max()))
    if block.time is not None:
        columns["time"] = block.time
        early, late = result.time_range
        result.time_range = min(early, int(block.time.min())), max(late, int(block.time.max()))
    result.rows.add(columns)


def _keep_rejects(block: Block, shown: str, line: int, result: Ingest, rejected: Any) -> None:
    lines, reasons, texts = zip(*block.rejects, strict=True)
    for reason in reasons:
        result.rejected[reason] = result.rejected.get(reason, 0) + 1
    for number, reason, text in block.rejects[: 5 - len(result.examples)]:
        result.examples.append(f"{shown} line {line + number}: {reason}: {text[:120]!r}")
    table = {"source": [shown] * len(lines), "line": [line + number for number in lines], "reason": list(reasons),
             "text": list(texts)}  # fmt: skip
    rejected.write_table(pa.table(table, schema=REJECTED_SCHEMA))
