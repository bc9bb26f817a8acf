"""The baseline against Surprise used by hand, its memory limit, its sample, and the run that it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import make_dataset, write_dataset
from surprise import SVD, Dataset, Reader

from mfdist.baseline import svd
from mfdist.baseline.run import BaselineConfig, run_baseline
from mfdist.data.dataset import Dataset as Prepared
from mfdist.errors import UsageError
from mfdist.log import Console
from mfdist.results import report
from mfdist.results.exported_model import ExportedModel

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))
import baseline_svd as job  # jobs are programs, not a package


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Users and items without training rows, users with many ratings, four lanes."""
    path = tmp_path_factory.mktemp("data")
    return make_dataset(path, rows=3000, lanes=4, val_rows=800, users=1200, items=900, seed=3)


def rows(data: Prepared, split: str, sample: float = 1.0) -> list[np.ndarray]:
    chunks = list(svd.rows_of(data, split, sample))
    return [np.concatenate([chunk[k] for chunk in chunks]) for k in range(3)]


def by_hand(data: Prepared, factors: int, epochs: int, seed: int) -> SVD:
    """Surprise as its documentation uses it, on the rows in lane and file order."""
    low, high = data.manifest.rating_scale
    triples = zip(*(column.tolist() for column in rows(data, "train")), strict=True)
    source = Dataset(Reader(rating_scale=(low, high)))
    trainset = source.construct_trainset([(user, item, rating, None) for user, item, rating in triples])
    return SVD(n_factors=factors, n_epochs=epochs, random_state=seed).fit(trainset)


def test_equals_surprise_by_hand_exactly(data: Prepared) -> None:
    theirs = by_hand(data, 7, 4, 11)
    ours = svd.fit(data, factors=7, epochs=4, seed=11)
    for name in ("bu", "bi", "pu", "qi"):
        assert np.array_equal(getattr(ours.svd, name), getattr(theirs, name)), name
    user, item, rating = rows(data, "val")
    expected = [p.est for p in theirs.test(list(zip(user.tolist(), item.tolist(), rating.tolist(), strict=True)))]
    unknown = (ours.trainset.user_inner[user] < 0) | (ours.trainset.item_inner[item] < 0)
    assert 0 < unknown.sum() < len(user)
    clipped = np.clip(ours.predict(user, item), *data.manifest.rating_scale)
    assert np.abs(clipped - expected).max() < 1e-12
    assert ours.check(user, item, rating) < 1e-12


def test_hyper_parameters_change_the_result(data: Prepared) -> None:
    user, item, _ = rows(data, "val")
    base = {"factors": 5, "epochs": 3, "seed": 1}
    expected = svd.fit(data, **base).predict(user, item)  # type: ignore[arg-type]
    assert np.array_equal(expected, svd.fit(data, **base).predict(user, item))  # type: ignore[arg-type]
    for name in base:
        changed = svd.fit(data, **{**base, name: base[name] + 1}).predict(user, item)  # type: ignore[arg-type]
        assert not np.array_equal(expected, changed), name


def test_wrong_predictions_are_found(data: Prepared) -> None:
    fitted = svd.fit(data, factors=5, epochs=2, seed=1)
    user, item, rating = (column[:50] for column in rows(data, "val"))
    honest = fitted.predict(user, item)
    object.__setattr__(fitted, "predict", lambda *_: honest + 1e-6)
    with pytest.raises(Exception, match=r"differ from svd\.test"):
        fitted.check(user, item, rating)


def test_run_writes_what_train_writes(data: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "svd")
    flags = ["--data", data.path, "--run-dir", run, "--factors", "6", "--epochs", "3", "--seed", "4"]
    assert job.main(flags) == 0
    assert "validation RMSE" in capsys.readouterr().out
    table = json.loads((tmp_path / "svd" / "report.json").read_text())
    assert set(table) == set(report.KEYS)
    assert [epoch["epoch"] for epoch in table["epochs"]] == [1, 2, 3]
    assert 0 < table["ranking"]["ndcg@10"] < 1 and table["ranking"]["users"] == table["ranking"]["of_users"] > 20
    assert table["final"]["how_chosen"] == "last epoch" and table["final"]["epoch"] == 3
    assert table["floors"]["bias"]["rmse"] > 0 and table["slices"]["cold_item"]["rows"] > 0
    for name in ("config.toml", "metrics.jsonl", "report.html", "loss.png", "model/config.json", "model/README.md"):
        assert (tmp_path / "svd" / name).stat().st_size > 0, name
    theirs, (user, item, rating) = by_hand(data, 6, 3, 4), rows(data, "val")
    errors = [
        p.est - p.r_ui for p in theirs.test(list(zip(user.tolist(), item.tolist(), rating.tolist(), strict=True)))
    ]
    assert table["final"]["val_rmse_clipped"] == pytest.approx(np.sqrt(np.mean(np.square(errors))), abs=1e-12)
    exported = ExportedModel.open(run).predict(user, item)
    assert np.sqrt(np.mean((exported - rating) ** 2)) == pytest.approx(table["final"]["val_rmse"], abs=1e-5)
    assert job.main([*flags[:-1], "5"]) == 0  # an earlier baseline is replaced
    assert json.loads((tmp_path / "svd" / "report.json").read_text())["seed"] == 5


def test_run_of_training_is_left_alone(data: Prepared, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"job": "train"}')
    with pytest.raises(UsageError, match="another job"):
        run_baseline(BaselineConfig(data=data.path, run_dir=str(tmp_path)), Console(speaks=False))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UsageError, match="run of train"):
        run_baseline(BaselineConfig(data=data.path, run_dir=str(tmp_path)), Console(speaks=False))


def test_refuses_what_does_not_fit_and_names_a_sample_that_does(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", rows=4000, lanes=2, users=2000, items=20)
    limit = svd.estimate_bytes(data, 100_000, 0.3)
    config = BaselineConfig(data=data.path, run_dir=str(tmp_path / "run"), factors=100_000, max_memory=limit)
    with pytest.raises(UsageError, match=r"--sample-users 0\.2 would fit") as refusal:
        run_baseline(config, Console(speaks=False))
    assert refusal.value.exit_code == 2 and not (tmp_path / "run").exists()
    svd.check_memory(data, 100_000, 0.2, limit)
    with pytest.raises(UsageError, match="fewer --factors"):
        svd.check_memory(data, 100_000, 1.0, 1000)


def test_sample_is_of_users_and_the_same_for_every_seed(data: Prepared, tmp_path: Path) -> None:
    config = BaselineConfig(data=data.path, run_dir=str(tmp_path / "a"), factors=4, epochs=1, sample_users=0.3, seed=1)
    table = run_baseline(config, Console(speaks=False))
    train_user, val_user = rows(data, "train", 0.3)[0], rows(data, "val", 0.3)[0]
    assert table["slices"]["all"]["rows"] == len(val_user)
    assert table["floors"] == {}
    everyone = rows(data, "train")[0]
    chosen = np.unique(train_user)
    assert 0.2 < len(chosen) / len(np.unique(everyone)) < 0.4
    assert np.isin(everyone, chosen).sum() == len(train_user)  # all rows of a chosen user
    assert set(np.unique(val_user)) <= set(np.flatnonzero(svd.in_sample(np.arange(1200), 0.3)))
    smaller = svd.in_sample(np.arange(1200), 0.1)
    assert not (smaller & ~svd.in_sample(np.arange(1200), 0.3)).any()


def test_no_training_rows(tmp_path: Path) -> None:
    empty = {"user": np.zeros(0, np.int32), "item": np.zeros(0, np.int32), "rating": np.zeros(0, np.float32)}
    data = write_dataset(tmp_path / "data", [[empty]], ranges=[(0, 2)], num_items=2)
    with pytest.raises(UsageError, match="no training ratings"):
        svd.fit(data, factors=2, epochs=1, seed=0)


def test_half_stars_and_repeated_pairs(tmp_path: Path) -> None:
    columns = {
        "user": np.array([1, 0, 1, 1, 0], np.int32), "item": np.array([2, 2, 0, 2, 2], np.int32),
        "rating": np.array([0.5, 4.5, 3.0, 1.5, 5.0], np.float32),
    }  # fmt: skip
    data = write_dataset(tmp_path / "data", [[columns]], ranges=[(0, 3)], num_items=3)
    theirs, ours = by_hand(data, 3, 5, 2), svd.fit(data, factors=3, epochs=5, seed=2)
    assert np.array_equal(theirs.pu, ours.svd.pu) and np.array_equal(theirs.qi, ours.svd.qi)
    assert ours.trainset.global_mean == theirs.trainset.global_mean
