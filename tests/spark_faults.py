"""Prepare on Spark with a stage that goes wrong: a program for tests, whose tasks run on executors of their own.

    python tests/spark_faults.py STAGE KIND FOLDER prepare's flags ...

STAGE: cut_task, read_task, gather_task, count_task, number_task or write_task. KIND: 'kill' ends the task's executor
with SIGKILL, 'fail' raises, both after the task's first output and twice in all; 'slow' waits, so that a speculative
attempt overtakes; 'tell' writes FOLDER/reached and waits for ever.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TIMES = 2


def turn(folder: str) -> int:
    """How many tasks have come before this one; each gets another number, in whatever process it runs."""
    for number in range(1000):
        try:
            os.close(os.open(f"{folder}/turn-{number}", os.O_CREAT | os.O_EXCL))
            return number
        except FileExistsError:
            continue
    raise AssertionError("too many tasks")


def executor_pid() -> int:
    """The JVM of the executor that this Python process works for."""
    import psutil

    for process in psutil.Process().parents():
        if "CoarseGrainedExecutorBackend" in " ".join(process.cmdline()):
            return int(process.pid)
    raise AssertionError("no executor above this process")


def go_wrong(kind: str, folder: str) -> None:
    if kind == "tell":
        Path(folder, "reached").touch()
        time.sleep(600)
    elif turn(folder) < TIMES:
        if kind == "kill":
            os.kill(executor_pid(), signal.SIGKILL)
            time.sleep(60)
        elif kind == "fail":
            raise OSError("the disk went away")
        else:
            time.sleep(45)


def faulty(task: Callable[[Any], Iterator[Any]], kind: str, folder: str) -> Callable[[Any], Iterator[Any]]:
    """The task, which goes wrong once it has written or said something."""

    def run(batches: Any) -> Iterator[Any]:
        wrong = False
        for batch in task(batches):
            yield batch
            if not wrong:
                wrong = True
                go_wrong(kind, folder)

    return run


def patch(stage: str, kind: str, folder: str) -> None:
    """Make the tasks of a stage faulty."""
    from mfdist.prepare_spark import driver, engine

    module = engine if hasattr(engine, stage) else driver
    make = getattr(module, stage)
    setattr(module, stage, lambda *given: faulty(make(*given), kind, folder))


def main(argv: list[str]) -> int:
    from mfdist.jobs import prepare
    from mfdist.prepare_spark import driver, pieces

    stage, kind, folder, *flags = argv
    pieces.TASK_BYTES, driver.PART_BYTES = 20_000, 40_000
    if stage != "none":
        patch(stage, kind, folder)
    return prepare.main(flags)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import spark_faults  # tasks find its functions by the name of the module, which is not __main__

    sys.exit(spark_faults.main(sys.argv[1:]))
