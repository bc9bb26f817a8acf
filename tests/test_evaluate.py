"""Evaluation: floors equal to Surprise's, figures equal to plain numpy, differences tested, the same on any ranks."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
from datasets import make_dataset, training_rows, write_dataset
from ranks import run_ranks
from test_export import CONFIG, PLAIN, export, in_chunks, random_tables
from written_runs import small_dataset, write_run

from mfdist import storage
from mfdist.cluster.world import World
from mfdist.data.dataset import Dataset
from mfdist.errors import ComparisonError, DataError, UsageError
from mfdist.metrics import in_sample
from mfdist.results.evaluate import EvaluateConfig, check_required, deciles, evaluate_runs, floors, format_table
from mfdist.results.exported_model import ExportedModel, write_model

JOBS = Path(__file__).parent.parent / "jobs"


@pytest.fixture
def dataset(tmp_path):
    return small_dataset(tmp_path)


def job(name):
    spec = importlib.util.spec_from_file_location(f"job_{name}", JOBS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def good_run(path, dataset, noise=0.0):
    """A run whose predictions are near the validation ratings' conditional means: item means."""
    _, item, rating = training_rows(dataset).T
    mean = rating.mean()
    count = np.bincount(item.astype(int), minlength=dataset.manifest.num_items)
    total = np.bincount(item.astype(int), rating - mean, dataset.manifest.num_items)
    tables = {name: np.zeros_like(table) for name, table in random_tables(dataset).items()}
    tables["item_bias"] += total / (10 + count)
    tables["item_bias"] += np.random.default_rng(1).normal(0, noise, len(count)) if noise else 0
    tables["offset"] += mean
    write_model(str(path), in_chunks(tables), CONFIG | {"sigmoid": False}, dataset)
    storage.write_text(storage.join(str(path), "config.toml"), f'data = "{dataset.path}"\n')


def config(*runs, **flags):
    return EvaluateConfig(runs=tuple(str(run) for run in runs), **flags)


# Floors -------------------------------------------------------------------------------------------


def surprise_bias(dataset):
    pandas, surprise = pytest.importorskip("pandas"), pytest.importorskip("surprise")
    train = pandas.DataFrame(training_rows(dataset), columns=["user", "item", "rating"])
    reader = surprise.Reader(rating_scale=dataset.manifest.rating_scale)
    algorithm = surprise.BaselineOnly(verbose=False)
    algorithm.fit(surprise.Dataset.load_from_df(train, reader).build_full_trainset())
    found = algorithm.test([tuple(row) for row in training_rows(dataset, "val")])
    return surprise.accuracy.rmse(found, verbose=False), surprise.accuracy.mae(found, verbose=False)


def dense_dataset(path, lanes):
    """Ratings with strong user and item effects (many predictions leave the scale), each lane with two user ranges."""
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 40, 3000).astype(np.int32), rng.integers(0, 30, 3000).astype(np.int32)
    effect = rng.normal(0, 1.5, 40)[user] + rng.normal(0, 1.5, 30)[item] + rng.normal(0, 0.3, 3000)
    rating = np.clip(np.round(3.5 + effect), 1, 5).astype(np.float32)
    size, is_train = 20 // lanes, np.arange(3000) % 5 < 4
    lane_of = user // size % lanes
    splits = [
        [
            [{"user": user[k], "item": item[k], "rating": rating[k]}]
            for k in (part & (lane_of == n) for n in range(lanes))
        ]
        for part in (is_train, ~is_train)
    ]
    even = [(40 * n // lanes, 40 * (n + 1) // lanes) for n in range(lanes)]  # a manifest is checked as it is read
    dataset = write_dataset(path, *splits, ranges=even, num_items=30)
    ranges = [tuple((first + n * size, first + (n + 1) * size) for first in (0, 20)) for n in range(lanes)]
    given = zip(dataset.manifest.lanes, ranges, strict=True)
    two = tuple(dataclasses.replace(lane, user_ranges=user_ranges) for lane, user_ranges in given)
    return Dataset(dataset.path, dataclasses.replace(dataset.manifest, lanes=two))


@pytest.mark.parametrize("lanes", [1, 2])
def test_bias_floor_is_surprises_baseline_only(tmp_path, lanes):
    dataset = dense_dataset(tmp_path / "dense", lanes)
    bias = floors(dataset, World.alone())["bias"]
    rmse, mae = surprise_bias(dataset)
    assert bias["rmse"] == pytest.approx(rmse, abs=1e-9) and bias["mae"] == pytest.approx(mae, abs=1e-9)


def test_mean_floors_are_the_plain_formula(dataset):
    found = floors(dataset, World.alone())
    _, item, rating = training_rows(dataset).T
    _, val_item, truth = training_rows(dataset, "val").T
    count = np.bincount(item.astype(int), minlength=90)
    means = np.where(count > 0, np.bincount(item.astype(int), rating, 90) / np.maximum(count, 1), rating.mean())
    for name, prediction in (("global_mean", rating.mean()), ("item_mean", means[val_item.astype(int)])):
        assert found[name]["rmse"] == pytest.approx(np.sqrt(np.mean((prediction - truth) ** 2)), rel=1e-12)
        assert found[name]["mae"] == pytest.approx(np.mean(np.abs(prediction - truth)), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "mean", "bias"),
    [("electronics-core164k.parquet", 1.0383, 0.9448), ("ratings_Electronics.head50698.csv", 1.3295, 1.2666)],
)
def test_floors_of_real_data(tmp_path, name, mean, bias):
    """The known figures of the last fifth of a shuffle with seed 42."""
    if "MFDIST_TEST_DATA" not in os.environ:
        pytest.skip("MFDIST_TEST_DATA does not name the folder of real ratings")
    pandas = pytest.importorskip("pandas")
    path = os.path.join(os.environ["MFDIST_TEST_DATA"], name)
    names = ["user", "item", "rating", "timestamp"]
    frame = pandas.read_csv(path, header=None, names=names) if name.endswith("csv") else pandas.read_parquet(path)
    frame.columns = names[: len(frame.columns)]
    frame["user"], frame["item"] = (pandas.factorize(frame[side])[0].astype(np.int32) for side in ("user", "item"))
    frame = frame.sample(frac=1, random_state=42)
    users, cut = int(frame["user"].max()) + 1, round(0.8 * len(frame))
    ranges, splits = [(0, users // 2), (users // 2, users)], []
    for part in (frame[:cut], frame[cut:]):
        lanes = [part[(part["user"] >= first) & (part["user"] < end)] for first, end in ranges]
        splits.append([[{side: lane[side].to_numpy() for side in ("user", "item")}
                        | {"rating": lane["rating"].to_numpy(np.float32)}] for lane in lanes])  # fmt: skip
    dataset = write_dataset(tmp_path / "data", *splits, ranges=ranges, num_items=int(frame["item"].max()) + 1)
    found = floors(dataset, World.alone())
    assert found["global_mean"]["rmse"] == pytest.approx(mean, abs=6e-5)
    assert found["bias"]["rmse"] == pytest.approx(bias, abs=6e-5)


def cold_dataset(path):
    """Users and items that training never saw, an empty lane, a lane without validation rows."""

    def rows(user, item, rating):
        return {"user": np.array(user, np.int32), "item": np.array(item, np.int32),
                "rating": np.array(rating, np.float32)}  # fmt: skip

    train = [[rows([0, 0, 1], [0, 1, 1], [5, 3, 4])], [], [rows([4, 4], [0, 2], [1, 2])]]
    val = [[rows([0, 1, 2], [2, 3, 0], [4, 1, 5])], [], []]
    return write_dataset(path, train, val, ranges=[(0, 3), (3, 4), (4, 5)], num_items=5)


def test_floors_of_unseen_rows(tmp_path):
    dataset = cold_dataset(tmp_path / "cold")
    found = floors(dataset, World.alone())
    mean, item_mean = 3.0, [3.0, 3.5, 2.0]
    errors = np.array([item_mean[2] - 4, mean - 1, item_mean[0] - 5])
    assert found["item_mean"]["rmse"] == pytest.approx(np.sqrt(np.mean(errors**2)))
    assert found["bias"]["rmse"] == pytest.approx(surprise_bias(dataset)[0], abs=1e-9)


def test_floors_of_no_validation_rows_are_null(tmp_path):
    found = floors(make_dataset(tmp_path / "data", rows=50, lanes=2), World.alone())
    assert found["bias"] == {"rmse": None, "mae": None}


def test_floors_do_not_depend_on_memory(dataset):
    assert floors(dataset, World.alone(), memory_bytes=0) == floors(dataset, World.alone())


def on_ranks(world, path, runs):
    dataset = Dataset.open(path)
    return floors(dataset, world), evaluate_runs(config(*runs, ranking=500), world)


def test_the_same_on_one_and_three_ranks(tmp_path, dataset):
    write_run(tmp_path / "a", dataset)
    write_run(tmp_path / "b", dataset, seed=5)
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    alone = run_ranks(1, on_ranks, dataset.path, runs)[0]
    for found in run_ranks(3, on_ranks, dataset.path, runs):
        for name in alone[0]:
            assert found[0][name] == pytest.approx(alone[0][name], rel=1e-12)
        assert flat(found[1]) == pytest.approx(flat(alone[1]), rel=1e-9, abs=1e-12)


def flat(value):
    if isinstance(value, dict):
        return [x for key in value for x in flat(value[key])]
    if isinstance(value, list):
        return [x for entry in value for x in flat(entry)]
    return [float(value)] if isinstance(value, (int, float)) else []


# Runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [CONFIG, PLAIN])
def test_figures_are_plain_numpy_over_the_validation_rows(tmp_path, dataset, form):
    write_run(tmp_path / "run", dataset, form)
    result = evaluate_runs(config(tmp_path / "run"), World.alone())
    found = result["runs"][0]
    user, item, rating = training_rows(dataset, "val").T
    raw = ExportedModel.open(str(tmp_path / "run")).predict(user.astype(int), item.astype(int))
    clipped = np.clip(raw, 1, 5)
    assert result["rows"] == 800
    assert found["val_rmse"] == pytest.approx(np.sqrt(np.mean((raw - rating) ** 2)), abs=1e-12)
    assert found["val_rmse_clipped"] == pytest.approx(np.sqrt(np.mean((clipped - rating) ** 2)), abs=1e-12)
    counts = dataset.counts("users")[user.astype(int)]
    parts = found["user_activity"]
    assert sum(part["rows"] for part in parts) == 800
    for part in parts:
        mask = (counts >= part["ratings_from"]) & (counts <= part["ratings_to"])
        assert part["rows"] == mask.sum()
        assert part["rmse"] == pytest.approx(np.sqrt(np.mean((clipped - rating)[mask] ** 2)), abs=1e-12)
    bins = found["calibration"]
    assert sum(part["rows"] for part in bins) == 800
    mean = sum(part["rows"] * part["predicted"] for part in bins) / 800
    assert mean == pytest.approx(clipped.mean(), abs=1e-12)
    json.dumps(result, allow_nan=False)


def test_slices_follow_the_training_counts(tmp_path):
    dataset = cold_dataset(tmp_path / "cold")
    write_run(tmp_path / "run", dataset)
    slices = evaluate_runs(config(tmp_path / "run"), World.alone())["runs"][0]["slices"]
    assert {name: figures["rows"] for name, figures in slices.items()} == {
        "all": 3, "warm": 1, "cold_user": 1, "cold_item": 1, "cold_both": 0}  # fmt: skip


def test_deciles_cut_rows_evenly_and_never_a_count():
    activity = np.zeros((50, 3))
    activity[:40, 0] = 5
    parts = deciles(activity)
    assert [part["rows"] for part in parts] == [20] * 10 and parts[0]["ratings_to"] == 3
    activity[1, 0] = 10_000  # nearly every row shares one count
    assert [part["rows"] for part in deciles(activity)] == [5, 10_000, 190]
    assert deciles(np.zeros((5, 3))) == []


def test_a_run_is_compared_with_another_preparation_by_ids(tmp_path, dataset):
    """The same split in other lanes numbers rows otherwise; predictions are still of the same pairs."""
    order = np.random.default_rng(0).permutation(dataset.manifest.num_users)
    rows = {split: training_rows(dataset, split) for split in ("train", "val")}
    columns = {split: [[{"user": order[r[:, 0].astype(int)].astype(np.int32), "item": r[:, 1].astype(np.int32),
                         "rating": r[:, 2].astype(np.float32)}]] for split, r in rows.items()}  # fmt: skip
    users = dataset.manifest.num_users
    other = write_dataset(tmp_path / "other", columns["train"], columns["val"], ranges=[(0, users)], num_items=90)
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"row": np.arange(users), "id": [f"u{row}" for row in np.argsort(order)],
                      "ratings": dataset.counts("users")[np.argsort(order)]})  # fmt: skip
    pq.write_table(table, storage.join(other.path, "users.parquet"))
    tables = write_run(tmp_path / "a", dataset)
    for name in ("user_embedding", "user_bias"):
        tables[name] = tables[name][np.argsort(order)]
    write_model(str(tmp_path / "b"), in_chunks(tables), CONFIG, other)
    result = evaluate_runs(config(tmp_path / "a", tmp_path / "b"), World.alone())
    assert result["runs"][0]["val_rmse"] == result["runs"][1]["val_rmse"]
    assert result["runs"][0]["ranking"] == result["runs"][1]["ranking"]


def test_a_sample_of_the_users_is_the_same_for_every_run(tmp_path, dataset):
    for name, line in (("a", ""), ("b", "sample-users = 0.3\n")):
        write_run(tmp_path / name, dataset)
        path = tmp_path / name / "config.toml"
        path.write_text(path.read_text() + line)
    user, _, rating = training_rows(dataset, "val").T
    kept = in_sample(user.astype(int), 0.3)
    result = evaluate_runs(config(tmp_path / "a", tmp_path / "b"), World.alone())
    assert result["rows"] == kept.sum() and 0 < kept.sum() < 800 and "sample of 0.3" in format_table(result)
    assert [run["slices"]["all"]["rows"] for run in result["runs"]] == [kept.sum()] * 2
    mean = training_rows(dataset)[:, 2].mean()
    assert result["floors"]["global_mean"]["rmse"] == pytest.approx(np.sqrt(np.mean((mean - rating[kept]) ** 2)))


def test_other_validation_rows_are_refused(tmp_path, dataset):
    write_run(tmp_path / "a", dataset)
    other = make_dataset(tmp_path / "other", rows=500, lanes=2, val_rows=90, seed=1)
    path = Path(other.path) / "dataset.json"
    path.write_text(path.read_text().replace('"fingerprint": "test"', '"fingerprint": "another"'))
    write_run(tmp_path / "b", Dataset.open(other.path))
    with pytest.raises(UsageError, match="not the same rows"):
        evaluate_runs(config(tmp_path / "a", tmp_path / "b"), World.alone())


def test_where_the_dataset_is_comes_from_the_run(tmp_path, dataset):
    export(tmp_path / "run", dataset)
    with pytest.raises(UsageError, match="--data"):
        evaluate_runs(config(tmp_path / "run"), World.alone())
    storage.write_text(str(tmp_path / "run" / "config.toml"), 'data = "/nowhere"\n')
    with pytest.raises(UsageError, match="not there now"):
        evaluate_runs(config(tmp_path / "run"), World.alone())
    assert evaluate_runs(config(tmp_path / "run", data=dataset.path), World.alone())["rows"] == 800


# Better -------------------------------------------------------------------------------------------


def test_better_is_a_tested_word(tmp_path, dataset):
    good_run(tmp_path / "good", dataset)
    good_run(tmp_path / "twin", dataset, noise=0.003)
    write_run(tmp_path / "bad", dataset)
    world, bad, good = World.alone(), tmp_path / "bad", tmp_path / "good"
    won = config(good, require_better=str(bad))
    result = evaluate_runs(won, world)
    check_required(won, result)
    assert result["comparisons"][0]["high"] < 0 and "better" in format_table(result)
    lost = config(bad, good, require_better=str(good))
    with pytest.raises(ComparisonError, match="not better"):
        check_required(lost, evaluate_runs(lost, world))
    tie = config(good, require_better=str(tmp_path / "twin"))
    with pytest.raises(ComparisonError, match="not better"):
        check_required(tie, evaluate_runs(tie, world))
    near = config(good, require_better=str(tmp_path / "twin"), margin=0.05)
    check_required(near, evaluate_runs(near, world))


def test_the_job_prints_writes_and_gates(tmp_path, dataset, capsys):
    good_run(tmp_path / "good", dataset)
    write_run(tmp_path / "bad", dataset)
    main = job("evaluate").main
    out = tmp_path / "out.json"
    assert main([str(tmp_path / "good"), str(tmp_path / "bad"), "--out", str(out), "--ranking", "100"]) == 0
    text = capsys.readouterr().out
    for part in ("floor: bias", "good (mf_advanced)", "95% interval", "NDCG@10", "warm"):
        assert part in text, part
    assert len(json.loads(out.read_text())["runs"]) == 2
    with pytest.raises(ComparisonError):
        main([str(tmp_path / "bad"), "--require-better", str(tmp_path / "good")])
    with pytest.raises(DataError, match="no exported model"):
        main([str(tmp_path / "nothing"), "--data", dataset.path])


# Ranking ------------------------------------------------------------------------------------------
