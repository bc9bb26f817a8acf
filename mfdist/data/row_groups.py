"""Reading rating files (Parquet) row group by row group: checked, converted, retried, never held open between reads.

The columns of a row group come as numpy arrays on Arrow's own memory where the types fit (int32 or int64 ids, float32
ratings); int64 ids that fit int32 and float64 ratings are converted. All else is refused with file and row group.

Local files go through Arrow's file system, which never holds the GIL while it reads or decodes. From any other file
system exactly the bytes of the row group are fetched in one request, with retries and growing waits, and decoded from
memory: Arrow never sees a Python file object, which serialises reads and can hang the interpreter's exit.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mfdist import storage
from mfdist.data import shuffle
from mfdist.errors import DataError

T = TypeVar("T")

UNIT_ROWS = 32_768
"""Row groups smaller than this are read together up to this many rows: a *unit* (part of the order version)."""

_ATTEMPTS = 6
_FIRST_WAIT_SECONDS = 0.05
_TAIL_BYTES = 1 << 16
_REMOTE_ERRORS = ("aiohttp", "aiobotocore", "botocore", "urllib3", "requests", "asyncio", "fsspec", "google", "gcsfs")


class Columns(NamedTuple):
    """The rows of a unit: ``user`` and ``item`` int32 or int64, ``rating`` float32, ``timestamp`` int64 or None."""

    user: npt.NDArray[Any]
    item: npt.NDArray[Any]
    rating: npt.NDArray[np.float32]
    timestamp: npt.NDArray[np.int64] | None = None

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in self if column is not None)


class Unit(NamedTuple):
    """Consecutive row groups of one file that are read and permuted together, and their rows."""

    groups: tuple[int, ...]
    rows: int


@dataclass(frozen=True)
class Limits:
    """What ids may be: users within [first_user, end_user), items within [0, num_items); and the types to give."""

    first_user: int
    end_user: int
    num_items: int
    user_dtype: Any = np.int32
    item_dtype: Any = np.int32


@dataclass
class Counters:
    """What reading has cost so far, summed over threads (an addition may be lost between threads; they are figures)."""

    read_seconds: float = 0.0
    retries: int = 0
    last_retry: str = field(default="", repr=False)


class RatingFile:
    """One Parquet file of ratings, its footer read and checked. No handle stays open."""

    def __init__(self, path: str, num_bytes: int, limits: Limits, counters: Counters) -> None:
        """Reads the footer; DataError where the file is missing, of another size, truncated, or of other columns."""
        self.path = path
        self.name = storage.redact(path)
        self._bytes = num_bytes
        self._limits = limits
        self._counters = counters
        self._check_size()
        self.metadata = self._read_footer()
        self.has_timestamp = self._check_columns()
        self._check_statistics()
        self.units = _units([self.metadata.row_group(g).num_rows for g in range(self.metadata.num_row_groups)])

    def read(self, unit: Unit, *, timestamp: bool = False) -> Columns:
        """The rows of a unit in file order; DataError names file and row group."""
        start = time.perf_counter()
        names = ["user", "item", "rating", *(["timestamp"] if timestamp and self.has_timestamp else [])]
        try:
            table = self._retried(lambda: self._read_groups(list(unit.groups), names))
        except FileNotFoundError:
            raise DataError(f"{self.name} has gone since training began; put it back and run again.") from None
        except (OSError, pa.ArrowException) as error:
            raise DataError(self._where(unit, f"cannot be read ({_one_line(error)})")) from error
        if table.num_rows != unit.rows:
            raise DataError(self._where(unit, f"holds {table.num_rows} rows, the footer said {unit.rows}"))
        columns = Columns(
            self._ids(unit, table.column(0), "user", self._limits.user_dtype),
            self._ids(unit, table.column(1), "item", self._limits.item_dtype),
            self._plain(unit, table.column(2), "rating").astype(np.float32, copy=False),
            self._plain(unit, table.column(3), "timestamp").astype(np.int64, copy=False) if len(names) > 3 else None,
        )
        self._check_values(unit, columns)
        self._counters.read_seconds += time.perf_counter() - start
        return columns

    # Opening ------------------------------------------------------------------------------------------

    def _check_size(self) -> None:
        try:
            found = self._retried(lambda: storage.size(self.path))
        except FileNotFoundError:
            raise DataError(f"{self.name} is missing, the manifest lists it; put it back or prepare again.") from None
        if found != self._bytes:
            raise DataError(
                f"{self.name} has {found} bytes, the manifest says {self._bytes}: it was truncated or changed "
                "since it was prepared; run prepare --verify, or prepare it again."
            )

    def _read_footer(self) -> pq.FileMetaData:
        try:
            if storage.is_local(self.path):
                return self._retried(lambda: pq.read_metadata(storage.local_path(self.path)))
            tail = self._fetch(max(0, self._bytes - _TAIL_BYTES), self._bytes)
            length = int.from_bytes(tail[-8:-4], "little") + 8
            if len(tail) < length <= self._bytes:
                tail = self._fetch(self._bytes - length, self._bytes)
            return pq.read_metadata(pa.BufferReader(tail))
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{self.name} has no readable Parquet footer ({_one_line(error)}): it was truncated or changed; "
                "run prepare --verify, or prepare it again."
            ) from error

    def _check_columns(self) -> bool:
        schema = self.metadata.schema.to_arrow_schema()
        wanted: dict[str, Callable[[pa.DataType], bool]] = {
            "user": pa.types.is_integer, "item": pa.types.is_integer,
            "rating": lambda kind: pa.types.is_floating(kind) or pa.types.is_integer(kind),
        }  # fmt: skip
        for name, fits in wanted.items():
            if name not in schema.names:
                raise DataError(f"{self.name} has no column '{name}' (it has {', '.join(schema.names)}).")
            if not fits(schema.field(name).type):
                raise DataError(
                    f"{self.name}: column '{name}' is of type {schema.field(name).type}, expected "
                    f"{'a number' if name == 'rating' else 'whole row numbers'}; prepare it again."
                )
        return "timestamp" in schema.names

    def _check_statistics(self) -> None:
        """What the footer tells about nulls and id ranges, so that training does not start on what it must refuse."""
        bounds = {"user": (self._limits.first_user, self._limits.end_user), "item": (0, self._limits.num_items)}
        for group in range(self.metadata.num_row_groups):
            chunks = self.metadata.row_group(group)
            for index in range(chunks.num_columns):
                name, statistics = chunks.column(index).path_in_schema, chunks.column(index).statistics
                if name not in ("user", "item", "rating") or statistics is None:
                    continue
                unit = Unit((group,), chunks.num_rows)
                if statistics.has_null_count and statistics.null_count:
                    raise DataError(self._where(unit, f"has {statistics.null_count} nulls in column '{name}'"))
                if name in bounds and statistics.has_min_max:
                    self._check_range(unit, name, statistics.min, statistics.max, bounds[name])

    # Reading ------------------------------------------------------------------------------------------

    def _read_groups(self, groups: list[int], names: list[str]) -> pa.Table:
        if storage.is_local(self.path):
            source: Any = storage.local_path(self.path)
        else:
            source = pa.BufferReader(self._sparse_copy(groups, names))
        with pq.ParquetFile(source, metadata=self.metadata, pre_buffer=False) as file:
            return file.read_row_groups(groups, columns=names, use_threads=False)

    def _sparse_copy(self, groups: list[int], names: list[str]) -> pa.Buffer:
        """A buffer as long as the file that holds the bytes of these row groups; the rest is never touched memory."""
        start, end = self._bytes, 0
        for group in groups:
            chunks = self.metadata.row_group(group)
            for column in (chunks.column(index) for index in range(chunks.num_columns)):
                if column.path_in_schema in names:
                    first = column.data_page_offset
                    if column.dictionary_page_offset is not None:
                        first = min(first, column.dictionary_page_offset)
                    start, end = min(start, first), max(end, first + column.total_compressed_size)
        whole = mmap.mmap(-1, self._bytes)
        if start < end:
            whole[start:end] = self._fetch(start, end)
        return pa.py_buffer(whole)

    def _fetch(self, start: int, end: int) -> bytes:
        return self._retried(lambda: self._fetch_once(start, end))

    def _fetch_once(self, start: int, end: int) -> bytes:
        fs, inner = storage.filesystem(self.path)
        content: bytes = fs.cat_file(inner, start=start, end=end)
        if len(content) != end - start:
            raise OSError(f"{self.name} gave {len(content)} bytes of {end - start}")
        return content

    def _retried(self, attempt: Callable[[], T]) -> T:
        """``attempt()`` again after transient errors, with doubled waits: 0.05 s, 0.1 s, ... 0.8 s."""
        for number in range(_ATTEMPTS):
            try:
                return attempt()
            except Exception as error:
                if number == _ATTEMPTS - 1 or not is_transient(error, local=storage.is_local(self.path)):
                    if type(error).__module__.split(".")[0] in _REMOTE_ERRORS:
                        raise OSError(_one_line(error)) from error
                    raise
                self._counters.retries += 1
                self._counters.last_retry = f"{self.name}: {_one_line(error)}"
            time.sleep(_FIRST_WAIT_SECONDS * 2**number)
        raise AssertionError

    # Checks -------------------------------------------------------------------------------------------

    def _plain(self, unit: Unit, column: pa.ChunkedArray, name: str) -> npt.NDArray[Any]:
        if column.null_count:
            raise DataError(self._where(unit, f"has {column.null_count} nulls in column '{name}'"))
        chunk = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        if isinstance(chunk, pa.ChunkedArray):  # no rows at all
            return np.empty(0, column.type.to_pandas_dtype())
        return chunk.to_numpy(zero_copy_only=True)  # type: ignore[no-any-return]

    def _ids(self, unit: Unit, column: pa.ChunkedArray, name: str, dtype: Any) -> npt.NDArray[Any]:
        ids = self._plain(unit, column, name)
        if ids.dtype == dtype:
            return ids
        low, high = (self._limits.first_user, self._limits.end_user) if name == "user" else (0, self._limits.num_items)
        if len(ids):  # before the conversion, which would wrap
            self._check_range(unit, name, int(ids.min()), int(ids.max()), (low, high))
        return ids.astype(dtype)

    def _check_values(self, unit: Unit, columns: Columns) -> None:
        limits = self._limits
        bounds = {"user": (limits.first_user, limits.end_user), "item": (0, limits.num_items)}
        fault = shuffle.check_rows(*columns[:3], limits.first_user, limits.end_user, limits.num_items)
        if fault == shuffle.BAD_RATING:
            raise DataError(self._where(unit, "has a rating that is not a finite number"))
        if fault != shuffle.OK:
            name, ids = ("user", columns.user) if fault == shuffle.BAD_USER else ("item", columns.item)
            self._check_range(unit, name, int(ids.min()), int(ids.max()), bounds[name])

    def _check_range(self, unit: Unit, name: str, low: int, high: int, bounds: tuple[int, int]) -> None:
        if low < bounds[0] or high >= bounds[1]:
            raise DataError(
                self._where(unit, f"has {name} rows {low} to {high} outside [{bounds[0]}, {bounds[1]}) of its lane")
            )

    def _where(self, unit: Unit, fault: str) -> str:
        groups = f"row group {unit.groups[0]}" + (f" to {unit.groups[-1]}" if len(unit.groups) > 1 else "")
        return f"{self.name}, {groups}: {fault}; run prepare --verify, or prepare it again."


def is_transient(error: Exception, *, local: bool) -> bool:
    """Whether a read may succeed when tried again: network and server errors, and a local disk's own errors.

    Arrow reports undecodable bytes as OSError without an errno: those are not transient.
    """
    if isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)):
        return False
    if local:
        return isinstance(error, OSError) and error.errno is not None
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _REMOTE_ERRORS


def _units(group_rows: list[int]) -> list[Unit]:
    """Consecutive row groups taken together while they stay within UNIT_ROWS; groups without rows join any."""
    units: list[Unit] = []
    groups: list[int] = []
    rows = 0
    for group, size in enumerate(group_rows):
        if rows and rows + size > UNIT_ROWS:
            units.append(Unit(tuple(groups), rows))
            groups, rows = [], 0
        groups.append(group)
        rows += size
    if rows:
        units.append(Unit(tuple(groups), rows))
    return units


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
