"""What a training run will take, before anything is submitted: steps, memory, network, checkpoint, time.

Everything but the time is counted from the manifest and the vocabulary's counts. The time comes from a calibration:
some steps of the real model on the dataset's own batches, with one rank's share of the tables, in this process; to
which are added what a step sends, and what its collective calls wait for.

Example: 1,000 ratings in 4 lanes of 300, 300, 200, 200 rows on 3 ranks, which hold 1, 1 and 2 lanes: the largest
share is 400 rows where an even one is 333.3, so 17% of the machine waits.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mfdist.assembly import AHEAD_BYTES
from mfdist.config import flag
from mfdist.dataset import Dataset, Manifest
from mfdist.distributed import World
from mfdist.embedding import ShardedTable, item_layout, user_layout
from mfdist.errors import UsageError
from mfdist.fused import FusedStep
from mfdist.kernels import stride_of
from mfdist.lanes import row_group_rows
from mfdist.loader import Loader, available_bytes, id_dtype, ranks_here
from mfdist.model import MF, MFAdvanced
from mfdist.objective import ITEM, USER, Objective
from mfdist.schedule import lanes_of_rank
from mfdist.train_config import TrainConfig

ID_BYTES = 8  # of a row number on the wire
WARM_UP_STEPS = 3
COLLECTIVES = 5
"""Calls that a step of several ranks waits for: how many ids go where, the ids, their rows, gradients, the offset's."""
PROCESS_BYTES = 400 << 20
"""What a process takes beside its modules: compiled kernels, the loader's spare buffers, vocabulary and figures."""


def parse_ranks(text: str) -> tuple[int, ...]:
    """'1,2,8' as numbers of ranks."""
    ranks = tuple(int(part) for part in text.split(","))
    if min(ranks) < 1:
        raise ValueError("expected numbers of ranks such as 1,2,8")
    return ranks


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """The flags of jobs/train.py, and for what to plan."""

    ranks: tuple[int, ...] = flag((1, 2, 4, 8), "numbers of ranks to plan for, such as 1,2,8", parse=parse_ranks)
    calibrate_seconds: float = flag(5.0, "seconds of calibration for each number of ranks; 0: no times", at_least=0)
    threads: int = flag(0, "threads of a rank; 0: this machine's cores divided by the ranks", at_least=0)
    network_gbps: float = flag(10.0, "network of a rank, gigabits per second", above=0)
    network_latency: float = flag(200.0, "what a collective call waits for, microseconds", at_least=0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One number of ranks. Figures of a rank are those of the rank that has most; None: not calibrated."""

    ranks: int
    lanes: tuple[int, int]  # fewest and most of a rank
    efficiency: float  # even share of the rows over the largest share
    steps_per_epoch: int
    table_bytes: int  # weights and optimizer state of a rank
    loader_bytes: int
    step_bytes: int
    base_bytes: int  # the process itself: interpreter, torch, compiled kernels
    wire_bytes: float  # that a rank sends in a step
    checkpoint_bytes: int
    epoch_seconds: float | None
    total_seconds: float | None

    @property
    def memory_bytes(self) -> int:
        return self.table_bytes + self.loader_bytes + self.step_bytes + self.base_bytes


def plan(config: PlanConfig) -> list[Plan]:
    """A plan for each of ``config.ranks``; UsageError where a number exceeds the lanes or --data is missing."""
    if config.data is None:
        raise UsageError("--data is needed: the plan is made from a prepared dataset.")
    base = resident_bytes() + PROCESS_BYTES  # before a calibration makes it larger
    dataset = Dataset.open(config.data)
    lanes = len(dataset.manifest.lanes)
    if max(config.ranks) > lanes:
        raise UsageError(f"--ranks {max(config.ranks)}: the dataset has {lanes} lanes; ask for at most as many ranks.")
    return [plan_for(config, dataset, ranks, base) for ranks in config.ranks]


def plan_for(config: PlanConfig, dataset: Dataset, ranks: int, base_bytes: int = 0) -> Plan:
    """``base_bytes``: what a process takes without tables and data."""
    manifest = dataset.manifest
    form = config.form(manifest)
    shares = rows_of_ranks(manifest, ranks)
    kept = 1 - config.stop_fraction
    rows = sum(shares) * kept
    steps = math.ceil(rows / config.batch_size)
    largest = max(shares) * kept
    lanes = [len(lanes_of_rank(len(manifest.lanes), rank, ranks)) for rank in range(ranks)]
    batch = config.batch_size * largest / max(rows, 1)
    wire = 0.0
    if ranks > 1 and config.sharding != "replicated":
        unique = expected_unique(dataset.counts("items"), batch)
        wide = 2 if config.wire_dtype == "bf16" else 4
        wire = unique * (ranks - 1) / ranks * (ID_BYTES + 2 * form.width * wide)
    elif ranks > 1:
        # a ring all-reduce sends every gradient twice, but for a rank's own piece
        wire = (manifest.num_users + manifest.num_items) * form.width * 4 * 2 * (ranks - 1) / ranks
    epoch = None
    if config.calibrate_seconds:
        local = calibrate(config, dataset, ranks)
        waiting = COLLECTIVES * config.network_latency * 1e-6 if ranks > 1 else 0.0
        sending = wire * 8 / (config.network_gbps * 1e9)
        epoch = steps * (local.step_seconds + waiting + sending) + local.epoch_end_seconds
    return Plan(
        ranks=ranks, lanes=(min(lanes), max(lanes)), efficiency=(rows / ranks / largest) if largest else 1.0,
        steps_per_epoch=steps, table_bytes=table_bytes(config, manifest, ranks),
        loader_bytes=loader_bytes(manifest, int(largest), max(lanes), ranks),
        step_bytes=int(batch * 2 * form.width * 4 * 8), base_bytes=base_bytes, wire_bytes=wire,
        checkpoint_bytes=sum(
            rows * stored_bytes_of_row(config, form.stored_width(side))
            for side, rows in ((USER, manifest.num_users), (ITEM, manifest.num_items))
        ),
        epoch_seconds=epoch, total_seconds=None if epoch is None else epoch * config.epochs,
    )  # fmt: skip


def rows_of_ranks(manifest: Manifest, ranks: int) -> list[int]:
    """Training rows of each rank's lanes."""
    lanes = manifest.lanes
    return [sum(lanes[k].train_rows for k in lanes_of_rank(len(lanes), rank, ranks)) for rank in range(ranks)]


def table_bytes(config: TrainConfig, manifest: Manifest, ranks: int) -> int:
    """Bytes of both tables on the rank that holds most."""
    form = config.form(manifest)
    user, item = (bytes_of_row(config, form.stored_width(side)) for side in (USER, ITEM))
    if config.sharding == "replicated":
        return manifest.num_users * user + manifest.num_items * item
    layouts = user_layout(manifest, ranks), item_layout(manifest, ranks)
    held = [[sum(end - first for first, end in layout.ranges_of(rank)) for layout in layouts] for rank in range(ranks)]
    return max(users * user + items * item for users, items in held)


def bytes_of_row(config: TrainConfig, width: int) -> int:
    """Weights, optimizer state and the number of the last step of one row; a gradient too where tables are whole."""
    state = sum(config.row_optimizer(1).state_widths(width))
    return 4 * (2 * width + state + 1) if config.sharding == "replicated" else 4 * stride_of(width, state)


def stored_bytes_of_row(config: TrainConfig, width: int) -> int:
    """Of one row in a checkpoint."""
    return 4 * (width + sum(config.row_optimizer(1).state_widths(width)) + 1)


def expected_unique(counts: np.ndarray[tuple[int], np.dtype[np.int64]], rows: float) -> float:
    """Distinct items among ``rows`` ratings drawn in proportion to ``counts``."""
    total = counts.sum()
    return float(-np.expm1(rows * np.log1p(-np.minimum(counts / total, 1 - 1e-12))).sum()) if total else 0.0


def loader_bytes(manifest: Manifest, rows: int, lanes: int, ranks: int) -> int:
    """Of a rank: a permuted row group open and one ahead per lane, blocks of batches, and all rows where they fit."""
    row_bytes: int = 4 + sum(np.dtype(id_dtype(count)).itemsize for count in (manifest.num_users, manifest.num_items))
    window = min(rows, 2 * lanes * row_group_rows(len(manifest.lanes))) * row_bytes
    whole = rows * row_bytes
    resident = whole if whole <= available_bytes() // ranks_here(ranks) // 4 else 0
    return window + resident + min(whole, AHEAD_BYTES)


def resident_bytes() -> int:
    """Memory of this process now, in bytes."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# Calibration --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    step_seconds: float
    epoch_end_seconds: float  # settling the rows, and predictions for the validation rows


def calibrate(config: PlanConfig, dataset: Dataset, ranks: int) -> Calibration:
    """Time steps of rank 0 of ``ranks``, with its share of both tables and its share of each batch."""
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // ranks))
    try:
        with Loader(
            dataset, batch_size=config.batch_size, seed=config.seed, rank=0, world_size=ranks,
            stop_fraction=config.stop_fraction,
        ) as loader:  # fmt: skip
            return _timed(config, dataset.manifest, ranks, loader)
    finally:
        torch.set_num_threads(before)


def _timed(config: PlanConfig, manifest: Manifest, ranks: int, loader: Loader) -> Calibration:
    model, step = _share_of_model(config, manifest, ranks, loader.num_steps * config.epochs)
    users, items = model.user.layout.num_rows, model.item.layout.num_rows
    steps, seconds_in_steps, began = 0, 0.0, time.monotonic()
    for batch in loader.epoch(0):
        start = time.monotonic()
        loss = step(batch.user % users, batch.item % items, batch.rating, batch.global_rows)
        if loss.requires_grad:
            loss.backward()
        steps += 1
        if steps > WARM_UP_STEPS:
            seconds_in_steps += time.monotonic() - start
        else:
            began = time.monotonic()
        if steps > WARM_UP_STEPS and time.monotonic() - began > config.calibrate_seconds:
            break
    timed = max(steps - WARM_UP_STEPS, 1)
    start = time.monotonic()
    step.settle()
    settling = time.monotonic() - start
    rows = max(1, min(manifest.num_ratings["val"] // ranks, 1 << 18))
    user, item = torch.randint(users, (rows,)), torch.randint(items, (rows,))
    seconds_of_rows = math.inf
    for _ in range(2):  # the first time makes the memory
        start = time.monotonic()
        with torch.no_grad():
            model.form.rating_of_score(
                model.form.score(model.user.read(user).weight, model.item.read(item).weight, model.offset)
            )
        seconds_of_rows = min(seconds_of_rows, time.monotonic() - start)
    predicting = seconds_of_rows * manifest.num_ratings["val"] / ranks / rows
    step.close()
    return Calibration(seconds_in_steps / timed, settling + predicting)


def _share_of_model(config: PlanConfig, manifest: Manifest, ranks: int, total_steps: int) -> tuple[MF, FusedStep]:
    """A model with rank 0's share of the rows, as in the middle of a run: every row touched at some earlier step."""
    lanes = lanes_of_rank(len(manifest.lanes), 0, ranks)
    share = dataclasses.replace(
        manifest, lanes=manifest.lanes[: len(lanes)], num_items=max(1, math.ceil(manifest.num_items / ranks))
    )
    world, form = World.alone(), config.form(manifest)
    optimizer = config.row_optimizer(total_steps)
    tables = []
    for side, layout, at_home in ((USER, user_layout(share, 1), True), (ITEM, item_layout(share, 1), False)):
        table = ShardedTable(layout, form.stored_width(side), optimizer, world, at_home=at_home)
        table.rows.weight.uniform_(0, 0.05)
        table.step = max(1, total_steps // 2)
        table.rows.last.random_(1, table.step + 1)
        tables.append(table)
    model = (MF if config.model == "mf" else MFAdvanced)(form, *tables)
    ones = np.ones(len(tables[USER].rows.last), np.float32), np.ones(len(tables[ITEM].rows.last), np.float32)
    shares = ones if form.implicit else None
    return model, FusedStep(model, optimizer, Objective(), torch.get_num_threads(), shares)


# Showing it ---------------------------------------------------------------------------------------


def format_plans(plans: Sequence[Plan], config: PlanConfig) -> str:
    """The plans as a table, a column for each number of ranks."""
    lines: list[tuple[str, list[str]]] = [
        ("ranks", [f"{p.ranks}" for p in plans]),
        ("lanes of a rank", ["-".join(str(n) for n in sorted(set(p.lanes))) for p in plans]),
        ("efficiency left by rounding lanes", [f"{p.efficiency:.1%}" for p in plans]),
        ("steps an epoch", [f"{p.steps_per_epoch:,}" for p in plans]),
        ("memory of a rank", [_bytes(p.memory_bytes) for p in plans]),
        ("  tables and optimizer", [_bytes(p.table_bytes) for p in plans]),
        ("  loader", [_bytes(p.loader_bytes) for p in plans]),
        ("  a step's rows", [_bytes(p.step_bytes) for p in plans]),
        ("  the process itself", [_bytes(p.base_bytes) for p in plans]),
        ("sent by a rank in a step", [_bytes(p.wire_bytes) for p in plans]),
        ("a checkpoint, all ranks", [_bytes(p.checkpoint_bytes) for p in plans]),
        ("an epoch", [_seconds(p.epoch_seconds) for p in plans]),
        (f"all {config.epochs} epochs", [_seconds(p.total_seconds) for p in plans]),
    ]
    left = max(len(name) for name, _ in lines)
    return "\n".join(name.ljust(left) + "".join(value.rjust(12) for value in values) for name, values in lines)


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
