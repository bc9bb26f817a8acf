"""Candidates for the best items, from products on a CUDA device where the items stay.

The device's order of summation is its own, so that it only names the k best and a few more; ``item_index`` computes
those as scores are defined, and searches anew where what was left out could have come that far.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mfdist.cluster.precision import full_float32
from mfdist.results.item_lists import ItemLists

ITEM_BLOCK = 1 << 16
EXTRA = 22
"""Candidates beyond k, between which and the k-th there is nearly always more than the products may be off."""

Floats32 = npt.NDArray[np.float32]


class GpuFilter:
    """``factors`` (items, dim) and ``bias`` (items,), kept on ``device``."""

    def __init__(self, factors: Floats32, bias: Floats32, device: Any) -> None:
        self.device = device
        self._items = torch.from_numpy(np.concatenate([factors, bias[:, None]], axis=1)).to(device)

    def candidates(self, users: Floats32, k: int, hidden: ItemLists) -> tuple[Any, Any]:
        """Positions (users, c) of the best products, -1 for none; and (users,) the most that any other can be.

        ``hidden``: positions that are left out (-1: none).
        """
        ones = np.ones((len(users), 1), np.float32)
        left = torch.from_numpy(np.concatenate([users, ones], axis=1)).to(self.device)
        hidden_user, hidden_place = (torch.from_numpy(rows).to(self.device) for rows in (hidden.users, hidden.items))
        width = min(k + EXTRA, len(self._items))
        best = torch.full((len(users), 0), -torch.inf, device=self.device)
        place = torch.empty((len(users), 0), dtype=torch.int64, device=self.device)
        for first in range(0, len(self._items), ITEM_BLOCK):
            with full_float32():
                score = left @ self._items[first : first + ITEM_BLOCK].T
            inside = (hidden_place >= first) & (hidden_place < first + score.shape[1])
            score[hidden_user[inside], hidden_place[inside] - first] = -torch.inf
            top, found = score.topk(min(width, score.shape[1]), dim=1)
            best, place = torch.cat([best, top], 1), torch.cat([place, found + first], 1)
            best, choice = best.topk(min(width, best.shape[1]), dim=1)
            place = place.gather(1, choice)
        everything = width == len(self._items)
        cutoff = np.full(len(users), -np.inf) if everything else best[:, -1].double().cpu().numpy()
        return torch.where(best.isneginf(), -1, place).cpu().numpy(), cutoff
