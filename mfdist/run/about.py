"""``RUN/run.json``: which job made a run, on what, with which flags. No torch here: who only predicts reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mfdist import json_tables, storage

REMEDY = "name another --run-dir, or give --overwrite"


@dataclass(frozen=True)
class TrainedOn:
    """The dataset of a run; ``path`` is as seen from the run directory, None in a run of an earlier version."""

    name: str
    fingerprint: str
    path: str | None = None


@dataclass(frozen=True)
class About:
    """What run.json says."""

    job: str
    dataset: TrainedOn
    config: dict[str, Any]


def read_about(run: str) -> About:
    """FileNotFoundError where there is no run.json, DataError where it is damaged."""
    path = storage.join(run, "run.json")
    try:
        found: About = json_tables.typed(About, json_tables.read(path, REMEDY), "")
    except ValueError as error:
        raise json_tables.damaged(path, error, REMEDY) from None
    return found
