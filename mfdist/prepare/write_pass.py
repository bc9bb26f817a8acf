"""From read rows to a dataset directory: counting passes where needed, lanes, vocabulary, figures, manifest last."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mfdist import storage
from mfdist.data.dataset import MANIFEST, Dataset, FileEntry, Lane, Manifest, fingerprint
from mfdist.data.id_text import ID_RULE
from mfdist.errors import DataError
from mfdist.log import Console
from mfdist.prepare.config import PrepareConfig
from mfdist.prepare.count_pass import (
    GROUP_ROWS,
    ROW_COST,
    Groups,
    Plan,
    ahead,
    check_memory,
    group_bounds,
    make_plan,
    survivors,
)
from mfdist.prepare.ids import HASH_VERSION
from mfdist.prepare.lanes import BLOCK_ROWS, MAX_DISTINCT, LaneFacts, LaneWriter, ParquetFile, lanes_of_users
from mfdist.prepare.read_pass import REJECTED_SCHEMA, Found, Ingest
from mfdist.prepare.report import write_dataset_report
from mfdist.prepare.spill import Arrays, Ids, IdSpill
from mfdist.prepare.split import Duplicates, choose, user_runs, val_in_train
from mfdist.prepare.vocabulary import vocabulary_file


@dataclass
class Totals:
    """Counts that grow while the lanes are written."""

    users: int = 0
    rows: int = 0
    lane_users: dict[int, tuple[int, int]] = field(default_factory=dict)
    lane_rows: dict[int, tuple[int, int]] = field(default_factory=dict)
    lane_files: dict[int, list[FileEntry]] = field(default_factory=dict)
    facts: LaneFacts = field(default_factory=LaneFacts)
    user_activity: dict[int, int] = field(default_factory=dict)
    cold_user_val: int = 0
    val_in_train: tuple[int, int] = (0, 0)


@dataclass
class ItemCounts:
    """Ratings of every item: in training, in validation, and in validation by users that training never saw."""

    train: npt.NDArray[np.int64]
    val: npt.NDArray[np.int64]
    val_of_cold: npt.NDArray[np.int64]

    @staticmethod
    def zeros(n: int) -> ItemCounts:
        return ItemCounts(*(np.zeros(n, np.int64) for _ in range(3)))

    def add(self, item: npt.NDArray[np.int64], is_val: npt.NDArray[np.bool_], cold: npt.NDArray[np.bool_]) -> None:
        """Count rows of these items; ``cold``: validation rows of users that training never saw."""
        size = self.train.size
        self.train += np.bincount(item[~is_val], minlength=size)
        self.val += np.bincount(item[is_val], minlength=size)
        self.val_of_cold += np.bincount(item[cold], minlength=size)


class Users(Protocol):
    """Who takes the ids of users: a ``Vocabulary``."""

    def write(self, ids: Ids, places: npt.NDArray[np.int64], ratings: npt.NDArray[np.int64]) -> None: ...


class Counts(Protocol):
    """Who counts ratings of items: ``ItemCounts``."""

    def add(self, item: npt.NDArray[np.int64], is_val: npt.NDArray[np.bool_], cold: npt.NDArray[np.bool_]) -> None: ...


def assemble(config: PrepareConfig, read: Ingest, request: dict[str, Any], scratch: str, console: Console) -> Dataset:
    """Write the dataset of ``read``; the directory is touched from here on, its manifest last."""
    with console.busy("sorting users and items"):
        counts = read.rows.finish()
        max_users, _ = read.ids[0].finish(), read.ids[1].finish()
    threads = os.cpu_count() or 1
    most = max(1 << 16, min(GROUP_ROWS, config.memory // ROW_COST // (3 * threads)))
    groups = Groups(read, config.duplicates, counts, group_bounds(counts, most), threads, console)
    check_memory(int(counts.max()), config.memory, "one part of the users", "--memory")
    try:
        plan = make_plan(config, read, groups, max_users, console)
    except Duplicates as pair:
        raise DataError(named_pair(read.ids, pair)) from None
    open_directory(config.target)
    totals, item_counts = Totals(), ItemCounts.zeros(plan.items.hashes.size)
    user_file = write_lanes(config, read, plan, groups, totals, item_counts, scratch, threads, console)
    with console.busy("writing the items"):
        item_file = write_items(config.target, read, plan, item_counts.train, scratch)
        rejected_file = write_rejected(config.target, read.rejected_path, scratch)
    manifest = make_manifest(config, read, plan, totals, item_counts, [user_file, item_file, rejected_file], request)
    return finish_dataset(config.target, manifest, read, totals, item_counts, console)


def finish_dataset(root: str, manifest: Manifest, found: Found, totals: Totals, counts: ItemCounts,
                   console: Console) -> Dataset:  # fmt: skip
    """Say where every row went, draw the report, and write the manifest, the last of a dataset's files."""
    say_totals(manifest, found, console)
    say_val_in_train(totals.val_in_train, manifest.num_ratings["val"], console)
    with console.busy("drawing the dataset's page"):
        activity = dict(sorted(totals.user_activity.items()))
        write_dataset_report(root, manifest, activity, counts.train, totals.facts.days)
    storage.write_text(storage.join(root, MANIFEST), manifest.to_json())
    return Dataset(root, manifest)


def open_directory(out: str) -> None:
    """Make the directory empty: without its manifest first, so that what is left of it looks like no dataset."""
    storage.remove(storage.join(out, MANIFEST))
    for name in ("train", "val", "report", "users.parquet", "items.parquet", "rejected.parquet"):
        storage.remove(storage.join(out, name))
    storage.make_dirs(out)


def write_lanes(config: PrepareConfig, read: Ingest, plan: Plan, groups: Groups, totals: Totals, counts: ItemCounts,
                scratch: str, threads: int, console: Console) -> FileEntry:  # fmt: skip
    """The write pass; returns users.parquet's entry and fills ``totals`` and ``counts``."""
    writer = LaneWriter(root=config.target, scratch=scratch, order=config.order, seed=config.seed,
                        has_time=read.rules.with_time, wide_ids=plan.wide_ids, num_lanes=plan.num_lanes)  # fmt: skip
    borders = lane_borders(plan)

    def chosen(bounds: tuple[int, int]) -> tuple[Arrays, Ids]:
        return chosen_rows(groups.group(bounds), plan, config.min_user_ratings), read.ids[0].read(*bounds)

    open_parts: list[Arrays] = []
    lane = 0
    writing: deque[Future[Any]] = deque()

    def written(most: int) -> None:
        while len(writing) > most:
            number, files, sizes, facts = writing.popleft().result()
            totals.lane_files[number], totals.lane_rows[number] = files, sizes
            totals.facts.add(facts)

    with (
        ThreadPoolExecutor(threads) as pool,
        vocabulary_file(config.target, "users", scratch) as users,
        console.progress("write", plan.kept_rows) as progress,
    ):
        for rows, ids in ahead(groups.bounds, chosen, threads):
            if plan.rule.kind == "given":
                pairs, same = val_in_train(rows)
                totals.val_in_train = totals.val_in_train[0] + pairs, totals.val_in_train[1] + same
            for next_lane, part in numbered(rows, ids, users, borders, totals, counts):
                if next_lane != lane and open_parts:
                    writing.append(pool.submit(writer.write, lane, open_parts))
                    open_parts = []
                    written(2 * threads)
                lane = next_lane
                open_parts.append(part)
            progress.advance(rows["user"].size)
        if open_parts:
            writing.append(pool.submit(writer.write, lane, open_parts))
        written(0)
        users.flush()
    return users.file.done


def lane_borders(plan: Plan) -> npt.NDArray[np.float64]:
    """The rows at which each lane ends: float64, (lanes,)."""
    return np.arange(1, plan.num_lanes + 1, dtype=np.float64) * (plan.kept_rows / plan.num_lanes)


def chosen_rows(rows: Arrays, plan: Plan, min_user: int) -> Arrays:
    """Of merged rows those that the minimum counts leave, with 'is_val', 'key' and 'item_row'."""
    rows = choose(survivors(rows, plan.all_items, plan.alive, min_user), plan.rule)
    return {**rows, "item_row": plan.items.rows(rows["item"])}


def numbered(rows: Arrays, ids: Ids, users: Users, borders: Any, totals: Totals,
             counts: Counts) -> Iterator[tuple[int, Arrays]]:  # fmt: skip
    """Number a group's users after those in ``totals``, write their ids, count; gives the group's rows lane by lane.

    ``borders``: the rows at which each lane ends, float64, (lanes,).
    """
    first, count = user_runs(rows["user"])
    if first.size == 0:
        return
    is_val, item = rows["is_val"], rows["item_row"]
    lanes = lanes_of_users(count, totals.rows, borders)
    user = np.repeat(np.arange(first.size), count)
    train_count = count - np.add.reduceat(is_val, first, dtype=np.int64)
    users.write(ids, np.searchsorted(ids.hashes, rows["user"][first]), train_count)
    cold = is_val & (train_count == 0)[user]
    counts.add(item, is_val, cold)
    totals.cold_user_val += int(np.count_nonzero(cold))
    for activity, number in zip(*np.unique(count, return_counts=True), strict=True):
        totals.user_activity[int(activity)] = totals.user_activity.get(int(activity), 0) + int(number)
    columns = {
        "user": user + totals.users,
        "item": item,
        "rating": rows["rating"],
        "is_val": is_val,
        "key": rows["key"],
    }
    if "time" in rows:
        columns["time"] = rows["time"]
    for a, b in lane_spans(lanes):
        low, high = int(first[a]), int(first[b - 1] + count[b - 1])
        number = int(lanes[a])
        begin, _ = totals.lane_users.get(number, (totals.users + a, 0))
        totals.lane_users[number] = (begin, totals.users + b)
        yield number, {name: values[low:high] for name, values in columns.items()}
    totals.users += first.size
    totals.rows += rows["user"].size


def lane_spans(lanes: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """(first, end) of every run of equal lanes."""
    edges = [0, *(np.flatnonzero(np.diff(lanes)) + 1).tolist(), lanes.size]
    return list(pairwise(edges))


def write_items(root: str, read: Ingest, plan: Plan, train: npt.NDArray[np.int64], scratch: str) -> FileEntry:
    ids = read.ids[1].read()
    with vocabulary_file(root, "items", scratch) as items:
        items.write(ids, np.searchsorted(ids.hashes, plan.items.hashes), train)
        items.flush()
    return items.file.done


def write_rejected(root: str, path: str, scratch: str) -> FileEntry:
    """rejected.parquet, from the file of the read pass, in row groups that do not depend on how it was read."""
    with (
        pq.ParquetFile(path) as found,
        ParquetFile(root, "rejected.parquet", REJECTED_SCHEMA, scratch + "/out") as file,
    ):
        for batch in found.iter_batches():
            file.write(pa.Table.from_batches([batch]))
    return file.done


def named_pair(ids_of: Sequence[IdSpill], pair: Duplicates) -> str:
    texts = []
    for side, value in enumerate((pair.user, pair.item)):
        ids = ids_of[side].read(value >> 52, (value >> 52) + 1)
        place = int(np.searchsorted(ids.hashes, np.uint64(value)))
        texts.append(ids.take(np.array([place]))[1].tobytes().decode())
    return (f"user {texts[0]!r} rates item {texts[1]!r} more than once; mend the source, or choose --duplicates last, "
            "mean or keep.")  # fmt: skip


def rating_facts(facts: LaneFacts, scale: tuple[float, float] | None) -> dict[str, Any]:
    """Scale, step, histogram and moments. Beyond 1,000 different ratings: 100 equal bins, by their lower edges."""
    both = dict(facts.train_values)
    for value, count in facts.val_values.items():
        both[value] = both.get(value, 0) + count
    values = sorted(both)
    low, high = scale or (values[0], values[-1])
    train = np.array(sorted(facts.train_values))
    step = float(np.diff(train).min()) if train.size > 1 else 1.0
    histogram = [(value, both[value]) for value in values]
    if len(values) > MAX_DISTINCT:
        counts, edges = np.histogram(values, 100, (values[0], values[-1]), weights=[both[v] for v in values])
        histogram = [(float(edge), int(count)) for edge, count in zip(edges[:-1], counts, strict=True)]
    return {"rating_scale": (low, high), "rating_step": max(step, (high - low) / 100), "rating_histogram": histogram,
            **rating_moments(facts.train_values)}  # fmt: skip


def rating_moments(counts: Mapping[float, int]) -> dict[str, float]:
    """Mean, standard deviation and skewness of ratings given as {rating: how many}; 0 of none."""
    number = max(sum(counts.values()), 1)
    mean = math.fsum(value * count for value, count in counts.items()) / number
    second, third = (
        math.fsum(count * (value - mean) ** power for value, count in counts.items()) / number for power in (2, 3)
    )
    spread = math.sqrt(second)
    return {"global_mean": mean, "rating_spread": spread, "rating_skewness": third / spread**3 if spread else 0.0}


def make_manifest(config: PrepareConfig, read: Found, plan: Plan, totals: Totals, counts: ItemCounts,
                  others: list[FileEntry], request: dict[str, Any]) -> Manifest:  # fmt: skip
    """The manifest; asserts that every row is accounted for."""
    num_train = sum(train for train, _ in totals.lane_rows.values())
    num_val = sum(val for _, val in totals.lane_rows.values())
    assert read.num_in == num_train + num_val + read.num_rejected + plan.filtered_rows + plan.merged_rows
    lanes, files = [], []
    for number in range(plan.num_lanes):
        entries = totals.lane_files.get(number, [])
        train, val = totals.lane_rows.get(number, (0, 0))
        ranges = (totals.lane_users[number],) if number in totals.lane_users else ()
        lanes.append(Lane(user_ranges=ranges, train_rows=train, val_rows=val, files=tuple(e.path for e in entries)))
        files += entries
    rule = plan.rule
    split = {"kind": rule.kind, "fraction": num_val / max(num_train + num_val, 1) if rule.kind in ("given", "last-n")
             else rule.fraction, "seed": rule.seed,
             "fingerprint": fingerprint([e.checksum for e in files if e.path.startswith("val/")])}  # fmt: skip
    if rule.kind == "last-n":
        split["last"] = rule.last
    if rule.kind == "time":
        split["time"] = rule.time_cut
    cold_items = counts.train == 0
    extra = {"block_rows": BLOCK_ROWS, "hash_version": HASH_VERSION, "salt": read.rules.salt, "request": request,
             "time_unit": 1, "synthetic": is_synthetic(read),
             "explicit_scale": config.rating_scale is not None, "id_rule": ID_RULE,
             "float_ids": dict(zip(("user_id", "item_id"), read.float_ids, strict=True)),
             "cold": {"cold_user": totals.cold_user_val, "cold_item": int(counts.val[cold_items].sum()),
                      "cold_both": int(counts.val_of_cold[cold_items].sum())}}  # fmt: skip
    extra["val_in_train"] = dict(zip(("pairs", "rows"), totals.val_in_train, strict=True))
    return Manifest(
        name=storage.name_of(config.target), num_users=totals.users, num_items=plan.items.hashes.size,
        num_ratings={"train": num_train, "val": num_val}, lanes=tuple(lanes), order=config.order, split=split,
        fingerprint=fingerprint([e.checksum for e in files]), sources=read.sources, rejected=read.rejected,
        filtered=plan.filtered_rows, merged=plan.merged_rows, files=tuple(files + others),
        has_timestamp=read.rules.with_time, extra=extra, **rating_facts(totals.facts, config.rating_scale),
    )  # fmt: skip


def is_synthetic(read: Found) -> bool:
    """Whether a source stands beside the truth that planted it."""
    paths = [source["path"] for source in read.sources]
    return any(storage.is_local(path) and os.path.exists(storage.local_path(path) + ".truth.json") for path in paths)


def say_val_in_train(repeated: tuple[int, int], num_val: int, console: Console) -> None:
    """Warn of rows given as validation that are trained on too: (of a pair that trains, with its time and rating)."""
    pairs, same = repeated
    if pairs:
        console.warn(f"{pairs:,} of {num_val:,} --val rows are of a user and item that are trained on too, {same:,} of "
                     "them with the same time and rating")  # fmt: skip


def say_totals(manifest: Manifest, read: Found, console: Console) -> None:
    """Where every row went."""
    train, val = manifest.num_ratings["train"], manifest.num_ratings["val"]
    console.info(f"rows in {read.num_in:,} = train {train:,} + val {val:,} + rejected {read.num_rejected:,} + filtered "
                 f"{manifest.filtered:,} + merged {manifest.merged:,}")  # fmt: skip
    for reason, count in sorted(manifest.rejected.items()):
        console.info(f"rejected: {reason}: {count:,}")
    for side, count in zip(("user", "item"), read.float_ids, strict=True):
        if count:
            console.info(f"{count:,} {side} ids are whole numbers written as floats: 11.0 is read as 11")
    low, high = manifest.rating_scale
    console.info(
        f"{manifest.num_users:,} users, {manifest.num_items:,} items, {len(manifest.lanes)} lanes, ratings {low:g} to "
        f"{high:g}, mean {manifest.global_mean:.4f}"
    )
