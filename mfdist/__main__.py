"""The program ``mfdist JOB [flags]``, also ``python -m mfdist JOB``: the same code as ``jobs/JOB.py``."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from mfdist import __version__, process
from mfdist.errors import UsageError, exit_code_of
from mfdist.loading import loading

JOBS = {
    "prepare": "make a dataset directory of raw ratings",
    "train": "train a model on a prepared dataset",
    "baseline": "Surprise's SVD on the same split, to compare with",
    "evaluate": "one table of several runs on their validation rows",
    "recommend": "the best items of users",
    "predict": "the ratings predicted for files of pairs",
    "similar": "what is most like each item, or user",
    "export": "a model's vectors for faiss, hnswlib, Parquet or safetensors",
    "plan": "what a training will take, before it is submitted",
    "tune": "search for settings of training on inner splits of the training rows",
    "checkpoint": "list, verify and prune the checkpoints of a run",
    "compile": "compile the kernels of all jobs ahead, once a machine",
    "synthesize": "make synthetic ratings with a known answer",
}
LAUNCH = "launch"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a job by its name and return its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else UsageError.exit_code
    name, *rest = words
    if name == "--version":
        print(f"mfdist {__version__}")
        return 0
    if name == LAUNCH:
        with loading():
            from mfdist.cluster import launch

        return exit_code_of(lambda: launch.main(rest))
    if name not in JOBS:
        return exit_code_of(lambda: _unknown(name))
    sys.argv = [f"mfdist {name}", *rest]
    with loading():
        job = importlib.import_module(f"mfdist.jobs.{name}").job
    code: int = job()
    return code


def usage() -> str:
    """The jobs, a line each."""
    jobs = {**JOBS, LAUNCH: "run a job in several processes: mfdist launch --nproc-per-node=4 train [flags]"}
    lines = [f"  {name:<11} {text}" for name, text in jobs.items()]
    return "\n".join(["usage: mfdist JOB [flags]", "", *lines, "", "mfdist JOB --help shows the flags of a job."])


def _unknown(name: str) -> int:
    close = difflib.get_close_matches(name, [*JOBS, LAUNCH], n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise UsageError(f"there is no job '{name}'; known are {', '.join([*JOBS, LAUNCH])}.{hint}")


def program() -> NoReturn:
    """What the command mfdist runs."""
    process.end(main())


if __name__ == "__main__":
    program()
