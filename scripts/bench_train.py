#!/usr/bin/env python
"""Training speed, in M ratings/s, beside what a user would pick instead, at the Electronics file's size, in one run.

    python scripts/bench_train.py                    # makes synthetic ratings of that size under data/bench first
    python scripts/bench_train.py --data DIR --data DIR2 --rounds 3 --json train.json --peers
    python scripts/bench_train.py --device cuda --batch 65536,1048576

Rounds go through all systems in turn, every other round backwards (A B B A), and the table shows the median of each, so
that a busy machine hurts all alike; ratios below it are medians of those of each round. Each of ours trains one epoch
untimed (compiled code, touched rows, true gaps between visits) and is timed over the next two. ``exact``: the optimizer
named is the one computed, on every row; ``sparse_adam`` moves touched rows only (the same arithmetic without catch-up).
Bytes a rating: rows of both tables, read and written once a step, and the buffers between the passes; the share is of
the copy bandwidth of the same run. LIBMF's epoch is (20 epochs - 1 epoch) / 19, its set-up left out. Peers live
in environments of their own under ``.peers``; one that cannot be installed is named as absent.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peer_programs import FBGEMM, LIBMF
from peers import ROOT, PeerAbsent, environment
from peers import job as run_job
from torch import nn

from mfdist.cluster.world import World
from mfdist.data.dataset import Dataset
from mfdist.data.loader import Loader
from mfdist.model.cpu_step import FusedStep
from mfdist.model.models import ITEM_TABLE, USER_TABLE, Form, MFAdvanced
from mfdist.model.objective import Objective
from mfdist.model.optimizers import RowOptimizer
from mfdist.model.tables import ShardedTable, item_layout, user_layout

DIM = 32
FORM = Form(model="mf_advanced", dim=DIM, bias=True, init=True, sigmoid_range=(0.5, 5.5))
RATES = {"adamw": 0.0005, "sparse_adam": 0.0005, "rowwise_adagrad": 0.05, "sgd": 1.0}
TIMED_EPOCHS = 2
DENSE_STEPS, SPARSE_SECONDS = 3, 4.0
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class System:
    """One line of the table. ``run`` gives M ratings/s figures by name (several where one program measures several)."""

    name: str
    algorithm: str
    exact: bool
    batch_size: int
    run: Callable[[], float]
    bytes_per_rating: float = 0.0
    rates: list[float] = field(default_factory=list)
    absent: str = ""
    python: Path | None = None  # of a peer's own environment


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", action="append", help="a prepared dataset; may be given again for another order")
    parser.add_argument("--batch", default="8192,65536", help="batch sizes")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of every system")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="", help="systems whose name or algorithm contains one of these")
    parser.add_argument("--peers", action="store_true", help="FBGEMM as well (a large installation)")
    parser.add_argument("--json", help="write the results here")
    flags = parser.parse_args(argv)
    torch.set_num_threads(flags.threads)
    datasets = [Dataset.open(path) for path in flags.data or made_datasets()]
    sizes = [int(size) for size in flags.batch.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        wanted = flags.only.split(",")
        listed = list_systems(datasets, sizes, flags, Path(folder))
        systems = [s for s in listed if any(word in f"{s.name}, {s.algorithm}" for word in wanted)]
        copies = measure(systems, flags)
    report(systems, copies, flags)
    return 0


def made_datasets() -> list[str]:
    """The synthetic twin of Electronics, prepared in both orders; made once under data/bench."""
    folder = ROOT / "data/bench"
    source = folder / "electronics.csv"
    if not source.exists():
        folder.mkdir(parents=True, exist_ok=True)
        run_job("synthesize", "--preset", "electronics", "--out", str(source))
    for order in ("random", "blocks"):
        if not (folder / order / "dataset.json").exists():
            run_job("prepare", str(source), "--out", str(folder / order), "--order", order)
    return [str(folder / order) for order in ("random", "blocks")]


# The systems --------------------------------------------------------------------------------------


def list_systems(datasets: Sequence[Dataset], sizes: Sequence[int], flags: Any, folder: Path) -> Iterator[System]:
    for dataset in datasets:
        order = dataset.manifest.order
        for size in sizes:
            batches = batches_of(dataset, size, flags.device)
            for kind in RATES:
                system = System(f"mfdist ({order})", kind, kind != "sparse_adam", size, lambda: 0.0)
                system.run = partial(ours, dataset, kind, batches, flags)
                system.bytes_per_rating = bytes_per_rating(batches, kind)
                yield system
            if flags.device == "cpu":
                yield System(f"jobs/train.py ({order})", "adamw", True, size, partial(job, dataset, size, flags))
    dataset = datasets[0]
    for size in sizes:
        batches = batches_of(dataset, size, flags.device)
        for algorithm, dense in (("SparseAdam", False), ("AdamW, dense tables", True)):
            run = partial(torch_loop, dataset, batches, dense, flags.device)
            yield System("torch.optim", algorithm, dense, size, run)
    if flags.device == "cpu":
        rows = folder / "rows.parquet"
        write_rows(dataset, rows)
        manifest = dataset.manifest
        yield peer("LIBMF", "its own Adagrad", 0, ["libmf", "numpy", "pyarrow"], LIBMF, [rows, flags.threads, DIM])
        if flags.peers:
            packages = ["torch==2.13.0", "--no-deps:fbgemm-gpu-cpu==1.8.0", "--no-deps:torchrec==1.8.0", "pyarrow",
                        "numpy", "tqdm"]  # fmt: skip
            for size in sizes:
                arguments = [rows, size, flags.threads, DIM, manifest.num_users, manifest.num_items]
                yield peer("FBGEMM on CPU", "rowwise Adagrad", size, packages, FBGEMM, arguments)


def batches_of(dataset: Dataset, size: int, device: str) -> list[Batch]:
    """The batches of one epoch, on the device."""
    with Loader(dataset, batch_size=size, seed=1, rank=0, world_size=1) as loader:
        return [
            (b.user.clone().to(device), b.item.clone().to(device), b.rating.clone().to(device)) for b in loader.epoch(0)
        ]


def write_rows(dataset: Dataset, path: Path) -> None:
    """All training rows in a random order, for the peers."""
    rows = batches_of(dataset, 1 << 20, "cpu")
    names = ("user", "item", "rating")
    columns = {name: torch.cat([batch[k] for batch in rows]).numpy() for k, name in enumerate(names)}
    pq.write_table(pa.table(columns), path)


def ours(dataset: Dataset, kind: str, batches: Sequence[Batch], flags: Any) -> float:
    """Ratings/s of the fused step over the second and third epoch."""
    world, manifest = World.alone(flags.device), dataset.manifest
    steps, decay = (1 + TIMED_EPOCHS) * len(batches), 0.01 if kind == "adamw" else 0.0
    optimizer = RowOptimizer(kind=kind, lr=RATES[kind], total_steps=steps, weight_decay=decay)
    tables = []
    for number, layout in ((USER_TABLE, user_layout(manifest, 1)), (ITEM_TABLE, item_layout(manifest, 1))):
        table = ShardedTable(layout, FORM.width, optimizer, world, at_home=number == USER_TABLE)
        table.initialise(partial(FORM.initial, 42, number))
        tables.append(table)
    model, step = MFAdvanced(FORM, *tables), None
    if flags.device == "cuda":
        from mfdist.model.gpu_step import GpuStep

        step = GpuStep(model, optimizer, Objective())
    step = step or FusedStep(model, optimizer, Objective(), flags.threads, ratings=_rows(batches))
    try:
        for epoch in range(1 + TIMED_EPOCHS):
            if epoch == 1:
                began = time.perf_counter()
            for user, item, rating in batches:
                step(user, item, rating, len(rating))
        assert np.isfinite(float(step.squared_error))
        return TIMED_EPOCHS * _rows(batches) / (time.perf_counter() - began)
    finally:
        step.close()


def job(dataset: Dataset, size: int, flags: Any) -> float:
    """Ratings/s of the last of three epochs of the whole job, loader and bookkeeping included."""
    with tempfile.TemporaryDirectory() as run:
        command = [sys.executable, "jobs/train.py", "--config", "vignette_mf_advanced",
                   "--data", dataset.path, "--run-dir", f"{run}/run", "--epochs", "3",
                   "--batch-size", str(size), "--checkpoint-every", "60m"]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": str(flags.threads)}
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment)
        epochs = json.loads(Path(run, "run/report.json").read_text())["epochs"]
    return float(epochs[-1]["ratings_per_second"])


class TorchModel(nn.Module):
    """mf_advanced as it is written with torch.nn.Embedding."""

    def __init__(self, users: int, items: int, sparse: bool) -> None:
        super().__init__()
        self.user, self.item = (nn.Embedding(n, DIM, sparse=sparse) for n in (users, items))
        self.user_bias, self.item_bias = (nn.Embedding(n, 1, sparse=sparse) for n in (users, items))
        self.offset = nn.Parameter(torch.zeros(1))
        for table in (self.user, self.item):
            nn.init.uniform_(table.weight, 0, 0.05)
        for table in (self.user_bias, self.item_bias):
            nn.init.zeros_(table.weight)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        dot = (self.user(user) * self.item(item)).sum(1)
        return 0.5 + 5 * torch.sigmoid(dot + self.user_bias(user)[:, 0] + self.item_bias(item)[:, 0] + self.offset)


def torch_loop(dataset: Dataset, batches: Sequence[Batch], dense: bool, device: str) -> float:
    """Ratings/s of the common training loop: the median step of a few."""
    model = TorchModel(dataset.manifest.num_users, dataset.manifest.num_items, not dense).to(device)
    rest = [model.offset]
    tables = [p for name, p in model.named_parameters() if name != "offset"]
    optimizers: list[torch.optim.Optimizer]
    if dense:
        optimizers = [torch.optim.AdamW(model.parameters(), lr=0.0005, weight_decay=0.01)]
    else:
        optimizers = [torch.optim.SparseAdam(tables, lr=0.0005), torch.optim.AdamW(rest, lr=0.0005)]
    seconds: list[float] = []
    for user, item, rating in batches:
        began = time.perf_counter()
        loss = ((model(user, item) - rating) ** 2).mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        if len(seconds) > DENSE_STEPS if dense else sum(seconds) > SPARSE_SECONDS:
            break
    return len(batches[0][2]) / statistics.median(seconds[1:] or seconds)


def peer(name: str, algorithm: str, size: int, packages: list[str], code: str, arguments: list[Any]) -> System:
    """A system that runs in an environment of its own, made on first use; absent where it cannot be installed."""
    system = System(name, algorithm, False, size, lambda: 0.0)
    try:
        system.python = environment(name.split(maxsplit=1)[0].lower(), packages)
    except PeerAbsent as error:
        system.absent = str(error)
    variables = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}

    def run() -> float:
        command = [str(system.python), "-c", code, *map(str, arguments)]
        result = subprocess.run(command, check=True, capture_output=True, text=True, env=variables)
        return float(result.stdout.split()[-1])

    system.run = run
    return system


# Measuring ----------------------------------------------------------------------------------------


def bytes_per_rating(batches: Sequence[Batch], kind: str) -> float:
    """Counted on the batches: distinct rows of both tables read and written, and the buffers that the passes share."""
    width = FORM.width
    state = {"adamw": 2 * width, "sparse_adam": 2 * width, "rowwise_adagrad": 1, "sgd": 0}[kind]
    row = 4 * (width + state + 1)
    total = 0
    for user, item, rating in batches[:50]:
        rows = [len(torch.unique(ids)) for ids in (user, item)]
        buffers = 4 * width * (sum(rows) + 2 * len(rating))  # written once a row, read once a rating
        total += 2 * row * sum(rows) + buffers + 12 * len(rating)
    return total / _rows(batches[:50])


def copy_bandwidth(threads: int, device: str) -> float:
    """Bytes read and written per second by a copy of 512 MiB."""
    size = 1 << 27
    if device == "cuda":
        source = torch.ones(size, device=device)
        target = torch.empty_like(source)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            target.copy_(source)
        torch.cuda.synchronize()
        return 10 * 8 * size / (time.perf_counter() - began)
    first, second = np.ones(size, np.float32), np.ones(size, np.float32)
    cuts = [size * k // threads for k in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        for _ in range(4):
            list(pool.map(lambda a, b: np.copyto(second[a:b], first[a:b]), cuts, cuts[1:]))
    return 4 * 8 * size / (time.perf_counter() - began)


def measure(systems: Sequence[System], flags: Any) -> float:
    """Fill the rates of all systems; returns the median copy bandwidth.

    Every other round goes backwards, so that nobody always comes after the same other one.
    """
    copies = []
    for number in range(flags.rounds):
        copies.append(copy_bandwidth(flags.threads, flags.device))
        for system in systems[:: 1 - 2 * (number % 2)]:
            if not system.absent:
                size = system.batch_size or ""
                print(f"round {number + 1}/{flags.rounds}: {system.name}, {system.algorithm} {size}", file=sys.stderr)
                system.rates.append(system.run())
    return statistics.median(copies)


def report(systems: Sequence[System], copies: float, flags: Any) -> None:
    """The table on stdout, and the JSON."""
    medians = {id(s): statistics.median(s.rates) for s in systems if s.rates}
    libmf = next((medians[id(s)] for s in systems if s.name == "LIBMF" and s.rates), None)
    print(f"{flags.threads} threads, {flags.device}, copy bandwidth {copies / 1e9:.1f} GB/s, k = {DIM}")
    print(f"{'system':26} {'algorithm':20} {'exact':>5} {'batch':>8} {'M ratings/s':>11} {'of LIBMF':>8} "
          f"{'bytes/rating':>12} {'of copy':>7}")  # fmt: skip
    for s in systems:
        if s.absent:
            print(f"{s.name:26} absent, {s.absent}")
            continue
        rate = medians[id(s)]
        ratio = f"{rate / libmf:8.2f}" if libmf else f"{'-':>8}"
        moved = f"{s.bytes_per_rating:12.0f} {s.bytes_per_rating * rate / copies:7.2f}" if s.bytes_per_rating else ""
        print(f"{s.name:26} {s.algorithm:20} {'yes' if s.exact else 'no':>5} {s.batch_size or '-':>8} "
              f"{rate / 1e6:11.3f} {ratio} {moved}".rstrip())  # fmt: skip
    for exact in (s for s in systems if s.name.startswith("mfdist") and s.algorithm == "adamw" and s.rates):
        order = exact.name.removeprefix("mfdist")
        others = [s for s in systems if s is not exact and s.rates and s.batch_size in (0, exact.batch_size)
                  and (s.name.endswith(order) or not s.name.endswith(")"))]  # fmt: skip
        ratios = [f"{_ratio(exact, other):.2f} of {other.name}, {other.algorithm}" for other in others]
        print(f"exact AdamW, {exact.name}, batch {exact.batch_size}: {'; '.join(ratios) or 'nothing beside it'}")
    if flags.json:
        rows = [
            {"system": s.name, "algorithm": s.algorithm, "exact": s.exact, "device": flags.device,
             "batch_size": s.batch_size, "threads": flags.threads, "ratings_per_second": medians.get(id(s)),
             "rounds": s.rates, "bytes_per_rating": s.bytes_per_rating or None, "absent": s.absent or None,
             "peak_rss_bytes": psutil.Process().memory_info().rss} for s in systems
        ]  # fmt: skip
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                   "copy_bytes_per_second": copies}  # fmt: skip
        Path(flags.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def _ratio(one: System, other: System) -> float:
    """The rate of ``one`` over that of the ``other`` in the same round, the median over the rounds."""
    return statistics.median(a / b for a, b in zip(one.rates, other.rates, strict=True))


def _rows(batches: Sequence[Batch]) -> int:
    return sum(len(batch[2]) for batch in batches)


if __name__ == "__main__":
    sys.exit(main())
