"""The engine of ``--engine spark``: the stages in their order, and the commit of what the tasks have written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mfdist import storage
from mfdist.data.dataset import Dataset, FileEntry
from mfdist.log import Console
from mfdist.prepare.config import PrepareConfig
from mfdist.prepare.count_pass import ROW_COST, Plan
from mfdist.prepare.ids import text_spans
from mfdist.prepare.layout import Layout
from mfdist.prepare.prepare import named_sources, rules_of
from mfdist.prepare.read_pass import REJECTED_SCHEMA, Found, FrameSource, Ingest
from mfdist.prepare.sources import Source
from mfdist.prepare.spill import Ids, IdSpill, RowSpill
from mfdist.prepare.vocabulary import vocabulary_file
from mfdist.prepare.write_pass import ItemCounts, Totals, finish_dataset, make_manifest, open_directory
from mfdist.prepare_spark import pieces
from mfdist.prepare_spark.count_stage import Core
from mfdist.prepare_spark.driver import PART_BYTES, Gathered, gather, make_plan, moved
from mfdist.prepare_spark.lake_tables import copied
from mfdist.prepare_spark.messages import COLUMNS, ITEMS, REJECTS, ROWS, USERS, ids_in, unpacked
from mfdist.prepare_spark.read_stage import Parts
from mfdist.prepare_spark.session import (
    check_installed,
    check_seen,
    check_shared,
    collected,
    facts_in,
    session,
    streamed,
)
from mfdist.prepare_spark.write_stage import (
    COUNTED,
    Numbering,
    Writing,
    Written,
    number_task,
    rejects_table,
    write_task,
)

TEXT_ROW_BYTES = 25
"""A row of text, about: ids of ten characters, a rating, a time."""
DISK_ROW_BYTES = 110
LEAST_TASK_BYTES = 512 << 20
CORES, ROUNDS = 4, 8
"""Of an executor, and tasks that each core does one after the other in a stage: what ``expectation`` reckons with."""


class SparkEngine:
    """Prepare on a Spark cluster (see the room's first lines); UsageError where PySpark or Java is missing."""

    def __init__(self, master: str | None) -> None:
        check_installed()
        self._master = master
        self._held = ExitStack()

    def __enter__(self) -> SparkEngine:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the copies of tables."""
        self._held.close()

    def sources(self, config: PrepareConfig, console: Console) -> list[Source]:
        if config.source_format is None:
            return named_sources(config, console)
        spark = self._held.enter_context(session(self._master))  # it is started once
        return self._held.enter_context(copied(spark, config, console))

    def dataset(self, config: PrepareConfig, sources: Sequence[Source | FrameSource], layouts: list[Layout], salt: int,
                request: dict[str, Any], scratch: str, console: Console) -> Dataset:  # fmt: skip
        rules = rules_of(config, layouts, salt, console)
        staging = storage.absolute(staging_folder(config.target, scratch))
        try:
            with session(self._master) as spark:
                check_shared(spark, staging, config.target, (source.path for source in files(sources)))
                found, gathered = gather(spark, config, files(sources), layouts, rules, config.duplicates, scratch,
                                         console)  # fmt: skip
                with closing(gathered):
                    plan, core = make_plan(config, found, gathered, console)
                    with console.busy(f"write {plan.num_lanes} lanes"):
                        totals, written = write(config, found, gathered, plan, core, staging)
            return commit(config, found, plan, totals, written, request, scratch, console)
        finally:
            storage.remove(staging if storage.is_local(staging) else storage.join(config.target, ".scratch"))

    def read(self, config: PrepareConfig, sources: Sequence[Source | FrameSource], layouts: list[Layout], salt: int,
             scratch: str, console: Console, time_unit: int) -> Ingest:  # fmt: skip
        """The rows of an append: read on the cluster, brought to the driver, which adds them to the dataset."""
        rules = rules_of(config, layouts, salt, console, time_unit)
        with session(self._master) as spark:
            check_shared(spark, None, config.target, (source.path for source in files(sources)))
            found, gathered = gather(spark, config, files(sources), layouts, rules, "keep", scratch, console)
            with closing(gathered), console.busy("bringing what was read to the driver"):
                return brought(config, found, gathered, scratch)


def expectation(sources: Sequence[Source | FrameSource], layouts: Sequence[Layout]) -> str:
    """What the sources will take on a cluster, as a sentence: tasks, executors, memory and disk of each."""
    given = files(sources)
    reading = sum(-(-source.bytes // pieces.TASK_BYTES) for source, layout in zip(given, layouts, strict=True)
                  if pieces.is_large(source, layout))  # fmt: skip
    small = [work for work in pieces.works(given, layouts, {}) if not pieces.is_large(work.file, work.layout)]
    reading += len(pieces.tasks(small))
    size = pieces.expected_bytes(given)
    parts = Parts.for_bytes(size, PART_BYTES)
    rows = size // TEXT_ROW_BYTES
    part_bytes = rows // parts.users * ROW_COST
    executors = -(-max(reading, parts.users) // (CORES * ROUNDS))
    memory = min(CORES, max(reading, parts.users)) * max(part_bytes, LEAST_TASK_BYTES) / 2**30
    disk = rows * DISK_ROW_BYTES / executors / 2**30
    return (f"on Spark: about {rows:,} rows, {reading:,} tasks read, {parts.users:,} sort; {executors:,} "
            f"executor{'s' * (executors > 1)} of {CORES} cores would do either in at most {ROUNDS} rounds, each with "
            f"{memory:.1f} GiB of memory beside Spark's own and {disk:.1f} GiB of disk")  # fmt: skip


def files(sources: Sequence[Source | FrameSource]) -> list[Source]:
    found = [source for source in sources if isinstance(source, Source)]
    assert len(found) == len(sources), "a data frame is no file"
    return found


def staging_folder(out: str, scratch: str) -> str:
    """Where attempts write: in the store of ``out``, under a name that no killed job's late tasks know."""
    name = f"attempts-{secrets.token_hex(8)}"
    return os.path.join(scratch, name) if storage.is_local(out) else storage.join(out, ".scratch", name)


def write(config: PrepareConfig, found: Found, gathered: Gathered, plan: Plan, core: Core,
          staging: str) -> tuple[Totals, list[Written]]:  # fmt: skip
    """Number and write: what all parts add up to, and what the attempts that count have written."""
    parts = gathered.parts
    users, rows = np.zeros(parts.users, np.int64), np.zeros(parts.users, np.int64)
    for fact in gathered.facts:
        users[fact.part], rows[fact.part] = fact.users, fact.rows
    shift = np.uint64(64 - (parts.items - 1).bit_length())
    firsts = np.arange(1, parts.items, dtype=np.uint64) << shift
    edges = np.concatenate([[0], np.searchsorted(plan.items.hashes, firsts), [plan.items.hashes.size]])
    same = plan.items is plan.all_items
    numbering = Numbering(
        parts=parts, core=core, items=core.items if same else gathered.share(plan.items.hashes),
        item_edges=edges.astype(np.int64), users_before=np.cumsum(users) - users, rows_before=np.cumsum(rows) - rows,
        kept_rows=plan.kept_rows, num_lanes=plan.num_lanes, rule=plan.rule, lines_before=gathered.lines_before,
    )  # fmt: skip
    writing = Writing(numbering=numbering, staging=staging, order=config.order, seed=config.seed,
                      has_time=found.rules.with_time, wide_ids=plan.wide_ids)  # fmt: skip
    numbered = gathered.frame.mapInArrow(number_task(numbering), COLUMNS)
    frame = moved(numbered, numbering.partitions).mapInArrow(write_task(writing), COLUMNS)
    facts = facts_in(collected(frame))
    totals = added([fact for fact in facts if isinstance(fact, Totals)])
    return totals, [fact for fact in facts if isinstance(fact, Written)]


def added(parts: Sequence[Totals]) -> Totals:
    """The totals of all parts, in order; lanes' files are not in them."""
    total = Totals()
    for part in parts:
        total.users, total.rows = max(total.users, part.users), max(total.rows, part.rows)
        for lane, (first, end) in part.lane_users.items():
            total.lane_users[lane] = (total.lane_users.get(lane, (first, end))[0], end)
        for activity, users in part.user_activity.items():
            total.user_activity[activity] = total.user_activity.get(activity, 0) + users
        total.cold_user_val += part.cold_user_val
        total.val_in_train = (total.val_in_train[0] + part.val_in_train[0],
                              total.val_in_train[1] + part.val_in_train[1])  # fmt: skip
    return total


def commit(config: PrepareConfig, found: Found, plan: Plan, totals: Totals, written: Sequence[Written],
           request: dict[str, Any], scratch: str, console: Console) -> Dataset:  # fmt: skip
    """Give the files of the attempts that count their names, and write items, report and manifest."""
    check_seen((storage.join(one.folder, entry.path) for one in written for entry in one.files), config.target)
    open_directory(config.target)
    entries = {entry.path: entry for attempt in written for entry in attempt.files}
    for attempt in written:
        if attempt.lane >= 0:
            totals.lane_files[attempt.lane], totals.lane_rows[attempt.lane] = attempt.files, attempt.sizes
            totals.facts.add(attempt.facts)
        for entry in attempt.files:
            if not entry.path.startswith("items/"):
                put(storage.join(attempt.folder, entry.path), storage.join(config.target, entry.path))
    with console.busy("writing the items"):
        counts, item_file = write_items(config.target, written, scratch)
    others = [entries["users.parquet"], item_file, entries["rejected.parquet"]]
    manifest = make_manifest(config, found, plan, totals, counts, others, request)
    return finish_dataset(config.target, manifest, found, totals, counts, console)


def put(source: str, target: str) -> None:
    storage.make_dirs(target.rpartition("/")[0])
    storage.move(source, target)


def write_items(root: str, written: Sequence[Written], scratch: str) -> tuple[ItemCounts, FileEntry]:
    """items.parquet of the parts that tasks have written, and the counts of all items."""
    paths = {e.path: storage.join(w.folder, e.path) for w in written for e in w.files if e.path.startswith("items/")}
    counts: list[list[npt.NDArray[np.int64]]] = []
    with vocabulary_file(root, "items", scratch) as items:
        for name in sorted(paths):
            table = pq.read_table(pa.BufferReader(storage.read_bytes(paths[name]))).combine_chunks()
            own = [table.column(column).to_numpy() for column in COUNTED]
            texts = table.column("text").chunk(0) if table.num_rows else None
            if texts is not None:
                content, start, _ = text_spans(texts)
                ids = Ids(np.zeros(len(texts), np.uint64), np.append(start, content.size), content)
                items.write(ids, np.arange(len(texts)), own[0])
            counts.append(own)
        items.flush()
    return ItemCounts(*(np.concatenate([own[k] for own in counts]) for k in range(3))), items.file.done


def brought(config: PrepareConfig, found: Found, gathered: Gathered, scratch: str) -> Ingest:
    """The rows and ids of the cluster as the read pass of one machine leaves them."""
    ids = (IdSpill(scratch, "users", config.memory // 16), IdSpill(scratch, "items", config.memory // 16))
    rows, path = RowSpill(scratch, config.memory // 6), os.path.join(scratch, "rejected.parquet")
    with pq.ParquetWriter(path, REJECTED_SCHEMA, compression="lz4") as rejected:
        for message in streamed(gathered.frame):
            if message.kind == ROWS:
                columns = {name: values.copy() for name, values in unpacked(message.data).items()}
                columns.pop("occurrence")
                rows.add(columns)
            elif message.kind in (USERS, ITEMS):
                own, _ = ids_in(message.data)
                ids[message.kind - USERS].add(own.hashes, own.edges[:-1], np.diff(own.edges), own.content)
            elif message.kind == REJECTS:
                rejected.write_table(rejects_table(message, gathered.lines_before[message.place]))
    for spill in (rows, *ids):
        spill.close()
    return Ingest(**vars(found), rows=rows, ids=ids, rejected_path=path)
