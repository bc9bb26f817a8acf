"""How good the rankings of a model are.

Metrics are means over hash-chosen users with a relevant validation item (rating in the upper quarter of the scale, 4 on
1 to 5), whose training items are left out of the ranking. Relevance is binary:

    NDCG@k   = sum over relevant items at place p <= k of 1 / log2(p + 1), divided by the best such sum possible
    recall@k = relevant items among the first k / relevant items

A ranking by number of training ratings (``popularity``) stands beside the model's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mfdist.cluster.world import World
from mfdist.data.batch_order import lanes_of_rank
from mfdist.data.dataset import Dataset
from mfdist.data.scan import scan
from mfdist.metrics import hash_rows
from mfdist.results.export import ExportedModel
from mfdist.results.item_lists import ItemLists
from mfdist.results.top_items import TopItems, seen_items

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


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
    sums, top = np.zeros(5), TopItems(model)
    for lane in lanes_of_rank(len(dataset.manifest.lanes), world.rank, world.size):
        users, relevant = _relevant(dataset, lane, threshold, fraction, seed)
        if len(users):
            seen = seen_items(dataset, lane, users)
            found, _ = top.of(users, k, seen)
            popular = _popular(popularity, seen, k)
            sums += len(users), *gains(found, relevant, k), *gains(popular, relevant, k)
    users_seen, *totals = world.sum(sums)
    means = [total / users_seen if users_seen else None for total in totals]
    return {
        "users": int(users_seen), "threshold": threshold, f"ndcg@{k}": means[0], f"recall@{k}": means[1],
        "popularity": {f"ndcg@{k}": means[2], f"recall@{k}": means[3]},
    }  # fmt: skip


def gains(found: Ints, relevant: ItemLists, k: int) -> tuple[float, float]:
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


def _relevant(dataset: Dataset, lane: int, threshold: float, fraction: float, seed: int) -> tuple[Ints, ItemLists]:
    """Chosen users of a lane that have relevant validation items, ascending, and those items without repetition."""
    pairs = [np.empty((0, 2), np.int64)]
    for _, user, item, rating, _ in scan(dataset, "val", range(lane, lane + 1)):
        keep = (rating >= threshold) & (chosen(user, seed) < fraction)
        pairs.append(np.stack([user[keep], item[keep]], axis=1).astype(np.int64))
    rows = np.unique(np.concatenate(pairs), axis=0)
    users, starts = np.unique(rows[:, 0], return_index=True)
    return users, ItemLists(np.append(starts, len(rows)).astype(np.int64), rows[:, 1])


def chosen(user: npt.NDArray[Any], seed: int) -> Floats:
    """A number in [0, 1) of each user row, by a hash of row and seed."""
    return hash_rows(user, 0, seed) / 2.0**64


def _popular(popularity: Floats, seen: ItemLists, k: int) -> Ints:
    """The k items with most training ratings for each user, but those seen; equal counts by item row."""
    order = np.argsort(-popularity, kind="stable")
    top = np.full((len(seen.starts) - 1, k), -1, np.int64)
    for row in range(len(top)):
        mine = seen.items[seen.starts[row] : seen.starts[row + 1]]
        head = order[: k + len(mine)]
        best = head[~np.isin(head, mine)][:k]
        top[row, : len(best)] = best
    return top
