"""What a run must know of its training ratings before its first step, where flags or manifest leave it open."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import numpy as np

from mfdist.cluster.world import World
from mfdist.data.batch_order import lanes_of_rank
from mfdist.data.dataset import Dataset
from mfdist.data.scan import scan
from mfdist.training.config import TrainConfig
from mfdist.training.defaults import BATCH_SIZE

C = TypeVar("C", bound=TrainConfig)
RATINGS_OF_A_ROW = 16
"""With the loss of a step summed, a row takes the steps of all its ratings in a batch at once, from where it stood:
so many are still a small step at the recipe's rate (their sum is 0.34 of the way, and 1 of it would overshoot)."""


def fitted(config: C, dataset: Dataset, world: World) -> tuple[C, Dataset]:
    """The configuration with its batch size, and the dataset with the spread of its ratings; collective."""
    if config.rating_units == "spread" and dataset.manifest.rating_spread is None:
        dataset = Dataset(dataset.path, dataclasses.replace(dataset.manifest, **_moments(dataset, world)))
    if not config.batch_size:
        config = dataclasses.replace(config, batch_size=_batch_size(dataset, world))
    return config, dataset


def _batch_size(dataset: Dataset, world: World) -> int:
    """The recipe's, halved until the row with most ratings has no more than RATINGS_OF_A_ROW of a batch's."""
    lanes = dataset.manifest.lanes
    spans = [span for lane in lanes_of_rank(len(lanes), world.rank, world.size) for span in lanes[lane].user_ranges]
    users = (dataset.counts("users", *span).max() for span in spans if span[1] > span[0])
    most = world.max([float(max([*users, dataset.counts("items").max()], default=0))])[0]
    size = BATCH_SIZE
    while size > 1 and size * most > RATINGS_OF_A_ROW * dataset.manifest.num_ratings["train"]:
        size //= 2
    return size


def _moments(dataset: Dataset, world: World) -> dict[str, Any]:
    """``rating_spread`` and ``rating_skewness`` of a dataset whose manifest does not have them, by one pass."""
    mean, sums = dataset.manifest.global_mean, np.zeros(3)
    lanes = lanes_of_rank(len(dataset.manifest.lanes), world.rank, world.size)
    for _, _, _, rating, _ in scan(dataset, "train", lanes):
        away = rating.astype(np.float64) - mean
        sums += len(away), (away**2).sum(), (away**3).sum()
    rows, second, third = world.sum(sums)
    spread = float((second / max(rows, 1)) ** 0.5)
    return {"rating_spread": spread, "rating_skewness": float(third / rows / spread**3) if spread else 0.0}
