#!/usr/bin/env python
"""Memory of the loader over several epochs of a small and a large dataset, read from disk every time.

    python scripts/bench_loader_memory.py [--rows 20000000 500000000] [--lanes 512] [--epochs 3] [--folder DIR]

Each dataset is of random rows, written as prepare writes them (about 9 bytes a row in DIR) and removed again. A
process of its own reads each; the table shows the highest resident memory of every epoch above what the process had
before it made the loader, and the bound: a row group open and one ahead per lane, the blocks ahead, and spare buffers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_loader import generate

from mfdist.data.batch_blocks import AHEAD_BYTES
from mfdist.data.dataset import Dataset
from mfdist.data.loader import POOL_BYTES, Loader
from mfdist.prepare.lanes import row_group_rows

ROW_BYTES = 12


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000_000, 500_000_000])
    parser.add_argument("--lanes", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=65536)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", help="where the datasets lie meanwhile (default: the temporary folder)")
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--read", help=argparse.SUPPRESS)  # what the process of its own does
    flags = parser.parse_args(argv)
    if flags.read:
        print(json.dumps(_read(flags)))
        return 0
    bound = 2 * flags.lanes * row_group_rows(flags.lanes) * ROW_BYTES + AHEAD_BYTES + POOL_BYTES
    print(f"bound {bound / 2**20:.0f} MiB: {flags.lanes} lanes, row groups of {row_group_rows(flags.lanes):,} rows")
    print(f"{'rows':>13} {'epoch':>5} {'M rows/s':>9} {'peak MiB':>9} {'of bound':>9}")
    found = []
    for rows in flags.rows:
        with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
            generate(folder, rows, flags.lanes)
            command = [sys.executable, __file__, "--read", folder, "--epochs", str(flags.epochs),
                       "--batch-size", str(flags.batch_size), "--threads", str(flags.threads)]  # fmt: skip
            epochs = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for epoch in epochs:
            found.append({"system": "mfdist streaming", "algorithm": "random", "exact": True, "device": "cpu",
                          "batch_size": flags.batch_size, "threads": flags.threads, "rows": rows, **epoch})  # fmt: skip
            rate, peak = epoch["rows_per_second"] / 1e6, epoch["peak_rss_bytes"]
            print(f"{rows:13,} {epoch['epoch']:5} {rate:9.1f} {peak / 2**20:9.0f} {peak / bound:9.2f}", flush=True)
    if flags.json:
        Path(flags.json).write_text(json.dumps({"machine": {"bound_bytes": bound}, "rows": found}, indent=1) + "\n")
    return int(max(row["peak_rss_bytes"] for row in found) > bound)


def _read(flags: Any) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    dataset = Dataset.open(flags.read)
    before = _resident("VmRSS")
    epochs = []
    with Loader(dataset, batch_size=flags.batch_size, seed=1, rank=0, world_size=1, threads=flags.threads,
                memory_bytes=0) as loader:  # fmt: skip
        for epoch in range(flags.epochs):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
            start = time.perf_counter()
            rows = sum(len(batch.user) for batch in loader.epoch(epoch))
            assert rows == loader.num_rows
            epochs.append({"epoch": epoch, "rows_per_second": rows / (time.perf_counter() - start),
                           "peak_rss_bytes": _resident("VmHWM") - before})  # fmt: skip
    return epochs


def _resident(name: str) -> int:
    """Resident memory of this process in bytes, now ("VmRSS") or at most since the last reset ("VmHWM")."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
