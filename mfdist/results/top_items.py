"""The best items of a model's users, with the ratings predicted for them::

    items, ratings = TopItems(model).of(users, k=10, hidden=seen)      # (users, 10) each, best first

The order is that of ``ItemIndex``: by score, equal scores by item row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mfdist.data.dataset import Dataset
from mfdist.data.scan import scan
from mfdist.results.exported_model import ExportedModel
from mfdist.results.item_index import ItemIndex
from mfdist.results.item_lists import ItemLists

SAMPLED_USERS = 20_000

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class TopItems:
    """A model's items, made ready once."""

    def __init__(self, model: ExportedModel, *, rows: Ints | None = None, device: Any = None) -> None:
        """``rows``: ascending item rows that may be found, None: all; ``device``: a torch device, None: processors."""
        self._model = model
        step = max(1, model.num_users // SAMPLED_USERS)
        sample = np.asarray(model.user_embedding[::step], np.float64)
        norms = np.linalg.norm(sample, axis=1) if len(sample) else None
        self._index = ItemIndex(model.item_embedding, model.item_bias, rows=rows, user_norms=norms, device=device)

    def of(
        self, users: Ints, k: int, hidden: ItemLists | None = None, listed: ItemLists | None = None
    ) -> tuple[Ints, Floats]:
        """Item rows and predicted ratings of each user's ``k`` best items: (users, k) each, best first.

        ``users``: user rows, -1 an id outside the vocabulary (only for a model with biases: the items by bias).
        ``hidden`` and ``listed``: see :meth:`ItemIndex.search`. Where fewer than k are left, item -1 and rating NaN.
        """
        model = self._model
        assert model.has_biases or not (users < 0).any()
        return self.of_factors(*model.users(users), k, hidden, listed)

    def of_factors(
        self, factors: npt.NDArray[np.float32], bias: Floats, k: int, hidden: ItemLists | None = None,
        listed: ItemLists | None = None,
    ) -> tuple[Ints, Floats]:  # fmt: skip
        """The same for users given by their factors (users, dim) and biases (users,)."""
        items, scores = self._index.search(factors, k, hidden, listed)
        rating = self._model.rating_of_score(scores.astype(np.float64) + bias[:, None] + self._model.offset)
        return items, np.where(items < 0, np.nan, rating)


def seen_items(dataset: Dataset, lane: int, users: Ints) -> ItemLists:
    """The training items of ``users`` (ascending rows of one lane), from one pass over the lane's files."""
    places, items = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for _, user, item, _, _ in scan(dataset, "train", range(lane, lane + 1)):
        place = np.searchsorted(users, user)
        hits = np.flatnonzero(users[np.minimum(place, len(users) - 1)] == user) if len(users) else place[:0]
        places.append(place[hits].astype(np.int64))
        items.append(item[hits].astype(np.int64))
    return ItemLists.of_pairs(np.concatenate(places), np.concatenate(items), len(users))
