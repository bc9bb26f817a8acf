"""The last two stages: users are numbered and their rows cut into lanes; then one task writes each file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mfdist import storage
from mfdist.data.dataset import FileEntry
from mfdist.errors import MfdistError
from mfdist.prepare.count_pass import Plan
from mfdist.prepare.ids import RowTable
from mfdist.prepare.lanes import LaneFacts, LaneWriter
from mfdist.prepare.read_pass import REJECTED_SCHEMA
from mfdist.prepare.spill import Arrays, Ids
from mfdist.prepare.split import SplitRule, val_in_train
from mfdist.prepare.vocabulary import vocabulary_file
from mfdist.prepare.write_pass import Totals, chosen_rows, lane_borders, numbered, write_rejected
from mfdist.prepare_spark import session
from mfdist.prepare_spark.count_stage import Core
from mfdist.prepare_spark.gather_stage import opened, rows_and_ids
from mfdist.prepare_spark.messages import (
    COUNTS,
    ITEMS,
    REJECTS,
    ROWS,
    USERS,
    Message,
    fact,
    fault,
    id_messages,
    ids_in,
    joined,
    row_messages,
    taken,
    to_batches,
    unpacked,
)
from mfdist.prepare_spark.read_stage import Batches, Parts, Task
from mfdist.prepare_spark.shared import SharedArray, shared_table

COUNTED = ("train", "val", "val_of_cold")


@dataclass(frozen=True, kw_only=True)
class Numbering:
    """What the tasks need to know of the whole: the plan's numbers, and users and rows before each part."""

    parts: Parts
    core: Core
    items: SharedArray  # the vocabulary
    item_edges: npt.NDArray[np.int64]  # first item row of each part of the items, and the end
    users_before: npt.NDArray[np.int64]
    rows_before: npt.NDArray[np.int64]
    kept_rows: int
    num_lanes: int
    rule: SplitRule
    lines_before: dict[int, int]  # of each work within its file

    @property
    def plan(self) -> Plan:
        alive = None if self.core.alive is None else self.core.alive.array
        return Plan(
            items=shared_table(self.items), all_items=self.core.table, alive=alive, kept_rows=self.kept_rows,
            merged_rows=0, filtered_rows=0, num_lanes=self.num_lanes, rule=self.rule, wide_ids=False,
        )  # fmt: skip

    @property
    def users_target(self) -> int:
        """After the lanes: the partition that writes users.parquet."""
        return self.num_lanes

    @property
    def ledger_target(self) -> int:
        """The partition that writes rejected.parquet and passes facts on."""
        return self.num_lanes + 1

    @property
    def first_items_target(self) -> int:
        return self.num_lanes + 2

    @property
    def partitions(self) -> int:
        return self.first_items_target + self.parts.items


class _SentUsers:
    """Takes a part's users in order, with their training ratings."""

    def __init__(self) -> None:
        self.ids: list[tuple[Ids, npt.NDArray[np.int64]]] = []

    def write(self, ids: Ids, places: npt.NDArray[np.int64], ratings: npt.NDArray[np.int64]) -> None:
        own = taken(ids.hashes, np.diff(ids.edges), ids.content, places)
        self.ids.append((own, ratings))


class _SentCounts:
    """Counts ratings of the items that a part has."""

    def __init__(self) -> None:
        self.item = np.zeros(0, np.int64)
        self.counts: Arrays = {}

    def add(self, item: npt.NDArray[np.int64], is_val: npt.NDArray[np.bool_], cold: npt.NDArray[np.bool_]) -> None:
        self.item, place = np.unique(item, return_inverse=True)
        chosen = (~is_val, is_val, cold)
        self.counts = {name: np.bincount(place[mask], minlength=self.item.size)
                       for name, mask in zip(COUNTED, chosen, strict=True)}  # fmt: skip


def number_task(given: Numbering) -> Task:
    """Messages of a gathered part as messages to the files that they belong in."""

    def run(batches: Batches) -> Iterator[pa.RecordBatch]:
        target, messages = opened(batches)
        if 0 <= target < given.parts.users:
            yield from to_batches(numbered_part(target, messages, given))
        elif target == given.parts.ledger:
            rejects = (m for m in messages if m.kind == REJECTS)
            yield from to_batches(m._replace(target=given.ledger_target) for m in rejects)
        else:
            first = given.first_items_target - given.parts.users
            yield from to_batches(m._replace(target=first + target) for m in messages if m.kind == ITEMS)

    return run


def numbered_part(part: int, messages: Iterator[Message], given: Numbering) -> Iterator[Message]:
    """Rows lane by lane, users, counts of items, and a fact, ``Totals`` of this part alone."""
    rows, ids = rows_and_ids(messages)
    rows = chosen_rows(rows, given.plan, given.core.min_user)
    totals = Totals(users=int(given.users_before[part]), rows=int(given.rows_before[part]))
    users, counts = _SentUsers(), _SentCounts()
    if given.rule.kind == "given":
        totals.val_in_train = val_in_train(rows)
    for lane, own in numbered(rows, ids, users, lane_borders(given.plan), totals, counts):
        yield from row_messages(lane, ROWS, part, own)
    for own_ids, ratings in users.ids:
        yield from id_messages(given.users_target, USERS, part, own_ids, ratings=ratings)
    edges = np.searchsorted(counts.item, given.item_edges)
    for k in np.flatnonzero(np.diff(edges)).tolist():
        columns = {"item": counts.item, **counts.counts}
        own = {name: values[edges[k] : edges[k + 1]] for name, values in columns.items()}
        yield from row_messages(given.first_items_target + k, COUNTS, part, own)
    yield fact(totals, given.ledger_target, part)


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How files are written: ``staging`` is the folder of all attempts, in the dataset's store."""

    numbering: Numbering
    staging: str
    order: str
    seed: int
    has_time: bool
    wide_ids: bool


@dataclass
class Written:
    """What a task has written, below the folder of its attempt: for the driver."""

    folder: str
    files: list[FileEntry] = field(default_factory=list)
    lane: int = -1
    sizes: tuple[int, int] = (0, 0)
    facts: LaneFacts = field(default_factory=LaneFacts)


def write_task(given: Writing) -> Task:
    """One partition's file, written below a folder that no other attempt has; for the driver a fact, Written."""

    def run(batches: Batches) -> Iterator[pa.RecordBatch]:
        folder = storage.join(given.staging, f"attempt-{session.attempt()}")
        target, messages = opened(batches)
        if target >= 0:
            with _scratch(folder) as scratch:
                yield from to_batches(_written(target, messages, folder, given, scratch))

    return run


def _scratch(folder: str) -> tempfile.TemporaryDirectory[str]:
    """A local folder for an attempt; where it can be, one that is removed with all attempts if the task is killed."""
    if not storage.is_local(folder):
        return tempfile.TemporaryDirectory(prefix="mfdist-prepare-")
    os.makedirs(storage.local_path(folder))
    return tempfile.TemporaryDirectory(dir=storage.local_path(folder))


def _written(target: int, messages: Iterator[Message], folder: str, given: Writing, scratch: str) -> Iterator[Message]:
    numbering = given.numbering
    try:
        if target < numbering.num_lanes:
            yield fact(_lane(target, messages, folder, given, scratch))
        elif target == numbering.users_target:
            yield fact(_users(messages, folder, scratch))
        elif target == numbering.ledger_target:
            yield from _ledger(messages, folder, numbering, scratch)
        else:
            yield fact(_items(target - numbering.first_items_target, messages, folder, numbering, scratch))
    except MfdistError as error:
        yield fault(error)


def _lane(lane: int, messages: Iterator[Message], folder: str, given: Writing, scratch: str) -> Written:
    writer = LaneWriter(root=folder, scratch=scratch, order=given.order, seed=given.seed, has_time=given.has_time,
                        wide_ids=given.wide_ids, num_lanes=given.numbering.num_lanes)  # fmt: skip
    rows = joined([unpacked(message.data) for message in messages])
    _, files, sizes, facts = writer.write(lane, [rows])
    return Written(folder, files, lane, sizes, facts)


def _users(messages: Iterator[Message], folder: str, scratch: str) -> Written:
    with vocabulary_file(folder, "users", scratch) as users:
        for message in messages:
            ids, columns = ids_in(message.data)
            users.write(ids, np.arange(len(ids)), columns["ratings"])
        users.flush()
    return Written(folder, [users.file.done])


def _ledger(messages: Iterator[Message], folder: str, numbering: Numbering, scratch: str) -> Iterator[Message]:
    """rejected.parquet, with lines counted from the beginning of each file; facts pass through."""
    path = os.path.join(scratch, "rejected.parquet")
    with pq.ParquetWriter(path, REJECTED_SCHEMA, compression="lz4") as rejected:
        for message in messages:
            if message.kind != REJECTS:
                yield message
                continue
            rejected.write_table(rejects_table(message, numbering.lines_before[message.place]))
    yield fact(Written(folder, [write_rejected(folder, path, scratch)]))


def rejects_table(message: Message, lines_before: int) -> pa.Table:
    """Refused rows of a work, with lines counted from the beginning of its file."""
    batch = pa.ipc.open_stream(message.data).read_next_batch()
    columns = {name: batch.column(name) for name in batch.schema.names}
    line = batch.column("line").to_numpy() + lines_before
    return pa.table({**columns, "line": pa.array(line)}, schema=REJECTED_SCHEMA)


ITEM_SCHEMA = pa.schema([("text", pa.large_binary()), *((name, pa.int64()) for name in COUNTED)])


def _items(part: int, messages: Iterator[Message], folder: str, numbering: Numbering, scratch: str) -> Written:
    """A file of this part's items in their order, texts and counts: the driver makes items.parquet of all parts."""
    first, end = (int(numbering.item_edges[part + k]) for k in range(2))
    counts = {name: np.zeros(end - first, np.int64) for name in COUNTED}
    ids: list[Ids] = []
    for message in messages:
        if message.kind == ITEMS:
            ids.append(ids_in(message.data)[0])
            continue
        columns = unpacked(message.data)
        for name in COUNTED:
            np.add.at(counts[name], columns["item"] - first, columns[name])
    texts = _texts_of(ids, shared_table(numbering.items))
    path = os.path.join(scratch, "items.parquet")
    table = pa.table({"text": texts, **{name: pa.array(values) for name, values in counts.items()}}, schema=ITEM_SCHEMA)
    pq.write_table(table, path)
    with open(path, "rb") as stream:
        storage.write_bytes(storage.join(folder, "items", f"{part:05d}.parquet"), stream.read())
    return Written(folder, [FileEntry(path=f"items/{part:05d}.parquet", rows=end - first, bytes=0, checksum="")])


def _texts_of(ids: list[Ids], vocabulary: RowTable) -> pa.LargeBinaryArray:
    """The texts of those ids that are in the vocabulary, in their order, which is that of their hashes."""
    parts = []
    for part in ids:
        edges, content = part.take(np.flatnonzero(vocabulary.rows(part.hashes) >= 0))
        parts.append(pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), edges.size - 1, [None, pa.py_buffer(edges), pa.py_buffer(content)]))  # fmt: skip
    return pa.concat_arrays(parts) if parts else pa.array([], pa.large_binary())
