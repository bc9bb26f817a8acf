"""The first two stages: cutting large files, and reading pieces into messages for the parts of users and items."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mfdist.errors import MfdistError
from mfdist.prepare.ids import U64, HashCollision, gather_bytes
from mfdist.prepare.read_pass import Found, Kept, keep, seen_ids
from mfdist.prepare.row_checks import Rules
from mfdist.prepare.spill import BUCKETS, Arrays, Ids
from mfdist.prepare_spark import pieces
from mfdist.prepare_spark.messages import (
    ITEMS,
    REJECTS,
    ROWS,
    USERS,
    Message,
    fact,
    fault,
    id_messages,
    joined,
    row_messages,
    streamed,
    taken,
    to_batches,
)
from mfdist.prepare_spark.pieces import Work

Batches = Iterable[pa.RecordBatch]
Task = Callable[[Batches], Iterator[pa.RecordBatch]]

REJECTS_ROWS = 1 << 12
HELD_BYTES = 64 << 20
"""A reading task sends its rows on when it holds so many bytes of them, or an eighth of its memory."""


@dataclass(frozen=True)
class Parts:
    """How many parts users and items are cut into by their hashes (powers of two), and where their messages go."""

    users: int
    items: int

    @property
    def ledger(self) -> int:
        """The partition of refused rows and counts: the last."""
        return self.users + self.items

    @property
    def partitions(self) -> int:
        return self.ledger + 1

    @staticmethod
    def for_bytes(size: int, part_bytes: int) -> Parts:
        """So many that a part of the users has about ``part_bytes`` of ``size`` bytes of text."""
        users = min(BUCKETS, 1 << max(1, (-(-size // part_bytes) - 1).bit_length()))
        return Parts(users, max(2, users // 4))


def part_of(hashes: U64, parts: int) -> npt.NDArray[np.int64]:
    """The part of each hash: its first bits."""
    return (hashes >> np.uint64(64 - (parts - 1).bit_length())).astype(np.int64)


def part_range(part: int, parts: int) -> tuple[int, int]:
    """The hashes of a part: [first, end)."""
    shift = 64 - (parts - 1).bit_length()
    return part << shift, (part + 1) << shift


@dataclass
class ReadFacts:
    """What one work adds up to; lines are counted from its first."""

    place: int
    found: Found
    lines: int
    fingerprint: str
    unit: Any


class _Rows:
    """Rows on their way to the parts of their users, numbered in the order in which they were read.

    Of rows that are equal to the sort, such as ratings of 0 and -0, the one read first comes first, as on one machine.
    """

    def __init__(self) -> None:
        self.held: list[Arrays] = []
        self.bytes = self.sent_before = 0

    def add(self, columns: Arrays) -> None:
        self.held.append(columns)
        self.bytes += sum(values.nbytes for values in columns.values())

    def sent(self, parts: int, place: int) -> Iterator[Message]:
        if not self.held:
            return
        rows = joined(self.held)
        self.held, self.bytes = [], 0
        for part, order in _by_part(rows["user"], parts):
            own = {name: values[order] for name, values in rows.items()}
            yield from row_messages(part, ROWS, place, own, self.sent_before)
        self.sent_before += rows["user"].size


class _Ids:
    """Ids of one side on their way to their parts."""

    def __init__(self) -> None:
        self.held: list[tuple[U64, npt.NDArray[np.int64], npt.NDArray[np.uint8]]] = []
        self.bytes = 0

    def add(self, hashes: U64, start: Any, length: Any, content: Any) -> None:
        out = np.empty(int(length.sum()), np.uint8)
        gather_bytes(content, start, length, out)
        self.held.append((hashes, length, out))
        self.bytes += 16 * hashes.size + out.size

    def sent(self, parts: int, first: int, kind: int, place: int) -> Iterator[Message]:
        if not self.held:
            return
        hashes, length, content = (np.concatenate([part[k] for part in self.held]) for k in range(3))
        self.held, self.bytes = [], 0
        for part, order in _by_part(hashes, parts):
            own: Ids = taken(hashes, length, content, order)
            yield from id_messages(first + part, kind, place, own)


class _Rejects:
    """Refused rows, as tables of their own, in order."""

    def __init__(self) -> None:
        self.held: list[pa.Table] = []
        self.sent_before = 0

    def write_table(self, table: pa.Table) -> None:
        self.held.append(table)

    def sent(self, target: int, place: int) -> Iterator[Message]:
        for table in self.held:
            for batch in table.to_batches(max_chunksize=REJECTS_ROWS):
                yield Message(target, REJECTS, place, self.sent_before, streamed(batch))
                self.sent_before += 1
        self.held = []


def _by_part(hashes: U64, parts: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """(part, places of its hashes in order) of every part that has any."""
    part = part_of(hashes, parts).astype(np.uint16)
    order = np.argsort(part, kind="stable")
    edges = np.searchsorted(part[order], np.arange(parts + 1))
    for k in np.flatnonzero(np.diff(edges)).tolist():
        yield k, order[edges[k] : edges[k + 1]]


def read_task(tasks: Sequence[Sequence[Work]], rules: Rules, parts: Parts, memory: int) -> Task:
    """The reading stage: partition k of ``spark.range(len(tasks))`` reads ``tasks[k]``."""

    def run(batches: Batches) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for k in batch.column(0).to_pylist():
                for work in tasks[k]:
                    yield from to_batches(read(work, rules, parts, memory))

    return run


def read(work: Work, rules: Rules, parts: Parts, memory: int) -> Iterator[Message]:
    """All messages of a work; its facts last, or the error that it ends with."""
    rows, users, items, rejects = _Rows(), _Ids(), _Ids(), _Rejects()
    kept = Kept(rows, (users, items), seen_ids(memory), rejects)
    facts = ReadFacts(work.place, Found(rules=rules), 0, "", work.unit)

    def sent() -> Iterator[Message]:
        yield from rows.sent(parts.users, work.place)
        yield from users.sent(parts.users, 0, USERS, work.place)
        yield from items.sent(parts.items, parts.users, ITEMS, work.place)
        yield from rejects.sent(parts.ledger, work.place)

    try:
        for block, unit in pieces.blocks(work, rules):
            facts.unit = unit
            if isinstance(block, str):
                facts.fingerprint = block
                break
            keep(block, work.file, 1 + facts.lines, facts.found, kept)
            facts.lines += block.lines
            if rows.bytes + users.bytes + items.bytes >= min(HELD_BYTES, memory // 8):
                yield from sent()
    except (MfdistError, HashCollision) as error:
        yield fault(error, parts.ledger, work.place)
        return
    yield from sent()
    yield fact(facts, parts.ledger, work.place)


def cut_task(large: Sequence[Work], rules: Rules) -> Task:
    """The cutting stage: partition k of ``spark.range(len(large))`` cuts the file of ``large[k]``."""

    def run(batches: Batches) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for k in batch.column(0).to_pylist():
                yield from to_batches([_cut(large[k], rules)])

    return run


def _cut(work: Work, rules: Rules) -> Message:
    try:
        return fact((work.source, pieces.cut(work.file, work.layout, rules)), place=work.place)
    except MfdistError as error:
        return fault(error, place=work.place)
