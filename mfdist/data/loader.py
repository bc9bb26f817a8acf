"""The training rows of a rank, batch by batch: exactly once an epoch, in an order that no world size changes.

    loader = Loader(dataset, batch_size=8192, seed=42, rank=1, world_size=4)
    for batch in loader.epoch(epoch, start_step=step):
        ...                               # batch.user, .item, .rating: this rank's rows of the global batch

Which rows make batch s is a pure function of dataset, seed, batch size, epoch and s (``schedule``, ``shuffle``). A rank
gets those of its lanes: lanes ascending, and within a lane in the lane's epoch order. Every rank takes the same number
of steps; its share of a step may be empty. The state is {epoch, step} and fingerprints, the same on every rank.

How it is done: prefetch threads decode the next unit (row group) of a lane, permute it while it is in the cache, and
assemble many steps at once into a *block* of about 2^18 rows, of which batches are slices. In memory are at most one
unit open and one ahead per lane, and the blocks ahead; where the rank's decoded rows fit as well, they stay after the
first pass and later epochs read no file: on the host, or on the GPU that they are for (``device_rows``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mfdist import storage
from mfdist.data.batch_blocks import AssembledBlock, EpochPlan, Piece, Pool, Source, select
from mfdist.data.batch_order import ORDER_VERSION, BatchOrder, lanes_of_rank
from mfdist.data.dataset import Dataset, FileEntry, checksum
from mfdist.data.device_rows import DeviceRows, fits_on_device
from mfdist.data.prefetch import Prefetcher
from mfdist.data.row_groups import Columns, Counters, RatingFile
from mfdist.data.scan import id_dtype, open_lane
from mfdist.errors import DataError, UsageError

POOL_BYTES = 256 << 20
CHECKSUM_BYTES = 512 << 20
"""Up to this many bytes of local files a rank verifies their checksums before training; above, prepare --verify."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A rank's rows of global batch ``step``: ``user``, ``item`` (global rows), ``rating`` float32, each (rows,).

    ``global_rows`` counts the rows of all ranks. The tensors are the caller's to keep.
    """

    user: torch.Tensor
    item: torch.Tensor
    rating: torch.Tensor
    step: int
    global_rows: int


@dataclass
class LoaderStats:
    """Figures since the loader was made: seconds the consumer waited, seconds of decoding (all threads), rows given;
    whether decoded rows stay, and whether they lie on the device by now."""

    wait_seconds: float = 0.0
    rows: int = 0
    resident: bool = False
    on_device: bool = False
    counters: Counters = field(default_factory=Counters)

    @property
    def decode_seconds(self) -> float:
        return self.counters.read_seconds

    @property
    def retries(self) -> int:
        return self.counters.retries


class Loader:
    """See the module. ``threads``: prefetch threads; ``memory_bytes``: what decoded rows may take to stay resident
    (default a quarter of the machine's free memory, shared by its ranks). ``reduce`` sums an int array over ranks: with
    it (collective then, in the constructor) each rank counts the stop rows of its own lanes only, without it of all.
    ``rows_on_device``: whether resident rows go to the device where they fit (default: to a GPU).

    UsageError: more ranks than lanes. DataError: a file missing, changed, truncated or not as the manifest says.
    """

    def __init__(
        self, dataset: Dataset, *, batch_size: int, seed: int, rank: int, world_size: int, stop_fraction: float = 0.0,
        device: str | torch.device = "cpu", threads: int | None = None, memory_bytes: int | None = None,
        rows_on_device: bool | None = None,
        reduce: Callable[[npt.NDArray[np.float64]], npt.ArrayLike] | None = None,
    ) -> None:  # fmt: skip
        self.dataset, self.seed, self.stop_fraction = dataset, seed, stop_fraction
        self.device = torch.device(device)
        self._moves = self.device.type == "cuda" if rows_on_device is None else rows_on_device
        num_lanes = len(dataset.manifest.lanes)
        if world_size > num_lanes:
            raise UsageError(
                f"{world_size} ranks cannot share the {num_lanes} lanes of {storage.redact(dataset.path)} (parts of "
                f"whole users): start at most {num_lanes}, or prepare it with more --lanes."
            )
        self.stats = LoaderStats()
        self._threads = threads or default_threads(world_size)
        self._lanes = lanes_of_rank(num_lanes, rank, world_size)
        self._resident: dict[tuple[int, int], Columns] = {}
        self._on_device: tuple[DeviceRows, list[list[int]]] | None = None
        with ThreadPoolExecutor(max_workers=max(self._threads, 8)) as pool:
            _verify_small(dataset, self._lanes, pool)
            counted = self._lanes if reduce or not stop_fraction else range(num_lanes)
            files = dict(zip(counted, pool.map(self._open_lane, counted), strict=True))
            pieces = dict(zip(counted, pool.map(self._pieces_of_lane, files.values()), strict=True))
        self._pieces = [pieces[lane] for lane in self._lanes]
        self.order = BatchOrder(self._count_lanes(pieces, reduce), batch_size)
        manifest = dataset.manifest
        self._source = Source(
            order=self.order, lanes=self._lanes, pieces=self._pieces, read=self._columns, seed=seed,
            stop_fraction=stop_fraction, pool=Pool(POOL_BYTES),
            types=(id_dtype(manifest.num_users), id_dtype(manifest.num_items), np.float32),
            block_rows=int(manifest.extra.get("block_rows", 512)) if manifest.order == "blocks" else 0,
        )  # fmt: skip
        self.stats.resident = self._fits(memory_bytes, world_size)

    @property
    def num_steps(self) -> int:
        """Steps of an epoch, on every rank."""
        return self.order.num_steps

    @property
    def num_rows(self) -> int:
        """Training rows of an epoch, of all ranks; stop rows are not among them."""
        return self.order.num_rows

    @property
    def num_stop_rows(self) -> int:
        """Training rows held out of the epochs, of all ranks."""
        return sum(lane.train_rows for lane in self.dataset.manifest.lanes) - self.num_rows

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from ``start_step`` on. Leaving the loop early ends the prefetch threads."""
        assert 0 <= start_step <= self.num_steps
        self._move_to_device()
        plan = EpochPlan(self._source, epoch, start_step, self._on_device and self._on_device[1])
        prefetcher = Prefetcher(plan.blocks(), self._threads, plan.ahead)
        try:
            yield from self._batches(prefetcher)
        finally:
            prefetcher.close()

    def state(self, epoch: int, step: int) -> dict[str, Any]:
        """What a run needs to go on before ``step`` of ``epoch``, on any number of ranks: plain JSON values."""
        return {
            "order_version": ORDER_VERSION, "epoch": epoch, "step": step, "seed": self.seed,
            "batch_size": self.order.batch_size, "stop_fraction": self.stop_fraction, "num_rows": self.num_rows,
            "fingerprint": self.dataset.manifest.fingerprint,
        }  # fmt: skip

    def check_state(self, state: dict[str, Any]) -> tuple[int, int]:
        """(epoch, step) of a state; UsageError where it belongs to other data, another order or another run."""
        for key, mine in self.state(0, 0).items():
            if key not in ("epoch", "step") and state.get(key) != mine:
                raise UsageError(
                    f"the checkpoint was made with {key} {state.get(key)}, this run has {mine}; "
                    "continue with the same data and settings, or start another run."
                )
        epoch, step = state.get("epoch"), state.get("step")
        if not (isinstance(epoch, int) and isinstance(step, int) and epoch >= 0 and 0 <= step <= self.num_steps):
            raise UsageError(f"the checkpoint's loader state is damaged: epoch {epoch}, step {step}.")
        return epoch, step

    def close(self) -> None:
        """Give the resident rows back. Threads and files are never held between epochs."""
        self._resident.clear()
        self._on_device, self.stats.on_device = None, False

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Opening ------------------------------------------------------------------------------------------

    def _open_lane(self, lane: int) -> list[RatingFile]:
        files = open_lane(self.dataset, "train", lane, self.stats.counters)
        found, told = sum(file.metadata.num_rows for file in files), self.dataset.manifest.lanes[lane].train_rows
        if found != told:
            raise DataError(
                f"the training files of lane {lane} ({', '.join(file.name for file in files)}) hold {found} rows, "
                f"the manifest says {told}; prepare the dataset again."
            )
        return files

    def _pieces_of_lane(self, files: list[RatingFile]) -> list[Piece]:
        pieces = []
        for file in files:
            for unit in file.units:
                rows = unit.rows
                if self.stop_fraction:
                    rows = len(select(file.read(unit), self.seed, self.stop_fraction, stop=False))
                pieces.append(Piece(file, unit, rows))
        return pieces

    def _count_lanes(self, pieces: dict[int, list[Piece]], reduce: Any) -> tuple[int, ...]:
        lanes = self.dataset.manifest.lanes
        if not self.stop_fraction:
            return tuple(lane.train_rows for lane in lanes)
        rows = np.zeros(len(lanes), np.float64)
        for lane, own in pieces.items():
            rows[lane] = sum(piece.rows for piece in own)
        return tuple(int(count) for count in (reduce(rows) if reduce else rows))

    def _fits(self, memory_bytes: int | None, world_size: int) -> bool:
        """Whether the decoded rows may stay; DataError where not even one unit open and one ahead per lane fit."""
        row_bytes = self._row_bytes
        rows = sum(piece.unit.rows for pieces in self._pieces for piece in pieces)
        largest = [max(pieces, key=lambda piece: piece.unit.rows) for pieces in self._pieces if pieces]
        window = 2 * row_bytes * sum(piece.unit.rows for piece in largest)
        free = available_bytes() // ranks_here(world_size)
        if window > free:
            worst = max(largest, key=lambda piece: piece.unit.rows)
            raise DataError(
                f"{worst.file.name}, row group {worst.unit.groups[0]} has {worst.unit.rows:,} rows; two such "
                f"groups for each lane need {window / 2**30:.1f} of {free / 2**30:.1f} GiB free. Prepare it again."
            )
        limit = free // 4 if memory_bytes is None else memory_bytes
        return bool(row_bytes * rows <= limit)

    @property
    def _row_bytes(self) -> int:
        return sum(np.dtype(one).itemsize for one in self._source.types)

    # Running ------------------------------------------------------------------------------------------

    def _move_to_device(self) -> None:
        """Once a pass has made all rows resident, let them lie on the device where they fit."""
        units = [(lane, unit) for lane, pieces in enumerate(self._pieces) for unit in range(len(pieces))]
        if not self._moves or self._on_device or not units or not all(unit in self._resident for unit in units):
            return
        rows = sum(piece.rows for pieces in self._pieces for piece in pieces)
        if self.device.type == "cuda" and not fits_on_device(rows, self._row_bytes, self.device):
            self._moves = False
            return
        kept = DeviceRows(map(self._without_stop_rows, units), rows, self.device)
        firsts = iter(kept.firsts)
        self._on_device = kept, [[next(firsts) for _ in pieces] for pieces in self._pieces]
        self.stats.on_device = True
        self._resident.clear()

    def _without_stop_rows(self, unit: tuple[int, int]) -> Columns:
        columns = self._resident[unit]
        if not self.stop_fraction:
            return columns
        chosen = select(columns, self.seed, self.stop_fraction, stop=False)
        return Columns(columns.user[chosen], columns.item[chosen], columns.rating[chosen])

    def _batches(self, prefetcher: Prefetcher[AssembledBlock]) -> Iterator[Batch]:
        blocks: Iterator[AssembledBlock] = prefetcher
        gather = self._on_device[0].gather if self._on_device else None
        if self.device.type == "cuda":
            from mfdist.data.device_feed import DeviceFeed

            blocks = DeviceFeed(prefetcher, self.device, gather)
        elif gather:
            blocks = map(gather, prefetcher)
        waited = prefetcher.wait_seconds
        for block in blocks:
            self.stats.wait_seconds += prefetcher.wait_seconds - waited
            waited = prefetcher.wait_seconds
            parts = [torch.split(column, block.sizes) for column in block.columns]
            for index, size in enumerate(block.sizes):
                step = block.first_step + index
                self.stats.rows += size
                yield Batch(parts[0][index], parts[1][index], parts[2][index], step, self.order.rows_of_step(step))

    def _columns(self, lane: int, unit: int) -> Columns:
        """The decoded rows of a unit (lane counted within the rank), from memory or from its file."""
        kept = self._resident.get((lane, unit))
        if kept is not None:
            return kept
        piece = self._pieces[lane][unit]
        columns = piece.file.read(piece.unit)
        if self.stats.resident:
            self._resident[lane, unit] = columns
        return columns


def ranks_here(world_size: int) -> int:
    """Ranks on this machine: torchrun's LOCAL_WORLD_SIZE, else all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def default_threads(world_size: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(4, cores // ranks_here(world_size)))


def available_bytes() -> int:
    """Free memory: the machine's MemAvailable, or what the control group (container, Slurm job) leaves if less."""
    free = 1 << 40
    try:
        with open("/proc/meminfo") as stream:
            free = next(int(line.split()[1]) * 1024 for line in stream if line.startswith("MemAvailable"))
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as current:
            limited = limit.read().strip()
            return free if limited == "max" else min(free, max(0, int(limited) - int(current.read())))
    except (OSError, StopIteration):
        return free


def _verify_small(dataset: Dataset, lanes: range, pool: ThreadPoolExecutor) -> None:
    """Checksums of the rank's local training files where they are few enough to read twice; DataError names a file."""
    entries = [entry for lane in lanes for entry in dataset.lane_files("train", lane)]
    if not storage.is_local(dataset.path) or sum(entry.bytes for entry in entries) > CHECKSUM_BYTES:
        return
    for entry, sound in zip(entries, pool.map(lambda entry: _is_sound(dataset, entry), entries), strict=True):
        if not sound:
            raise DataError(
                f"{storage.redact(dataset.file_path(entry))} has another checksum than the manifest says: it was "
                "changed since it was prepared; prepare it again."
            )


def _is_sound(dataset: Dataset, entry: FileEntry) -> bool:
    """Whether the checksum agrees; a file that is missing or of another size is left to the check that names that."""
    path = dataset.file_path(entry)
    try:
        return storage.size(path) != entry.bytes or checksum(path) == entry.checksum
    except FileNotFoundError:
        return True
