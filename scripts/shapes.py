#!/usr/bin/env python
"""Ratings of other shapes than those that are lying about, from a seed: for scripts/leaderboard.py and the recipe.

    python scripts/shapes.py --out build/shapes
    python scripts/leaderboard.py --files build/shapes

Few users and many items, few items and many users, one rating a user, every pair rated, 1 to 10, half stars, -10 to 10
with hardly a pair missing (as in Jester). A rating is a mean, a user's and an item's bias, the product of four factors
and noise, all normal, on the scale; which pairs are rated says nothing of how. Synthetic: no figure on them speaks of
people.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

RANK = 4


@dataclass(frozen=True, kw_only=True)
class Shape:
    """``rows`` of all users x items pairs (all of them where 0, one of each user where -1). Standard deviations, in
    quarters of the scale: ``user``, ``item``: biases; ``factors``: their product; ``noise``. ``step`` 0: any number."""

    users: int
    items: int
    rows: int = 0
    scale: tuple[float, float] = (1.0, 5.0)
    step: float = 1.0
    user: float = 0.4
    item: float = 0.5
    factors: float = 0.4
    noise: float = 0.9
    uneven: float = 1.0  # standard deviation of the logarithm of how often a user or an item occurs


SHAPES = {
    "few-users": Shape(users=20, items=20_000, rows=100_000, uneven=0.5),
    "few-items": Shape(users=20_000, items=12, rows=100_000, scale=(1, 10), uneven=0.5),
    "one-each": Shape(users=50_000, items=500, rows=-1),
    "dense": Shape(users=1_000, items=100),
    "one-to-ten": Shape(users=1_500, items=1_000, rows=100_000, scale=(1, 10)),
    "half-stars": Shape(users=1_500, items=1_000, rows=100_000, scale=(0.5, 5), step=0.5),
    "jester-like": Shape(users=2_000, items=100, rows=110_000, scale=(-10, 10), step=0, user=0.45, item=0.25,
                         factors=0.45, noise=0.8, uneven=0.5),
}  # fmt: skip


def made(shape: Shape, seed: int) -> pd.DataFrame:
    """The columns user_id, item_id, rating."""
    rng = np.random.default_rng(seed)
    user, item = pairs(shape, rng)
    biases = shape.user * rng.normal(size=shape.users)[user] + shape.item * rng.normal(size=shape.items)[item]
    p, q = rng.normal(size=(shape.users, RANK)), rng.normal(size=(shape.items, RANK))
    product = shape.factors / RANK**0.5 * np.einsum("ij,ij->i", p[user], q[item])
    noise = shape.noise * rng.normal(size=len(user))
    (low, high), step = shape.scale, shape.step
    rating = (low + high) / 2 + (high - low) / 4 * (0.2 + biases + product + noise)
    if step:
        rating = low + step * np.rint((rating - low) / step)
    users, items = (np.array([f"{letter}{k}" for k in range(count)])
                    for letter, count in (("u", shape.users), ("i", shape.items)))  # fmt: skip
    return pd.DataFrame(
        {"user_id": users[user], "item_id": items[item], "rating": np.clip(rating, low, high).astype("f4")}
    )


def pairs(shape: Shape, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Distinct (user, item), those of frequent users and items more often."""
    logs = [shape.uneven * rng.normal(size=count) for count in (shape.users, shape.items)]
    if shape.rows < 0:
        odds = np.exp(logs[1])
        return np.arange(shape.users), rng.choice(shape.items, shape.users, p=odds / odds.sum())
    chosen = np.arange(shape.users * shape.items)
    if shape.rows:  # without replacement, by the odds of each pair (Gumbel's trick)
        keys = logs[0][:, None] + logs[1] + rng.gumbel(size=(shape.users, shape.items))
        chosen = np.argpartition(-keys.ravel(), shape.rows)[: shape.rows]
    user, item = np.divmod(chosen, shape.items)
    return user, item


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder for NAME.parquet")
    parser.add_argument("--data", default=",".join(SHAPES), help="shapes, with commas between them")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(argv)
    names = flags.data.split(",")
    if set(names) - set(SHAPES):
        parser.error(f"--data: the shapes are {', '.join(SHAPES)}.")
    folder = Path(flags.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        frame = made(SHAPES[name], flags.seed)
        frame.to_parquet(folder / f"{name}.parquet", index=False)
        print(f"{name}: {len(frame):,} ratings, mean {frame.rating.mean():.2f}, spread {frame.rating.std():.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
