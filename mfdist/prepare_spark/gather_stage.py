"""The third stage: all rows of a part of the users, sorted and merged, and all ids of a part, once each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa

from mfdist.prepare.ids import HashCollision
from mfdist.prepare.spill import Arrays, Ids, sorted_ids
from mfdist.prepare.split import Duplicates, merged, sorted_rows, user_runs
from mfdist.prepare_spark.messages import (
    COUNTS,
    ITEMS,
    ROWS,
    USERS,
    Message,
    fact,
    fault,
    from_batches,
    id_messages,
    ids_in,
    joined,
    joined_ids,
    packed,
    row_messages,
    to_batches,
    unpacked,
)
from mfdist.prepare_spark.read_stage import Batches, Parts, Task, part_range


@dataclass(frozen=True)
class PartFacts:
    """What a part of the users holds: rows as read, rows after merging, and users."""

    part: int
    read_rows: int
    rows: int
    users: int


def gather_task(parts: Parts, duplicates: str) -> Task:
    """What a part's task makes of the messages that were read: sorted rows, sorted ids, counts.

    For the driver: a fact of each part of the users, and COUNTS with the hashes of each part of the items. Refused
    rows, facts and faults of the reading stage pass through.
    """

    def run(batches: Batches) -> Iterator[pa.RecordBatch]:
        yield from to_batches(gathered(from_batches(batches), parts, duplicates))

    return run


def gathered(messages: Iterator[Message], parts: Parts, duplicates: str) -> Iterator[Message]:
    rows: list[Arrays] = []
    ids: list[Ids] = []
    target = 0
    for message in messages:
        target = message.target
        if target == parts.ledger:
            yield message
        elif message.kind == ROWS:
            rows.append(unpacked(message.data))
        else:
            ids.append(ids_in(message.data)[0])
    if not ids:
        return
    kind = USERS if target < parts.users else ITEMS
    try:
        own = merged_ids(ids)
        yield from id_messages(target, kind, 0, own)
        if kind == ITEMS:
            yield Message(target, COUNTS, target, 0, packed({"hash": own.hashes}))
        else:
            yield from gathered_rows(rows, target, parts, duplicates)
    except (HashCollision, Duplicates) as error:
        yield fault(error, target, target)


def merged_ids(parts: list[Ids]) -> Ids:
    """Ids of many messages sorted by hash, once each; HashCollision where two different ones share a hash."""
    hashes, length, content = joined_ids(parts)
    parts.clear()
    return sorted_ids(hashes, np.cumsum(length) - length, length, content)


def gathered_rows(held: list[Arrays], part: int, parts: Parts, duplicates: str) -> Iterator[Message]:
    rows = joined(held)
    held.clear()
    read_rows = rows["user"].size
    rows = merged(sorted_rows(rows, *part_range(part, parts.users)), duplicates)
    yield from row_messages(part, ROWS, 0, rows)
    yield fact(PartFacts(part, read_rows, rows["user"].size, user_runs(rows["user"])[0].size), part, part)


def opened(batches: Batches) -> tuple[int, Iterator[Message]]:
    """(its target, the messages) of one partition of gathered messages; -1 where it is empty."""
    messages = from_batches(batches)
    first = next(messages, None)
    return (-1, messages) if first is None else (first.target, chain([first], messages))


def rows_and_ids(messages: Iterator[Message]) -> tuple[Arrays, Ids]:
    """The merged rows of a part of the users, and its ids: what :func:`gathered` gave."""
    rows: list[Arrays] = []
    ids: list[Ids] = []
    for message in messages:
        if message.kind == ROWS:
            rows.append(unpacked(message.data))
        elif message.kind == USERS:
            ids.append(ids_in(message.data)[0])
    hashes, length, content = joined_ids(ids)
    return joined(rows), Ids(hashes, np.concatenate([[0], np.cumsum(length)]).astype(np.int64), content)
