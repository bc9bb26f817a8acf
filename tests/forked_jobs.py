"""Runs jobs in forked processes, so that one costs neither imports nor compiled kernels to load.

A line of JSON in, the arguments with the job's name first; its process id out, then, when it has ended, its exit code
(negative: the signal that ended it). The first time that a job is named it runs in this process, of id 0.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any


def main() -> None:
    answers, nowhere = os.fdopen(os.dup(1), "w"), os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    jobs: dict[str, Any] = {}
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        sys.argv = [name, *arguments]
        if name not in jobs:
            jobs[name] = importlib.import_module(f"mfdist.jobs.{name}")
            print(0, jobs[name].job(), sep="\n", file=answers, flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            os._exit(jobs[name].job())
        print(pid, file=answers, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    main()
