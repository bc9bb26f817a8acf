"""What simple predictions reach on the validation rows: the figures that a model has to be below.

    global_mean   the mean of the training ratings
    item_mean     the item's training mean; the global mean for an item without training ratings
    bias          mean + b_u + b_i by alternating least squares: Surprise's BaselineOnly with its defaults
                  (Koren 2010, "Factor in the neighbors", section 2.1), clipped to the scale as Surprise does

A rank holds whole users (its lanes), so user sums are local and only item sums are added over ranks: with two ranks
and four lanes, rank 0 reads lanes 0 and 1, rank 1 lanes 2 and 3, and both then hold the same item biases. In memory
are a few float64 arrays of items and the rows of one lane; lanes stay in memory while they fit in ``memory_bytes``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mfdist.cluster.world import World
from mfdist.data.batch_order import lanes_of_rank
from mfdist.data.dataset import Dataset
from mfdist.data.scan import scan
from mfdist.metrics import clip_to_scale, in_sample, mae, rmse

REG_USER, REG_ITEM, EPOCHS = 15.0, 10.0, 10

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


class Rows(NamedTuple):
    """Rows of a lane that has ``num_users`` users: ``user`` counted within the lane, ``item``, ``rating`` (float32)."""

    num_users: int
    user: Array
    item: Array
    rating: Array

    @property
    def nbytes(self) -> int:
        return int(self.user.nbytes + self.item.nbytes + self.rating.nbytes)


class LaneUsers:
    """The users of one lane, numbered 0 .. ``count`` over its ranges of user rows."""

    def __init__(self, dataset: Dataset, lane: int) -> None:
        self._ranges = sorted(dataset.manifest.lanes[lane].user_ranges)
        self._firsts = np.array([first for first, _ in self._ranges] or [0], np.int64)
        sizes = [end - first for first, end in self._ranges] or [0]
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        self.count = sum(sizes)

    def place(self, user: Array) -> Array:
        """User rows as numbers within the lane."""
        which = np.searchsorted(self._firsts, user, side="right") - 1
        return self._starts[which] + user - self._firsts[which]

    def counts(self, dataset: Dataset) -> npt.NDArray[np.int64]:
        """Training ratings of each of the lane's users: int64 (count,)."""
        parts = [dataset.counts("users", first, end) for first, end in self._ranges if end > first]
        return np.concatenate([np.empty(0, np.int64), *parts])


def lane_rows(dataset: Dataset, split: str, lane: int, sample: float = 1.0) -> Iterator[tuple[Array, Array, Array]]:
    """(user, item, rating) chunks of one lane; only those of a sample of the users (``metrics.in_sample``)."""
    for _, user, item, rating, _ in scan(dataset, split, range(lane, lane + 1)):
        chosen = slice(None) if sample >= 1 else in_sample(user, sample)
        yield user[chosen], item[chosen], rating[chosen]


def floors(
    dataset: Dataset, world: World, memory_bytes: int = 1 << 30, sample: float = 1.0
) -> dict[str, dict[str, float | None]]:
    """``{"global_mean": {"rmse", "mae"}, "item_mean": ..., "bias": ...}`` on validation rows; collective.

    They learn from all training rows; ``sample`` < 1 measures them on the rows of a sample of the users
    (``metrics.in_sample``). Figures over no validation rows are None.
    """
    lanes = _Lanes(dataset, world, memory_bytes)
    item_sum, item_rows = _item_sums(lanes, dataset.manifest.num_items, world)
    mean = float(item_sum.sum() / max(item_rows.sum(), 1.0))
    item_mean = np.where(item_rows > 0, item_sum / np.maximum(item_rows, 1.0), mean)
    item_bias = (item_sum - mean * item_rows) / (REG_ITEM + item_rows)  # the first half epoch: user biases are 0
    for _ in range(EPOCHS - 1):
        residual = np.zeros_like(item_sum)
        for _, train in lanes.train():
            user_bias = _user_bias(train, mean, item_bias)
            error = train.rating.astype(np.float64) - mean - user_bias[train.user]
            residual += np.bincount(train.item, error, len(item_sum))
        item_bias = world.sum(residual) / (REG_ITEM + item_rows)
    sums = np.zeros((3, 3))
    low, high = dataset.manifest.rating_scale
    for lane, train in lanes.train():
        user_bias = _user_bias(train, mean, item_bias)
        for val in lanes.read(lane, "val", sample):
            bias = clip_to_scale(mean + user_bias[val.user] + item_bias[val.item], low, high)
            for row, prediction in enumerate((np.full(len(val.item), mean), item_mean[val.item], bias)):
                error = prediction - val.rating
                sums[row] += len(error), (error * error).sum(), np.abs(error).sum()
    names = ("global_mean", "item_mean", "bias")
    totals = dict(zip(names, world.sum(sums), strict=True))
    return {name: {"rmse": rmse(s[1], s[0]), "mae": mae(s[2], s[0])} for name, s in totals.items()}


def _item_sums(lanes: _Lanes, num_items: int, world: World) -> tuple[Floats, Floats]:
    """Sum and number of the training ratings of every item, over all ranks."""
    sums = np.zeros((2, num_items))
    for _, train in lanes.train():
        sums[0] += np.bincount(train.item, train.rating, num_items)
        sums[1] += np.bincount(train.item, minlength=num_items)
    sums = world.sum(sums)
    return sums[0], sums[1]


def _user_bias(train: Rows, mean: float, item_bias: Floats) -> Floats:
    """The regularised mean residual of each of the lane's users; 0 of one without a training row."""
    sums = np.bincount(train.user, train.rating.astype(np.float64) - mean - item_bias[train.item], train.num_users)
    return sums / (REG_USER + np.bincount(train.user, minlength=train.num_users))


class _Lanes:
    """This rank's lanes; training rows are kept while they fit in the memory given, and read again otherwise."""

    def __init__(self, dataset: Dataset, world: World, memory_bytes: int) -> None:
        self.dataset = dataset
        self.numbers = lanes_of_rank(len(dataset.manifest.lanes), world.rank, world.size)
        self._kept: dict[int, Rows] = {}
        self._left = memory_bytes

    def train(self) -> Iterator[tuple[int, Rows]]:
        """(lane, all its training rows), a lane at a time."""
        for lane in self.numbers:
            rows = self._kept.get(lane) or self._joined(lane)
            if lane not in self._kept and rows.nbytes <= self._left:
                self._kept[lane] = rows
                self._left -= rows.nbytes
            yield lane, rows

    def read(self, lane: int, split: str, sample: float = 1.0) -> Iterator[Rows]:
        """One lane's rows of a split, a chunk at a time; only those of a sample of the users."""
        users = LaneUsers(self.dataset, lane)
        for user, item, rating in lane_rows(self.dataset, split, lane, sample):
            yield Rows(users.count, users.place(user).astype(user.dtype), item, rating)

    def _joined(self, lane: int) -> Rows:
        chunks = list(self.read(lane, "train"))
        if not chunks:
            return Rows(
                LaneUsers(self.dataset, lane).count, *(np.empty(0, t) for t in (np.int32, np.int32, np.float32))
            )
        columns = [np.concatenate([chunk[column] for chunk in chunks]) for column in (1, 2, 3)]
        return Rows(chunks[0].num_users, *columns)
