"""The best items of each user, and how good such rankings are; users x items is never whole in memory, only a block.

>>> items, ratings = top_items(model, users, k=10)      # (users, 10) each, best first

Metrics are means over hash-chosen users with a relevant validation item (rating in the upper quarter of the scale, 4 on
1 to 5), whose training items are left out of the ranking. Relevance is binary:

    NDCG@k   = sum over relevant items at place p <= k of 1 / log2(p + 1), divided by the best such sum possible
    recall@k = relevant items among the first k / relevant items

A ranking by number of training ratings (``popularity``) stands beside the model's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mfdist.cluster.world import World
from mfdist.data.batch_order import lanes_of_rank
from mfdist.data.dataset import Dataset
from mfdist.data.loader import scan
from mfdist.metrics import hash_rows
from mfdist.results.export import ExportedModel

USER_BLOCK = 256
ITEM_BLOCK = 1 << 15

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Seen(NamedTuple):
    """Items of each of n users: those of user j are ``items[starts[j] : starts[j + 1]]``; ``starts`` is (n + 1,)."""

    starts: Ints
    items: Ints

    def cut(self, users: slice) -> Seen:
        """The part of users ``start`` to ``stop``."""
        starts = self.starts[users.start : users.stop + 1]
        return Seen(starts - starts[0], self.items[starts[0] : starts[-1]])


def seen_items(dataset: Dataset, lane: int, users: Ints) -> Seen:
    """The training items of ``users`` (ascending rows of one lane), from one pass over the lane's files."""
    places, items = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for _, user, item, _, _ in scan(dataset, "train", range(lane, lane + 1)):
        place = np.searchsorted(users, user)
        hits = np.flatnonzero(users[np.minimum(place, len(users) - 1)] == user) if len(users) else place[:0]
        places.append(place[hits].astype(np.int64))
        items.append(item[hits].astype(np.int64))
    place = np.concatenate(places)
    order = np.argsort(place, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(place, minlength=len(users)))])
    return Seen(starts.astype(np.int64), np.concatenate(items)[order])


def top_items(
    model: ExportedModel, users: Ints, k: int, seen: Seen | None = None, device: str | torch.device = "cpu"
) -> tuple[Ints, Floats]:
    """Item rows and predicted ratings of each user's ``k`` best items that are not in ``seen``: (users, k), best first.

    ``users``: user rows, -1 an id outside the vocabulary (only for a model with biases: the items by bias). Equal
    scores are ordered by item row. Where fewer than k items are left, item -1 and rating NaN fill up.
    """
    assert model.has_biases or not (users < 0).any()
    items = np.full((len(users), k), -1, np.int64)
    score = np.full((len(users), k), -np.inf)
    for first in range(0, len(users), USER_BLOCK):
        block = slice(first, min(first + USER_BLOCK, len(users)))
        hidden = None if seen is None else seen.cut(block)
        items[block], score[block] = _top_of_block(model, users[block], k, hidden, torch.device(device))
    own = np.zeros(len(users)) if model.user_bias is None else np.where(users < 0, 0.0, model.user_bias[users])
    rating = model.rating_of_score(score + own[:, None] + model.offset)
    empty = np.isneginf(score)
    return np.where(empty, -1, items), np.where(empty, np.nan, rating)


def _top_of_block(
    model: ExportedModel, users: Ints, k: int, seen: Seen | None, device: torch.device
) -> tuple[Ints, Floats]:
    """Best items of a block of users, a block of items at a time; scores without user bias and offset."""
    factors = np.where((users < 0)[:, None], np.float32(0), model.user_embedding[users])
    left = torch.from_numpy(factors).to(device)
    best = torch.full((len(users), k), -torch.inf, device=device)
    best_items = torch.full((len(users), k), -1, dtype=torch.int64, device=device)
    for first in range(0, model.num_items, ITEM_BLOCK):
        score = left @ torch.from_numpy(np.array(model.item_embedding[first : first + ITEM_BLOCK])).to(device).T
        if model.item_bias is not None:
            score += torch.from_numpy(np.array(model.item_bias[first : first + ITEM_BLOCK])).to(device)
        if seen is not None:
            _hide(score, seen, first)
        top, place = score.topk(min(k, score.shape[1]), dim=1)
        best, choice = torch.cat([best, top], 1).topk(k, dim=1)
        best_items = torch.cat([best_items, place + first], 1).gather(1, choice)
    items, scores = best_items.cpu().numpy(), best.cpu().numpy().astype(np.float64)
    order = np.lexsort((items, -scores), axis=1)
    return np.take_along_axis(items, order, 1), np.take_along_axis(scores, order, 1)


def _hide(score: torch.Tensor, seen: Seen, first: int) -> None:
    user = np.repeat(np.arange(len(seen.starts) - 1), np.diff(seen.starts))
    inside = np.flatnonzero((seen.items >= first) & (seen.items < first + score.shape[1]))
    score[torch.from_numpy(user[inside]), torch.from_numpy(seen.items[inside] - first)] = -torch.inf


# Metrics ------------------------------------------------------------------------------------------


def rank_metrics(
    model: ExportedModel, dataset: Dataset, world: World, num_users: int, k: int = 10, seed: int = 0
) -> dict[str, Any]:
    """``{"users", "threshold", "ndcg@10", "recall@10", "popularity": {...}}``; collective.

    About ``num_users`` users are chosen by a hash of their row, the same for every model and world size. The model's
    rows are the dataset's.
    """
    low, high = dataset.manifest.rating_scale
    threshold = low + 0.75 * (high - low)
    fraction = num_users / max(1, dataset.manifest.num_users)
    popularity = dataset.counts("items").astype(np.float64)
    sums = np.zeros(5)
    for lane in lanes_of_rank(len(dataset.manifest.lanes), world.rank, world.size):
        users, relevant = _relevant(dataset, lane, threshold, fraction, seed)
        if len(users):
            seen = seen_items(dataset, lane, users)
            found, _ = top_items(model, users, k, seen)
            popular = _popular(popularity, seen, k)
            sums += len(users), *gains(found, relevant, k), *gains(popular, relevant, k)
    users_seen, *totals = world.sum(sums)
    means = [total / users_seen if users_seen else None for total in totals]
    return {
        "users": int(users_seen), "threshold": threshold, f"ndcg@{k}": means[0], f"recall@{k}": means[1],
        "popularity": {f"ndcg@{k}": means[2], f"recall@{k}": means[3]},
    }  # fmt: skip


def gains(found: Ints, relevant: Seen, k: int) -> tuple[float, float]:
    """Sums over users of NDCG@k and recall@k: ``found`` (users, k) item rows, ``relevant`` at least one item a user."""
    discount = 1.0 / np.log2(np.arange(k) + 2)
    best = np.concatenate([[0.0], np.cumsum(discount)])
    ndcg = recall = 0.0
    for row, top in enumerate(found):
        wanted = relevant.items[relevant.starts[row] : relevant.starts[row + 1]]
        hit = np.isin(top, wanted)
        ndcg += float(discount[hit].sum() / best[min(k, len(wanted))])
        recall += float(hit.sum() / len(wanted))
    return ndcg, recall


def _relevant(dataset: Dataset, lane: int, threshold: float, fraction: float, seed: int) -> tuple[Ints, Seen]:
    """Chosen users of a lane that have relevant validation items, ascending, and those items without repetition."""
    pairs = [np.empty((0, 2), np.int64)]
    for _, user, item, rating, _ in scan(dataset, "val", range(lane, lane + 1)):
        keep = (rating >= threshold) & (chosen(user, seed) < fraction)
        pairs.append(np.stack([user[keep], item[keep]], axis=1).astype(np.int64))
    rows = np.unique(np.concatenate(pairs), axis=0)
    users, starts = np.unique(rows[:, 0], return_index=True)
    return users, Seen(np.append(starts, len(rows)).astype(np.int64), rows[:, 1])


def chosen(user: npt.NDArray[Any], seed: int) -> Floats:
    """A number in [0, 1) of each user row, by a hash of row and seed."""
    return hash_rows(user, 0, seed) / 2.0**64


def _popular(popularity: Floats, seen: Seen, k: int) -> Ints:
    """The k items with most training ratings for each user, but those seen; equal counts by item row."""
    order = np.argsort(-popularity, kind="stable")
    top = np.full((len(seen.starts) - 1, k), -1, np.int64)
    for row in range(len(top)):
        mine = seen.items[seen.starts[row] : seen.starts[row + 1]]
        head = order[: k + len(mine)]
        best = head[~np.isin(head, mine)][:k]
        top[row, : len(best)] = best
    return top
