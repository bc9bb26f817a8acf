"""A ranking: its solver against the dense objective, on any ranks, after a stop; what its model says and refuses."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from datasets import make_dataset, training_rows, write_dataset
from ranks import run_ranks
from safetensors.numpy import load_file
from test_train import stop_all

import mfdist
from mfdist.cluster.world import World
from mfdist.config import parse_config, to_toml
from mfdist.data.dataset import Dataset
from mfdist.errors import UsageError
from mfdist.jobs.evaluate import main as evaluate
from mfdist.jobs.predict import main as predict
from mfdist.log import Console
from mfdist.planning.plan import PlanConfig, plan
from mfdist.planning.plan_table import format_plans
from mfdist.training.config import TrainConfig
from mfdist.training.train import train

QUIET = Console(speaks=False)
UNOBSERVED, PENALTY = 3.0, 0.1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """5 lanes of 120 users and 40 items; users 17, 18 and items 38, 39 are without a training rating."""
    rng = np.random.default_rng(1)
    lanes: dict[str, list[list[dict[str, np.ndarray]]]] = {"train": [], "val": []}
    ranges = [(24 * lane, 24 * lane + 24) for lane in range(5)]
    taste = rng.integers(0, 3, 120)
    for first, end in ranges:
        for split, rows in (("train", 260), ("val", 60)):
            user = rng.integers(first, end, rows)
            item = np.where(
                rng.random(rows) < 0.8, 12 * taste[user] + rng.integers(0, 12, rows), rng.integers(0, 36, rows)
            )
            if split == "train":
                user = np.where((user == 17) | (user == 18), 16, user)
            else:
                item = np.where(rng.random(rows) < 0.05, 39, item)
            pairs = np.unique(np.stack([user, item], axis=1), axis=0).astype(np.int32)
            rating = rng.integers(1, 6, len(pairs)).astype(np.float32)
            lanes[split].append([{"user": pairs[:, 0], "item": pairs[:, 1], "rating": rating}])
    path = str(tmp_path_factory.mktemp("alternating") / "data")
    write_dataset(path, lanes["train"], lanes["val"], ranges=ranges, num_items=40)
    return path


def config(data, run, **values):
    given = {"emb_dim": 3, "epochs": 2, "unobserved_weight": UNOBSERVED, "ranking_penalty": PENALTY}
    return TrainConfig.ready("ranking", data=data, run_dir=str(run), **{**given, **values})


def tables(run):
    found = load_file(f"{run}/model/model.safetensors")
    return found["user_embedding"].astype(np.float64), found["item_embedding"].astype(np.float64)


def train_all(world, configs):
    return [train(c, world, QUIET) for c in configs]


# Arithmetic ---------------------------------------------------------------------------------------


class Dense:
    """The objective over all pairs, in float64 and by the text of ``model.alternating``."""

    def __init__(self, data):
        dataset = Dataset.open(data)
        user, item, _ = training_rows(dataset).astype(int).T
        self.rated = np.zeros((dataset.manifest.num_users, dataset.manifest.num_items))
        np.add.at(self.rated, (user, item), 1)
        self.users, self.items = self.rated.any(axis=1), self.rated.any(axis=0)
        ratings, users, items = self.rated.sum(), self.users.sum(), self.items.sum()
        self.pair = UNOBSERVED * ratings / (users * items)
        penalty = PENALTY * ((users / ratings) ** 0.5 + (items / ratings) ** 0.5)
        self.pulls = (penalty * (self.rated.sum(axis=1) + self.pair * items),
                      penalty * (self.rated.sum(axis=0) + self.pair * users))  # fmt: skip

    def loss(self, p, q):
        score, rated = p @ q.T, torch.from_numpy(self.rated)
        pulls = [torch.from_numpy(pull) for pull in self.pulls]
        everywhere = self.pair * score.square().sum()
        pulled = (pulls[0] * p.square().sum(1)).sum() + (pulls[1] * q.square().sum(1)).sum()
        return (rated * (1 - score).square()).sum() + everywhere + pulled

    def solve(self, others, rated, pulls):
        rows = np.zeros((len(rated), others.shape[1]))
        for row in np.flatnonzero(rated.any(axis=1)):
            matrix = others.T @ (rated[row][:, None] * others) + self.pair * others.T @ others
            rows[row] = np.linalg.solve(matrix + pulls[row] * np.eye(len(matrix)), others.T @ rated[row])
        return rows


def test_three_factors_are_solved_exactly(data, tmp_path):
    """Three steps of conjugate gradients end in three dimensions: two epochs are two exact alternations."""
    c, dense = config(data, tmp_path / "run"), Dense(data)
    train(c, World.alone(), QUIET)
    form = c.form(Dataset.open(data).manifest)
    items = form.initial(c.seed, 1, 0, 40).double().numpy() * dense.items[:, None]
    for _ in range(2):
        users = dense.solve(items, dense.rated, dense.pulls[0])
        items = dense.solve(users, dense.rated.T, dense.pulls[1])
    users[~dense.users] = users[dense.users].mean(axis=0)
    found = tables(tmp_path / "run")
    np.testing.assert_allclose(found[0], users, atol=2e-4)
    np.testing.assert_allclose(found[1], items, atol=2e-4)
    assert not dense.users[[17, 18]].any() and not dense.items[39] and not found[1][39].any()


def test_many_epochs_end_where_the_gradient_of_all_pairs_is_zero(data, tmp_path):
    report = train(config(data, tmp_path / "run", emb_dim=6, epochs=60), World.alone(), QUIET)
    dense = Dense(data)
    p, q = (torch.from_numpy(table).requires_grad_() for table in tables(tmp_path / "run"))
    with torch.no_grad():
        p[~torch.from_numpy(dense.users)] = 0  # the mean row of users without ratings is no part of the objective
    dense.loss(p, q).backward()
    scale = float(torch.from_numpy(dense.pulls[0])[:, None].mul(p.detach()).abs().max())
    assert float(p.grad.abs().max()) < 0.02 * scale and float(q.grad.abs().max()) < 0.02 * scale
    errors = [epoch["train_rmse"] for epoch in report["epochs"]]
    score = (p @ q.T).detach().numpy()
    last = np.sqrt(((1 - score[dense.rated > 0]) ** 2).mean())
    assert errors[-1] == pytest.approx(last, abs=2e-3) and errors[-1] < 0.9 * errors[0]


# Ranks, stops -------------------------------------------------------------------------------------


def test_one_two_and_four_ranks_give_the_same_model(data, tmp_path):
    reports = {}
    for ranks in (1, 2, 4):
        c = config(data, tmp_path / str(ranks), emb_dim=8, epochs=4)
        (reports[ranks],) = run_ranks(ranks, train_all, [c], timeout=600)[0]
    alone = tables(tmp_path / "1")
    for ranks in (2, 4):
        for mine, theirs in zip(alone, tables(tmp_path / str(ranks)), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-4 * np.abs(mine).max())
        for key in ("ndcg@10", "recall@10", "mrr@10"):
            assert reports[ranks]["ranking"][key] == pytest.approx(reports[1]["ranking"][key], abs=1e-4)
    assert reports[1]["ranking"]["ndcg@10"] > 1.3 * reports[1]["ranking"]["popularity"]["ndcg@10"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_stopped_and_resumed_is_the_same_bits(data, tmp_path, ranks):
    c = config(data, tmp_path / "whole", emb_dim=8, epochs=3)
    run_ranks(ranks, train_all, [c], timeout=600)
    run_ranks(ranks, stop_all, [dataclasses.replace(c, run_dir=str(tmp_path / "cut"))], timeout=600)
    for mine, theirs in zip(tables(tmp_path / "whole"), tables(tmp_path / "cut"), strict=True):
        assert (mine == theirs).all()


# What it says -------------------------------------------------------------------------------------


def test_a_ranking_says_what_it_is(data, tmp_path, capsys):
    run = tmp_path / "run"
    report = train(config(data, run, emb_dim=8, epochs=4), World.alone(), QUIET)
    assert report["final"]["val_rmse"] is None and report["floors"] == {} and report["ranking"]["ndcg@10"] > 0.2
    assert [e["val_ndcg"] for e in report["epochs"]][-1] == report["ranking"]["ndcg@10"]
    page, card = (run / "report.html").read_text(), (run / "model/README.md").read_text()
    assert "Ranking by epoch" in page and "Where the error is" not in page and "RMSE" not in page
    assert "scores of preference" in card and "RMSE" not in card and "NDCG@10" in card
    model = mfdist.load(str(run))
    assert model.predict(["u0", "nobody"], ["i1", "i1"])[1] == 0.0
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("user_id,item_id,rating\nu0,i1,5\nu1,i2,3\n")
    assert predict([str(pairs), "--run-dir", str(run), "--out", str(tmp_path / "out.csv")]) == 0
    said = capsys.readouterr()
    assert "scores of preference" in said.out + said.err and "RMSE" not in said.out
    assert evaluate([str(run), "--out", str(tmp_path / "e.json")]) == 0
    assert "not all of these predict ratings" in capsys.readouterr().out
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["runs"][0]["ranking"] == report["ranking"] and found["comparisons"] == []
    for flags in (["--require-better", str(run)], ["--html", str(tmp_path / "e.html")], ["--ranking", "0"]):
        with pytest.raises(UsageError, match="no ratings"):
            evaluate([str(run), *flags])


def test_a_user_is_folded_in_as_training_would_solve_it(data, tmp_path):
    train(config(data, tmp_path / "run", emb_dim=8), World.alone(), QUIET)
    dense, items = Dense(data), tables(tmp_path / "run")[1]
    user = 5
    chosen = np.flatnonzero(dense.rated[user])
    folded = mfdist.load(str(tmp_path / "run")).fold_in([f"i{item}" for item in chosen], [1.0] * len(chosen))
    expected = dense.solve(items, dense.rated, dense.pulls[0])[user]
    np.testing.assert_allclose(folded.predict([f"i{item}" for item in range(40)]), items @ expected, atol=1e-6)


def test_its_plan_counts_and_says_that_it_does_not_time(data):
    flags = PlanConfig(data=data, objective="ranking", ranks=(1, 2))
    plans = plan(flags)
    assert [one.steps_per_epoch for one in plans] == [1, 1] and plans[1].wire_bytes > 0 == plans[0].wire_bytes
    assert "are not measured" in format_plans(plans, flags)


REFUSED = {
    ("--members", "4"): "not how it was rated",
    ("--stop-fraction", "0.1"): "stop rows",
    ("--lr", "0.1"): "not how it was rated",
    ("--sharding", "replicated"): "cut by rows",
    ("--row-l2", "1,1"): "not how it was rated",
    ("--init-from", "run"): "small random rows",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_flags_without_a_meaning_are_refused(flags):
    with pytest.raises(UsageError, match=REFUSED[flags]):
        parse_config(TrainConfig, ["--objective", "ranking", *flags], "")


@pytest.mark.parametrize("flags", [("--optimizer", "als"), ("--ranking-penalty", "1"), ("--unobserved-weight", "1")])
def test_flags_of_a_ranking_alone_need_one(flags):
    with pytest.raises(UsageError, match="needs --objective ranking"):
        parse_config(TrainConfig, list(flags), "")


def test_its_configuration_is_read_back(tmp_path):
    c = dataclasses.replace(TrainConfig.ready("ranking"), batch_size=100)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(c))
    assert parse_config(TrainConfig, ["--config", str(path)], "") == c


@pytest.mark.parametrize(
    "name", ["electronics-core164k.parquet", pytest.param("ml-1m.parquet", marks=pytest.mark.slow)]
)
def test_real_ratings_rank_far_above_popularity(tmp_path, name):
    """A fifth held out at random: ml-1m has NDCG@10 about 0.36 (popularity 0.17), core164k 0.04 (0.02)."""
    if "MFDIST_TEST_DATA" not in os.environ:
        pytest.skip("MFDIST_TEST_DATA does not name the folder of real ratings")
    frame = pytest.importorskip("polars").read_parquet(os.path.join(os.environ["MFDIST_TEST_DATA"], name))
    frame = frame.select(frame.columns[:3])
    mfdist.prepare_frame(frame.rename(dict(zip(frame.columns, ["user_id", "item_id", "rating"], strict=True))),
                         str(tmp_path / "data"))  # fmt: skip
    c = TrainConfig.ready("ranking", data=str(tmp_path / "data"), run_dir=str(tmp_path / "run"))
    found = train(c, World.alone(), QUIET)["ranking"]
    assert found["ndcg@10"] > 1.7 * found["popularity"]["ndcg@10"] and found["coverage@10"] > 0.05


def test_a_lane_without_users_and_more_factors_than_items(tmp_path):
    make_dataset(tmp_path / "data", rows=30, lanes=2, val_rows=10, users=9, items=4)
    c = config(str(tmp_path / "data"), tmp_path / "run", emb_dim=16)
    assert np.isfinite(tables_of(c)[0]).all()


def tables_of(c):
    train(c, World.alone(), QUIET)
    return tables(c.run_dir)
