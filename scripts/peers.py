"""What the benchmarks share: environments of their own for other systems, a job of ours, a dataset's rows as arrays."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mfdist.data.dataset import Dataset
from mfdist.results.floors import lane_rows

ROOT = Path(__file__).resolve().parents[1]
Array = npt.NDArray[Any]


class PeerAbsent(Exception):
    """A system that cannot be installed here; the text says why."""


def environment(name: str, packages: Sequence[str]) -> Path:
    """The interpreter of the environment ``.peers/name``, which is made on first use; PeerAbsent where it cannot be.

    A package may begin with ``--no-deps:``.
    """
    python = ROOT / ".peers" / name / "bin/python"
    if (python.parent / "complete").exists():
        return python
    try:
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True, capture_output=True)
        for package in packages:
            wanted = package.replace("--no-deps:", "--no-deps ").split()
            subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise PeerAbsent(f"cannot be installed: {lines[-1][:200]}") from None
    (python.parent / "complete").touch()
    return python


def job(name: str, *arguments: str, **options: Any) -> None:
    """Run one of our jobs in a process of its own."""
    subprocess.run([sys.executable, str(ROOT / f"jobs/{name}.py"), *arguments], cwd=ROOT, check=True, **options)


def columns_of(dataset: Dataset, split: str) -> dict[str, Array]:
    """user, item (row numbers) and rating of all rows of a split, in lane and file order."""
    parts = [part for lane in range(len(dataset.manifest.lanes)) for part in lane_rows(dataset, split, lane)]
    return {name: np.concatenate([part[k] for part in parts]) for k, name in enumerate(("user", "item", "rating"))}
