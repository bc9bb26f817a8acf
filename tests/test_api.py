"""mfdist.load(RUN): predictions and recommendations on original ids, without the libraries of preparation."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pandas
import polars
import pyarrow as pa
import pytest
from datasets import make_dataset
from test_evaluate import write_run
from test_export import PLAIN
from test_recommend import expected

import mfdist
from mfdist.errors import DataError, UsageError
from mfdist.results.exported_model import ExportedModel


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "data", rows=1200, lanes=5, users=150, items=60)


@pytest.fixture
def run(tmp_path, dataset):
    write_run(tmp_path / "run", dataset)
    return str(tmp_path / "run")


def test_predict_takes_ids(run):
    found = mfdist.load(run).predict(["u7", "u149", "u7"], np.array(["i0", "i59", "i1"]))
    assert found.tolist() == ExportedModel.open(run).predict(np.array([7, 149, 7]), np.array([0, 59, 1])).tolist()
    assert mfdist.load(run).predict([], []).shape == (0,)


def test_strangers_get_the_known_side_or_the_mean(tmp_path, dataset, run):
    model = mfdist.load(run)
    strangers = model.predict(["nobody", "someone else", "u1"], ["i3", "i3", "i3"])
    assert strangers[0] == strangers[1] != strangers[2]
    write_run(tmp_path / "mf", dataset, PLAIN)
    assert mfdist.load(str(tmp_path / "mf")).predict(["nobody"], ["i3"]).tolist() == [dataset.manifest.global_mean]


def test_whole_numbers_are_the_ids_that_they_spell(tmp_path, dataset):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"row": np.arange(150), "id": [str(row * 11) for row in range(150)],
                      "ratings": dataset.counts("users")})  # fmt: skip
    pq.write_table(table, f"{dataset.path}/users.parquet")
    write_run(tmp_path / "numbers", dataset)
    model = mfdist.load(str(tmp_path / "numbers"))
    expected_ratings = model.predict(["22", "33"], ["i1", "i1"]).tolist()
    assert model.predict([22, 33], ["i1", "i1"]).tolist() == expected_ratings
    assert model.predict(np.array([22, 33]), ["i1", "i1"]).tolist() == expected_ratings
    assert model.predict([22.0, 33.0], ["i1", "i1"]).tolist() == expected_ratings
    assert model.predict(np.array([22, 33], np.float32), ["i1", "i1"]).tolist() == expected_ratings
    assert (
        model.recommend([22.0], k=3).column("item_id").to_pylist()
        == model.recommend(["22"], k=3)["item_id"].to_pylist()
    )
    assert expected_ratings[0] != expected_ratings[1]


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_recommend_keeps_the_users_order(dataset, run, exclude_seen):
    table = mfdist.load(run).recommend(["u140", "u2", "u140", "u75", "u1"], k=6, exclude_seen=exclude_seen)
    assert table.column_names == ["user_id", "item_id", "rank", "score"]
    found = [tuple(row.values())[:3] for row in table.to_pylist()]
    assert found == expected(run, dataset, [140, 2, 140, 75, 1], 6, exclude_seen)


def test_recommend_to_a_stranger(tmp_path, dataset, run):
    for exclude_seen in (False, True):
        table = mfdist.load(run).recommend(["stranger", "u1"], k=3, exclude_seen=exclude_seen)
        best = np.argsort(-ExportedModel.open(run).item_bias, kind="stable")[:3]
        assert table["item_id"].to_pylist()[:3] == [f"i{item}" for item in best]
    write_run(tmp_path / "mf", dataset, PLAIN)
    with pytest.raises(UsageError, match="stranger"):
        mfdist.load(str(tmp_path / "mf")).recommend(["stranger"])


def test_mistakes_are_explained(tmp_path, run):
    with pytest.raises(DataError, match="no exported model"):
        mfdist.load(str(tmp_path / "nothing"))
    model = mfdist.load(run)
    with pytest.raises(UsageError, match="as many"):
        model.predict(["u1"], [])
    for alone in ("u1", 1, 1.0, None):
        with pytest.raises(UsageError, match="a list of ids"):
            model.predict(alone, ["i1"])
        with pytest.raises(UsageError, match="a list of ids"):
            model.recommend(alone)
    with pytest.raises(UsageError, match="cannot be an id"):
        model.recommend([float("nan")])
    with pytest.raises(UsageError, match="at least 1"):
        model.recommend(["u1"], k=0)
    with pytest.raises(AttributeError):
        _ = mfdist.nothing


def test_the_folder_of_the_model_itself(run, tmp_path):
    whole = mfdist.load(run).predict(["u1"], ["i1"]).tolist()
    assert mfdist.load(f"{run}/model").predict(["u1"], ["i1"]).tolist() == whole
    assert mfdist.load(f"{run}/model/").exported.run == run
    os.rename(f"{run}/model", tmp_path / "alone")
    assert mfdist.load(str(tmp_path / "alone")).predict(["u1"], ["i1"]).tolist() == whole


@pytest.mark.parametrize("kind", ["pandas", "polars", "arrow"])
def test_predict_a_frame(run, kind):
    columns = {"who": ["u7", "nobody", "u7"], "what": ["i0", "i1", "nothing"], "rating": [1, 2, 3]}
    frame = {"pandas": pandas.DataFrame, "polars": polars.DataFrame, "arrow": pa.table}[kind](columns)
    model = mfdist.load(run)
    table = model.predict_frame(frame, user_id="who", item_id="what")
    assert table.column_names == ["who", "what", "rating", "prediction", "known_user", "known_item"]
    assert table["prediction"].to_pylist() == model.predict(columns["who"], columns["what"]).tolist()
    assert table["known_user"].to_pylist() == [True, False, True]
    assert table["known_item"].to_pylist() == [True, True, False]
    with pytest.raises(UsageError, match="no column 'user_id'"):
        model.predict_frame(frame)


def test_predicting_needs_numpy_and_pyarrow_and_little_time_beside(run):
    code = f"""
import sys, time
for name in ("torch", "numba", "polars", "pydantic", "surprise", "tqdm"):
    sys.modules[name] = None
import mfdist
assert "numpy" not in sys.modules and "pyarrow" not in sys.modules, "import mfdist is light"
began = time.process_time()
import fsspec, numpy, pyarrow.compute, pyarrow.parquet
libraries = time.process_time() - began
began = time.process_time()
model = mfdist.load({run!r})
seconds = time.process_time() - began
print(model.predict(["u1"], ["i1"])[0], seconds, libraries)
"""
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120) for _ in range(2)]
    assert runs[0].returncode == 0, runs[0].stderr
    rating, seconds, libraries = runs[1].stdout.split()
    assert float(rating) == mfdist.load(run).predict(["u1"], ["i1"])[0]
    assert float(seconds) < float(libraries), (seconds, libraries)  # a measure that any machine has


def test_recommending_needs_no_torch(run):
    code = f"""
import sys
for name in ("torch", "polars"):
    sys.modules[name] = None
import mfdist
print(mfdist.load({run!r}).recommend(["u1"], k=2, exclude_seen=True)["item_id"].to_pylist()[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == mfdist.load(run).recommend(["u1"], k=2, exclude_seen=True)["item_id"][0].as_py()
