"""Fold-in minimises what training minimises; similar items and users are those of all pairs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from datasets import make_dataset, training_rows, write_dataset
from test_export import CONFIG, PLAIN, export

import mfdist
from mfdist.errors import UsageError
from mfdist.results.fold_in import FoldIn

PENALTY = {"l2": [0.03, 0.01], "row_l2": [6.0, 4.5, 5.0, 6.5, 8.0, 35.0]}
FORMS = {
    "biases": CONFIG | {"sigmoid": False, "sigmoid_range": None, "penalty": PENALTY},
    "plain": PLAIN | {"penalty": PENALTY},
    "sigmoid": CONFIG | {"penalty": PENALTY},
    "members": CONFIG | {"sigmoid": False, "sigmoid_range": None, "penalty": PENALTY, "members": 2, "implicit": 0.25},
    "prior": CONFIG | {"penalty": None, "train_rmse": 0.9},
}


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "data", rows=1200, lanes=5, users=150, items=60)


def load(tmp_path, dataset, form):
    export(tmp_path / "run", dataset, FORMS[form])
    return mfdist.load(str(tmp_path / "run"))


def loss_of(model, form, row, items, ratings):
    """Plainly: the sum over ratings of the squared error, and the penalty of the row."""
    exported = model.exported
    q, bias = exported.item_embedding[items].astype(float), exported.item_bias
    factors, b = (row[: q.shape[1]], row[q.shape[1]]) if form != "plain" else (row, 0.0)
    score = q @ factors + b + exported.offset + (0 if bias is None else bias[items])
    error = exported.rating_of_score(score) - ratings
    a, rows = PENALTY["l2"], PENALTY["row_l2"]
    penalty = (len(items) * a[0] + rows[0]) * factors @ factors + (len(items) * a[1] + rows[2]) * b * b
    return error @ error + penalty


@pytest.mark.parametrize("form", ["biases", "plain", "sigmoid"])
def test_nothing_near_the_solution_is_better(tmp_path, dataset, form):
    model, rng = load(tmp_path, dataset, form), np.random.default_rng(0)
    items, ratings = rng.choice(60, 20, replace=False), rng.integers(1, 6, 20).astype(float)
    folded = model.fold_in([f"i{item}" for item in items], ratings)
    row = folded.factors if form == "plain" else np.append(folded.factors, folded.bias)
    least = loss_of(model, form, row, items, ratings)
    for _ in range(200):
        assert loss_of(model, form, row + rng.normal(0, 1e-2, len(row)), items, ratings) > least


def test_members_are_solved_one_by_one_with_what_was_rated_beside(tmp_path, dataset):
    """The derivative of each member's own loss, written out by ``Form``, is zero at what was found."""
    import torch

    from mfdist.model.models import Form
    from mfdist.model.objective import ITEM, USER

    model, rng = load(tmp_path, dataset, "members"), np.random.default_rng(0)
    items, ratings = rng.choice(60, 20, replace=False), rng.integers(1, 6, 20)
    folded = model.fold_in([f"i{item}" for item in items], ratings)
    form = Form(model="mf_advanced", dim=6, bias=True, init=True, sigmoid_range=None, members=2, implicit=0.25)
    item_rows = form.imported(ITEM, torch.from_numpy(model.exported.item_embedding[items]).double(), None)
    with_bag = form.imported(USER, torch.from_numpy(folded.factors)[None], None)
    weight = 0.25 / np.sqrt(20)
    bag = weight * (item_rows * form.is_factor()).sum(dim=0)
    own = (with_bag[0] - bag).requires_grad_()
    stored = torch.cat([own, bag, torch.zeros(6)]).expand(20, -1)
    share = torch.full((20,), 1 / 20, dtype=torch.float64)
    scores = form.member_scores(stored, item_rows, torch.tensor([model.exported.offset]), share)
    errors = torch.from_numpy(ratings.astype(float))[:, None] - scores
    penalties = torch.full((6,), 20 * 0.03 + 6.0, dtype=torch.float64)
    penalties[1::3], penalties[0::3] = 20 * 0.01 + 5.0, 20 * 0.01 + 8.0
    loss = errors.square().sum() + (penalties * own.square()).sum()
    (slope,) = torch.autograd.grad(loss, own)
    assert float(slope.abs().max()) < 1e-4
    biases = own.detach()[1::3]
    assert folded.bias == pytest.approx(float(biases.mean()))


def test_a_prior_of_the_trained_users_where_training_had_no_penalty(tmp_path, dataset):
    model = load(tmp_path, dataset, "prior")
    nothing = model.fold_in([], [])
    np.testing.assert_allclose(nothing.factors, model.exported.user_embedding.mean(axis=0), atol=1e-6)
    high, low = (model.fold_in(["i1", "i2", "i3"], [rating] * 3) for rating in (5, 1))
    assert (high.predict(["i1", "i2", "i3"]) > low.predict(["i1", "i2", "i3"])).all()


def test_members_without_a_penalty(tmp_path, dataset):
    form = FORMS["members"] | {"penalty": None, "train_rmse": 0.9, "units": {"mean": 3.0, "spread": -1.2}}
    export(tmp_path / "run", dataset, form)
    model = mfdist.load(str(tmp_path / "run"))
    high, low = (model.fold_in(["i1", "i2", "i3"], [rating] * 3) for rating in (5, 1))
    assert (high.predict(["i1", "i2", "i3"]) > low.predict(["i1", "i2", "i3"])).all()


def test_predictions_and_recommendations_of_a_folded_user(tmp_path, dataset):
    model = load(tmp_path, dataset, "biases")
    folded = model.fold_in(["i1", "nothing", "i4"], [5, 1, 2])
    every = folded.predict([f"i{item}" for item in range(60)])
    table = folded.recommend(5)
    left = np.where(np.isin(np.arange(60), [1, 4]), -np.inf, every)
    assert table["item_id"].to_pylist() == [f"i{item}" for item in np.argsort(-left)[:5]]
    assert table["rank"].to_pylist() == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(table["score"].to_numpy(), np.sort(left)[::-1][:5], rtol=1e-5)
    assert len(folded.recommend(100, exclude_rated=False)) == 60
    with pytest.raises(UsageError, match="as many items"):
        model.fold_in(["i1"], [])
    with pytest.raises(UsageError, match="finite"):
        model.fold_in(["i1"], [np.nan])


def test_a_known_user_keeps_the_training_ratings(tmp_path, dataset):
    model, rows = load(tmp_path, dataset, "biases"), training_rows(dataset)
    mine = rows[rows[:, 0] == 7]
    again = int(mine[0, 1])
    kept = mine[mine[:, 1] != again]
    items, ratings = np.append(kept[:, 1].astype(int), again), np.append(kept[:, 2], 5.0)
    wanted = FoldIn(model.exported).solve(items, ratings)
    folded = model.fold_in([f"i{again}"], [5.0], user_id="u7", data=dataset.path)
    np.testing.assert_allclose(folded.factors, wanted.factors, atol=1e-10)
    with pytest.raises(UsageError, match="'nobody' was not known"):
        model.fold_in(["i3"], [5.0], user_id="nobody", data=dataset.path)


@pytest.mark.parametrize("measure", ["cosine", "inner"])
@pytest.mark.parametrize("side", ["items", "users"])
def test_similar_are_those_of_all_pairs(tmp_path, dataset, side, measure):
    model = load(tmp_path, dataset, "biases")
    table = (model.exported.item_embedding if side == "items" else model.exported.user_embedding).astype(float)
    unit = table / np.linalg.norm(table, axis=1)[:, None] if measure == "cosine" else table
    score = unit @ unit.T
    np.fill_diagonal(score, -np.inf)
    letter = side[0]
    similar = model.similar_items if side == "items" else model.similar_users
    found = similar([f"{letter}9", f"{letter}2"], 4, measure=measure)
    assert found.column_names == [f"{side[:-1]}_id", "similar_id", "rank", "score"]
    wanted = [f"{letter}{other}" for row in (9, 2) for other in np.argsort(-score[row])[:4]]
    assert found["similar_id"].to_pylist() == wanted
    with pytest.raises(UsageError, match="'stranger'"):
        similar(["stranger"])
    with pytest.raises(UsageError, match="measure"):
        similar([f"{letter}1"], measure="angle")


def test_a_trained_run_says_what_fold_in_needs(tmp_path):
    """A held-out user, folded in, predicts like one that was trained with: their training rows give about their row."""
    from mfdist.cluster.world import World
    from mfdist.log import Console
    from mfdist.training.config import TrainConfig
    from mfdist.training.train import train

    data = make_dataset(tmp_path / "data", rows=3000, lanes=2, users=60, items=40)
    train(TrainConfig(data=data.path, run_dir=str(tmp_path / "run"), model="mf_advanced", no_sigmoid=True,
                      offset="mean", emb_dim=8, members=1, init_std=0.3, optimizer="sgd", reduction="sum", lr=0.02,
                      lr_schedule="cosine", weight_decay=0.0, implicit=0.25, l2=(0.03, 0.0),
                      row_l2=(6.0, 4.5, 5.0, 6.5, 8.0, 35.0), batch_size=256, epochs=60, cold="known-side",
                      device="cpu"), World.alone(), Console(False))  # fmt: skip
    model = mfdist.load(str(tmp_path / "run"))
    about = json.loads((tmp_path / "run/model/config.json").read_text())
    assert about["penalty"]["row_l2"][0] == 6.0 and about["implicit"] == 0.25
    rows = training_rows(data)
    errors = []
    for user in range(0, 60, 7):
        mine = rows[rows[:, 0] == user]
        items = [f"i{int(item)}" for item in mine[:, 1]]
        folded = model.fold_in(items, mine[:, 2])
        errors.append(folded.predict(items) - model.predict([f"u{user}"] * len(items), items))
    assert np.sqrt(np.mean(np.concatenate(errors) ** 2)) < 0.05


def planted(users=300, items=120, each=40, seed=0):
    """(user, item, rating) of a planted model with noise, ``each`` ratings a user, in random order within a user."""
    rng = np.random.default_rng(seed)
    p, q, b, c = (rng.normal(0, 1, shape) for shape in ((users, 3), (items, 3), users, items))
    user = np.repeat(np.arange(users), each)
    item = np.concatenate([rng.choice(items, each, replace=False) for _ in range(users)])
    score = 3.5 + 0.4 * (p[user] * q[item]).sum(axis=1) + 0.3 * b[user] + 0.4 * c[item]
    return user, item, np.clip(np.rint(score + rng.normal(0, 0.5, len(user))), 1, 5).astype(np.float32)


def test_held_out_users_folded_in_are_as_good_as_trained_with(tmp_path):
    """RMSE on rows that neither saw, within 2% of training with those users."""
    from mfdist.cluster.world import World
    from mfdist.log import Console
    from mfdist.training.config import TrainConfig
    from mfdist.training.train import train

    user, item, rating = planted()
    unseen, held = np.tile(np.arange(40) >= 30, 300), user < 40
    models = {}
    for name, rows in (("all", ~unseen), ("others", ~unseen & ~held)):
        ranges = [(0, 150), (150, 300)]
        lanes = [[{"user": user[mine], "item": item[mine], "rating": rating[mine]}]
                 for mine in (rows & (user >= first) & (user < end) for first, end in ranges)]  # fmt: skip
        data = write_dataset(tmp_path / name, lanes, ranges=ranges, num_items=120)
        train(TrainConfig(data=data.path, run_dir=str(tmp_path / f"{name}.run"), emb_dim=16, members=1,
                          batch_size=64, device="cpu"), World.alone(), Console(False))  # fmt: skip
        models[name] = mfdist.load(str(tmp_path / f"{name}.run"))
    errors = {"all": [], "others": [], "unknown": []}
    for one in range(40):
        known, asked = np.flatnonzero((user == one) & ~unseen), np.flatnonzero((user == one) & unseen)
        folded = models["others"].fold_in([f"i{k}" for k in item[known]], rating[known])
        names = [f"i{k}" for k in item[asked]]
        errors["others"].append(folded.predict(names) - rating[asked])
        errors["all"].append(models["all"].predict([f"u{one}"] * len(asked), names) - rating[asked])
        errors["unknown"].append(models["others"].fold_in([], []).predict(names) - rating[asked])
    rmse = {name: float(np.sqrt(np.mean(np.concatenate(found) ** 2))) for name, found in errors.items()}
    assert rmse["others"] < 1.02 * rmse["all"] and rmse["others"] < 0.85 * rmse["unknown"], rmse
