#!/usr/bin/env python
"""What each stage of the pipeline costs as the data grows: seconds, rows/s, peak memory and bytes on disk.

    python scripts/bench_scale.py --json scale.json                # 1 M to 200 M rows: half an hour, 20 GB of disk
    python scripts/bench_scale.py --sizes 1e6,8e6 --folder /scratch
    python scripts/bench_scale.py --sizes 200e6 --keep --again train    # the data of an earlier --keep, one stage anew

A size is ROWS, or ROWS:USERS:ITEMS; by default a tenth as many users as rows and a hundredth as many items, and two
sizes more with the tables of the largest, to see the cost of a rating at equal table size. The ratings are synthetic
(``jobs/synthesize.py --preset electronics``), and nothing is said about accuracy.

``synthesize`` and ``prepare`` are the jobs; ``train`` (one epoch of mf_advanced with exact AdamW), ``settle``
(every row brought to the epoch's end), ``evaluate`` (all validation rows, the second time), ``checkpoint`` and
``export`` are the library's calls in one process, each with a memory peak of its own. The epoch's first batch is left
out: it opens files and loads compiled code. Ratings are read from disk (``jobs/train.py`` keeps them in memory, 12
bytes each, where they fit into a quarter of what is free). ``bound`` is the peak as a share of the documented bound:
1 GiB and 8 bytes an item for synthesize, --memory for prepare, and for the others tables, loader and batch as
jobs/plan.py counts them and 1 GiB.

``wire``: a few steps on 2, 4 and 8 ranks as if each had a host of its own, and every byte that leaves a rank for
another one: headers, requests, rows and gradients, counted where they are sent. What is found is kept in --folder as it
comes: an interrupted run goes on there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mfdist.cluster.world import World
from mfdist.data.dataset import Dataset
from mfdist.data.loader import Loader
from mfdist.log import Console
from mfdist.model.cpu_step import FusedStep
from mfdist.planning.plan import PlanConfig, plan_for
from mfdist.training.config import TrainConfig
from mfdist.training.finish import export_model
from mfdist.training.session import Session, build, restore_or_initialise, save, wait_for_save
from mfdist.training.train import batches_of, train_step

ROOT = Path(__file__).resolve().parents[1]
SIZES = "1e6,8e6,50e6,200e6,50e6:20e6:2e6,100e6:20e6:2e6"
CONFIG = "vignette_mf_advanced"
IN_PROCESS = ("train", "settle", "evaluate", "checkpoint", "export")
PREPARE_MEMORY = 4 << 30
SYNTHESIZE_MEMORY = 1 << 30  # beside 8 bytes an item
PROCESS_MEMORY = 1 << 30  # interpreter, torch, compiled kernels, buffers
WIRE_STEPS = 8
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    rows: int
    users: int
    items: int

    @staticmethod
    def parse(text: str) -> Size:
        rows, *others = (int(float(part)) for part in text.split(":"))
        users, items = others or (max(rows // 10, 1), max(rows // 100, 1))
        return Size(rows, users, items)

    def __str__(self) -> str:
        return f"{self.rows}-{self.users}-{self.items}"


@dataclass(frozen=True)
class Used:
    seconds: float
    cpu_seconds: float
    peak: int  # resident bytes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=SIZES, help="ROWS[:USERS:ITEMS],... (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=65536, help="ratings of a step (default %(default)s)")
    parser.add_argument("--ranks", default="2,4,8", help="numbers of ranks to count bytes with (default %(default)s)")
    parser.add_argument("--wire-batch", default="8192,65536", help="batch sizes to count bytes with")
    parser.add_argument("--folder", help="where everything lies meanwhile (default: a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="leave datasets in --folder")
    parser.add_argument("--again", choices=("train", "wire"), help="measure this anew where it was before")
    parser.add_argument("--json", help="write the figures here")
    for name in ("stage", "data", "run_dir"):  # what a process of this program's own does
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.stage:
        {"train": measure_in_process, "wire": count_wire}[flags.stage](flags)
        return 0
    if flags.folder:
        run_sizes(flags, Path(flags.folder))
    else:
        with tempfile.TemporaryDirectory(prefix="bench-scale-") as folder:
            run_sizes(flags, Path(folder))
    return 0


def run_sizes(flags: argparse.Namespace, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    print("synthetic ratings; figures of size and speed only")
    head = f"{'rows':>12}{'users':>11}{'items':>10}  {'stage':<16}{'seconds':>9}{'CPU s':>9}"
    print(f"{head}{'M rows/s':>10}{'peak GiB':>10}{'bound':>7}{'disk':>10}")
    for text in flags.sizes.split(","):
        size = Size.parse(text)
        for row in measure_size(flags, folder, size):
            rows.append(row)
            print(line_of(row), flush=True)
            if flags.json:
                Path(flags.json).write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def measure_size(flags: argparse.Namespace, folder: Path, size: Size) -> Iterator[Row]:
    """The rows of the table for one size; what was measured before is not measured again."""
    home = folder / str(size)
    home.mkdir(exist_ok=True)
    notes = folder / f"{size}.json"
    found: dict[str, Row] = json.loads(notes.read_text()) if notes.exists() else {}
    if flags.again:
        again = IN_PROCESS if flags.again == "train" else ("wire",)
        found = {name: row for name, row in found.items() if not name.startswith(again)}

    def note(rows: dict[str, Row]) -> None:
        for name, row in rows.items():
            found[name] = {"system": "mfdist", "algorithm": name, "exact": True, "device": "cpu", "rows": size.rows,
                           "users": size.users, "items": size.items, "threads": os.cpu_count(), **row}  # fmt: skip
        notes.write_text(json.dumps(found, indent=1) + "\n")

    try:
        _measure_size(flags, home, size, found, note)
    finally:
        if not flags.keep:
            shutil.rmtree(home)
    yield from found.values()


def _measure_size(
    flags: argparse.Namespace, home: Path, size: Size, found: dict[str, Row], note: Callable[[dict[str, Row]], None]
) -> None:
    data, run = home / "data", home / "run"
    wire = [(batch, ranks) for batch in _numbers(flags.wire_batch) for ranks in _numbers(flags.ranks)]
    in_process, missing = "train" not in found, [pair for pair in wire if _wire_name(*pair) not in found]
    if (in_process or missing) and not (data / "dataset.json").exists():
        _make_data(home, data, size, note)
    if in_process:
        command = [sys.executable, __file__, "--stage", "train", "--data", str(data), "--run-dir", str(run),
                   "--batch-size", str(flags.batch_size)]  # fmt: skip
        note(json.loads(_run(command)[1]))
        shutil.rmtree(run)
    for batch, ranks in missing:
        launch = [sys.executable, "-m", "mfdist.launch", "--standalone", f"--nproc-per-node={ranks}", __file__]
        command = [*launch, "--stage", "wire", "--data", str(data), "--run-dir", str(run), "--batch-size", str(batch)]
        note({_wire_name(batch, ranks): json.loads(_run(command)[1])})
        shutil.rmtree(run, ignore_errors=True)


def _wire_name(batch: int, ranks: int) -> str:
    return f"wire {batch:,} x {ranks}"


def _make_data(home: Path, data: Path, size: Size, note: Callable[[dict[str, Row]], None]) -> None:
    csv = home / "ratings.csv"
    command = [sys.executable, "jobs/synthesize.py", "--preset", "electronics", "--rows", str(size.rows),
               "--users", str(size.users), "--items", str(size.items), "--out", str(csv)]  # fmt: skip
    used, _ = _run(command)
    note({"synthesize": _figures(size.rows, used, SYNTHESIZE_MEMORY + 8 * size.items, csv.stat().st_size)})
    command = [sys.executable, "jobs/prepare.py", str(csv), "--out", str(data), "--memory", str(PREPARE_MEMORY)]
    used, _ = _run(command)
    note({"prepare": _figures(size.rows, used, PREPARE_MEMORY, bytes_under(data))})
    csv.unlink()


def _figures(rows: int, used: Used, bound: int, disk: int) -> Row:
    return {"seconds": used.seconds, "cpu_seconds": used.cpu_seconds, "rows_per_second": rows / max(used.seconds, 1e-9),
            "peak_rss_bytes": used.peak, "bound_bytes": bound, "disk_bytes": disk}  # fmt: skip


def _run(command: list[str]) -> tuple[Used, str]:
    """What a program and its processes used (the peak is that of the largest), and what it printed; it must succeed."""
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
        out.seek(0)
        seconds = time.perf_counter() - began
        return Used(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024), out.read()


# In a process of its own --------------------------------------------------------------------------


@contextmanager
def open_session(flags: argparse.Namespace, world: World) -> Iterator[Session]:
    """A fresh run of one epoch of mf_advanced, initialised."""
    config = TrainConfig.ready(
        "vignette_mf_advanced", data=flags.data, run_dir=flags.run_dir, batch_size=flags.batch_size, epochs=1, keep=1
    )
    Path(flags.run_dir).mkdir(parents=True, exist_ok=True)
    dataset = Dataset.open(flags.data)
    with Loader(dataset, batch_size=config.batch_size, seed=config.seed, rank=world.rank, world_size=world.size,
                memory_bytes=0) as loader:  # fmt: skip
        session = build(config, dataset, world, Console(False), loader)
        try:
            restore_or_initialise(session)
            yield session
        finally:
            session.saver.close()
            if session.fused:
                session.fused.close()


def measure_in_process(flags: argparse.Namespace) -> None:
    """Prints the figures of IN_PROCESS as JSON."""
    found: dict[str, Row] = {}
    with open_session(flags, World.alone()) as session:
        manifest = session.dataset.manifest
        plan = plan_for(
            PlanConfig.ready(CONFIG, data=flags.data, calibrate_seconds=0, batch_size=flags.batch_size),
            session.dataset,
            1,
        )
        bound = plan.table_bytes + plan.loader_bytes + plan.step_bytes + PROCESS_MEMORY
        train, val = manifest.num_ratings["train"], manifest.num_ratings["val"]
        table_rows = manifest.num_users + manifest.num_items

        def measure(stage: str, rows: int, work: Callable[[], Any], path: str = "") -> None:
            _forget_peak()
            began = _now()
            began, left_out = work() or (began, 0)
            seconds, cpu_seconds = (end - start for end, start in zip(_now(), began, strict=True))
            disk = bytes_under(Path(flags.run_dir, path)) if path else 0
            figures = _figures(rows - left_out, Used(seconds, cpu_seconds, _peak()), bound, disk)
            found[stage] = {"batch_size": flags.batch_size, **figures}

        measure("train", train, partial(_epoch, session))
        measure("settle", table_rows, session.fused.settle if session.fused else session.model.settle)
        session.validation.errors(session.model)
        measure("evaluate", val, lambda: session.validation.errors(session.model) and None)
        measure("checkpoint", table_rows, partial(_checkpoint, session), "checkpoints")
        measure("export", table_rows, partial(export_model, session), "model")
    print(json.dumps(found))


def _now() -> tuple[float, float]:
    """Seconds on the clock, and seconds that this process's threads have computed."""
    return time.perf_counter(), time.process_time()


def _epoch(session: Session) -> tuple[tuple[float, float], int]:
    """One epoch; returns when its first batch was through, and that batch's rows."""
    first = None
    for batch in session.loader.epoch(0):
        train_step(session, batch)
        first = first or (_now(), batch.global_rows)
    assert first is not None
    return first


def _checkpoint(session: Session) -> None:
    save(session)
    wait_for_save(session)


def count_wire(flags: argparse.Namespace) -> None:
    """Some steps on all ranks; rank 0 prints the bytes that left any rank for another one, as JSON."""
    torch.set_num_threads(1)
    with World.open("cpu") as world:
        world.may_share = False  # as if each rank had a host of its own
        with open_session(flags, world) as session:
            assert isinstance(session.fused, FusedStep)
            rows, began = 0, time.perf_counter()
            for batch in batches_of(session, 0):
                train_step(session, batch)
                rows += batch.global_rows
                if batch.step + 1 == WIRE_STEPS:
                    break
            seconds = time.perf_counter() - began
            sent = [session.fused.traffic["bytes"], float(session.model.item.wire_bytes)]  # type: ignore[arg-type]
            total, of_rows = world.sum(sent)
            if world.is_main:
                print(json.dumps({
                    "ranks": world.size, "batch_size": flags.batch_size, "steps": batch.step + 1, "seconds": seconds,
                    "bytes_per_rating": total / rows, "row_bytes_per_rating": of_rows / rows,
                }))  # fmt: skip


# Figures ------------------------------------------------------------------------------------------


def line_of(row: Row) -> str:
    """A line of the table."""
    head = f"{row['rows']:12,}{row['users']:11,}{row['items']:10,}  {row['algorithm']:<16}{row['seconds']:9.2f}"
    if "bytes_per_rating" in row:
        return f"{head}{'':9}{row['bytes_per_rating']:10.1f} bytes a rating between ranks, {row['steps']} steps"
    disk = f"{row['disk_bytes'] / 1e9:8.2f}GB" if row["disk_bytes"] else ""
    peak, bound = row["peak_rss_bytes"], row["bound_bytes"]
    head += f"{row['cpu_seconds']:9.2f}"
    return f"{head}{row['rows_per_second'] / 1e6:10.2f}{peak / 2**30:10.2f}{peak / bound:7.2f}{disk}"


def bytes_under(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def machine() -> dict[str, Any]:
    return {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": sys.version,
            "torch": torch.__version__}  # fmt: skip


def _numbers(text: str) -> list[int]:
    return [int(float(part)) for part in text.split(",") if part]


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Highest resident memory of this process since the last _forget_peak, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
