"""Time and peak memory of prepare beside polars' own scan_csv -> sink_parquet, on one CSV, in one run.

    python scripts/bench_prepare.py --json prepare.json
    python scripts/bench_prepare.py --rows 100000000 --memory 4GiB
    python scripts/bench_prepare.py --source ratings_Electronics.csv
    python scripts/bench_prepare.py --engine spark --rows 10000000     # prepare on one machine beside prepare on Spark

Without --source the CSV is synthetic: Electronics' size (or --rows), from `jobs/synthesize.py --preset electronics`.
Each program runs in a process of its own, both in turn; the best of --repeats is shown. Compiled code is cached by a
first run on a small file, as it is on every machine after its first use. With --engine spark the peak is the memory of
all processes together (Spark's and its Python workers'; mapped files are not counted); told are the bytes that Spark
shuffled, and what a row takes of processors beyond what a run on a thousand rows takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

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


class Together:
    """The most memory of their own that a process and those below it had at once, and the seconds of processors that
    they took, looked at five times a second. Pages of files that they map are the kernel's to take back: Spark maps
    what it has shuffled."""

    def __init__(self, pid: int) -> None:
        self._process, self._over, self.peak = psutil.Process(pid), threading.Event(), 0
        self._spent: dict[psutil.Process, float] = {}
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.2):
            total = 0
            with contextlib.suppress(psutil.Error):
                for process in (self._process, *self._process.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        total += own_bytes(process.pid)
                        times = process.cpu_times()
                        self._spent[process] = times.user + times.system
            self.peak = max(self.peak, total)

    def end(self) -> tuple[int, float]:
        """(peak bytes, processor seconds)."""
        self._over.set()
        self._thread.join()
        return self.peak, sum(self._spent.values())


def own_bytes(pid: int) -> int:
    """Resident memory of a process that is no file's; 0 where it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith(("RssAnon:", "RssShmem:")))


def timed_together(command: list[str], env: dict[str, str]) -> tuple[float, int, float]:
    """(seconds, peak bytes of all its processes, their processor seconds) of a program; it must succeed."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | env)
    together = Together(process.pid)
    code = process.wait()
    seconds, (peak, spent) = time.perf_counter() - began, together.end()
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    return seconds, peak, spent


def shuffled_bytes(events: Path) -> int:
    """The bytes that all tasks of Spark's event logs have written for others."""
    total = 0
    for path in (path for path in events.rglob("*") if path.is_file() and not path.name.startswith(".")):
        for line in path.read_text().splitlines():
            if '"SparkListenerTaskEnd"' in line:
                metrics = json.loads(line).get("Task Metrics", {})
                total += metrics.get("Shuffle Write Metrics", {}).get("Shuffle Bytes Written", 0)
    return total


def measure_spark(
    source: Path, rows: int, memory: str, repeats: int, folder: Path, master: str
) -> list[dict[str, Any]]:
    """Prepare on one machine beside prepare on Spark, in turn; the datasets must be equal."""
    events = folder / "events"
    events.mkdir()
    (folder / "spark-defaults.conf").write_text(
        f"spark.eventLog.enabled true\nspark.eventLog.compress false\nspark.eventLog.dir file://{events}\n"
        f"spark.local.dir {folder}\nspark.driver.memory 2g\nspark.ui.enabled false\n"
    )
    env = {"SPARK_CONF_DIR": str(folder), "SPARK_WORKER_DIR": str(folder / "workers")}
    prepare = [sys.executable, "jobs/prepare.py", "--overwrite", "--memory", memory]
    on_spark = ["--engine", "spark", "--spark-master", master]
    commands = {"prepare": [str(source), "--out", str(folder / "one/d")],
                "prepare --engine spark": [str(source), "--out", str(folder / "spark/d"), *on_spark]}  # fmt: skip
    best: dict[str, tuple[float, int, float]] = {}
    head = str(beginning(source, folder))
    small = {name: [*prepare, head, "--out", str(folder / "small"), *more]
             for name, more in zip(commands, ([], on_spark), strict=True)}  # fmt: skip
    start = {name: [timed_together(command, env)[2] for _ in range(2)][1] for name, command in small.items()}
    shutil.rmtree(events)
    events.mkdir()
    for _ in range(repeats):
        for name, command in commands.items():
            seconds, peak, spent = timed_together([*prepare, *command], env)
            old = best.get(name, (seconds, peak, spent))
            best[name] = min(old[0], seconds), max(old[1], peak), min(old[2], spent)
            print(f"{name}: {seconds:.1f} s, {spent:.1f} s of processors", file=sys.stderr)
    prints = [json.loads((folder / place / "d/dataset.json").read_text())["fingerprint"] for place in ("one", "spark")]
    if prints[0] != prints[1]:
        raise SystemExit(f"the datasets differ: {prints}")
    shuffled = shuffled_bytes(events) // repeats
    print(f"equal datasets; Spark shuffled {shuffled / 2**20:,.0f} MiB, {shuffled / rows:.1f} bytes a row ({master})")
    return [{"system": name, "algorithm": "read, hash, split, lanes", "exact": True, "device": "cpu",
             "threads": os.cpu_count(), "rows": rows, "seconds": seconds, "rows_per_second": rows / seconds,
             "peak_rss_bytes": peak, "processor_seconds": spent,
             "start_processor_seconds": start[name], "memory": memory,
             "shuffled_bytes": 0 if name == "prepare" else shuffled}
            for name, (seconds, peak, spent) in best.items()]  # fmt: skip


def synthetic(rows: int, path: Path) -> None:
    command = [sys.executable, "jobs/synthesize.py", "--preset", "electronics", "--rows", str(rows), "--out", str(path)]
    subprocess.run(command, cwd=ROOT, check=True)


def beginning(source: Path, folder: Path) -> Path:
    """The first thousand lines of a file, to compile with."""
    head = folder / "head.csv"
    with source.open() as whole:
        head.write_text("".join(line for line, _ in zip(whole, range(1000), strict=False)))
    return head


def measure(source: Path, rows: int, memory: str, repeats: int, folder: Path) -> list[dict[str, Any]]:
    head = beginning(source, folder)
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
    parser.add_argument("--engine", choices=("local", "spark"), default="local", help="what stands beside prepare")
    parser.add_argument("--spark-master", default="local-cluster[2,1,4096]", help="Spark's master, with --engine spark")
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
        given = (source, rows, args.memory, args.repeats, folder)
        found = measure_spark(*given, args.spark_master) if args.engine == "spark" else measure(*given)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # Spark takes its own folders away at the same time
    print(f"{'':34}{'seconds':>9}{'M rows/s':>10}{'peak RSS':>11}{'rows':>13}{'processor s':>13}{'us a row':>10}")
    for row in found:
        spent = f"{'-':>13}{'-':>10}"
        if "processor_seconds" in row:
            whole = row["processor_seconds"]
            spent = f"{whole:13.1f}{(whole - row['start_processor_seconds']) / row['rows'] * 1e6:10.2f}"
        print(f"{row['system']:34}{row['seconds']:9.2f}{row['rows_per_second'] / 1e6:10.2f}"
              f"{row['peak_rss_bytes'] / 2**30:8.2f}GiB{row['rows']:13,}{spent}")  # fmt: skip
    print(f"{found[1]['system']} takes {found[1]['seconds'] / found[0]['seconds']:.2f} times as long")
    if args.json:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": sys.version,
        }
        Path(args.json).write_text(json.dumps({"machine": machine, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
