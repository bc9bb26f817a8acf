"""The error of a model in training, on rows that it does not learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from mfdist.cluster.world import World
from mfdist.data.batch_order import lanes_of_rank
from mfdist.data.dataset import Dataset
from mfdist.data.scan import scan
from mfdist.metrics import SliceSums
from mfdist.model.models import MF
from mfdist.model.objective import ITEM, USER
from mfdist.model.tables import Rows
from mfdist.results.error_sums import ErrorSums
from mfdist.results.floors import LaneUsers
from mfdist.results.item_index import ItemIndex
from mfdist.results.item_lists import ItemLists
from mfdist.results.ranking import RankedUsers, rank_metrics, ranked_users

CHUNK_ROWS = 1 << 18
RANKED_ITEMS = 1 << 16
"""Items that a rank holds at a time while it ranks them."""


class Validation:
    """Evaluates one model on one dataset again and again. ``zero_untouched``: known-side predictions of cold rows."""

    def __init__(self, dataset: Dataset, world: World, zero_untouched: bool) -> None:
        self._dataset, self._world, self._zero = dataset, world, zero_untouched
        self._lanes = lanes_of_rank(len(dataset.manifest.lanes), world.rank, world.size)
        self._item_cold = dataset.counts("items") == 0
        self._places = {lane: LaneUsers(dataset, lane) for lane in self._lanes}
        self._ranked: RankedUsers | None = None
        self._user_cold = {lane: place.counts(dataset) == 0 for lane, place in self._places.items()}

    def no_errors(self) -> SliceSums:
        """Of no row: what :meth:`errors` are where predictions are no ratings."""
        return SliceSums(*self._dataset.manifest.rating_scale, self._dataset.manifest.rating_step)

    @torch.no_grad()
    def errors(
        self, model: MF, split: str = "val", stop_fraction: float = 0.0, seed: int = 0,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> SliceSums:  # fmt: skip
        """Error sums over all ranks' rows of ``split`` with the tables as they are (settled); every rank calls.

        ``advance`` is told about how many rows of all ranks are done more."""
        low, high = self._dataset.manifest.rating_scale
        sums = SliceSums(low, high, self._dataset.manifest.rating_step)

        def add(lane: int, user: Any, item: Any, rating: Any, prediction: Any) -> None:
            sums.add(prediction, rating, self._user_cold[lane][self._places[lane].place(user)], self._item_cold[item])
            advance(len(user) * self._world.size)

        self._predict_all(model, split, stop_fraction, seed, add)
        total = self._world.sum(sums.values)
        return SliceSums.from_values(total, low, high, self._dataset.manifest.rating_step)

    @torch.no_grad()
    def diagnosis(self, model: MF) -> ErrorSums:
        """Where and how the model errs on all ranks' validation rows, its tables settled; every rank calls."""
        sums = ErrorSums(self._dataset.manifest)
        item_counts, user_counts = self._dataset.counts("items"), dict[int, Any]()

        def add(lane: int, user: Any, item: Any, rating: Any, prediction: Any) -> None:
            if lane not in user_counts:  # lane follows lane: the one before is done
                user_counts.clear()
                user_counts[lane] = self._places[lane].counts(self._dataset)
            counts = user_counts[lane][self._places[lane].place(user)], item_counts[item]
            sums.add(prediction, rating, user, item, counts)

        self._predict_all(model, "val", 0.0, 0, add)
        sums.add_ranks(self._world.sum)
        return sums

    @torch.no_grad()
    def ranking(self, model: MF) -> dict[str, Any]:
        """``ranking.rank_metrics`` of the model, its tables settled: as its export ranks; every rank calls."""
        if self._ranked is None:
            self._ranked = ranked_users(self._dataset, self._world)
        return rank_metrics(partial(self._top, model), self._ranked, self._dataset, self._world)

    def _top(self, model: MF, users: Any, k: int, hidden: ItemLists) -> Any:
        """The best items of this rank's ``users``, from all items, a part of them at a time; collective."""
        device = self._world.device
        mine = self._weights(model.user.read(torch.tensor(users, device=device)))
        factors = model.form.exported(USER, mine)[0].cpu().numpy()
        rows, scores = np.full((len(users), k), -1, np.int64), np.full((len(users), k), -np.inf, np.float32)
        norms = np.linalg.norm(factors, axis=1)
        for first in range(0, self._dataset.manifest.num_items, RANKED_ITEMS):
            end = min(first + RANKED_ITEMS, self._dataset.manifest.num_items)
            rows_of_part = model.item.read(torch.arange(first, end, device=device))
            item, bias = model.form.exported(ITEM, self._weights(rows_of_part))
            biases = None if bias is None else bias.cpu().numpy()
            index = ItemIndex(item.cpu().numpy(), biases, user_norms=norms, device=device)
            found, score = index.search(factors, k, hidden.between(first, end))
            # equal scores in the order of their rows, as one index over all items has it
            both = np.hstack([rows, np.where(found < 0, -1, found + first)]), np.hstack([scores, score])
            best = np.argsort(-both[1], axis=1, kind="stable")[:, :k]
            rows, scores = (np.take_along_axis(part, best, axis=1) for part in both)
        return rows

    def _predict_all(
        self, model: MF, split: str, stop_fraction: float, seed: int, add: Callable[[int, Any, Any, Any, Any], None]
    ) -> None:
        """``add(lane, user, item, rating, prediction)`` for chunks of this rank's rows; collective."""
        chunks = scan(self._dataset, split, self._lanes, stop_fraction=stop_fraction, seed=seed, chunk_rows=CHUNK_ROWS)
        for chunk in self._in_step(iter(chunks)):
            lane, user, item, rating = chunk[:4] if chunk else (None, *_nothing(self._dataset))
            prediction = self._predict(model, user, item)
            if lane is not None:
                add(lane, user, item, rating, prediction)

    def _in_step(self, chunks: Iterator[Any]) -> Iterator[Any]:
        """This rank's chunks, then None until every rank is through: reading item rows is collective."""
        while True:
            chunk = next(chunks, None)
            if not self._world.any(chunk is not None):
                return
            yield chunk

    def _predict(self, model: MF, user: Any, item: Any) -> Any:
        device = self._world.device
        p = self._weights(model.user.read(torch.tensor(user, device=device)))
        q = self._weights(model.item.read(torch.tensor(item, device=device)))
        value = model.form.value_of_score(model.form.score(p, q, model.offset))
        return model.form.units.ratings(value).cpu().numpy()

    def _weights(self, rows: Rows) -> torch.Tensor:
        return torch.where(rows.last[:, None] > 0, rows.weight, 0.0) if self._zero else rows.weight


def _nothing(dataset: Dataset) -> tuple[Any, Any, Any]:
    return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
