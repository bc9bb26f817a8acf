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
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mfdist import storage
from mfdist.errors import DataError

FORMAT_VERSION = 1
MANIFEST = "dataset.json"
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
        try:
            table = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not valid JSON ({error}); run prepare again.") from None
        if table.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {table.get('format_version')}, this mfdist reads {FORMAT_VERSION}; "
                "run prepare again."
            )
        try:
            table["lanes"] = tuple(
                Lane(
                    user_ranges=tuple((a, b) for a, b in lane.pop("user_ranges")),
                    files=tuple(lane.pop("files")),
                    **lane,
                )
                for lane in table["lanes"]
            )
            table["files"] = tuple(FileEntry(**entry) for entry in table["files"])
            table["rating_scale"] = tuple(table["rating_scale"])
            return Manifest(**table)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is damaged ({error}); run prepare again.") from None


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
            text = storage.read_text(manifest_path)
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"{storage.redact(path)} is not a dataset: it has no {MANIFEST}. Make one with jobs/prepare.py."
            ) from None
        return Dataset(path, Manifest.from_json(text, storage.redact(manifest_path)))

    def lane_files(self, split: str, lane: int) -> list[FileEntry]:
        """The files of one lane and split, oldest first."""
        return [self._entries[name] for name in self.manifest.lanes[lane].files if name.startswith(f"{split}/")]

    def file_path(self, entry: FileEntry) -> str:
        return storage.join(self.path, entry.path)

    def counts(self, side: str, first: int = 0, end: int | None = None) -> npt.NDArray[np.int64]:
        """Training ratings of rows ``first`` to ``end`` of ``side`` ('users' or 'items'): int64, (end - first,)."""
        return column_range(storage.join(self.path, f"{side}.parquet"), "ratings", first, end).to_numpy()  # type: ignore[no-any-return]

    def ids(self, side: str, first: int = 0, end: int | None = None) -> pa.ChunkedArray:
        """Original ids (strings) of rows ``first`` to ``end`` of ``side`` ('users' or 'items')."""
        return column_range(storage.join(self.path, f"{side}.parquet"), "id", first, end)

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


def column_range(path: str, column: str, first: int, end: int | None) -> pa.ChunkedArray:
    """Rows ``first`` to ``end`` of one column, touching only the row groups that hold them."""
    fs, inner = storage.arrow_filesystem(path)
    with pq.ParquetFile(inner, filesystem=fs) as file:
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
