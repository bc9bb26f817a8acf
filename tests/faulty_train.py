"""jobs/train.py with one fault planted from outside: MFDIST_TEST_FAULT="POINT RANK COUNT FOLDER".

The process of RANK kills itself the COUNTth time that it comes to POINT, and leaves the file FOLDER/fault. Nothing of
this is in the product: functions of it are replaced here.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from jobs import train as job
from mfdist.model import exchange, optimizers
from mfdist.run import background_save, checkpoint, tensor_files
from mfdist.training import train, validation

POINTS = {
    "first step": (train, "train_step"),  # COUNT 1
    "step": (train, "train_step"),
    "mid-step": (optimizers.RowOptimizer, "update"),  # the offset's: the tables have moved, it has not
    "exchange": (exchange.SharedExchange, "bring"),
    "check": (train, "_check"),
    "before shard": (tensor_files, "write"),
    "in shard": (tensor_files, "_exact"),
    "flush": (background_save, "_flush"),
    "before metadata": (tensor_files, "write_metadata"),
    "before COMMIT": (checkpoint, "sync_folder"),
    "prune": (checkpoint, "spare_of"),  # COMMIT is gone, its folder is not
    "evaluation": (validation.Validation, "errors"),
    "export": (train, "finish"),
}


def plant(text: str) -> None:
    *point, rank, count, folder = text.split()
    if os.environ.get("RANK", "0") != rank or os.path.exists(f"{folder}/fault"):
        return
    owner, name = POINTS[" ".join(point)]
    original, left = getattr(owner, name), [int(count)]

    def replaced(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            Path(folder, "fault").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, replaced)


if __name__ == "__main__":
    if fault := os.environ.get("MFDIST_TEST_FAULT"):
        plant(fault)
    sys.exit(job.job())
