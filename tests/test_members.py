"""Members, penalties of whole rows and the sum as loss: kernels against autograd, against a loop of single ratings."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from datasets import make_dataset, training_rows
from ranks import run_ranks
from test_train import config, curve, exported, train_all

from mfdist.data.dataset import Dataset
from mfdist.errors import UsageError
from mfdist.training.config import TrainConfig, parse_row_l2

LINEAR = {"no_sigmoid": True, "offset": "mean", "optimizer": "sgd", "weight_decay": 0.0, "reduction": "sum"}
RECIPE = {**LINEAR, "members": 2, "emb_dim": 8, "init_std": 0.3, "lr": 0.02, "lr_schedule": "cosine", "batch_size": 64,
          "l2": (0.02, 0.0), "row_l2": (6.0, 4.5, 5.0, 6.5, 8.0, 35.0), "cold": "known-side"}  # fmt: skip
BAGS = {**RECIPE, "implicit": 0.25}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("data") / "small")
    make_dataset(path, rows=1500, lanes=7, val_rows=200, users=150, items=60, row_group=64)
    return path


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_kernels_equal_autograd(data, tmp_path, ranks):
    """A penalty, a member's bias or a share that one of the two paths misses would part them."""
    plain = {"l2": (0.1, 0.2), "row_l2": (0.5, 0.7, 0.3, 0.2, 0.0, 0.0)}
    settings = {
        "recipe": RECIPE,
        "adamw": {**RECIPE, "optimizer": "adamw", "reduction": "mean"},
        "plain": plain,
        "bags": BAGS,
        "one bag": {**LINEAR, "implicit": 0.5, "init_std": 0.3, "lr": 0.05, "batch_size": 64},
    }
    configs = [
        config(data, tmp_path / f"{name}-{sharding}", **{**values, "sharding": sharding, "epochs": 3})
        for name, values in settings.items()
        for sharding in ("row", "replicated")
    ]
    reports = run_ranks(ranks, train_all, configs, timeout=400.0)[0]
    for fused, autograd in zip(reports[::2], reports[1::2], strict=True):
        np.testing.assert_allclose(curve(fused), curve(autograd), rtol=2e-5, err_msg=str(fused["config"]))
        assert fused["epochs"][-1]["train_rmse"] < fused["epochs"][0]["train_rmse"]


def test_equals_a_loop_of_single_ratings(data, tmp_path):
    """Batches of one rating: the update that the recipe's table of equations gives, written out."""
    from mfdist.data.loader import Loader

    c = config(data, tmp_path / "run", **{**RECIPE, "batch_size": 1, "epochs": 1, "lr_schedule": "constant"})
    (report,) = train_all(_world(), [c])
    dataset, form = Dataset.open(data), c.form(Dataset.open(data).manifest)
    n_u, n_i = dataset.counts("users"), dataset.counts("items")
    p = form.initial(c.seed, 0, 0, len(n_u)).double().numpy().reshape(len(n_u), 2, 4)
    q = form.initial(c.seed, 1, 0, len(n_i)).double().numpy().reshape(len(n_i), 2, 4)
    a = np.array([0.0, 0.0, 0.02, 0.02])
    pull_u, pull_i = np.array([8.0, 5.0, 6.0, 6.0]), np.array([6.5, 35.0, 4.5, 4.5])
    mean, squares = dataset.manifest.global_mean, 0.0
    with Loader(dataset, batch_size=1, seed=c.seed, rank=0, world_size=1) as loader:
        for batch in loader.epoch(0):
            u, i, y = int(batch.user), int(batch.item), float(batch.rating)
            e = y - (mean + (p[u] * q[i]).sum(1) + p[u][:, 1] + q[i][:, 0])[:, None]
            to_p = e * (q[i] + [0, 1, 0, 0]) - (a + pull_u / n_u[u]) * p[u]
            to_q = e * (p[u] + [1, 0, 0, 0]) - (a + pull_i / n_i[i]) * q[i]
            p[u] += c.lr * to_p
            q[i] += c.lr * to_q
            squares += e.mean() ** 2
    assert report["epochs"][0]["train_rmse"] == pytest.approx((squares / loader.num_rows) ** 0.5, rel=1e-4)
    tables = exported(c.run_dir)
    seen = n_u > 0
    np.testing.assert_allclose(tables["user_bias"][seen], p[seen][:, :, 1].mean(1), atol=1e-4)
    np.testing.assert_allclose(tables["user_embedding"][seen], p[seen].reshape(-1, 8) / 2**0.5, atol=1e-4)


def test_bags_equal_a_loop_of_single_ratings(data, tmp_path):
    """A user's factors, and the bag of what the user rated, written out; an item's own share is no part of a score."""
    from mfdist.data.loader import Loader

    values = {**BAGS, "l2": (0.0, 0.0), "row_l2": (0.0,) * 6}
    c = config(data, tmp_path / "run", **{**values, "batch_size": 1, "epochs": 2, "lr_schedule": "constant"})
    (report,) = train_all(_world(), [c])
    dataset, form = Dataset.open(data), c.form(Dataset.open(data).manifest)
    n = dataset.counts("users")
    p, q = (form.initial(c.seed, side, 0, rows).double().numpy() for side, rows in ((0, len(n)), (1, 60)))
    assert p.shape[1] == 24 and not p[:, 8:].any()
    p, q = p[:, :8].reshape(-1, 2, 4), q.reshape(-1, 2, 4)
    bag, pull = np.zeros((2, *p.shape))
    factor, one = np.array([0, 0, 1, 1]), np.eye(4)
    mean, curve = dataset.manifest.global_mean, []
    with Loader(dataset, batch_size=1, seed=c.seed, rank=0, world_size=1) as loader:
        for epoch in range(2):
            squares = 0.0
            for batch in loader.epoch(epoch):
                u, i, y = int(batch.user), int(batch.item), float(batch.rating)
                w, whole = 0.25 / n[u] ** 0.5, p[u] + bag[u]
                score = (whole * q[i]).sum(1) - w * (factor * q[i] ** 2).sum(1)
                e = y - (mean + score + p[u][:, 1] + q[i][:, 0])[:, None]
                to_p = e * (q[i] + one[1])
                to_q = e * (whole + one[0]) + pull[u] - w * e * factor * q[i]
                bag[u] += w * factor * q[i] - bag[u] / n[u]
                pull[u] += w * e * factor * q[i] - pull[u] / n[u]
                p[u], q[i] = p[u] + c.lr * to_p, q[i] + c.lr * to_q
                squares += e.mean() ** 2
            curve.append((squares / loader.num_rows) ** 0.5)
    assert [e["train_rmse"] for e in report["epochs"]] == pytest.approx(curve, rel=1e-4)
    seen = n > 0
    found = exported(c.run_dir)["user_embedding"][seen]
    np.testing.assert_allclose(found, (p + bag)[seen].reshape(-1, 8) / 2**0.5, atol=1e-4)
    assert np.abs(bag[seen]).max() > 0.01


def test_bags_survive_a_stop(data, tmp_path):
    """Stopped in the middle of the second epoch and continued: the same bits."""
    whole = config(data, tmp_path / "whole", **{**BAGS, "epochs": 3})
    halted = config(data, tmp_path / "halted", **{**BAGS, "epochs": 3, "checkpoint_every": "30"})
    (expected,) = train_all(_world(), [whole])
    train_all(_world(), [halted])
    for epoch_end in (48, 60, 72, 90):
        path = tmp_path / "halted" / "checkpoints" / f"step-{epoch_end:08d}"
        if epoch_end > 48 and path.exists():
            shutil.rmtree(path)
    (tmp_path / "halted" / "report.json").unlink()
    (again,) = train_all(_world(), [halted])
    np.testing.assert_array_equal(curve(again), curve(expected))
    for name, tensor in exported(whole.run_dir).items():
        np.testing.assert_array_equal(exported(halted.run_dir)[name], tensor)


def test_every_weight_of_bags_is_another_result(data, tmp_path):
    configs = [config(data, tmp_path / f"{k}", **{**BAGS, "implicit": k / 4}) for k in range(3)]
    found = [report["final"]["val_rmse"] for report in train_all(_world(), configs)]
    assert len(set(found)) == 3


@pytest.mark.parametrize("values", [{"optimizer": "adamw"}, {"weight_decay": 0.1}])
def test_bags_need_plain_sgd(values):
    with pytest.raises(UsageError, match="--implicit"):
        TrainConfig(**{**BAGS, **values})


@pytest.mark.parametrize("values", [RECIPE, BAGS])
def test_the_export_alone_gives_the_validation_error(data, tmp_path, values):
    c = config(data, tmp_path / "run", **values)
    (report,) = train_all(_world(), [c])
    tables, rows = exported(c.run_dir), training_rows(Dataset.open(data), "val")
    user, item = rows[:, 0].astype(int), rows[:, 1].astype(int)
    found = (tables["user_embedding"][user] * tables["item_embedding"][item]).sum(1)
    found += tables["user_bias"][user] + tables["item_bias"][item] + tables["offset"][0]
    assert np.sqrt(np.mean((found - rows[:, 2]) ** 2)) == pytest.approx(report["final"]["val_rmse"], rel=1e-5)


@pytest.mark.parametrize("values", [RECIPE, {**BAGS, "implicit": 1.0, "epochs": 6}], ids=["members", "bags"])
def test_init_from_goes_on_with_all_members(data, tmp_path, values):
    """Bags are made anew from the ratings: what they add must be taken from the users' own factors, once."""
    first = config(data, tmp_path / "first", **values)
    (before,) = train_all(_world(), [first])
    still = {**values, "lr": 1e-12, "init_from": first.run_dir, "epochs": 1}
    (after,) = train_all(_world(), [config(data, tmp_path / "second", **still)])
    apart = 1e-3 if "implicit" in values else 1e-5  # a bag is renewed by every rating, whatever the rate
    assert after["final"]["val_rmse"] == pytest.approx(before["final"]["val_rmse"], rel=apart)
    with pytest.raises(UsageError, match="--members"):
        train_all(_world(), [config(data, tmp_path / "third", **{**still, "members": 1})])


def test_a_short_last_batch_moves_no_further(data, tmp_path):
    """With the mean as loss, a last batch of one rating would move its rows by the rate of a whole batch."""
    c = config(
        data, tmp_path / "run", **{**RECIPE, "batch_size": 1499, "l2": (0.0, 0.0), "row_l2": (0.0,) * 6, "lr": 0.05}
    )
    (report,) = train_all(_world(), [c])
    assert np.isfinite(curve(report)).all()


@pytest.mark.parametrize(
    "values",
    [{"members": 2, "no_sigmoid": False}, {"offset": "mean", "no_sigmoid": False},
     {"members": 3, **LINEAR}, {"members": 4, **LINEAR, "emb_dim": 8},
     {"model": "mf", "members": 2}],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(values):
    with pytest.raises(UsageError, match="--members"):
        TrainConfig(**{"emb_dim": 8, **values})


def test_row_l2_is_two_four_or_six_numbers():
    assert parse_row_l2("6,4.5") == (6.0, 4.5, 0.0, 0.0, 0.0, 0.0)
    for text in ("1", "1,2,3", "1,-2"):
        with pytest.raises(ValueError, match="six"):
            parse_row_l2(text)


def _world():
    from mfdist.cluster.world import World

    return World.alone()
