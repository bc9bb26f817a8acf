#!/usr/bin/env python
"""Shuffled rows/s of the loader beside raw Parquet decoding and a torch DataLoader over tensors, in one run.

    python scripts/bench_loader.py [--rows 20000000] [--data DIR] [--threads 1] [--json FILE] [--peers]

Rounds go through all systems in turn and the table shows the median of each, so that a busy machine hurts all alike;
the rows a CPU second (all threads) mean more where others use the cores as well.
Without ``--data`` a dataset of random rows is written as prepare writes it. ``--peers`` adds Hugging Face datasets
(``pip install datasets`` in an environment of its own).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mfdist import storage
from mfdist.data.dataset import MANIFEST, Dataset, Lane, Manifest, fingerprint
from mfdist.data.loader import Loader
from mfdist.prepare.lanes import ParquetFile, rating_schema, row_group_rows

BATCHES = (8192, 65536)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000_000, help="rows to generate")
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--data", help="a prepared dataset to read instead")
    parser.add_argument("--threads", type=int, default=1, help="prefetch threads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", action="store_true", help="Hugging Face datasets as well")
    parser.add_argument("--json", help="write the results here")
    flags = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dataset = Dataset.open(flags.data) if flags.data else generate(folder, flags.rows, flags.lanes)
        rows = _measure(_systems(dataset, flags), flags.rounds, dataset)
    _print(rows)
    if flags.json:
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        Path(flags.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


def generate(path: str, rows: int, lanes: int) -> Dataset:
    """Random training rows in lanes of equal size, written as prepare writes them; without vocabulary files."""
    users, items, rng = max(lanes, rows // 2), max(1, rows // 16), np.random.default_rng(1)
    schema, files, entries = rating_schema(pa.int32(), False), [], []
    for lane in range(lanes):
        first, end = users * lane // lanes, users * (lane + 1) // lanes
        size = rows * (lane + 1) // lanes - rows * lane // lanes
        columns = {
            "user": rng.integers(first, end, size, np.int32),
            "item": (rng.random(size, np.float32) ** 2 * (items - 1)).astype(np.int32),
            "rating": rng.integers(1, 6, size, np.int8).astype(np.float32),
        }
        name = f"train/lane-{lane:05d}.parquet"
        with ParquetFile(path, name, schema, path, use_dictionary=["rating"], write_statistics=True) as file:
            file.write(pa.table(columns, schema=schema), row_group_rows(lanes))
        entries.append(file.done)
        files.append(Lane(user_ranges=((first, end),), train_rows=size, val_rows=0, files=(name,)))
    manifest = Manifest(
        name="random rows", num_users=users, num_items=items, num_ratings={"train": rows, "val": 0},
        rating_scale=(1.0, 5.0), rating_step=1.0, rating_histogram=[], global_mean=3.0, lanes=tuple(files),
        order="random", split={"kind": "random"}, fingerprint=fingerprint([entry.checksum for entry in entries]),
        sources=[], rejected={}, filtered=0, merged=0, files=tuple(entries),
    )  # fmt: skip
    storage.write_text(storage.join(path, MANIFEST), manifest.to_json())
    return Dataset.open(path)


def _systems(dataset: Dataset, flags: Any) -> list[dict[str, Any]]:
    """name, batch size, whether every row comes once an epoch, and a function that counts rows."""
    systems = [
        {"system": "raw read_row_group", "batch_size": 0, "exact": False, "threads": 1, "run": lambda: _raw(dataset)}
    ]
    for batch, (mode, memory) in itertools.product(BATCHES, (("streaming", 0), ("resident", None))):
        loader = Loader(
            dataset, batch_size=batch, seed=1, rank=0, world_size=1, threads=flags.threads,
            memory_bytes=memory if memory == 0 else 1 << 40,
        )  # fmt: skip
        epochs = itertools.count()
        systems.append({
            "system": f"mfdist {mode}", "batch_size": batch, "exact": True, "threads": flags.threads,
            "run": lambda loader=loader, epochs=epochs: _ours(loader, next(epochs)),
        })  # fmt: skip
    systems += [
        {"system": "torch DataLoader", "batch_size": batch, "exact": True, "threads": 1,
         "run": lambda b=batch: _torch(b)}
        for batch in BATCHES
    ]  # fmt: skip
    if flags.peers:
        systems.append({"system": "HF datasets, shuffle(100k)", "batch_size": 8192, "exact": False, "threads": 1,
                        "run": lambda: _hugging_face(dataset)})  # fmt: skip
    return systems


def _measure(systems: list[dict[str, Any]], rounds: int, dataset: Dataset) -> list[dict[str, Any]]:
    rates: dict[int, list[float]] = {index: [] for index in range(len(systems))}
    cpu_rates: dict[int, list[float]] = {index: [] for index in range(len(systems))}
    for round_number in range(rounds + 1):
        for index, system in enumerate(systems):
            start, cpu_start = time.perf_counter(), time.process_time()
            count = system["run"]()
            if round_number:  # the first round compiles, fills the disk cache and makes rows resident
                rates[index].append(count / (time.perf_counter() - start))
                cpu_rates[index].append(count / (time.process_time() - cpu_start))
    raw, cpu_raw = statistics.median(rates[0]), statistics.median(cpu_rates[0])
    peak = psutil.Process().memory_info().rss
    names = ("system", "batch_size", "exact", "threads")
    return [
        {**{key: system[key] for key in names}, "algorithm": dataset.manifest.order,
         "device": "cpu", "rows_per_second": (rate := statistics.median(rates[index])), "of_raw": rate / raw,
         "rows_per_cpu_second": (cpu := statistics.median(cpu_rates[index])), "of_raw_cpu": cpu / cpu_raw,
         "rss_bytes": peak}
        for index, system in enumerate(systems)
    ]  # fmt: skip


def _ours(loader: Loader, epoch: int) -> int:
    return sum(len(batch.user) for batch in loader.epoch(epoch))


def _raw(dataset: Dataset) -> int:
    rows = 0
    for path in _files(dataset):
        with pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            for group in range(file.metadata.num_row_groups):
                rows += file.read_row_group(group, columns=["user", "item", "rating"], use_threads=False).num_rows
    return rows


def _torch(batch_size: int) -> int:
    """The common way: everything in memory, a map-style dataset, shuffle=True; a few batches tell its rate."""
    tensors = [torch.randint(0, 1000, (1_000_000,), dtype=torch.int32) for _ in range(3)]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*tensors), batch_size=batch_size, shuffle=True)
    return sum(len(batch[0]) for batch in itertools.islice(loader, max(1, 100_000 // batch_size)))


def _hugging_face(dataset: Dataset) -> int:
    import datasets

    stream = datasets.load_dataset("parquet", data_files=list(_files(dataset)), split="train", streaming=True)
    batches = stream.shuffle(seed=1, buffer_size=100_000).with_format("numpy").iter(batch_size=8192)
    return sum(len(batch["user"]) for batch in itertools.islice(batches, 200))


def _files(dataset: Dataset) -> Iterator[str]:
    for lane in range(len(dataset.manifest.lanes)):
        for entry in dataset.lane_files("train", lane):
            yield dataset.file_path(entry)


def _print(rows: list[dict[str, Any]]) -> None:
    print(f"{'system':28} {'batch':>6} {'threads':>7} {'M rows/s':>9} {'of raw':>7} {'M rows/CPU s':>13} {'of raw':>7}")
    for row in rows:
        print(
            f"{row['system']:28} {row['batch_size'] or '':>6} {row['threads']:>7} "
            f"{row['rows_per_second'] / 1e6:9.2f} {row['of_raw']:7.2f} "
            f"{row['rows_per_cpu_second'] / 1e6:13.2f} {row['of_raw_cpu']:7.2f}"
        )


if __name__ == "__main__":
    sys.exit(main())
