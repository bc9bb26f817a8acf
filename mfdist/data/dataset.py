"""The dataset directory: its manifest, where its files lie, and whether they are what the manifest says.

    DATA/dataset.json                 manifest, written last; a directory without it is not a dataset
    DATA/{train,val}/lane-00000.parquet ...   user, item, rating[, timestamp]
    DATA/users.parquet, items.parquet row, id, ratings (training ratings of that row)

A lane is a fixed partition of the users and all their ratings. It owns one contiguous range of user rows
and one more for every append, and may have several files: ``lane-00003.parquet`` of the first preparation,
``lane-00003.append-001.parquet`` of the first append.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mfdist import json_tables, storage
from mfdist.data import manifest_checks
from mfdist.errors import DataError

FORMAT_VERSION = 1
MANIFEST = "dataset.json"
REMEDY = "run prepare again"
SPLITS = ("train", "val")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One Parquet file; ``path`` is relative to the dataset, ``checksum`` the BLAKE2b (16 bytes, hex) of it."""

    path: str
    rows: int
    bytes: int
    checksum: str


@dataclass(frozen=True, kw_only=True)
class Lane:
    """A partition of the users: half-open ranges of user rows, rows of each split, files relative to the dataset."""

    user_ranges: tuple[tuple[int, int], ...]
    train_rows: int
    val_rows: int
    files: tuple[str, ...]

    @property
    def num_users(self) -> int:
        return sum(end - first for first, end in self.user_ranges)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """``dataset.json``, field by field."""

    name: str
    num_users: int
    num_items: int
    num_ratings: dict[str, int]
    rating_scale: tuple[float, float]
    rating_step: float
    rating_histogram: list[tuple[float, int]]
    global_mean: float
    lanes: tuple[Lane, ...]
    order: str
    split: dict[str, Any]
    fingerprint: str
    sources: list[dict[str, Any]]
    rejected: dict[str, int]
    filtered: int
    merged: int
    files: tuple[FileEntry, ...]
    rating_spread: float | None = None  # standard deviation of the training ratings, and their skewness;
    rating_skewness: float = 0.0  # None in a dataset that an earlier version prepared
    has_timestamp: bool = False
    format_version: int = FORMAT_VERSION
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str, path: str) -> Manifest:
        return Manifest.of_table(json.loads(text), path)

    @staticmethod
    def of_table(table: dict[str, Any], path: str) -> Manifest:
        """The manifest in the JSON object of the file ``path``; DataError where it cannot be one."""
        version = table.get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {json_tables.short(version)}, this mfdist reads {FORMAT_VERSION}; {REMEDY}."
            )
        try:
            manifest: Manifest = json_tables.typed(Manifest, table, "")
            manifest_checks.check(manifest)
        except ValueError as error:
            raise json_tables.damaged(path, error, REMEDY) from None
        return manifest


class Dataset:
    """An opened dataset directory. Opening reads the manifest only and is cheap on every rank."""

    def __init__(self, path: str, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._entries = {entry.path: entry for entry in manifest.files}

    @staticmethod
    def open(path: str) -> Dataset:
        """DataError where ``path`` is no dataset."""
        manifest_path = storage.join(path, MANIFEST)
        try:
            table = json_tables.read(manifest_path, REMEDY)
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"{storage.redact(path)} is not a dataset: it has no {MANIFEST}. Make one with jobs/prepare.py."
            ) from None
        return Dataset(path, Manifest.of_table(table, storage.redact(manifest_path)))

    def lane_files(self, split: str, lane: int) -> list[FileEntry]:
        """The files of one lane and split, oldest first."""
        return [self._entries[name] for name in self.manifest.lanes[lane].files if name.startswith(f"{split}/")]

    def file_path(self, entry: FileEntry) -> str:
        """DataError where a link leads out of the dataset."""
        return storage.inside(self.path, entry.path)

    def counts(self, side: str, first: int = 0, end: int | None = None) -> npt.NDArray[np.int64]:
        """Training ratings of rows ``first`` to ``end`` of ``side`` ('users' or 'items'): int64, (end - first,)."""
        return column_range(self._vocabulary(side), "ratings", first, self._end(side, end)).to_numpy()  # type: ignore[no-any-return]

    def ids(self, side: str, first: int = 0, end: int | None = None) -> pa.ChunkedArray:
        """Original ids (strings) of rows ``first`` to ``end`` of ``side`` ('users' or 'items')."""
        return column_range(self._vocabulary(side), "id", first, self._end(side, end))

    def check_vocabularies(self) -> None:
        """DataError where users.parquet or items.parquet has not as many rows as there are users or items."""
        for side in ("users", "items"):
            num_rows, expected = rows_of(self._vocabulary(side)), self._end(side, None)
            if num_rows != expected:
                raise DataError(
                    f"{storage.redact(self._vocabulary(side))} has {num_rows} rows, the manifest says {expected}; "
                    f"{REMEDY}."
                )

    def _end(self, side: str, end: int | None) -> int:
        return end if end is not None else self.manifest.num_users if side == "users" else self.manifest.num_items

    def _vocabulary(self, side: str) -> str:
        return storage.inside(self.path, f"{side}.parquet")

    def check_files(self, splits: tuple[str, ...] = SPLITS) -> None:
        """Compare existence, size and row count of every file with the manifest; DataError names the first fault."""
        for entry in self.manifest.files:
            if entry.path.split("/")[0] not in splits:
                continue
            path = self.file_path(entry)
            fault = size_fault(path, entry)
            if fault:
                raise DataError(f"{storage.redact(path)} {fault}; run prepare --verify, or prepare it again.")


def size_fault(path: str, entry: FileEntry) -> str | None:
    """What is wrong with a file at first sight, or None."""
    try:
        found = storage.size(path)
    except FileNotFoundError:
        return "is missing"
    return f"has {found} bytes, the manifest says {entry.bytes}" if found != entry.bytes else None


def checksum(path: str) -> str:
    """BLAKE2b (16 bytes, hex) of a file's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with storage.open_read(path) as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(checksums: list[str]) -> str:
    """The dataset's fingerprint: BLAKE2b over the file checksums in lane order."""
    return hashlib.blake2b("".join(checksums).encode(), digest_size=16).hexdigest()


def verify(dataset: Dataset, advance: Callable[[int], None] = lambda _bytes: None) -> Iterator[str]:
    """Re-read every file and yield a sentence for each one that is not what the manifest says; ``advance`` is told the
    bytes of each file behind it."""
    for entry in dataset.manifest.files:
        path = dataset.file_path(entry)
        fault = size_fault(path, entry)
        if fault is None and checksum(path) != entry.checksum:
            fault = "has another checksum than the manifest says"
        advance(entry.bytes)
        if fault:
            yield f"{storage.redact(path)} {fault}"


def rows_of(path: str) -> int:
    """Rows of a Parquet file, by its footer; DataError as :func:`column_range`."""

    def footer() -> int:
        fs, inner = storage.arrow_filesystem(path)
        with pq.ParquetFile(inner, filesystem=fs) as file:
            return int(file.metadata.num_rows)

    return _readable(path, footer)


def column_range(path: str, column: str, first: int, end: int | None) -> pa.ChunkedArray:
    """Rows ``first`` to ``end`` of one column, touching only the row groups that hold them. DataError where the file is
    missing, damaged, without that column, or shorter."""
    found = _readable(path, lambda: _column_range(path, column, first, end))
    if end is not None and len(found) != end - first:
        raise DataError(f"{storage.redact(path)} has {first + len(found)} rows where {end} are needed.")
    return found


T = TypeVar("T")


def _readable(path: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except FileNotFoundError:
        raise DataError(f"{storage.redact(path)} is missing.") from None
    except (pa.ArrowException, OSError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{storage.redact(path)} cannot be read ({reason}).") from None


def _column_range(path: str, column: str, first: int, end: int | None) -> pa.ChunkedArray:
    fs, inner = storage.arrow_filesystem(path)
    with pq.ParquetFile(inner, filesystem=fs) as file:
        if column not in file.schema_arrow.names:
            raise KeyError(f"it has no column {column}")
        end = file.metadata.num_rows if end is None else end
        groups, start, skipped = [], 0, None
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if start + rows > first and start < end:
                skipped = start if skipped is None else skipped
                groups.append(group)
            start += rows
        table = file.read_row_groups(groups, columns=[column])
    return table.column(0).slice(first - (skipped or 0), end - first)
