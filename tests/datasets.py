"""Dataset directories made directly, without prepare: small, exact, and of any shape a test asks for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mfdist import storage
from mfdist.data.dataset import MANIFEST, Dataset, FileEntry, Lane, Manifest, checksum, fingerprint

Columns = dict[str, np.ndarray]


def make_dataset(
    path: str | Path,
    rows: int = 1000,
    lanes: int = 4,
    *,
    val_rows: int = 0,
    users: int | None = None,
    items: int = 50,
    row_group: int = 64,
    order: str = "random",
    block_rows: int = 512,
    id_type: str = "int32",
    timestamp: bool = False,
    seed: int = 0,
    lane_weights: Sequence[float] | None = None,
    compression: str = "lz4",
) -> Dataset:
    """Random ratings 1..5 over ``lanes`` lanes; users are numbered lane by lane, lane sizes follow ``lane_weights``.

    With ``order`` "blocks" the rows of a lane are sorted by user.
    """
    rng = np.random.default_rng(seed)
    users = max(lanes, rows // 4) if users is None else users
    ranges = [(users * lane // lanes, users * (lane + 1) // lanes) for lane in range(lanes)]
    splits: dict[str, list[list[Columns]]] = {}
    for split, total in (("train", rows), ("val", val_rows)):
        sizes = _lane_sizes(total, ranges, lane_weights)
        splits[split] = [
            [_random_rows(rng, size, first, end, items, id_type, timestamp, order)]
            for size, (first, end) in zip(sizes, ranges, strict=True)
        ]
    return write_dataset(
        path, splits["train"], splits["val"], ranges=ranges, num_items=items, row_group=row_group, order=order,
        block_rows=block_rows, compression=compression,
    )  # fmt: skip


def write_dataset(
    path: str | Path,
    train: Sequence[Sequence[Columns]],
    val: Sequence[Sequence[Columns]] | None = None,
    *,
    ranges: Sequence[tuple[int, int]],
    num_items: int,
    row_group: int | Sequence[int] = 64,
    order: str = "random",
    block_rows: int = 512,
    compression: str = "lz4",
    name: str = "test",
) -> Dataset:
    """A dataset of exactly these columns: ``train[lane][file]`` is a dict of arrays user, item, rating[, timestamp].

    ``row_group``: rows per row group, or a list of them (the last one repeats). Arrow arrays are taken as they are.
    """
    path = str(path)
    val = val if val is not None else [[] for _ in train]
    entries: list[FileEntry] = []
    lanes: list[Lane] = []
    for lane, (first, end) in enumerate(ranges):
        files: list[str] = []
        for split, parts in (("train", train[lane]), ("val", val[lane])):
            for number, columns in enumerate(parts):
                entry = _write_file(path, split, lane, number, columns, row_group, compression)
                entries.append(entry)
                files.append(entry.path)
        count = [sum(len(columns["user"]) for columns in parts) for parts in (train[lane], val[lane])]
        lanes.append(Lane(user_ranges=((first, end),), train_rows=count[0], val_rows=count[1], files=tuple(files)))
    num_users = max((end for _, end in ranges), default=0)
    ratings = _all(train, "rating").astype(np.float64)
    values, counts = np.unique(ratings, return_counts=True)
    steps = np.diff(values)
    manifest = Manifest(
        name=name, num_users=num_users, num_items=num_items,
        num_ratings={"train": len(ratings), "val": len(_all(val, "rating"))},
        rating_scale=(float(values[0]), float(values[-1])) if len(values) else (1.0, 5.0),
        rating_step=float(steps.min()) if len(steps) else 1.0,
        rating_histogram=[(float(v), int(c)) for v, c in zip(values, counts, strict=True)],
        global_mean=float(ratings.mean()) if len(ratings) else 0.0,
        lanes=tuple(lanes), order=order, split={"kind": "random", "fraction": 0.2, "seed": 0, "fingerprint": "test"},
        fingerprint=fingerprint([entry.checksum for entry in entries]), sources=[], rejected={}, filtered=0, merged=0,
        files=tuple(entries), has_timestamp=any("timestamp" in columns for parts in train for columns in parts),
        extra={"block_rows": block_rows},
    )  # fmt: skip
    _write_ids(path, "users", "u", num_users, _all(train, "user"))
    _write_ids(path, "items", "i", num_items, _all(train, "item"))
    storage.write_text(storage.join(path, MANIFEST), manifest.to_json())
    return Dataset.open(path)


def training_rows(dataset: Dataset, split: str = "train") -> np.ndarray:
    """All rows of a split as a sorted (rows, 3) float64 array of user, item, rating: a multiset to compare."""
    tables = [
        pq.read_table(storage.local_path(dataset.file_path(entry)), columns=["user", "item", "rating"])
        for lane in range(len(dataset.manifest.lanes))
        for entry in dataset.lane_files(split, lane)
    ]
    names = ("user", "item", "rating")
    return sorted_rows(*(np.concatenate([table[name].to_numpy() for table in tables] or [[]]) for name in names))


def sorted_rows(user: Any, item: Any, rating: Any) -> np.ndarray:
    """Columns as a (rows, 3) float64 array, sorted: equal exactly where the multisets of rows are."""
    rows = np.stack([np.asarray(column, np.float64) for column in (user, item, rating)], axis=1)
    return rows[np.lexsort(rows.T)]


def _lane_sizes(total: int, ranges: Sequence[tuple[int, int]], weights: Sequence[float] | None) -> list[int]:
    share = np.array([end > first for first, end in ranges], float) if weights is None else np.asarray(weights, float)
    edges = np.floor(np.concatenate([[0.0], np.cumsum(share / share.sum())]) * total + 1e-9).astype(int)
    edges[-1] = total
    return np.diff(edges).tolist()


def _random_rows(
    rng: np.random.Generator, size: int, first: int, end: int, items: int, id_type: str, timestamp: bool, order: str
) -> Columns:
    user = rng.integers(first, max(end, first + 1), size).astype(id_type)
    columns = {
        "user": np.sort(user) if order == "blocks" else user,
        "item": np.minimum((rng.random(size) ** 2 * items).astype(id_type), items - 1),
        "rating": rng.integers(1, 6, size).astype(np.float32),
    }
    if timestamp:
        columns["timestamp"] = rng.integers(912_729_600, 1_405_987_200, size)
    return columns


def _write_file(
    path: str, split: str, lane: int, number: int, columns: Columns, row_group: int | Sequence[int], compression: str
) -> FileEntry:
    suffix = f".append-{number:03d}" if number else ""
    name = f"{split}/lane-{lane:05d}{suffix}.parquet"
    file = os.path.join(path, name)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    table = pa.table(dict(columns))
    sizes = [row_group] if isinstance(row_group, int) else list(row_group)
    with pq.ParquetWriter(file, table.schema, compression=compression, use_dictionary=["rating"]) as writer:
        start = 0
        while start < len(table) or (sizes and not start and not len(table)):
            size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
            writer.write_table(table.slice(start, size), row_group_size=max(1, size))
            if not len(table):
                break
            start += size
    return FileEntry(path=name, rows=len(table), bytes=os.path.getsize(file), checksum=checksum(file))


def _write_ids(path: str, side: str, letter: str, count: int, rows: np.ndarray) -> None:
    ids = pa.table({
        "row": np.arange(count), "id": [f"{letter}{row}" for row in range(count)],
        "ratings": np.bincount(rows[(rows >= 0) & (rows < count)].astype(np.int64), minlength=count).astype(np.int64),
    })  # fmt: skip
    pq.write_table(ids, os.path.join(path, f"{side}.parquet"))


def _all(parts: Sequence[Sequence[Columns]], name: str) -> np.ndarray:
    arrays = [np.asarray(columns[name]) for files in parts for columns in files]
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64)
