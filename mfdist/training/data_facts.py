"""What a run must know of its training ratings before its first step, where flags or manifest leave it open."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mfdist.cluster.world import World
from mfdist.data.batch_order import lanes_of_rank
from mfdist.data.dataset import Dataset
from mfdist.data.scan import scan
from mfdist.training.config import TrainConfig
from mfdist.training.defaults import BATCH_SIZE, IMPLICIT, OF_THE_DATA, RECIPE

C = TypeVar("C", bound=TrainConfig)
Counts = npt.NDArray[np.int64]
RATINGS_OF_A_ROW = 16
"""With the loss of a step summed, a row takes the steps of all its ratings in a batch at once, from where it stood:
so many are still a small step at the recipe's rate (their sum is 0.34 of the way, and 1 of it would overshoot)."""


NOISE = 0.42
"""What a rating's own noise is taken for in --l2 of factors, in units of the ratings' spread: its square."""
NOISE_OF_SCALES = 0.8
"""The same for scales, which multiply a bias."""
FACTOR_SQUARE = 0.06
"""What a rating says of a factor on its other side: the mean square of a factor, by which that enters the score."""
BIAS_SQUARE = 0.3
"""The same of a bias."""
GRAIN = 1 << 16
"""Sums over users are of whole numbers of 1 / GRAIN: the same in any order, and so on any number of ranks."""


def fitted(config: C, dataset: Dataset, world: World) -> tuple[C, Dataset]:
    """The configuration with what follows from the data, and the dataset with the spread of its ratings; collective."""
    if config.rating_units == "spread" and dataset.manifest.rating_spread is None:
        dataset = Dataset(dataset.path, dataclasses.replace(dataset.manifest, **_moments(dataset, world)))
    if config.is_ranking:
        config = dataclasses.replace(config, batch_size=max(1, dataset.manifest.num_ratings["train"]))
    elif not config.batch_size or config.implicit == OF_THE_DATA or not config.l2:
        config = dataclasses.replace(config, **_of_counts(config, dataset, world))
    return config, dataset


def _of_counts(config: TrainConfig, dataset: Dataset, world: World) -> dict[str, Any]:
    """The flags that follow from how many training ratings each user and each item has."""
    lanes, ratings = dataset.manifest.lanes, dataset.manifest.num_ratings["train"]
    spans = [span for lane in lanes_of_rank(len(lanes), world.rank, world.size) for span in lanes[lane].user_ranges]
    mine = [dataset.counts("users", *span) for span in spans if span[1] > span[0]]
    users, items = np.concatenate([np.empty(0, np.int64), *mine]), dataset.counts("items")
    found: dict[str, Any] = {}
    if not config.batch_size:
        most = world.max([float(max(users.max(initial=0), items.max(initial=0)))])[0]
        summed = config.reduction == "sum"
        found["batch_size"] = batch_size(most, ratings, config.lr) if summed else even_batch_size(ratings)
    if config.implicit == OF_THE_DATA:
        squares = world.sum([float((users * users).sum())])[0]
        found["implicit"] = implicit(squares / ratings / max(dataset.manifest.num_items, 1))
    if not config.l2:
        row_l2 = config.row_l2 if any(config.row_l2) else RECIPE["row_l2"]
        of_users = world.sum([_left_open(users, row_l2[0], FACTOR_SQUARE), _left_open(users, row_l2[2], BIAS_SQUARE)])
        of_items = [_left_open(items, row_l2[1], FACTOR_SQUARE), _left_open(items, row_l2[3], BIAS_SQUARE)]
        noise = NOISE, 0.0, NOISE_OF_SCALES
        (user, user_bias), (item, item_bias) = (np.asarray(sums) / GRAIN / ratings for sums in (of_users, of_items))
        open_sides = item, user, 0.0, 0.0, item_bias, user_bias
        found["l2"] = tuple(_short(part * left) for part, left in zip(np.repeat(noise, 2), open_sides, strict=True))
    return found


def batch_size(most: float, ratings: int, rate: float) -> int:
    """The recipe's, halved until the row with ``most`` ratings has no more than RATINGS_OF_A_ROW of a batch's, less at
    a higher ``rate`` than the recipe's."""
    size, few = BATCH_SIZE, RATINGS_OF_A_ROW * min(1.0, RECIPE["lr"] / rate)
    while size > 1 and size * most > few * ratings:
        size //= 2
    return size


def even_batch_size(ratings: int) -> int:
    """At most the recipe's, such that an epoch's last batch is about as large: of a mean over few ratings each has the
    weight of hundreds elsewhere."""
    return max(1, -(-ratings // max(1, -(-ratings // BATCH_SIZE))))


def implicit(share: float) -> float:
    """The weight of bags where a rating's user has rated ``share`` of all items, on the mean over ratings.

    The choice of one who has rated most of what there is says little, and the sum over many rows, each of them free,
    fits what is left.
    """
    return _short(IMPLICIT * max(0.0, 1 - (2 * share) ** 2))


def _left_open(counts: Counts, own: float, square: float) -> float:
    """GRAIN times the sum, over the ratings of rows with ``counts`` ratings, of the variance that a row's ratings leave
    of a number of its, the noise of a rating being 1: 1 / (``own`` + n ``square``), see ``model.objective``."""
    return float(np.rint(counts / (own + counts * square) * GRAIN).sum())


def _short(value: float) -> float:
    """Four digits of it, as config.toml shows them."""
    return float(f"{value:.4g}")


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
