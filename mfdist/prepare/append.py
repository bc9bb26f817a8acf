"""``--append``: new files added to a dataset.

Known ids keep their rows, so that a model of the old dataset can go on with the new one. New users are numbered after
all others, lane by lane in hash order, each lane getting what it lacks of an even share; new items after all others.
The split's rule applies to the added rows alone; so do duplicates. The added rows and 24 bytes an id must fit
``--memory``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mfdist import storage
from mfdist.data.dataset import Dataset, FileEntry, Lane, Manifest, fingerprint
from mfdist.data.id_text import ID_RULE, OLD_IDS
from mfdist.data.scan import scan
from mfdist.errors import DataError, UsageError
from mfdist.log import Console
from mfdist.prepare.config import PrepareConfig
from mfdist.prepare.count_pass import GROUP_ROWS, INT32_ROWS, Groups, check_memory, group_bounds
from mfdist.prepare.ids import HashCollision, RowTable, hash_ids, text_spans
from mfdist.prepare.lanes import LaneWriter, ParquetFile, lanes_of_users
from mfdist.prepare.read_pass import REJECTED_SCHEMA, Ingest
from mfdist.prepare.replace import NEXT, REPLACED, commit, ordered_files
from mfdist.prepare.report import write_dataset_report
from mfdist.prepare.spill import Arrays, Ids, sorted_ids
from mfdist.prepare.split import Duplicates, SplitRule, choose, time_bins, time_cut, val_in_train
from mfdist.prepare.totals import survey
from mfdist.prepare.vocabulary import vocabulary_file
from mfdist.prepare.write_pass import named_pair, rating_facts, say_totals, say_val_in_train

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Side:
    """Users or items after an append: rows of the known, and of the new in the order of their hashes."""

    known_hashes: npt.NDArray[np.uint64]  # sorted
    known_rows: Counts
    new: Ids

    def rows(self, hashes: Any, new_rows: Counts) -> Counts:
        """Row of every hash; ``new_rows`` are those of ``new``."""
        known = RowTable(self.known_hashes).rows(hashes)
        fresh = RowTable(self.new.hashes).rows(hashes)
        assert bool(np.all((known < 0) != (fresh < 0)))
        out = np.empty(hashes.size, np.int64)
        out[known >= 0] = self.known_rows[known[known >= 0]]
        out[fresh >= 0] = new_rows[fresh[fresh >= 0]]
        return out


def compare(dataset: Dataset, side: str, ids: Ids, salt: int) -> Side:
    """Which of ``ids`` the dataset knows, by hash and by their text."""
    column = dataset.ids(side).cast(pa.large_string()).combine_chunks()
    text = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
    if dataset.manifest.extra.get("id_rule", 1) < ID_RULE:
        check_old_ids(dataset, side, text)
    content, start, length = text_spans(text)
    hashes, second = np.empty(length.size, np.uint64), np.empty(length.size, np.uint64)
    hash_ids(content, start, length, np.uint64(salt), hashes, second)
    try:  # known and new ids together: two texts with one hash are found here
        together = np.concatenate([content, ids.content])
        starts = np.concatenate([start, ids.edges[:-1] + content.size])
        sorted_ids(np.concatenate([hashes, ids.hashes]), starts, np.concatenate([length, np.diff(ids.edges)]), together)
    except HashCollision:
        raise DataError(
            f"{storage.redact(dataset.path)}: a new id has the hash of a known one, so it cannot be appended; prepare "
            "all files together."
        ) from None
    order = np.argsort(hashes)
    fresh = np.flatnonzero(~np.isin(ids.hashes, hashes))
    new_edges, new_content = ids.take(fresh)
    return Side(hashes[order], order, Ids(ids.hashes[fresh], new_edges, new_content))


def check_old_ids(dataset: Dataset, side: str, ids: pa.Array) -> None:
    """DataError where ids that an earlier version wrote would be others today, so that new rows would not meet them."""
    old = ids.filter(pc.match_substring_regex(ids, OLD_IDS))
    if len(old):
        raise DataError(
            f"{storage.redact(dataset.path)} was prepared by an earlier version, which kept {len(old):,} {side[:-1]} "
            f"ids such as {old[0].as_py()!r} as they stood; it would be another id today. Prepare all files together."
        )


def append(config: PrepareConfig, dataset: Dataset, read: Ingest, scratch: str, console: Console) -> Dataset:
    """Add the rows of ``read`` to ``dataset``."""
    manifest, root = dataset.manifest, dataset.path
    check_memory(read.rows.rows, 2 * config.memory, "the append", "--memory, or append fewer files at a time")
    with console.busy("finding the users and items that are known"):
        counts = read.rows.finish()
        for ids in read.ids:
            ids.finish()
        salt = int(manifest.extra["salt"])
        users, items = (compare(dataset, side, ids.read(), salt) for side, ids in zip(("users", "items"), read.ids,
                                                                                       strict=True))  # fmt: skip
    bounds = group_bounds(counts, GROUP_ROWS)
    try:
        parts = list(Groups(read, config.duplicates, counts, bounds, os.cpu_count() or 1, console)("count"))
    except Duplicates as pair:
        raise DataError(named_pair(read.ids, pair)) from None
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    rows = choose(rows, split_rule(config, manifest, rows, read))
    new_lane = lanes_of_new(manifest, rows["user"], users.new.hashes)
    rows["item"] = items.rows(rows["item"], manifest.num_items + np.arange(len(items.new)))
    rows["user"] = users.rows(rows["user"], manifest.num_users + np.arange(len(users.new)))
    lanes = with_new_ranges(manifest, new_lane)
    lane = lane_of_rows(lanes, rows["user"])
    repeated = val_trained_on(dataset, lane, rows) if config.val else (0, 0)
    with console.busy("writing what is new"):
        lanes, files, added = write_added(config, manifest, root, lanes, lane, rows, len(users.new), scratch)
    manifest = with_val_in_train(manifest, repeated)
    grown = grow(manifest, read, lanes, files, users, items, rows["user"].size)
    num_old = sum(manifest.num_ratings.values())
    assert read.num_in == sum(added) + read.num_rejected + (grown.merged - manifest.merged)
    assert sum(grown.num_ratings.values()) == num_old + sum(added)
    with console.busy("writing users, items and the manifest"):
        done = finish(dataset, grown, (users.new, items.new), read.rejected_path, scratch)
    say_val_in_train(repeated, added[1], console)
    say_totals(replace(done.manifest, num_ratings={"train": added[0], "val": added[1]}, filtered=0,
                       merged=grown.merged - manifest.merged, rejected=read.rejected), read, console)  # fmt: skip
    return done


def split_rule(config: PrepareConfig, manifest: Manifest, rows: Arrays, read: Ingest) -> SplitRule:
    """The dataset's own rule; files given as ``--val`` validate, and everything added beside them trains."""
    split = manifest.split
    kind = "given" if config.val else split["kind"]
    cut = 0
    if kind == "time":
        cut = time_cut(lambda *bins: time_bins(rows, *bins), *read.time_range, split["fraction"])
    return SplitRule(kind=kind, fraction=split["fraction"], seed=split["seed"], last=split.get("last", 1), time_cut=cut)


def lanes_of_new(manifest: Manifest, user: Any, new: Any) -> Counts:
    """Lane of every new user (in hash order): each lane is filled up to an even share of all ratings."""
    places = RowTable(new).rows(user)
    counts = np.bincount(places[places >= 0], minlength=new.size)
    have = np.array([lane.train_rows + lane.val_rows for lane in manifest.lanes], np.float64)
    level, total = have.min(), float(counts.sum())
    for height in np.sort(have):  # pour the new ratings in, like water
        if np.maximum(height - have, 0).sum() > total:
            break
        level = height
    below = have <= level
    level += (total - np.maximum(level - have, 0).sum()) / below.sum()
    borders = np.cumsum(np.maximum(level - have, 0))
    return lanes_of_users(counts, 0, borders)


def with_new_ranges(manifest: Manifest, new_lane: Counts) -> list[Lane]:
    """The lanes with one more range of user rows where they get new users."""
    edges = manifest.num_users + np.searchsorted(new_lane, np.arange(len(manifest.lanes) + 1))
    more = [((a, b),) if b > a else () for a, b in pairwise(edges.tolist())]
    return [replace(lane, user_ranges=lane.user_ranges + new) for lane, new in zip(manifest.lanes, more, strict=True)]


def lane_of_rows(lanes: Sequence[Lane], user: Counts) -> Counts:
    """The lane of every user row."""
    ranges = sorted((first, number) for number, lane in enumerate(lanes) for first, _ in lane.user_ranges)
    firsts = np.array([first for first, _ in ranges])
    return np.array([number for _, number in ranges])[np.searchsorted(firsts, user, side="right") - 1]


def lane_writer(config_order: str, manifest: Manifest, root: str, scratch: str, suffix: str, most: int) -> LaneWriter:
    return LaneWriter(root=root, scratch=scratch, order=config_order, seed=manifest.split["seed"],
                      has_time=manifest.has_timestamp, wide_ids=most > INT32_ROWS, num_lanes=len(manifest.lanes),
                      suffix=suffix, time_unit=manifest.extra["time_unit"])  # fmt: skip


def val_trained_on(dataset: Dataset, lane: Counts, rows: Arrays) -> tuple[int, int]:
    """Of the added validation rows: those of a pair that trains, here or there, and those with its time and rating."""
    names = ("user", "item", "rating", *(("time",) if "time" in rows else ()))
    pairs = same = 0
    for number in np.unique(lane[rows["is_val"]]).tolist():
        mine = lane == number
        parts = [{name: rows[name][mine] for name in names} | {"val": rows["is_val"][mine].astype(np.uint8)}]
        for _, user, item, rating, time in scan(dataset, "train", range(number, number + 1)):
            old = {"user": user, "item": item, "rating": rating, "time": time, "val": np.zeros(len(user), np.uint8)}
            parts.append({name: old[name] for name in parts[0]})
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.lexsort([whole[name] for name in ("rating", *names[3:], "item", "val", "user")])
        found = val_in_train({name: column[order] for name, column in whole.items()})
        pairs, same = pairs + found[0], same + found[1]
    return pairs, same


def with_val_in_train(manifest: Manifest, repeated: tuple[int, int]) -> Manifest:
    """The manifest with the append's number of validation rows that are trained on too."""
    before = manifest.extra.get("val_in_train", {})
    counts = {name: before.get(name, 0) + count for name, count in zip(("pairs", "rows"), repeated, strict=True)}
    return replace(manifest, extra={**manifest.extra, "val_in_train": counts})


def write_added(config: PrepareConfig, manifest: Manifest, root: str, lanes: list[Lane], lane: Counts, rows: Arrays,
                num_new: int, scratch: str) -> tuple[list[Lane], list[FileEntry], tuple[int, int]]:  # fmt: skip
    """Write the added rows lane by lane; (lanes, new files, (train, val) rows added)."""
    number = manifest.extra.get("appends", 0) + 1
    writer = lane_writer(manifest.order, manifest, root, scratch, f".append-{number:03d}", manifest.num_users + num_new)
    order = np.lexsort((rows["user"], lane))
    edges = np.searchsorted(lane[order], np.arange(len(lanes) + 1))
    wanted = [name for name in ("user", "item", "rating", "is_val", "key", "time") if name in rows]
    files: list[FileEntry] = []
    train = val = 0
    for place, (first, end) in enumerate(pairwise(edges.tolist())):
        if first == end:
            continue
        _, entries, sizes, _ = writer.write(place, [{name: rows[name][order[first:end]] for name in wanted}])
        files += entries
        train, val = train + sizes[0], val + sizes[1]
        old = lanes[place]
        lanes[place] = replace(old, train_rows=old.train_rows + sizes[0], val_rows=old.val_rows + sizes[1],
                               files=old.files + tuple(entry.path for entry in entries))  # fmt: skip
    return lanes, files, (train, val)


def grow(manifest: Manifest, read: Ingest, lanes: list[Lane], files: list[FileEntry], users: Side, items: Side,
         kept: int) -> Manifest:  # fmt: skip
    """The manifest with the append's counts; figures and whole-dataset files follow in :func:`finish`."""
    before = manifest.extra.get("float_ids", {})
    names = ("user_id", "item_id")
    float_ids = {name: before.get(name, 0) + count for name, count in zip(names, read.float_ids, strict=True)}
    rejected = dict(manifest.rejected)
    for reason, count in read.rejected.items():
        rejected[reason] = rejected.get(reason, 0) + count
    return replace(
        manifest, num_users=manifest.num_users + len(users.new), num_items=manifest.num_items + len(items.new),
        lanes=tuple(lanes), files=manifest.files + tuple(files), sources=manifest.sources + read.sources,
        num_ratings={"train": sum(x.train_rows for x in lanes), "val": sum(x.val_rows for x in lanes)},
        rejected=rejected, merged=manifest.merged + read.rows.rows - kept,
        extra={**manifest.extra, "request": None, "appends": manifest.extra.get("appends", 0) + 1,
               "id_rule": ID_RULE, "float_ids": float_ids},
    )  # fmt: skip


def finish(dataset: Dataset, grown: Manifest, new: tuple[Ids, Ids], rejected: str, scratch: str) -> Dataset:
    """Survey, vocabulary, refused rows, report, manifest."""
    root, old = dataset.path, dataset.manifest
    found = survey(root, grown)
    others = [
        write_vocabulary(dataset, "users", new[0], found.user_train, scratch),
        write_vocabulary(dataset, "items", new[1], found.items.train, scratch),
        write_all_rejected(root, rejected, scratch),
    ]
    kept = [entry for entry in grown.files if entry.path not in REPLACED]
    cold_items = found.items.train == 0
    scale = tuple(old.rating_scale) if (old.extra.get("explicit_scale")) else None
    extra = {**grown.extra, "cold": {
        "cold_user": found.cold_user_val, "cold_item": int(found.items.val[cold_items].sum()),
        "cold_both": int(found.items.val_of_cold[cold_items].sum())}}  # fmt: skip
    grown = replace(grown, files=(*kept, *others), extra=extra, **rating_facts(found.facts, scale))  # type: ignore[arg-type]
    in_order = ordered_files(grown)
    val = fingerprint([e.checksum for e in in_order if e.path.startswith("val/")])
    grown = replace(grown, fingerprint=fingerprint([e.checksum for e in in_order]),
                    split={**grown.split, "fingerprint": val})  # fmt: skip
    activity, number = np.unique(found.user_all, return_counts=True)
    by_activity = {int(a): int(n) for a, n in zip(activity, number, strict=True) if a}
    write_dataset_report(root, grown, by_activity, found.items.train, found.facts.days)
    return commit(root, grown)


def write_vocabulary(dataset: Dataset, side: str, new: Ids, counts: Counts, scratch: str) -> FileEntry:
    """users.parquet.next: the old ids and the new ones, with the new counts."""
    with vocabulary_file(dataset.path, side, scratch, NEXT) as vocabulary:
        text = dataset.ids(side)
        vocabulary.write_texts(text, counts[: len(text)])
        vocabulary.write(new, np.arange(len(new)), counts[len(text) :])
        vocabulary.flush()
    return replace(vocabulary.file.done, path=f"{side}.parquet")


def write_all_rejected(root: str, added: str, scratch: str) -> FileEntry:
    with ParquetFile(root, "rejected.parquet" + NEXT, REJECTED_SCHEMA, scratch + "/out") as file:
        for path in (storage.inside(root, "rejected.parquet"), added):
            fs, inner = storage.arrow_filesystem(path)
            with pq.ParquetFile(inner, filesystem=fs) as found:
                for batch in found.iter_batches():
                    file.write(pa.Table.from_batches([batch]))
    return replace(file.done, path="rejected.parquet")


def check_append(config: PrepareConfig, manifest: Manifest) -> None:
    """UsageError where a flag asks for another rule than the dataset's."""
    if config.min_user_ratings > 1 or config.min_item_ratings > 1:
        raise UsageError("--append keeps all added rows: leave out --min-user-ratings and --min-item-ratings.")
    asked = {"split": (config.split, manifest.split["kind"], "random"),
             "seed": (config.seed, manifest.split["seed"], 42),
             "order": (config.order, manifest.order, "random"),
             "lanes": (config.lanes, len(manifest.lanes), 0)}  # fmt: skip
    for name, (value, own, default) in asked.items():
        if value not in (own, default):
            raise UsageError(f"--{name} {value}: the dataset was prepared with {own}, and --append keeps to that.")
