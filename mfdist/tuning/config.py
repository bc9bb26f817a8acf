"""The flags of the search."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import Any

from mfdist.config import flag, read_toml
from mfdist.errors import UsageError
from mfdist.training.config import TrainConfig
from mfdist.tuning.space import SEARCHED, parse_search

OF_OTHER_ROWS = {"init_from": "begins with a model of other rows", "stop_fraction": "holds out rows of its own",
                 "patience": "holds out rows of its own"}  # fmt: skip
"""Settings of training that a search cannot have, and why."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """The flags of jobs/tune.py."""

    data: str = flag("", "dataset directory or URL; its validation rows are never read", metavar="DIR")
    run_dir: str = flag("", "directory or URL of the search; the same command goes on with it", metavar="DIR")
    training: str | None = flag(
        None, "settings to begin with, a file for train --config or a ready one by its name; not set: those of train "
        "without flags", metavar="FILE.toml|NAME",
    )  # fmt: skip
    search: tuple[str, ...] = flag(
        (), "what to search, each as NAME=LOW:HIGH, as NAME=A,B,C, or with x before the numbers as multiples of what "
        "it begins with; NAME alone: multiples around 1; not set: multiples of rate, epochs, penalties and of the "
        "weights that the configuration has",
        many=True, metavar="SETTING", example="lr=0.005:0.1 emb-dim=32,64,128 l2=x0.3:x3",
    )  # fmt: skip
    trials: int = flag(40, "trials in all, those of earlier calls counted", at_least=1, metavar="NUMBER")
    minutes: float | None = flag(
        None, "end this call after so many minutes, such as 30; a later one goes on", above=0, metavar="MINUTES"
    )
    splits: int = flag(
        3, "inner splits of the training rows; the error of a trial is the mean over them", at_least=1, at_most=20,
        metavar="NUMBER",
    )  # fmt: skip
    seed: int = flag(42, "seed of the inner splits, of the search and of training", at_least=0)
    device: str = flag("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    overwrite: bool = flag(False, "remove the search that --run-dir holds and begin anew")

    def __post_init__(self) -> None:
        if not self.data or not self.run_dir:
            raise UsageError(f"tune needs {'--run-dir' if self.data else '--data'}, a directory or URL.")
        if importlib.util.find_spec("optuna") is None:
            raise UsageError("tune needs the library optuna: pip install 'mfdist[tune]'.")
        parse_search(self.search)
        self.beginning()

    def beginning(self) -> dict[str, Any]:
        """The settings of --training by field name; UsageError where a search cannot have one of them."""
        given = read_toml(TrainConfig, self.training, "--training") if self.training else {}
        for name, why in OF_OTHER_ROWS.items():
            if given.get(name):
                raise UsageError(f"--training {self.training}: {name.replace('_', '-')} {why}; a search cannot.")
        return {name: value for name, value in given.items() if _is_of_the_model(name)}


def _is_of_the_model(name: str) -> bool:
    """Whether a setting of training says what is learned and how, and not where one run of it goes on."""
    field = next(field for field in dataclasses.fields(TrainConfig) if field.name == name)
    return name != "seed" and (field.metadata["group"] in SEARCHED or name == "sharding")
