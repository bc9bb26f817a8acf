"""From Python: ``mfdist.prepare_frame(frame, out)`` and ``mfdist.load(RUN)``, on original ids::

model = mfdist.load("runs/advanced")
model.predict(["A2CX7LUOHB2NDG"], ["B00004SABB"])               # array([4.31...])
model.recommend(["A2CX7LUOHB2NDG"], k=10).to_pandas()           # user_id, item_id, rank, score

To load and to predict numpy and pyarrow suffice; torch is never needed, and recommending takes numba.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mfdist.data.dataset import Dataset
from mfdist.data.id_text import id_texts
from mfdist.errors import UsageError
from mfdist.results.exported_model import ExportedModel
from mfdist.results.recommendation_table import refuse_unknown, table_of
from mfdist.results.trained_on import dataset_of_model

if TYPE_CHECKING:
    from mfdist.prepare.prepare import prepare_frame
    from mfdist.results.fold_in import FoldIn
    from mfdist.results.neighbours import Neighbours
    from mfdist.results.top_items import TopItems

__all__ = ["Model", "load", "prepare_frame"]


def __getattr__(name: str) -> Any:
    """``prepare_frame`` on first use: it needs polars, which a machine that only predicts may not have."""
    if name == "prepare_frame":
        from mfdist.prepare import prepare

        return prepare.prepare_frame
    raise AttributeError(f"module 'mfdist.api' has no attribute '{name}'")


def load(run: str) -> Model:
    """The exported model of a run directory, or of the folder of a model itself (local or URL).

    DataError where there is none. Runs no code from it.
    """
    return Model(ExportedModel.open(str(run)))


class Model:
    """A trained model on original ids. Ids may be texts or whole numbers: 11, 11.0 and "11" are one id."""

    def __init__(self, exported: ExportedModel) -> None:
        self.exported = exported
        self._neighbours: dict[tuple[str, str], Neighbours] = {}

    def predict(self, user_ids: Iterable[Any], item_ids: Iterable[Any]) -> npt.NDArray[np.float64]:
        """Predicted ratings of pairs, not clipped to the scale: float64 (pairs,).

        For an id outside the vocabulary the known side decides; a model without biases gives the training mean.
        """
        users, items = id_texts(user_ids), id_texts(item_ids)
        if len(users) != len(items):
            raise UsageError(f"predict needs as many users as items, got {len(users)} and {len(items)}.")
        return self.exported.predict(self.exported.rows_of("users", users), self.exported.rows_of("items", items))

    def predict_frame(self, frame: Any, user_id: str = "user_id", item_id: str = "item_id") -> pa.Table:
        """A polars or pandas frame, or an Arrow table, with the columns prediction, known_user and known_item added.

        ``user_id`` and ``item_id`` name its columns of ids.
        """
        table = _arrow_table(frame)
        for name in (user_id, item_id):
            if name not in table.column_names:
                raise UsageError(f"the frame has no column '{name}'; it has {', '.join(table.column_names[:12])}.")
        users = self.exported.rows_of("users", id_texts(table[user_id]))
        items = self.exported.rows_of("items", id_texts(table[item_id]))
        added = {"prediction": self.exported.predict(users, items), "known_user": users >= 0, "known_item": items >= 0}
        for name, values in added.items():
            table = table.append_column(name, pa.array(values))
        return table

    def recommend(
        self, user_ids: Iterable[Any], k: int = 10, *, exclude_seen: bool = False, data: str | None = None
    ) -> pa.Table:
        """The k best items of each user: a table of user_id, item_id, rank (from 1) and score, in the users' order.

        ``exclude_seen`` leaves out what the user has rated in the training rows; it reads the run's dataset, from
        ``data`` where that has moved. A user outside the vocabulary gets the items by bias; UsageError without biases.
        A user who is left with fewer items than k has fewer rows.
        """
        _check_k("recommend", k)
        names = id_texts(user_ids)
        rows = self.exported.rows_of("users", names)
        refuse_unknown(self.exported, [name for name, row in zip(names, rows.tolist(), strict=True) if row < 0])
        if not exclude_seen:
            items, ratings = self._top.of(rows, k)
            return table_of(self.exported, pa.array(names, pa.string()), items, ratings)
        return self._recommend_unseen(self._dataset(data), names, rows, k)

    def fold_in(
        self, item_ids: Iterable[Any], ratings: Iterable[float], *, user_id: Any = None, data: str | None = None
    ) -> FoldedUser:
        """A user from their ratings, solved exactly (see ``results.fold_in``): predictions and recommendations.

        Items unknown to training are left out. ``user_id``: a known user who has rated more since; the training
        ratings are read from the run's dataset (``data`` where that has moved) and count as well, a new rating of the
        same item in the place of the old one.
        """
        names, given = id_texts(item_ids), np.asarray(list(ratings), np.float64)
        if len(names) != len(given):
            raise UsageError(f"fold_in needs as many items as ratings, got {len(names)} and {len(given)}.")
        if not np.isfinite(given).all():
            raise UsageError("fold_in needs ratings that are finite numbers.")
        rows = self.exported.rows_of("items", names)
        items, given = rows[rows >= 0], given[rows >= 0]
        if user_id is not None:
            from mfdist.results.fold_in import with_training

            items, given = with_training(*self._training_ratings(user_id, data), items, given)
        folded = self._fold_in.solve(items, given)
        return FoldedUser(self, folded.factors, folded.bias, items)

    def similar_items(self, item_ids: Iterable[Any], k: int = 10, *, measure: str = "cosine") -> pa.Table:
        """The k items most like each: a table of item_id, similar_id, rank (from 1) and score, without itself.

        ``measure``: 'cosine', or 'inner' for the inner product of the factors. Equal scores by row. Biases play no
        part. UsageError for an id that training did not know.
        """
        return self._similar("items", item_ids, k, measure)

    def similar_users(self, user_ids: Iterable[Any], k: int = 10, *, measure: str = "cosine") -> pa.Table:
        """The k users most like each: a table of user_id, similar_id, rank and score; see :meth:`similar_items`."""
        return self._similar("users", user_ids, k, measure)

    def _similar(self, side: str, ids: Iterable[Any], k: int, measure: str) -> pa.Table:
        from mfdist.results.neighbours import Neighbours

        _check_k(f"similar_{side}", k)
        names = id_texts(ids)
        rows = self.exported.rows_of(side, names)
        unknown = [name for name, row in zip(names, rows.tolist(), strict=True) if row < 0]
        if unknown:
            raise UsageError(f"{len(unknown)} of the {side} were not known to training (the first: '{unknown[0]}').")
        if (side, measure) not in self._neighbours:
            self._neighbours[side, measure] = Neighbours(self.exported, side, measure)
        return self._neighbours[side, measure].table(pa.array(names, pa.string()), rows, k)

    @cached_property
    def _fold_in(self) -> FoldIn:
        from mfdist.results.fold_in import FoldIn

        return FoldIn(self.exported)

    def _training_ratings(
        self, user_id: Any, data: str | None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Item rows and ratings of a known user's training rows."""
        from mfdist.data.scan import scan

        (name,) = id_texts([user_id])
        row = int(self.exported.rows_of("users", [name])[0])
        if row < 0:
            raise UsageError(f"user '{name}' was not known to training; fold in all their ratings without user_id.")
        items, ratings = [np.empty(0, np.int64)], [np.empty(0)]
        dataset = self._dataset(data)
        for number, lane in enumerate(dataset.manifest.lanes):
            if any(first <= row < end for first, end in lane.user_ranges):
                for _, user, item, rating, _ in scan(dataset, "train", range(number, number + 1)):
                    mine = np.flatnonzero(user == row)
                    items.append(item[mine].astype(np.int64))
                    ratings.append(rating[mine].astype(np.float64))
        return np.concatenate(items), np.concatenate(ratings)

    @cached_property
    def _top(self) -> TopItems:
        from mfdist.results.top_items import TopItems

        return TopItems(self.exported)

    def _dataset(self, data: str | None) -> Dataset:
        return dataset_of_model(self.exported, data)

    def _recommend_unseen(self, dataset: Dataset, names: list[str], rows: npt.NDArray[np.int64], k: int) -> pa.Table:
        """Lane by lane, each lane read once; then back in the order asked for."""
        from mfdist.results.top_items import seen_items

        items = np.full((len(rows), k), -1, np.int64)
        ratings = np.full((len(rows), k), np.nan)
        for lane, places in _by_lane(dataset, rows):
            unique, back = np.unique(rows[places], return_inverse=True)
            seen = None if lane is None else seen_items(dataset, lane, unique)
            found, score = self._top.of(unique, k, seen)
            items[places], ratings[places] = found[back], score[back]
        return table_of(self.exported, pa.array(names, pa.string()), items, ratings)


class FoldedUser:
    """A user that :meth:`Model.fold_in` solved: ``factors`` (dim,) and ``bias``, as the export has them."""

    def __init__(
        self, model: Model, factors: npt.NDArray[np.float64], bias: float, rated: npt.NDArray[np.int64]
    ) -> None:
        self._model, self.factors, self.bias, self._rated = model, factors, bias, rated

    def predict(self, item_ids: Iterable[Any]) -> npt.NDArray[np.float64]:
        """Predicted ratings of items, not clipped: float64 (items,); of an unknown item by the user's bias."""
        exported = self._model.exported
        rows = exported.rows_of("items", id_texts(item_ids))
        known = rows >= 0
        score = np.full(len(rows), exported.offset + self.bias)
        score[known] += exported.item_embedding[rows[known]].astype(np.float64) @ self.factors
        if exported.item_bias is not None:
            score[known] += exported.item_bias[rows[known]]
        rating = exported.rating_of_score(score)
        if not exported.has_biases:
            rating[~known] = exported.of_unknown
        return rating

    def recommend(self, k: int = 10, *, exclude_rated: bool = True) -> pa.Table:
        """The k best items: a table of item_id, rank (from 1) and score; without the rated ones."""
        from mfdist.results.item_lists import ItemLists

        _check_k("recommend", k)
        rated = np.unique(self._rated)
        hidden = ItemLists(np.array([0, len(rated)]), rated) if exclude_rated else None
        factors = self.factors[None].astype(np.float32)
        items, ratings = self._model._top.of_factors(factors, np.array([self.bias]), k, hidden)
        return table_of(self._model.exported, pa.array([""]), items, ratings).drop_columns(["user_id"])


def _check_k(what: str, k: Any) -> None:
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise UsageError(f"{what} needs k that is a whole number of at least 1, got {k!r}.")


def _by_lane(dataset: Dataset, rows: npt.NDArray[np.int64]) -> list[tuple[int | None, npt.NDArray[np.int64]]]:
    """(lane, places in ``rows`` of its users), and (None, places) of those outside the vocabulary."""
    groups: list[tuple[int | None, npt.NDArray[np.int64]]] = [(None, np.flatnonzero(rows < 0))]
    for number, lane in enumerate(dataset.manifest.lanes):
        inside = np.zeros(len(rows), bool)
        for first, end in lane.user_ranges:
            inside |= (rows >= first) & (rows < end)
        groups.append((number, np.flatnonzero(inside)))
    return [(lane, places) for lane, places in groups if len(places)]


def _arrow_table(frame: Any) -> pa.Table:
    if isinstance(frame, pa.Table):
        return frame
    if hasattr(frame, "to_arrow"):
        return frame.to_arrow()
    try:
        return pa.Table.from_pandas(frame, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError, AttributeError, TypeError) as error:
        raise UsageError(f"the frame cannot be read: {error}.") from None
