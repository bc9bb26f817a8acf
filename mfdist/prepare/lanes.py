"""Lanes: where they are cut, in which order their ratings lie, and their Parquet files with checksums.

Users in hash order are dealt to lanes so that each gets its share of the ratings: a user goes to the lane in which
the middle of its ratings falls. Worked example, 3 lanes and users with 4, 1, 1, 2, 1 of 9 ratings: the middles 2,
4.5, 5.5, 7, 8.5 fall in the thirds 0, 1, 1, 2, 2.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mfdist import storage
from mfdist.data.dataset import FileEntry
from mfdist.prepare.ids import mix
from mfdist.prepare.spill import Arrays

BLOCK_ROWS = 128
"""Of a block of users (``--order blocks``): so few that a small batch holds most of a user's ratings at once."""
MAX_DISTINCT = 1000
DAY_SECONDS = 86_400


def row_group_rows(num_lanes: int) -> int:
    """Rows of a row group: small where many lanes are open at once."""
    return min(max(8_388_608 // num_lanes, 32_768), 262_144)


def lanes_of_users(
    counts: npt.NDArray[np.int64], before: int, borders: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """The lane of each user, given its ratings, the ratings of users before it, and the lanes' upper borders."""
    end = before + np.cumsum(counts)
    return np.minimum(np.searchsorted(borders, end - counts / 2, side="right"), borders.size - 1).astype(np.int64)


class HashingFile:
    """A local file that is written once, with the digest and number of its bytes. For pyarrow's writers."""

    def __init__(self, path: str) -> None:
        self._stream = open(path, "wb")  # noqa: SIM115
        self._digest = hashlib.blake2b(digest_size=16)
        self.bytes = 0
        self.closed = False

    def write(self, content: Any) -> int:
        self._digest.update(content)
        size = memoryview(content).nbytes
        self.bytes += size
        self._stream.write(content)
        return size

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            self.closed = True

    @property
    def checksum(self) -> str:
        return self._digest.hexdigest()


class ParquetFile:
    """One Parquet file of a dataset, written in tables; :meth:`close` says what it became. For use in a ``with``.

    A file of a remote dataset is written to ``scratch`` and then sent there whole.
    """

    def __init__(self, root: str, name: str, schema: pa.Schema, scratch: str, **options: Any) -> None:
        self._root, self._name, self.rows = root, name, 0
        self._remote = not storage.is_local(root)
        target = (
            os.path.join(scratch, name.replace("/", "-"))
            if self._remote
            else storage.local_path(storage.join(root, name))
        )
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        self._target, self._sink = target, HashingFile(target)
        self._writer = pq.ParquetWriter(self._sink, schema, compression="lz4", **options)
        self.entry: FileEntry | None = None

    def write(self, table: pa.Table, row_group_size: int | None = None) -> None:
        self._writer.write_table(table, row_group_size)
        self.rows += table.num_rows

    def __enter__(self) -> ParquetFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._writer.close()
        self._sink.close()
        if kind is None:
            self.entry = FileEntry(
                path=self._name, rows=self.rows, bytes=self._sink.bytes, checksum=self._sink.checksum
            )
            if self._remote:
                send(self._target, storage.join(self._root, self._name))

    @property
    def done(self) -> FileEntry:
        assert self.entry is not None
        return self.entry


def send(local: str, path: str, tries: int = 5) -> None:
    """Upload a local file and remove it; errors that may pass are tried again."""
    import time

    fs, inner = storage.filesystem(path)
    for attempt in range(tries):
        try:
            fs.put_file(local, inner)
            break
        except (PermissionError, FileNotFoundError):
            raise
        except OSError:
            if attempt == tries - 1:
                raise
            time.sleep(0.5 * 2**attempt)
    os.unlink(local)


def rating_schema(id_type: Any, has_time: bool) -> pa.Schema:
    fields = [("user", id_type), ("item", id_type), ("rating", pa.float32())] + [("timestamp", pa.int64())] * has_time
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields])


@dataclass
class LaneFacts:
    """What a lane's rows add up to, summed over lanes."""

    train_values: dict[float, int] = field(default_factory=dict)
    val_values: dict[float, int] = field(default_factory=dict)
    days: dict[int, int] = field(default_factory=dict)

    def add(self, other: LaneFacts) -> None:
        _add_counts(self.train_values, other.train_values)
        _add_counts(self.val_values, other.val_values)
        _add_counts(self.days, other.days)


def _add_counts(mine: dict[Any, int], theirs: dict[Any, int]) -> None:
    for key, count in theirs.items():
        mine[key] = mine.get(key, 0) + count


@dataclass(frozen=True, kw_only=True)
class LaneWriter:
    """How lanes are written: the dataset's ``root``, the local ``scratch`` folder, and the shape of the files."""

    root: str
    scratch: str
    order: str
    seed: int
    has_time: bool
    wide_ids: bool
    num_lanes: int
    suffix: str = ""
    time_unit: int = 1  # timestamps per second

    def write(self, lane: int, parts: Sequence[Arrays]) -> tuple[int, list[FileEntry], tuple[int, int], LaneFacts]:
        """Write a lane's rows, sorted by user; returns (lane, files, (train rows, val rows), facts)."""
        rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        facts, entries, sizes = LaneFacts(), [], []
        for split, mask in (("train", ~rows["is_val"]), ("val", rows["is_val"])):
            chosen = {name: rows[name][mask] for name in rows if name != "is_val"}
            sizes.append(chosen["user"].size)
            values, counts = np.unique(chosen["rating"], return_counts=True)
            table = dict(zip(values.tolist(), counts.tolist(), strict=True))
            (facts.train_values if split == "train" else facts.val_values).update(table)
            if self.has_time:
                add_days(facts.days, chosen["time"] // (DAY_SECONDS * self.time_unit))
            if sizes[-1]:
                entries.append(self._file(f"{split}/lane-{lane:05d}{self.suffix}.parquet", chosen))
        return lane, entries, (sizes[0], sizes[1]), facts

    def _file(self, name: str, rows: Arrays) -> FileEntry:
        order = lane_order(rows, self.order, self.seed)
        kind = np.int64 if self.wide_ids else np.int32
        columns = {"user": rows["user"].astype(kind)[order], "item": rows["item"].astype(kind)[order],
                   "rating": rows["rating"][order]}  # fmt: skip
        if self.has_time:
            columns["timestamp"] = rows["time"][order]
        schema = rating_schema(pa.int64() if self.wide_ids else pa.int32(), self.has_time)
        with ParquetFile(
            self.root, name, schema, self.scratch, use_dictionary=["rating"], write_statistics=True
        ) as file:
            file.write(pa.table(columns, schema=schema), row_group_rows(self.num_lanes))
        return file.done


def lane_order(rows: Arrays, order: str, seed: int) -> npt.NDArray[np.int64]:
    """Places of a lane's rows (sorted by user) in file order."""
    if order == "random":
        return np.argsort(rows["key"])
    size = rows["user"].size
    block_key = _mixed(rows["key"][::BLOCK_ROWS])  # a block is as random as the key of its first row, with the seed
    if size % BLOCK_ROWS:
        block_key[-1] = np.iinfo(np.uint64).max  # the rest comes last: a reader counts blocks from the first row on
    block = np.arange(size) // BLOCK_ROWS
    return np.lexsort((rows["key"], block, block_key[block]))


def _mixed(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Other random numbers than the keys themselves: the first of a user's rows is not the one with a small key."""
    return np.array([mix(np.uint64(key ^ np.uint64(0x5BD1E995))) for key in keys], np.uint64)


def add_days(days: dict[int, int], values: npt.NDArray[np.int64]) -> None:
    """Count days (since 1970) into ``days``."""
    if values.size == 0:
        return
    low, high = int(values.min()), int(values.max())
    if high - low < 1 << 20:
        counts = np.bincount(values - low)
        found, number = np.flatnonzero(counts) + low, counts[counts > 0]
    else:
        found, number = np.unique(values, return_counts=True)
    for day, count in zip(found.tolist(), number.tolist(), strict=True):
        days[day] = days.get(day, 0) + count
