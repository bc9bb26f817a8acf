"""The leaderboard's bookkeeping, without training anything."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import make_dataset

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import leaderboard
import shapes
from peers import PeerAbsent, columns_of


@pytest.fixture
def split(tmp_path):
    dataset = make_dataset(tmp_path / "data", rows=800, lanes=3, val_rows=300, users=40, items=30)
    arrays = columns_of(dataset, "train") | {f"val_{key}": c for key, c in columns_of(dataset, "val").items()}
    return leaderboard.Split("small", dataset, tmp_path / "rows.npz", arrays)


def noisy(level, calls):
    def learn(split, seed):
        calls.append(seed)
        rng = np.random.default_rng(seed)
        return split.arrays["val_rating"] + rng.normal(0, level, len(split.arrays["val_rating"])), 1.5

    return learn


def test_rows_of_the_table(split):
    calls: list[int] = []

    def absent(split, seed):
        raise PeerAbsent("cannot be installed: no network")

    systems = [
        leaderboard.System(leaderboard.OURS, noisy(0.4, calls), ours=True),
        leaderboard.System("mf (vignette)", noisy(0.1, calls), ours=True),
        leaderboard.System("A", noisy(0.8, calls)),
        leaderboard.System("B", noisy(1.2, calls), seeded=False),
        leaderboard.System("C", absent),
        leaderboard.System("D", noisy(0.1, calls), reason=lambda split: "left out: too long"),
    ]
    rows = leaderboard.measure(split, systems, 3)
    again = leaderboard.measure(split, systems, 3)
    assert rows == again
    assert calls == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]  # each cell once
    by_name = {row["system"]: row for row in rows}
    assert by_name["A"]["seeds"] == 3 and by_name["B"]["seeds"] == 1
    assert by_name["A"]["rmse"] == pytest.approx(np.sqrt(np.mean(np.square(by_name["A"]["rmse_of_seeds"]))))
    difference, low, high = by_name["A"]["ours_minus_this"]  # the best peer, not the vignette's model
    assert low < difference < high < 0
    assert difference == pytest.approx(by_name[leaderboard.OURS]["rmse"] - by_name["A"]["rmse"])
    assert "ours_minus_this" not in by_name["B"]
    assert by_name["C"]["reason"].startswith("cannot be installed") and by_name["D"]["reason"].startswith("left out")


def test_any_folder_of_files(tmp_path):
    for name in ("ml-1m.parquet", "b.base.tsv", "b.test.tsv", "plain.csv", "a.b.csv", "lone.train.csv", "notes.md"):
        (tmp_path / name).write_text("u1,i1,4.5,7\n" if name == "plain.csv" else "user,item,stars\nu1,i1,-3\n")
    assert leaderboard.datasets_in(tmp_path) == {
        "ml-1m": ("ml-1m.parquet",), "b": ("b.base.tsv", "b.test.tsv"), "plain": ("plain.csv",), "a.b": ("a.b.csv",),
        "lone.train": ("lone.train.csv",),
    }  # fmt: skip
    for name, rating in (("plain.csv", 4.5), ("a.b.csv", -3.0)):
        frame = leaderboard.read_ratings(tmp_path / name)
        assert frame.to_dict("records") == [{"user_id": "u1", "item_id": "i1", "rating": rating}]


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_shapes_are_what_they_say(name):
    shape = shapes.SHAPES[name]
    frame = shapes.made(shape, 0)
    assert frame.equals(shapes.made(shape, 0)) and not frame.duplicated(["user_id", "item_id"]).any()
    rows = {0: shape.users * shape.items, -1: shape.users}.get(shape.rows, shape.rows)
    assert len(frame) == rows and shape.scale[0] <= frame.rating.min() < frame.rating.max() <= shape.scale[1]
    steps = (frame.rating - shape.scale[0]) / (shape.step or 1)
    assert (steps == steps.round()).all() == bool(shape.step)


def test_the_last_fifth_after_pandas_shuffle():
    frame = pd.DataFrame({"user_id": range(11), "item_id": 0, "rating": 1.0})
    train, val = leaderboard.divide([frame])
    assert val["user_id"].tolist() == frame.sample(frac=1, random_state=42)["user_id"].tolist()[-2:]
    assert sorted([*train["user_id"], *val["user_id"]]) == list(range(11))
    assert leaderboard.divide([train, val])[1] is val
