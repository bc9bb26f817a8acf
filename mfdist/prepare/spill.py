"""Rows and ids between the passes: in memory up to a limit, in runs on the local disk beyond it.

Rows are kept in 4,096 buckets of the user hash (its first 12 bits). A bucket of every run together is all there is
of its users, so any range of buckets can be worked on alone, in hash order. Ids are kept sorted by hash, once each.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numba
import numpy as np
import numpy.typing as npt

from mfdist.prepare.ids import U64, HashCollision, first_of_each, gather_bytes

BUCKETS = 4096
_SHIFT = np.uint64(52)
Arrays = dict[str, npt.NDArray[Any]]
T = TypeVar("T")


@numba.njit(nogil=True, cache=True)
def _bucket_places(user: Any, cursor: Any, place: Any) -> None:
    for i in range(user.size):
        b = np.int64(user[i] >> _SHIFT)
        place[i] = cursor[b]
        cursor[b] += 1


def bucket_edge(bucket: int) -> int:
    """The smallest hash of a bucket."""
    return bucket << 52


class Runs(Generic[T]):
    """Runs in order, each made on a thread beside the caller's; one is in work at most, which bounds the memory."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._made: list[Future[T]] = []

    def __len__(self) -> int:
        return len(self._made)

    def add(self, make: Callable[[], T]) -> None:
        """Begin to make the next run; raises what the one before it has raised."""
        if self._made:
            self._made[-1].result()
        self._made.append(self._thread.submit(make))

    def all(self) -> list[T]:
        """Every run; no more follow."""
        self._thread.shutdown()
        return [run.result() for run in self._made]


class RowSpill:
    """Rows as columns 'user' and 'item' (uint64 hashes), 'rating' (float32), 'val' (uint8) and maybe 'time' (int64)."""

    def __init__(self, folder: str, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._held: list[Arrays] = []
        self._held_bytes = 0
        self._making: Runs[tuple[Arrays | str, npt.NDArray[np.int64]]] = Runs()
        self._runs: list[tuple[Arrays | str, npt.NDArray[np.int64]]] = []
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self.rows = 0

    def add(self, columns: Arrays) -> None:
        """Keep rows; they may go to the disk at once."""
        self._dtypes = {name: values.dtype for name, values in columns.items()}
        self._held.append(columns)
        self._held_bytes += sum(values.nbytes for values in columns.values())
        self.rows += columns["user"].size
        if self._held_bytes >= self._max_bytes:
            self._close_run(to_disk=True)

    def close(self) -> None:
        """No more rows come: begin the last run."""
        if self._held:
            self._close_run(to_disk=len(self._making) > 0)

    def finish(self) -> npt.NDArray[np.int64]:
        """After :meth:`close`, the rows of every bucket: int64, (BUCKETS,)."""
        self._runs = self._making.all()
        return (
            np.sum([np.diff(edges) for _, edges in self._runs], axis=0) if self._runs else np.zeros(BUCKETS, np.int64)
        )

    def read(self, first: int, end: int) -> Arrays:
        """The rows of buckets ``first`` to ``end``, in no order."""
        parts = [self._slice(run, int(edges[first]), int(edges[end])) for run, edges in self._runs]
        return {name: np.concatenate([part[name] for part in parts]) for name in self._dtypes}

    def _close_run(self, *, to_disk: bool) -> None:
        held, self._held, self._held_bytes = self._held, [], 0
        number = len(self._making)
        self._making.add(lambda: self._run(held, number, to_disk))

    def _run(self, held: list[Arrays], number: int, to_disk: bool) -> tuple[Arrays | str, npt.NDArray[np.int64]]:
        counts = np.zeros(BUCKETS + 1, np.int64)
        for part in held:
            counts[1:] += np.bincount((part["user"] >> _SHIFT).astype(np.int64), minlength=BUCKETS)
        edges = np.cumsum(counts)
        cursor, total = edges[:-1].copy(), int(edges[-1])
        run = {name: np.empty(total, dtype) for name, dtype in self._dtypes.items()}
        held.reverse()
        while held:  # each part is freed when it has been copied
            part = held.pop()
            place = np.empty(part["user"].size, np.int64)
            _bucket_places(part["user"], cursor, place)
            for name, values in part.items():
                run[name][place] = values
        return self._written(run, number) if to_disk else run, edges

    def _written(self, run: Arrays, number: int) -> str:
        base = os.path.join(self._folder, f"rows-{number:05d}")
        for name, values in run.items():
            values.tofile(f"{base}.{name}")
        return base

    def _slice(self, run: Arrays | str, first: int, end: int) -> Arrays:
        if isinstance(run, dict):
            return {name: values[first:end] for name, values in run.items()}
        return {
            name: np.fromfile(f"{run}.{name}", dtype, end - first, offset=first * dtype.itemsize)
            for name, dtype in self._dtypes.items()
        }


class Ids:
    """Ids sorted by hash, once each: ``hashes`` (uint64, (n,)), ``edges`` (int64, (n + 1,)) into ``content``."""

    def __init__(self, hashes: U64, edges: npt.NDArray[np.int64], content: npt.NDArray[np.uint8]) -> None:
        self.hashes, self.edges, self.content = hashes, edges, content

    def __len__(self) -> int:
        return self.hashes.size

    def take(self, places: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        """(edges, content) of the ids at these places, in this order."""
        length = np.diff(self.edges)[places]
        content = np.empty(int(length.sum()), np.uint8)
        gather_bytes(self.content, self.edges[places], length, content)
        return np.concatenate([[0], np.cumsum(length)]).astype(np.int64), content


def sorted_ids(hashes: U64, start: Any, length: Any, content: npt.NDArray[np.uint8]) -> Ids:
    """Sort ids by hash and drop repeats. HashCollision where two different ids share a hash."""
    order = np.argsort(hashes)  # equal hashes in any order: all of them are compared, one is kept
    kept = np.zeros(order.size, np.bool_)
    if first_of_each(order, hashes, content, start, length, kept) < 0:
        raise HashCollision
    order = order[kept]
    out = np.empty(int(length[order].sum()), np.uint8)
    gather_bytes(content, start[order], length[order], out)
    return Ids(hashes[order], np.concatenate([[0], np.cumsum(length[order])]).astype(np.int64), out)


class IdSpill:
    """The ids of one side, collected with repeats and read back sorted by hash, once each."""

    def __init__(self, folder: str, name: str, max_bytes: int) -> None:
        self._folder, self._name, self._max_bytes = folder, name, max_bytes
        self._held: list[tuple[U64, npt.NDArray[np.int64], npt.NDArray[np.uint8]]] = []
        self._held_bytes = 0
        self._making: Runs[tuple[Ids | str, npt.NDArray[np.int64], npt.NDArray[np.int64]]] = Runs()
        self._runs: list[tuple[Ids | str, npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []

    def add(self, hashes: U64, start: Any, length: Any, content: Any) -> None:
        out = np.empty(int(length.sum()), np.uint8)
        gather_bytes(content, start, length, out)
        self._held.append((hashes, length, out))
        self._held_bytes += 16 * hashes.size + out.size
        if self._held_bytes >= self._max_bytes:
            self._close_run(to_disk=True)

    def close(self) -> None:
        """No more ids come: begin the last run."""
        if self._held:
            self._close_run(to_disk=len(self._making) > 0)

    def finish(self) -> int:
        """After :meth:`close`, an upper bound of their number, exact where nothing went to the disk."""
        self._runs = self._making.all()
        return sum(int(places[-1]) for _, places, _ in self._runs)

    def read(self, first: int = 0, end: int = BUCKETS) -> Ids:
        """The ids whose hash is in buckets ``first`` to ``end``."""
        parts = [self._slice(run, places, edges, first, end) for run, places, edges in self._runs]
        if len(parts) == 1:
            return parts[0]
        empty = np.zeros(0, np.int64)
        hashes = np.concatenate([part.hashes for part in parts] or [np.zeros(0, np.uint64)])
        length = np.concatenate([np.diff(part.edges) for part in parts] or [empty])
        content = np.concatenate([part.content for part in parts] or [np.zeros(0, np.uint8)])
        return sorted_ids(hashes, np.cumsum(length) - length, length, content)

    def _close_run(self, *, to_disk: bool) -> None:
        held, self._held, self._held_bytes = self._held, [], 0
        number = len(self._making)
        self._making.add(lambda: self._run(held, number, to_disk))

    def _run(
        self, held: list[tuple[U64, npt.NDArray[np.int64], npt.NDArray[np.uint8]]], number: int, to_disk: bool
    ) -> tuple[Ids | str, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        hashes, length, content = (np.concatenate([part[k] for part in held]) for k in range(3))
        held.clear()
        ids = sorted_ids(hashes, np.cumsum(length) - length, length, content)
        borders = np.arange(1, BUCKETS, dtype=np.uint64) << _SHIFT
        places = np.concatenate([[0], np.searchsorted(ids.hashes, borders), [len(ids)]]).astype(np.int64)
        return self._written(ids, number) if to_disk else ids, places, ids.edges[places]

    def _written(self, ids: Ids, number: int) -> str:
        base = os.path.join(self._folder, f"{self._name}-{number:05d}")
        ids.hashes.tofile(f"{base}.hash")
        ids.edges.tofile(f"{base}.edges")
        ids.content.tofile(f"{base}.text")
        return base

    @staticmethod
    def _slice(run: Ids | str, places: Any, edges: Any, first: int, end: int) -> Ids:
        a, b = int(places[first]), int(places[end])
        if isinstance(run, Ids):
            low, high = int(run.edges[a]), int(run.edges[b])
            return Ids(run.hashes[a:b], run.edges[a : b + 1] - low, run.content[low:high])
        text_edges = np.fromfile(f"{run}.edges", np.int64, b - a + 1, offset=8 * a)
        content = np.fromfile(f"{run}.text", np.uint8, int(edges[end] - edges[first]), offset=int(edges[first]))
        return Ids(np.fromfile(f"{run}.hash", np.uint64, b - a, offset=8 * a), text_edges - text_edges[0], content)
