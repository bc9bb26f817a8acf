"""Item rows of each of many users: what they have seen, what they may get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class ItemLists(NamedTuple):
    """Item rows of each of n users: of user j ``items[starts[j] : starts[j + 1]]``; ``starts`` is (n + 1,)."""

    starts: Ints
    items: Ints

    @staticmethod
    def none(users: int) -> ItemLists:
        return ItemLists(np.zeros(users + 1, np.int64), np.empty(0, np.int64))

    @staticmethod
    def of_pairs(user: Ints, item: Ints, users: int) -> ItemLists:
        """Of pairs of a user's number below ``users`` and an item row, each user's items ascending and once."""
        order = np.lexsort((item, user))
        user, item = user[order], item[order]
        first = np.ones(len(user), bool)
        first[1:] = (user[1:] != user[:-1]) | (item[1:] != item[:-1])
        sizes = np.bincount(user[first], minlength=users)
        return ItemLists(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), item[first].astype(np.int64))

    @staticmethod
    def concatenated(parts: Sequence[ItemLists]) -> ItemLists:
        """The users of all ``parts``, one after the other."""
        sizes = np.concatenate([np.diff(part.starts) for part in parts])
        items = np.concatenate([part.items for part in parts])
        return ItemLists(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), items)

    @property
    def users(self) -> Ints:
        """The user's number of each of ``items``."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    def cut(self, users: slice) -> ItemLists:
        """The part of users ``start`` to ``stop``."""
        starts = self.starts[users.start : users.stop + 1]
        return ItemLists(starts - starts[0], self.items[starts[0] : starts[-1]])

    def of(self, users: Ints) -> ItemLists:
        """The lists of ``users``, in that order."""
        sizes = np.diff(self.starts)[users]
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        places = np.repeat(self.starts[users] - starts[:-1], sizes) + np.arange(starts[-1])
        return ItemLists(starts, self.items[places])

    def joined(self, other: ItemLists) -> ItemLists:
        """What either has of each user, ascending and once; ``other`` of as many users."""
        user, item = np.concatenate([self.users, other.users]), np.concatenate([self.items, other.items])
        return ItemLists.of_pairs(user, item, len(self.starts) - 1)

    def between(self, first: int, end: int) -> ItemLists:
        """Of each user the items from row ``first`` on and below ``end``, counted from ``first``."""
        inside = (self.items >= first) & (self.items < end)
        before = np.concatenate([[0], np.cumsum(inside)])
        return ItemLists(before[self.starts].astype(np.int64), self.items[inside] - first)

    def ordered(self) -> ItemLists:
        """The same with each user's items ascending and once."""
        return ItemLists.of_pairs(self.users, self.items, len(self.starts) - 1)
