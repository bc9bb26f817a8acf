"""The stages as one program: each function runs one of them on the cluster and gives what the driver learns from it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count as numbers_from
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from mfdist.errors import DataError
from mfdist.log import Console
from mfdist.prepare.config import PrepareConfig
from mfdist.prepare.count_pass import Plan, check_memory, cut_by_time, plan_of_counts
from mfdist.prepare.ids import HashCollision, RowTable
from mfdist.prepare.layout import Layout
from mfdist.prepare.prepare import check_read
from mfdist.prepare.read_pass import Found, check_source, source_entry
from mfdist.prepare.row_checks import Rules
from mfdist.prepare.sources import Source
from mfdist.prepare.spill import Arrays
from mfdist.prepare.split import Duplicates, core
from mfdist.prepare_spark import pieces
from mfdist.prepare_spark.count_stage import RANGES, Core, core_count, count_task, kept_count, sum_task, time_count
from mfdist.prepare_spark.gather_stage import PartFacts, gather_task
from mfdist.prepare_spark.messages import (
    COLUMNS,
    COUNTS,
    FACT,
    FAULT,
    ITEMS,
    USERS,
    Message,
    ids_in,
    unpacked,
    value_of,
)
from mfdist.prepare_spark.read_stage import Parts, ReadFacts, Task, cut_task, part_of, read_task
from mfdist.prepare_spark.session import collected, facts_in, kept
from mfdist.prepare_spark.shared import SharedArray, share

PART_BYTES = 64 << 20
"""Of text, whose rows are one part of the users: about two and a half million."""


@dataclass
class Gathered:
    """The rows and ids that were read, on the cluster's disks as ``frame``; ``parts``, in order, of the users.

    ``lines_before``: of each work within its file. ``hashes``: of all items, sorted.
    """

    spark: Any
    frame: Any
    parts: Parts
    scratch: str
    facts: list[PartFacts]
    hashes: npt.NDArray[np.uint64]
    lines_before: dict[int, int]
    token: str = field(default_factory=lambda: secrets.token_hex(4))
    _names: Iterator[int] = field(default_factory=numbers_from)

    def close(self) -> None:
        """Remove the rows from the cluster's disks."""
        self.frame.unpersist()

    def share(self, values: npt.NDArray[Any]) -> SharedArray:
        """An array for all tasks."""
        return share(self.spark, self.scratch, f"mfdist-{self.token}-{next(self._names)}", values)

    def counted(self, count: Callable[[int, Arrays], Iterator[Message]], size: int) -> tuple[Any, list[PartFacts]]:
        """(int64 sums of ``size`` places, facts of the parts in order) of a pass over all parts."""
        counts = self.frame.mapInArrow(count_task(self.parts, count), COLUMNS)
        messages = collected(moved(counts, RANGES).mapInArrow(sum_task, COLUMNS))
        sums = np.zeros(size, np.int64)
        for message in messages:
            if message.kind == COUNTS:
                columns = unpacked(message.data)
                sums[columns["place"]] = columns["count"]
        return sums, facts_in(messages)


def moved(frame: Any, partitions: int) -> Any:
    """Messages at their targets, in order."""
    return frame.repartitionById(partitions, frame["target"]).sortWithinPartitions("kind", "place", "number")


def run_each(spark: Any, tasks: int, task: Task) -> Any:
    """A DataFrame of what ``task`` makes of the numbers 0 to ``tasks``, each in a partition of its own."""
    return spark.range(0, tasks, 1, tasks).mapInArrow(task, COLUMNS)


def gather(spark: Any, config: PrepareConfig, sources: Sequence[Source], layouts: Sequence[Layout], rules: Rules,
           duplicates: str, scratch: str, console: Console) -> tuple[Found, Gathered]:  # fmt: skip
    """Cut, read and gather: DataError and HashCollision as the read pass of one machine raises them."""
    far = [pieces.found_from_anywhere(source) for source in sources]
    cuts = cut_large(spark, far, layouts, rules, console)
    works = pieces.works(far, layouts, cuts)
    todo = pieces.tasks(works)
    parts = Parts.for_bytes(pieces.expected_bytes(far), PART_BYTES)
    read = run_each(spark, len(todo), read_task(todo, rules, parts, config.memory))
    frame = kept(moved(read, parts.partitions).mapInArrow(gather_task(parts, duplicates), COLUMNS))
    try:
        with console.busy(f"read and sort ({len(todo)} tasks, {parts.users} parts of the users)"):
            messages = collected(frame.where(frame["kind"].isin(COUNTS, FACT, FAULT)))
        ledger = [m for m in messages if m.target == parts.ledger]
        found, lines_before = settled(sources, layouts, works, cuts, ledger, rules, console)
        check_read(config, found, sources)
        own = sorted((m for m in messages if m.target != parts.ledger), key=lambda m: m.target)
        raise_first(own, frame, parts)
        hashes = [unpacked(m.data)["hash"] for m in own if m.kind == COUNTS]
        facts = facts_in([m for m in own if m.kind == FACT])
        check_memory(max(fact.read_rows for fact in facts), config.memory, "one part of the users", "--memory")
    except BaseException:  # a session that goes on keeps no rows of ours
        frame.unpersist()
        raise
    return found, Gathered(spark, frame, parts, scratch, facts, np.concatenate(hashes), lines_before)


def cut_large(spark: Any, sources: Sequence[Source], layouts: Sequence[Layout], rules: Rules,
              console: Console) -> dict[int, pieces.Cut]:  # fmt: skip
    """How the large files are shared out, by their numbers."""
    whole = pieces.works(sources, layouts, {})
    large = [work for work in whole if pieces.is_large(work.file, work.layout)]
    if not large:
        return {}
    with console.busy(f"find the pieces of {len(large)} large files"):
        return dict(facts_in(collected(run_each(spark, len(large), cut_task(large, rules)))))


def settled(sources: Sequence[Source], layouts: Sequence[Layout], works: Sequence[pieces.Work],
            cuts: dict[int, pieces.Cut], ledger: Sequence[Message], rules: Rules,
            console: Console) -> tuple[Found, dict[int, int]]:  # fmt: skip
    """What all works add up to, source after source as one machine reads them, and the lines before each work."""
    by_place = {message.place: message for message in ledger if message.kind in (FACT, FAULT)}
    total, lines_before = Found(rules=rules), {}
    of_source = {number: [*own] for number, own in groupby(works, key=lambda work: work.source)}
    for number, (source, layout) in enumerate(zip(sources, layouts, strict=True)):
        lines, before, last = 0, total.num_in, None
        for work in of_source[number]:
            value = value_of(by_place[work.place])
            if isinstance(value, Exception):
                raise value
            last = value
            lines_before[work.place] = lines
            add_found(total, value, lines)
            lines += value.lines
        assert last is not None
        own = cuts.get(number)
        shared = own is not None and bool(own.shares)
        print_, unit = (own.fingerprint, own.unit) if own is not None and shared else (last.fingerprint, last.unit)
        total.sources.append(source_entry(source, total.num_in - before, print_, unit))
        check_source(source, layout, total, console)
    return total, lines_before


def add_found(total: Found, facts: ReadFacts, lines_before: int) -> None:
    """Add a work's counts to those before it."""
    own = facts.found
    total.num_in += own.num_in
    total.num_rows += own.num_rows
    for reason, count in own.rejected.items():
        total.rejected[reason] = total.rejected.get(reason, 0) + count
    total.examples += [row._replace(line=row.line + lines_before) for row in own.examples][: 5 - len(total.examples)]
    total.rating_range = (min(total.rating_range[0], own.rating_range[0]),
                          max(total.rating_range[1], own.rating_range[1]))  # fmt: skip
    total.time_range = min(total.time_range[0], own.time_range[0]), max(total.time_range[1], own.time_range[1])
    total.float_ids = total.float_ids[0] + own.float_ids[0], total.float_ids[1] + own.float_ids[1]


def raise_first(messages: Sequence[Message], frame: Any, parts: Parts) -> None:
    """HashCollision, or DataError of the first pair that ``--duplicates error`` met twice, as one machine does.

    ``messages``: of the parts, in order.
    """
    errors = [value_of(m) for m in messages if m.kind == FAULT]
    if any(isinstance(error, HashCollision) for error in errors):
        raise HashCollision
    for error in errors:
        if isinstance(error, Duplicates):
            user, item = (np.array([value], np.uint64) for value in (error.user, error.item))
            texts = (text_of(frame, USERS, int(part_of(user, parts.users)[0]), error.user),
                     text_of(frame, ITEMS, parts.users + int(part_of(item, parts.items)[0]), error.item))  # fmt: skip
            raise DataError(f"user {texts[0]!r} rates item {texts[1]!r} more than once; mend the source, or choose "
                            "--duplicates last, mean or keep.")  # fmt: skip
        raise error


def text_of(frame: Any, kind: int, target: int, value: int) -> str:
    """The id of a hash, which is in this partition."""
    for message in collected(frame.where((frame["kind"] == kind) & (frame["target"] == target))):
        ids, _ = ids_in(message.data)
        place = int(np.searchsorted(ids.hashes, np.uint64(value)))
        if place < len(ids) and int(ids.hashes[place]) == value:
            return ids.take(np.array([place]))[1].tobytes().decode()
    raise AssertionError("a hash without an id")


def make_plan(config: PrepareConfig, found: Found, gathered: Gathered, console: Console) -> tuple[Plan, Core]:
    """The counting passes where they are needed; ``gathered.facts`` become those of the rows that stay."""
    items = all_items = RowTable(gathered.hashes)
    size = all_items.hashes.size
    shared, alive = gathered.share(all_items.hashes), None
    counted = Core(shared, None, config.min_user_ratings)
    merged_rows = found.num_rows - sum(fact.rows for fact in gathered.facts)
    if config.min_user_ratings > 1 or config.min_item_ratings > 1:
        console.info("counting ratings per user and item until no more are removed")
        passes = numbers_from(1)

        def count(alive: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
            with console.busy(f"minimum counts, pass {next(passes)}"):
                now = Core(shared, gathered.share(alive), config.min_user_ratings)
                counts: npt.NDArray[np.int64] = gathered.counted(core_count(now), size)[0]
                return counts

        alive = core(count, size, config.min_item_ratings)
        counted = Core(shared, gathered.share(alive), config.min_user_ratings)
        with console.busy("count"):
            rows_of_items, gathered.facts = gathered.counted(kept_count(counted), size)
        items = RowTable(all_items.hashes[rows_of_items > 0])
    kept_rows, users = (sum(getattr(fact, name) for fact in gathered.facts) for name in ("rows", "users"))
    plan = plan_of_counts(config, items, all_items, alive, (found.num_rows, merged_rows, kept_rows), users)
    if plan.rule.kind == "time":

        def bins(low: int, high: int, width: int) -> npt.NDArray[np.int64]:
            with console.busy("time of the split"):
                counts: npt.NDArray[np.int64] = gathered.counted(
                    time_count(counted, low, high, width), (high - low) // width + 1
                )[0]
                return counts

        plan = cut_by_time(plan, config, found, bins)
    return plan, counted
