"""Evaluation: floors equal to Surprise's, figures equal to plain numpy, differences tested, the same on any ranks."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from datasets import make_dataset, training_rows, write_dataset
from ranks import run_ranks
from test_export import CONFIG, PLAIN, export, in_chunks, random_tables

from mfdist import storage
from mfdist.cluster.world import World
from mfdist.data.dataset import Dataset
from mfdist.errors import ComparisonError, DataError, UsageError
from mfdist.metrics import in_sample
from mfdist.results import ranking_metrics
from mfdist.results.evaluate import EvaluateConfig, check_required, deciles, evaluate_runs, floors, format_table
from mfdist.results.export import ExportedModel, write_model
from mfdist.results.item_lists import ItemLists
from mfdist.results.ranking import USERS, rank_metrics, ranked_users, top_of_model
from mfdist.results.ranking_metrics import gains
from mfdist.results.top_items import TopItems, seen_items

JOBS = Path(__file__).parent.parent / "jobs"


def job(name):
    spec = importlib.util.spec_from_file_location(f"job_{name}", JOBS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "data", rows=3000, lanes=5, val_rows=800, items=90)


def write_run(path, dataset, config=None, **kwargs):
    tables = export(path, dataset, config, **kwargs)
    storage.write_text(storage.join(str(path), "config.toml"), f'data = "{dataset.path}"\n')
    return tables


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


def brute_force(model, users, k, hidden):
    items = np.arange(model.num_items)
    found = []
    for user in users:
        score = model.predict(np.full(len(items), user), items)
        score[list(hidden[user])] = -np.inf
        found.append(np.lexsort((items, -score))[:k])
    return np.array(found)


@pytest.mark.parametrize("block", [7, 1020])
def test_top_items_are_those_of_all_pairs(tmp_path, dataset, monkeypatch, block):
    monkeypatch.setattr("mfdist.results.item_index.BATCH_USERS", block)
    write_run(tmp_path / "run", dataset)
    model = ExportedModel.open(str(tmp_path / "run"))
    first, end = dataset.manifest.lanes[1].user_ranges[0]
    users = np.arange(first, end)
    seen = seen_items(dataset, 1, users)
    rows = training_rows(dataset).astype(int)
    hidden = {user: set(rows[rows[:, 0] == user][:, 1]) for user in users}
    items, rating = TopItems(model).of(users, 10, seen)
    assert items.tolist() == brute_force(model, users, 10, hidden).tolist()
    flat_user = np.repeat(users, 10)
    np.testing.assert_allclose(rating.ravel(), model.predict(flat_user, items.ravel()), atol=1e-6)


def test_more_than_all_items_fill_up(tmp_path, dataset):
    write_run(tmp_path / "run", dataset)
    items, rating = TopItems(ExportedModel.open(str(tmp_path / "run"))).of(np.array([0]), 100)
    assert sorted(items[0][:90]) == list(range(90)) and (items[0][90:] == -1).all() and np.isnan(rating[0][90:]).all()


def test_gains_by_hand():
    relevant = ItemLists(np.array([0, 2, 3, 5]), np.array([7, 9, 4, 4, 8]))
    found = gains(np.array([[9, 1, 7], [1, 2, 3], [1, 4, -1]]), relevant)
    assert found[0] == pytest.approx([(1 + 1 / np.log2(4)) / (1 + 1 / np.log2(3)), 1.0, 1.0])
    assert found[1].tolist() == [0, 0, 0]
    assert found[2] == pytest.approx([1 / np.log2(3) / (1 + 1 / np.log2(3)), 0.5, 0.5])


def test_a_perfect_ranking_scores_one(tmp_path):
    """Each user's only relevant item is the one whose factor matches."""
    users = 40
    val = {"user": np.arange(users, dtype=np.int32), "item": np.arange(users, dtype=np.int32),
           "rating": np.full(users, 4, np.float32)}  # fmt: skip
    train = {"user": np.arange(users, dtype=np.int32), "item": np.roll(np.arange(users, dtype=np.int32), 1),
             "rating": np.array([1, 5] * 20, np.float32)}  # fmt: skip
    dataset = write_dataset(tmp_path / "data", [[train]], [[val]], ranges=[(0, users)], num_items=users)
    eye = np.eye(users, dtype=np.float32)
    write_model(str(tmp_path / "run"), in_chunks({"user_embedding": eye, "item_embedding": eye}),
                PLAIN | {"dim": users}, dataset)  # fmt: skip
    found = ranking_of(tmp_path / "run", dataset)
    assert found["users"] == users and found["threshold"] == 4.0
    assert found["ndcg@10"] == 1.0 and found["recall@10"] == 1.0
    assert found["mrr@10"] == 1.0 and found["coverage@10"] == 1.0
    assert found["popularity"]["recall@10"] < 0.5 and found["popularity"]["coverage@10"] < 0.4


def ranking_of(run, dataset, users=USERS, **choice):
    top = partial(top_of_model, ExportedModel.open(str(run)))
    return rank_metrics(top, ranked_users(dataset, World.alone(), users, **choice), dataset, World.alone())


def test_a_ranking_by_hand(tmp_path):
    """Two lanes, three users. User 0 has seen item 0 and likes 2 and 4 (3 is rated too low), user 1 likes nothing, user
    2 likes 1. The model ranks items by 4, 3, 2, 1, 0 for everybody, popularity by 0, 1, 2, 3, 4."""

    def rows(user, item, rating):
        return {"user": np.array(user, np.int32), "item": np.array(item, np.int32),
                "rating": np.array(rating, np.float32)}  # fmt: skip

    train = [[rows([0, 1, 1], [0, 0, 1], [5, 1, 4])], [rows([2], [0], [2])]]
    val = [[rows([0, 0, 0, 1], [2, 4, 3, 2], [4, 5, 3.9, 1])], [rows([2], [1], [4])]]
    dataset = write_dataset(tmp_path / "data", train, val, ranges=[(0, 2), (2, 3)], num_items=5)
    write_model(str(tmp_path / "run"), in_chunks({"user_embedding": np.ones((3, 1), np.float32),
                "item_embedding": np.arange(5, dtype=np.float32)[:, None]}), PLAIN | {"dim": 1}, dataset)  # fmt: skip
    found = ranking_of(tmp_path / "run", dataset)
    discount = 1 / np.log2(np.arange(10) + 2)
    best = discount[0] + discount[1]
    # user 0 gets 4, 3, 2, 1: hits at 1 and 3; user 2 gets 4, 3, 2, 1: a hit at 4. By popularity: 1, 2, 3, 4 for both.
    assert found["users"] == found["of_users"] == 2 and found["threshold"] == 4.0
    assert found["ndcg@10"] == pytest.approx(((discount[0] + discount[2]) / best + discount[3]) / 2)
    assert found["recall@10"] == 1.0 and found["mrr@10"] == pytest.approx((1 + 1 / 4) / 2)
    assert found["coverage@10"] == 4 / 5 and found["popularity"]["coverage@10"] == 4 / 5
    assert found["popularity"]["ndcg@10"] == pytest.approx(((discount[1] + discount[3]) / best + 1) / 2)
    assert found["popularity"]["mrr@10"] == pytest.approx((1 / 2 + 1) / 2)
    assert "below the most popular" in ranking_metrics.doubt_about(found)
    assert ranking_metrics.doubt_about(found | {"ndcg@10": found["popularity"]["ndcg@10"]}) == ""


def test_a_ranking_is_of_about_as_many_users_as_asked_for(tmp_path, dataset):
    whole = ranked_users(dataset, World.alone())
    few = ranked_users(dataset, World.alone(), 60)
    assert len(whole.users) == whole.of_users == few.of_users > 200
    assert 35 < len(few.users) < 85 and set(few.users) < set(whole.users)
    other = ranked_users(dataset, World.alone(), 60, seed=1)
    assert set(other.users) != set(few.users)
    place = np.searchsorted(whole.users, few.users)
    for part, of in ((few.relevant, whole.relevant), (few.seen, whole.seen)):
        assert [list(x) for x in of.of(place)] == [list(x) for x in part]
    sampled = ranked_users(dataset, World.alone(), sample=0.3)
    assert in_sample(sampled.users, 0.3).all() and 0 < len(sampled.users) < len(whole.users)


def ranking_on_ranks(world, path, run):
    dataset = Dataset.open(path)
    chosen = ranked_users(dataset, world, 80)
    return rank_metrics(partial(top_of_model, ExportedModel.open(run)), chosen, dataset, world)


def test_a_ranking_is_the_same_bits_on_any_ranks(tmp_path, dataset):
    write_run(tmp_path / "run", dataset)
    alone = run_ranks(1, ranking_on_ranks, dataset.path, str(tmp_path / "run"))
    assert run_ranks(3, ranking_on_ranks, dataset.path, str(tmp_path / "run")) == alone * 3
    assert 0 < alone[0]["ndcg@10"] < 1 and 0 < alone[0]["coverage@10"] < 1


def test_no_validation_row_is_no_ranking(tmp_path):
    dataset = make_dataset(tmp_path / "data", rows=50, lanes=2)
    write_run(tmp_path / "run", dataset)
    found = ranking_of(tmp_path / "run", dataset)
    assert found["users"] == 0 and found["ndcg@10"] is None and found["popularity"]["coverage@10"] is None
    assert ranking_metrics.doubt_about(found) == ""
