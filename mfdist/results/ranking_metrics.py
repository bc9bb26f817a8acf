"""How good lists of items are, measured by items that their users turned out to like. Sums until printed.

Relevance is binary. Of one user's list of k items, best first:

    NDCG@k   = sum over relevant items at place p <= k of 1 / log2(p + 1), divided by the best such sum possible
    recall@k = relevant items among the first k / relevant items
    MRR@k    = 1 / place of the first relevant item, 0 where none is among the first k (its mean is the MRR)

Example, k = 3, relevant 7 and 9, list 9, 1, 7: NDCG = (1 + 1/2) / (1 + 1/1.585) = 0.920, recall 1, reciprocal rank 1.
Over all users, coverage@k is the share of the catalogue's items that at least one of the lists holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mfdist.results.item_lists import ItemLists

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

K = 10
FIGURES = {f"ndcg@{K}": f"NDCG@{K}", f"recall@{K}": f"recall@{K}", f"mrr@{K}": f"MRR@{K}",
           f"coverage@{K}": f"coverage@{K}"}  # fmt: skip
"""Keys of a ranking's figures, and what a person reads for them."""
HEADLINE = f"ndcg@{K}"


def gains(found: Ints, relevant: ItemLists) -> Floats:
    """(users, 3): NDCG, recall and reciprocal rank of lists ``found`` (users, k), -1 where one is short.

    ``relevant``: at least one item of each user, none twice.
    """
    users, k = found.shape
    base = int(max(found.max(initial=0), relevant.items.max(initial=0))) + 2
    wanted = relevant.users * base + relevant.items + 1
    hit = np.isin(np.arange(users)[:, None] * base + found + 1, wanted) & (found >= 0)
    discount = 1.0 / np.log2(np.arange(k) + 2)
    best = np.concatenate([[0.0], np.cumsum(discount)])
    sizes = np.diff(relevant.starts)
    ndcg = (hit * discount).sum(axis=1) / best[np.minimum(sizes, k)]
    reciprocal = np.where(hit.any(axis=1), 1.0 / (hit.argmax(axis=1) + 1), 0.0)
    return np.stack([ndcg, hit.sum(axis=1) / sizes, reciprocal], axis=1)


def popular(counts: Ints, seen: ItemLists, k: int) -> Ints:
    """The ``k`` items with most training ratings for each user, but those seen; equal ``counts`` by item row."""
    order = np.argsort(-counts, kind="stable")
    top = np.full((len(seen.starts) - 1, k), -1, np.int64)
    for row in range(len(top)):
        mine = seen.items[seen.starts[row] : seen.starts[row + 1]]
        head = order[: k + len(mine)]
        best = head[~np.isin(head, mine)][:k]
        top[row, : len(best)] = best
    return top


def figures(sums: Floats, users: float, covered: int, num_items: int) -> dict[str, float | None]:
    """Means of (3,) sums of :func:`gains` over ``users``, and the coverage, by the keys of FIGURES; None of no user."""
    if not users:
        return dict.fromkeys(FIGURES)
    return dict(zip(FIGURES, [*(float(s / users) for s in sums), covered / num_items], strict=True))


# Words --------------------------------------------------------------------------------------------


def basis(ranking: Mapping[str, Any]) -> str:
    """What the figures of a ranking are of."""
    users, among = ranking["users"], ranking["of_users"]
    chosen = f"{users:,} users" if users == among else f"{users:,} of {among:,} users, chosen by hash"
    return f"{chosen}; relevant: validation ratings from {ranking['threshold']:g}; items of training left out"


def figures_in_words(ranking: Mapping[str, Any]) -> str:
    """The model's own figures in a line."""
    values = ((name, ranking[key]) for key, name in FIGURES.items())
    return ", ".join(f"{name} -" if value is None else f"{name} {value:.4f}" for name, value in values)


def sentence(ranking: Mapping[str, Any]) -> str:
    """The figures in one line, for a console."""
    if ranking[HEADLINE] is None:
        return "no user has a validation rating that is high enough to rank for"
    own = figures_in_words(ranking)
    return (
        f"{own}; the most popular items: {FIGURES[HEADLINE]} {ranking['popularity'][HEADLINE]:.4f} ({basis(ranking)})"
    )


def rows(runs: Mapping[str, Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Rows of a table with the columns of FIGURES: each run of ``runs`` by its name, then popularity."""
    table = [(name, *(ranking[key] for key in FIGURES)) for name, ranking in runs.items()]
    first = next(iter(runs.values()))
    return [*table, ("most popular items", *(first["popularity"][key] for key in FIGURES))]


def doubt_about(ranking: Mapping[str, Any]) -> str:
    """Why these recommendations should not be given to anybody; '' where they beat the most popular items."""
    own, popularity = ranking[HEADLINE], ranking["popularity"][HEADLINE]
    if own is None or own >= popularity:
        return ""
    return (
        f"the model's recommendations rank below the most popular items: {FIGURES[HEADLINE]} {own:.4f} beside "
        f"{popularity:.4f}. It was made to predict ratings; --config ranking learns what users choose."
    )
