"""Time and peak memory of prepare beside polars' own scan_csv -> sink_parquet, on one CSV, in one run.

    python scripts/bench_prepare.py --json prepare.json
    python scripts/bench_prepare.py --rows 100000000 --memory 4GiB
    python scripts/bench_prepare.py --source ratings_Electronics.csv

Without --source the CSV is synthetic: Electronics' size (or --rows), from `jobs/synthesize.py --preset electronics`.
Each program runs in a process of its own, polars and prepare in turn; the best of --repeats is shown. Compiled code is
cached by a first run on a small file, as it is on every machine after its first use.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ELECTRONICS_ROWS = 7_824_482
SINK = """
import sys, polars as pl
schema = {"user": pl.String, "item": pl.String, "rating": pl.Float64, "timestamp": pl.Int64}
pl.scan_csv(sys.argv[1], has_header=False, schema=schema).sink_parquet(sys.argv[2])
"""


def timed(command: list[str]) -> tuple[float, int]:
    """(seconds, peak resident bytes) of a program; it must succeed."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - began, usage.ru_maxrss * 1024


def synthetic(rows: int, path: Path) -> None:
    command = [sys.executable, "jobs/synthesize.py", "--preset", "electronics", "--rows", str(rows), "--out", str(path)]
    subprocess.run(command, cwd=ROOT, check=True)


def measure(source: Path, rows: int, memory: str, repeats: int, folder: Path) -> list[dict[str, Any]]:
    head = folder / "head.csv"
    with source.open() as whole:
        head.write_text("".join(line for line, _ in zip(whole, range(1000), strict=False)))
    prepare = [sys.executable, "jobs/prepare.py", "--overwrite", "--memory", memory]
    timed([*prepare, str(head), "--out", str(folder / "small")])
    polars = [sys.executable, "-c", SINK, str(source), str(folder / "out.parquet")]
    commands = {"polars scan_csv -> sink_parquet": polars,
                "prepare": [*prepare, str(source), "--out", str(folder / "data")]}  # fmt: skip
    best: dict[str, tuple[float, int]] = {}
    for _ in range(repeats):
        for name, command in commands.items():
            seconds, peak = timed(command)
            old = best.get(name, (seconds, peak))
            best[name] = min(old[0], seconds), max(old[1], peak)
    return [{"system": name, "algorithm": "read, hash, split, lanes" if name == "prepare" else "read, write",
             "exact": True, "device": "cpu", "threads": os.cpu_count(), "rows": rows, "seconds": seconds,
             "rows_per_second": rows / seconds, "peak_rss_bytes": peak, "memory": memory}
            for name, (seconds, peak) in best.items()]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="a headerless CSV; else a synthetic one is made")
    parser.add_argument("--rows", type=int, default=ELECTRONICS_ROWS, help="rows of the synthetic CSV")
    parser.add_argument("--memory", default="4GiB", help="prepare's --memory")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", help="where the figures go")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-prepare-"))
    try:
        source = Path(args.source) if args.source else folder / "twin.csv"
        if not args.source:
            synthetic(args.rows, source)
        with source.open("rb") as stream:
            rows = sum(piece.count(b"\n") for piece in iter(lambda: stream.read(1 << 24), b""))
        found = measure(source, rows, args.memory, args.repeats, folder)
    finally:
        shutil.rmtree(folder)
    print(f"{'':34}{'seconds':>9}{'M rows/s':>10}{'peak RSS':>11}{'rows':>13}")
    for row in found:
        print(f"{row['system']:34}{row['seconds']:9.2f}{row['rows_per_second'] / 1e6:10.2f}"
              f"{row['peak_rss_bytes'] / 2**30:8.2f}GiB{row['rows']:13,}")  # fmt: skip
    print(f"prepare takes {found[1]['seconds'] / found[0]['seconds']:.2f} times as long")
    if args.json:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": sys.version,
        }
        Path(args.json).write_text(json.dumps({"machine": machine, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
