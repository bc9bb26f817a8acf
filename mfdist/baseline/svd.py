"""Surprise's SVD on a prepared dataset, bit for bit what Surprise gives by hand on the same rows in the same order.

Surprise keeps a Python tuple a rating and dictionaries of raw ids. :class:`ArrayTrainset` stands in for its trainset
with arrays, laid out as Surprise would: users and items numbered in order of first appearance, ratings grouped by
user. Rows (user, item) (7, 3), (2, 3), (7, 1) become (0, 0), (0, 1), (1, 0): user 7 is 0, user 2 is 1, item 3 is 0.
The only module that imports surprise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mfdist.data.dataset import Dataset
from mfdist.data.scan import scan
from mfdist.errors import MfdistError, UsageError
from mfdist.metrics import in_sample

try:
    from surprise import SVD, Trainset
except ModuleNotFoundError:
    raise UsageError("The baseline needs Surprise: pip install 'mfdist[baseline]'.") from None

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

CHUNK_ROWS = 1 << 16
RATINGS_PER_SECOND = 600_000  # of SVD with 100 factors on one core of the machine the README names
ROW_BYTES = 64  # the arrays of a training row at their peak, while rows are grouped by user
BASE_BYTES = 400 << 20  # Python and its libraries, the chunks, the validation pass


class ArrayTrainset(Trainset):  # type: ignore[misc]
    """Surprise's trainset over arrays. ``to_inner_uid``/``to_inner_iid`` take the dataset's row numbers as raw ids.

    ``user_inner``/``item_inner`` (int32, by dataset row) give Surprise's number, -1 for a row without a rating.
    ``advance(rows)`` is called as an epoch goes through the rows, ``epoch_starts`` holds when each one began.
    """

    def __init__(
        self, columns: tuple[Array, Array, Array], num_users: int, num_items: int, rating_scale: tuple[float, float],
        advance: Callable[[int], None] = lambda rows: None,
    ) -> None:  # fmt: skip
        user, item, rating = columns
        self.user_inner, known_users = _by_appearance(user, num_users)
        self.item_inner, known_items = _by_appearance(item, num_items)
        super().__init__(None, None, known_users, known_items, len(user), rating_scale, None, None)
        inner = self.user_inner[user]
        order = np.argsort(inner, kind="stable")
        self._user = inner[order]
        self._item = self.item_inner[item][order]
        self._rating = rating[order].astype(np.float64)
        self._global_mean = np.mean(self._rating)
        self._advance = advance
        self.epoch_starts: list[float] = []

    def all_ratings(self) -> Iterator[tuple[int, int, float]]:
        self.epoch_starts.append(time.monotonic())
        for start in range(0, self.n_ratings, CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            yield from zip(
                self._user[part].tolist(), self._item[part].tolist(), self._rating[part].tolist(), strict=True
            )
            self._advance(len(self._user[part]))

    def knows_user(self, uid: Any) -> bool:
        return not isinstance(uid, str)  # Surprise marks an unknown id by a string

    def knows_item(self, iid: Any) -> bool:
        return not isinstance(iid, str)

    def to_inner_uid(self, ruid: int) -> int:
        return _known(self.user_inner, ruid)

    def to_inner_iid(self, riid: int) -> int:
        return _known(self.item_inner, riid)


@dataclass(frozen=True)
class FittedSVD:
    """Surprise's fitted SVD and the trainset it was fitted on."""

    svd: Any
    trainset: ArrayTrainset

    def predict(self, user: Array, item: Array) -> Floats:
        """Unclipped predictions, float64 (rows,), of the dataset's row numbers; unknown sides count as zero."""
        u, i = self.trainset.user_inner[user], self.trainset.item_inner[item]
        predicted = np.full(len(u), float(self.trainset.global_mean))
        predicted[u >= 0] += self.svd.bu[u[u >= 0]]
        predicted[i >= 0] += self.svd.bi[i[i >= 0]]
        both = np.flatnonzero((u >= 0) & (i >= 0))
        for start in range(0, len(both), CHUNK_ROWS):
            k = both[start : start + CHUNK_ROWS]
            predicted[k] += np.einsum("nf,nf->n", self.svd.qi[i[k]], self.svd.pu[u[k]])
        return predicted

    def check(self, user: Array, item: Array, rating: Array) -> float:
        """The largest difference to ``svd.test`` over these rows; MfdistError where it is more than rounding."""
        tested = self.svd.test(list(zip(user.tolist(), item.tolist(), rating.tolist(), strict=True)))
        theirs = np.array([prediction.est for prediction in tested])
        ours = np.clip(self.predict(user, item), *self.trainset.rating_scale)
        worst = float(np.abs(ours - theirs).max(initial=0.0))
        if not worst < 1e-9:
            raise MfdistError(f"Predictions differ from svd.test by {worst:g}: this Surprise predicts in another way.")
        return worst

    def tensors(self) -> dict[str, tuple[tuple[int, ...], Iterator[npt.NDArray[np.float32]]]]:
        """name -> (shape, float32 chunks) by the dataset's rows, as the export takes them; unknown rows are zero."""
        sides = (("user", self.trainset.user_inner, self.svd.pu, self.svd.bu),
                 ("item", self.trainset.item_inner, self.svd.qi, self.svd.bi))  # fmt: skip
        found: dict[str, tuple[tuple[int, ...], Iterator[npt.NDArray[np.float32]]]] = {}
        for side, inner, factors, bias in sides:
            found[f"{side}_embedding"] = ((len(inner), factors.shape[1]), _by_row(inner, factors))
            found[f"{side}_bias"] = ((len(inner),), _by_row(inner, bias))
        found["offset"] = ((1,), iter([np.array([self.trainset.global_mean], np.float32)]))
        return found


def estimate_bytes(dataset: Dataset, factors: int, sample: float = 1.0) -> int:
    """Peak memory of a fit, in bytes: float64 factors of every row with a rating, and the rows themselves."""
    manifest = dataset.manifest
    users = sample * int(np.count_nonzero(dataset.counts("users")))
    tables = 8 * (factors + 1) * (users + manifest.num_items)
    rows = ROW_BYTES * sample * manifest.num_ratings["train"]
    return int(tables + rows + 4 * (manifest.num_users + manifest.num_items)) + BASE_BYTES


def check_memory(dataset: Dataset, factors: int, sample: float, limit: int) -> int:
    """The estimate in bytes; UsageError names a --sample-users that fits into ``limit`` where it does not."""
    needed = estimate_bytes(dataset, factors, sample)
    if needed > limit:
        raise UsageError(
            f"SVD of {dataset.manifest.num_ratings['train']:,} ratings with {factors} factors needs about "
            f"{needed / 1e9:.2f} GB, more than the {limit / 1e9:.2f} GB of --max-memory; "
            + _remedy(dataset, factors, sample, limit)
        )
    return needed


def rows_of(dataset: Dataset, split: str, sample: float) -> Iterator[tuple[Array, Array, Array]]:
    """(user, item, rating) chunks of a split's rows in lane and file order, those of the sample's users only."""
    for _, user, item, rating, _ in scan(dataset, split, range(len(dataset.manifest.lanes))):
        chosen = in_sample(user, sample)
        yield (user, item, rating) if chosen.all() else (user[chosen], item[chosen], rating[chosen])


def fit(
    dataset: Dataset, *, factors: int, epochs: int, seed: int, sample: float = 1.0,
    advance: Callable[[int], None] = lambda rows: None,
) -> FittedSVD:  # fmt: skip
    """Surprise's SVD with its defaults but for these, on the training rows in lane and file order."""
    columns = _columns(dataset, sample)
    if not len(columns[0]):
        raise UsageError("There are no training ratings to fit SVD on; with --sample-users, take a larger fraction.")
    manifest = dataset.manifest
    trainset = ArrayTrainset(columns, manifest.num_users, manifest.num_items, manifest.rating_scale, advance)
    del columns  # Surprise's factors want the memory
    svd = SVD(n_factors=factors, n_epochs=epochs, random_state=seed)
    return FittedSVD(svd.fit(trainset), trainset)


def _columns(dataset: Dataset, sample: float) -> tuple[Array, Array, Array]:
    chunks = list(rows_of(dataset, "train", sample))
    user, item, rating = (np.concatenate([chunk[k] for chunk in chunks] or [np.zeros(0, np.int32)]) for k in range(3))
    return user, item, rating


def _by_appearance(rows: Array, count: int) -> tuple[Array, int]:
    """(count,) int32: the rank of each row number by its first place in ``rows``, -1 for none; and how many appear."""
    first = np.full(count, len(rows), np.int64)
    first[rows[::-1]] = np.arange(len(rows))[::-1]
    present = np.flatnonzero(first < len(rows))
    inner = np.full(count, -1, np.int32)
    inner[present[np.argsort(first[present])]] = np.arange(len(present), dtype=np.int32)
    return inner, len(present)


def _known(inner: Array, row: int) -> int:
    found = int(inner[row])
    if found < 0:
        raise ValueError(f"row {row} has no training rating")  # what Surprise expects of an unknown id
    return found


def _by_row(inner: Array, values: Array) -> Iterator[npt.NDArray[np.float32]]:
    for start in range(0, len(inner), CHUNK_ROWS):
        part = inner[start : start + CHUNK_ROWS]
        chunk = np.zeros((len(part), *values.shape[1:]), np.float32)
        chunk[part >= 0] = values[part[part >= 0]]
        yield chunk


def _remedy(dataset: Dataset, factors: int, sample: float, limit: int) -> str:
    for share in (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001):
        if share < sample and estimate_bytes(dataset, factors, share) <= limit:
            return f"--sample-users {share:g} would fit."
    return "give more memory or fewer --factors: no --sample-users F would make it fit."
