"""Which items may be recommended: to everybody (allow, deny, a least number of ratings), and to one user.

A file of item ids concerns everybody. A file of pairs (user_id, item_id) concerns its users alone: ``allow`` gives them
no other items, ``deny`` none of these; who is not named in it is not restricted by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mfdist import storage
from mfdist.data.dataset import Dataset
from mfdist.errors import UsageError
from mfdist.results.exported_model import ExportedModel
from mfdist.results.id_files import read_id_file
from mfdist.results.item_lists import ItemLists
from mfdist.results.top_items import TopItems

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class ItemFilters:
    """``rows``: ascending item rows that anybody may get, None: all. ``remarks``: what a person should know."""

    def __init__(
        self, allow: str | None, deny: str | None, min_item_ratings: int, model: ExportedModel,
        dataset: Dataset | None = None, unknown: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """``unknown``: ids of users without a row; number j has the key ``model.num_users + j``. UsageError where
        nothing is left to recommend, and ``dataset`` is that of the model where a least number is given."""
        self._model, self._unknown = model, {name: model.num_users + j for j, name in enumerate(unknown)}
        self.remarks: list[str] = []
        self.identity: list[Any] = []
        allowed = np.ones(model.num_items, bool)
        self._allow = self._read(allow, "allow", allowed)
        self._deny = self._read(deny, "deny", allowed)
        if min_item_ratings:
            assert dataset is not None
            allowed &= dataset.counts("items") >= min_item_ratings
        self.rows = None if allowed.all() else np.flatnonzero(allowed)
        if not allowed.any():
            raise UsageError("--allow, --deny and --min-item-ratings leave no item to recommend.")

    def top(self, top: TopItems, users: Ints, keys: Ints, k: int, seen: ItemLists | None) -> tuple[Ints, Floats]:
        """:meth:`TopItems.of` for users with these keys (the row, or that of an unknown id)."""
        hidden = seen
        if self._deny is not None:
            denied = self._deny.of(keys)
            hidden = denied if seen is None else seen.joined(denied)
        if self._allow is None:
            return top.of(users, k, hidden)
        listed = self._allow.named(keys)
        items, ratings = np.full((len(users), k), -1, np.int64), np.full((len(users), k), np.nan)
        for chosen, only in ((~listed, None), (listed, self._allow)):
            places = np.flatnonzero(chosen)
            if len(places):
                left_out = None if hidden is None else hidden.of(places)
                found = top.of(users[places], k, left_out, None if only is None else only.of(keys[places]))
                items[places], ratings[places] = found
        return items, ratings

    def _read(self, path: str | None, flag: str, allowed: npt.NDArray[np.bool_]) -> _Pairs | None:
        """Narrow ``allowed`` by a list, or return the pairs of a file."""
        if path is None:
            return None
        file = read_id_file(path, flag, "item_id")
        self.identity.append([flag, file.checksum])
        shown = f"--{flag} {storage.redact(path)}"
        names = file.ids if file.item_ids is None else file.item_ids
        rows = self._model.rows_of("items", names) if names else np.empty(0, np.int64)
        if flag == "deny" and not (rows >= 0).any():
            self.remarks.append(f"{shown} names no item that training knew: nothing is left out by it")
            return None
        if not (rows >= 0).any():
            raise UsageError(f"{shown}: none of its {len(names):,} items was known to training.")
        if (rows < 0).any():
            self.remarks.append(f"{shown}: {int((rows < 0).sum()):,} of {len(rows):,} items were not known to training")
        if file.user_ids is None:
            chosen = np.zeros(len(allowed), bool)
            chosen[rows[rows >= 0]] = True
            allowed &= chosen if flag == "allow" else ~chosen
            return None
        keys = self._model.rows_of("users", file.user_ids)
        strangers = np.flatnonzero(keys < 0)
        keys[strangers] = [self._unknown.get(file.user_ids[place], -1) for place in strangers]
        return _Pairs(keys, rows)


class _Pairs:
    """Item rows by the key of a user; a user whose items are all unknown (-1) is named nevertheless."""

    def __init__(self, keys: Ints, items: Ints) -> None:
        self._keys, number = np.unique(keys, return_inverse=True)
        known = items >= 0
        self._lists = ItemLists.of_pairs(number[known], items[known], len(self._keys))

    def named(self, keys: Ints) -> npt.NDArray[np.bool_]:
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.asarray((self._keys[place] == keys) & (keys >= 0))

    def of(self, keys: Ints) -> ItemLists:
        """The items of users with these keys; none for others."""
        named = self.named(keys)
        place = np.searchsorted(self._keys, keys[named])
        mine = self._lists.of(place)
        sizes = np.zeros(len(keys), np.int64)
        sizes[named] = np.diff(mine.starts)
        return ItemLists(np.concatenate([[0], np.cumsum(sizes)]), mine.items)
