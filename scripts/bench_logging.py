#!/usr/bin/env python
"""What the records of a training cost it: processor time of metrics.jsonl and TensorBoard, all threads.

    python scripts/bench_logging.py
    python scripts/bench_logging.py --records 5000 --json logging.json

Half of the records are written to a log that keeps none, half to one of a run directory with its trackers, a hundred at
a time in turn; the median difference is what a record costs. A training writes one every five seconds, and its share of
the throughput is that of as many processor seconds as the threads of a process have in that time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mfdist.config import to_dict
from mfdist.log import MetricsLog
from mfdist.training.config import TrainConfig
from mfdist.training.meter import INTERVAL_SECONDS
from mfdist.training.trackers import open_trackers

TURN = 100


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=2000, help="records with trackers (default %(default)s)")
    parser.add_argument("--json", help="write the figures here")
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as run:
        costs = measure(run, flags.records)
    cost = statistics.median(costs)
    print(
        f"a record costs {1000 * cost:.2f} ms of a processor ({len(costs)} turns, at most {1000 * max(costs):.2f} ms)"
    )
    print(f"one every {INTERVAL_SECONDS:.0f} s is {cost / INTERVAL_SECONDS:.3%} of the throughput of one thread")
    if flags.json:
        row = {"system": "mfdist", "algorithm": "logging", "exact": True, "device": "cpu", "threads": 1,
               "seconds": cost, "share": cost / INTERVAL_SECONDS}  # fmt: skip
        Path(flags.json).write_text(json.dumps({"machine": {"cores": os.cpu_count()}, "rows": [row]}, indent=1) + "\n")
    return 0


def measure(run: str, records: int) -> list[float]:
    """Processor seconds of a record, of each turn but the first."""
    trackers = open_trackers(run, None, to_dict(TrainConfig()), print)
    logs = MetricsLog(None), MetricsLog(f"{run}/metrics.jsonl", None, trackers.record)
    found = []
    for turn in range(-1, max(1, records // TURN)):
        without, with_trackers = (_spent(log, turn * TURN) for log in logs)
        if turn >= 0:  # before it libraries are loaded, and files opened
            found.append((with_trackers - without) / TURN)
    trackers.close()
    return found


def _spent(log: MetricsLog, first: int) -> float:
    """Processor seconds of a turn, until its threads are done with it."""
    began = time.process_time()
    for step in range(first, first + TURN):
        log.write(
            "interval", step=step, epoch=1, train_rmse=1.0, ratings_per_second=1e6, learning_rate=0.01, seconds=5.0,
            wait_seconds=0.1, ranks_wait_seconds=0.1, memory_bytes=1 << 30,
        )  # fmt: skip
    last = -1.0
    while (now := time.process_time()) - last > 0.002:  # a thread is at work as long as processor time passes
        last = now
        time.sleep(0.2)
    return now - began


if __name__ == "__main__":
    sys.exit(main())
