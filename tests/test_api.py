"""mfdist.load(RUN): predictions and recommendations on original ids, without the libraries of preparation."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from datasets import make_dataset
from test_evaluate import write_run
from test_export import PLAIN
from test_recommend import expected

import mfdist
from mfdist.errors import DataError, UsageError
from mfdist.results.export import ExportedModel


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
    with pytest.raises(UsageError, match="single text"):
        model.predict("u1", ["i1"])
    with pytest.raises(UsageError, match="at least 1"):
        model.recommend(["u1"], k=0)
    with pytest.raises(AttributeError):
        _ = mfdist.nothing


def test_loading_needs_no_library_of_preparation(run):
    code = f"""
import sys
for name in ("polars", "pydantic", "surprise"):
    sys.modules[name] = None
import mfdist
assert "torch" not in sys.modules and "pyarrow" not in sys.modules, "import mfdist is light"
print(mfdist.load({run!r}).predict(["u1"], ["i1"])[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == mfdist.load(run).predict(["u1"], ["i1"])[0]
