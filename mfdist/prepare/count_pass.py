"""What must be known before the first lane is written: groups of users, and the passes that count over them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count as numbers_from
from typing import Any

import numpy as np
import numpy.typing as npt

from mfdist.errors import DataError, UsageError
from mfdist.log import Console
from mfdist.prepare.config import PrepareConfig
from mfdist.prepare.ids import RowTable
from mfdist.prepare.read_pass import Found, Ingest
from mfdist.prepare.spill import BUCKETS, Arrays, bucket_edge
from mfdist.prepare.split import SplitRule, core, core_items, core_rows, merged, sorted_rows, time_bins, time_cut

INT32_ROWS = 2**31 - 1
ROW_COST = 200
"""Bytes that a row takes while its group is worked on: sorting, both forms, and what waits to be written."""
GROUP_ROWS = 1 << 20


@dataclass
class Groups:
    """The rows in groups of users, in hash order, each sorted and merged; counted once."""

    read: Ingest
    policy: str
    counts: npt.NDArray[np.int64]  # rows of every bucket
    bounds: list[tuple[int, int]]
    threads: int
    console: Console

    def __call__(self, label: str) -> Iterator[Arrays]:
        """One pass over the groups, in order; the console shows how far it is under ``label``."""
        with self.console.progress(label, self.read.rows.rows) as progress:
            for bounds, rows in zip(self.bounds, ahead(self.bounds, self.group, self.threads), strict=True):
                yield rows
                progress.advance(int(self.counts[slice(*bounds)].sum()))

    def group(self, bounds: tuple[int, int]) -> Arrays:
        rows = self.read.rows.read(*bounds)
        return merged(sorted_rows(rows, bucket_edge(bounds[0]), bucket_edge(bounds[1])), self.policy)


def ahead(work: list[Any], do: Any, threads: int) -> Iterator[Any]:
    """``do(x)`` for x in ``work``, in order, computed by threads a little ahead."""
    waiting: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for x in work:
            waiting.append(pool.submit(do, x))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def group_bounds(counts: npt.NDArray[np.int64], most: int) -> list[tuple[int, int]]:
    """Consecutive buckets together up to ``most`` rows a group (a bucket alone may hold more)."""
    bounds, first, rows = [], 0, 0
    for bucket, count in enumerate(counts.tolist()):
        if rows and rows + count > most:
            bounds.append((first, bucket))
            first, rows = bucket, 0
        rows += count
    return [*bounds, (first, BUCKETS)]


def check_memory(rows: int, memory: int, what: str, remedy: str) -> None:
    """UsageError where so many rows cannot be worked on together."""
    if rows * ROW_COST > memory:
        raise UsageError(
            f"{what} holds {rows:,} ratings, which take {rows * ROW_COST / 2**30:.1f} GiB: more than --memory "
            f"{memory / 2**30:.1f}GiB. Raise {remedy}."
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What must be known before the first lane is written: ``items`` are the vocabulary, ``all_items`` those read."""

    items: RowTable
    all_items: RowTable
    alive: npt.NDArray[np.bool_] | None  # of all_items, those inside the k-core; None: no minimum counts
    kept_rows: int
    merged_rows: int
    filtered_rows: int
    num_lanes: int
    rule: SplitRule
    wide_ids: bool


def make_plan(config: PrepareConfig, read: Ingest, groups: Groups, max_users: int, console: Console) -> Plan:
    """The counting passes: k-core, kept rows, the time of a time split."""
    items = all_items = RowTable(read.ids[1].read().hashes)
    alive, merged_rows, kept_rows = None, 0, read.rows.rows
    if config.min_user_ratings > 1 or config.min_item_ratings > 1:
        console.info("counting ratings per user and item until no more are removed")
        passes = numbers_from(1)

        def count(alive: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
            counts = np.zeros(alive.size, np.int64)
            for rows in groups(f"minimum counts, pass {next(passes)}"):
                counts += np.bincount(core_items(rows, all_items, alive, config.min_user_ratings), minlength=alive.size)
            return counts

        alive = core(count, all_items.hashes.size, config.min_item_ratings)
    if config.duplicates != "keep" or alive is not None:
        after_merge, kept_rows, present = 0, 0, np.zeros(all_items.hashes.size, np.bool_)
        for group in groups("count"):
            after_merge += group["user"].size
            rows = survivors(group, all_items, alive, config.min_user_ratings)
            kept_rows += rows["user"].size
            present[all_items.rows(rows["item"])] = True
        merged_rows = read.rows.rows - after_merge
        items = RowTable(all_items.hashes[present])
    plan = plan_of_counts(config, items, all_items, alive, (read.rows.rows, merged_rows, kept_rows), max_users)
    return with_time_cut(plan, config, read, groups) if plan.rule.kind == "time" else plan


def plan_of_counts(config: PrepareConfig, items: RowTable, all_items: RowTable, alive: npt.NDArray[np.bool_] | None,
                   rows: tuple[int, int, int], max_users: int) -> Plan:  # fmt: skip
    """The plan of ``rows`` (read, merged into others, kept), with lanes; the time of a time split is not in it yet.

    DataError where no row is left, UsageError where a lane does not fit the memory.
    """
    read_rows, merged_rows, kept_rows = rows
    if kept_rows == 0:
        raise DataError("no row is left: --min-user-ratings and --min-item-ratings remove all of them.")
    num_lanes = config.lanes or (64 if kept_rows <= 10_000_000 else 512)
    check_memory(kept_rows // num_lanes, config.memory, "a lane", "--lanes, or --memory")
    return Plan(items=items, all_items=all_items, alive=alive, kept_rows=kept_rows, merged_rows=merged_rows,
                filtered_rows=read_rows - merged_rows - kept_rows, num_lanes=num_lanes,
                rule=SplitRule(kind="given" if config.val else config.split, fraction=config.val_fraction,
                               seed=config.seed, last=config.last),
                wide_ids=max(max_users, items.hashes.size) > INT32_ROWS)  # fmt: skip


def with_time_cut(plan: Plan, config: PrepareConfig, read: Ingest, groups: Groups) -> Plan:
    """The plan with the time after which rows validate."""

    def count(low: int, high: int, width: int) -> npt.NDArray[np.int64]:
        counts = np.zeros((high - low) // width + 1, np.int64)
        for rows in groups("time of the split"):
            kept = survivors(rows, plan.all_items, plan.alive, config.min_user_ratings)
            counts += time_bins(kept, low, high, width)
        return counts

    return cut_by_time(plan, config, read, count)


def cut_by_time(plan: Plan, config: PrepareConfig, found: Found,
                count: Callable[[int, int, int], npt.NDArray[np.int64]]) -> Plan:  # fmt: skip
    """The plan with the time that ``count`` leads to (see ``split.time_cut``); DataError where there is none."""
    early, late = found.time_range
    cut = time_cut(count, early, late, config.val_fraction)
    if cut >= late and config.val_fraction > 0:
        raise DataError(f"--split time: more than {config.val_fraction:g} of the rows have the newest time, {late}; "
                        "there is no time to cut at. Use --split random.")  # fmt: skip
    return replace(plan, rule=replace(plan.rule, time_cut=cut))


def survivors(rows: Arrays, items: RowTable, alive: npt.NDArray[np.bool_] | None, min_user: int) -> Arrays:
    """The merged rows that the minimum counts leave."""
    if alive is None:
        return rows
    kept = core_rows(rows, items, alive, min_user)
    return {name: values[kept] for name, values in rows.items()}
