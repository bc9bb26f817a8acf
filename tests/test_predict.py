"""Files of pairs: every row scored in its order, unknown ids flagged, errors beside, the same bytes always."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from datasets import make_dataset
from ranks import run_ranks
from test_evaluate import job, write_run

import mfdist
from mfdist.cluster.world import World
from mfdist.errors import DataError, StopRequested, UsageError
from mfdist.results import predict as module
from mfdist.results.predict import PredictConfig, predict


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run", make_dataset(tmp_path / "data", rows=1200, lanes=5, users=150, items=60))
    return str(tmp_path / "run")


def pairs(count=400, seed=0):
    rng = np.random.default_rng(seed)
    users, items = rng.integers(0, 160, count), rng.integers(0, 65, count)
    ratings = rng.integers(1, 6, count).astype(np.float64)
    return [f"u{u}" for u in users], [f"i{i}" for i in items], ratings


def check(path, run, users, items, ratings=None):
    table = pq.read_table(path) if path.endswith(".parquet") else pacsv.read_csv(path)
    rated = [] if ratings is None else ["rating"]
    assert table.column_names == ["user_id", "item_id", *rated, "prediction", "known_user", "known_item"]
    assert table["user_id"].to_pylist() == users and table["item_id"].to_pylist() == items
    assert table["prediction"].to_pylist() == mfdist.load(run).predict(users, items).tolist()
    assert table["known_user"].to_pylist() == [int(u[1:]) < 150 for u in users]
    assert table["known_item"].to_pylist() == [int(i[1:]) < 60 for i in items]
    if rated:
        assert table["rating"].to_pylist() == ratings.tolist()


@pytest.mark.parametrize("out", ["o.parquet", "o.csv"])
@pytest.mark.parametrize("form", ["header", "headerless", "parquet", "json", "named", "two files"])
def test_pairs_of_every_form(tmp_path, run, form, out, capsys):
    users, items, ratings = pairs()
    lines = [f"{u},{i},{r:g}" for u, i, r in zip(users, items, ratings)]
    flags = []
    if form == "header":
        (tmp_path / "p.csv").write_text("item_id,user_id\n" + "".join(f"{i},{u}\n" for u, i in zip(users, items)))
    elif form == "headerless":
        (tmp_path / "p.csv").write_text("\n".join(lines))
    elif form == "parquet":
        pq.write_table(pa.table({"user_id": users, "item_id": items}), tmp_path / "p.csv")
    elif form == "json":
        rows = [json.dumps({"user_id": u, "item_id": i, "rating": r}) for u, i, r in zip(users, items, ratings)]
        (tmp_path / "p.csv").write_text("\n".join(rows) + "\n")
    elif form == "named":
        (tmp_path / "p.csv").write_text("x;who;stars;what\n" + "".join(f"1;{u};;{i}\n" for u, i in zip(users, items)))
        flags = ["--columns", "who,what"]
    else:
        (tmp_path / "p").mkdir()
        for name, part in (("a.csv", lines[:150]), ("b.csv", lines[150:])):
            (tmp_path / "p" / name).write_text("\n".join(part) + "\n")
    source = str(tmp_path / ("p" if form == "two files" else "p.csv"))
    out = str(tmp_path / out)
    assert job("predict").main([source, "--run-dir", run, "--out", out, *flags]) == 0
    rated = ratings if form in ("headerless", "json", "two files") else None
    check(out, run, users, items, rated)
    said = capsys.readouterr().out
    assert ("RMSE" in said) == (rated is not None)
    if rated is not None:
        error = mfdist.load(run).predict(users, items) - ratings
        assert f"RMSE {np.sqrt(np.mean(error**2)):.4f}, MAE {np.abs(error).mean():.4f}" in said
    assert not [name for name in os.listdir(tmp_path) if name.endswith((".tmp", ".parts"))]


def small_parts(tmp_path, monkeypatch):
    """Four files, so four parts."""
    users, items, ratings = pairs()
    for k in range(4):
        rows = zip(users[k::4], items[k::4], ratings[k::4])
        (tmp_path / f"p{k}.csv").write_text("".join(f"{u},{i},{r:g}\n" for u, i, r in rows))
    order = [place for k in range(4) for place in range(k, 400, 4)]
    return [users[p] for p in order], [items[p] for p in order], ratings[order]


def on_ranks(world, run, pattern, out):
    return tuple(predict(PredictConfig(pairs=(pattern,), run_dir=run, out=out), world))


def test_three_ranks_write_what_one_writes(tmp_path, run, monkeypatch):
    wanted = small_parts(tmp_path, monkeypatch)
    one, three = str(tmp_path / "1.parquet"), str(tmp_path / "3.parquet")
    alone = run_ranks(1, on_ranks, run, str(tmp_path / "p*.csv"), one)
    assert run_ranks(3, on_ranks, run, str(tmp_path / "p*.csv"), three) == alone * 3
    check(one, run, *wanted)
    assert Path(one).read_bytes() == Path(three).read_bytes()


def test_a_stop_keeps_parts_and_their_figures(tmp_path, run, monkeypatch):
    small_parts(tmp_path, monkeypatch)
    config = PredictConfig(pairs=(str(tmp_path / "p*.csv"),), run_dir=run, out=str(tmp_path / "o.csv"))
    whole = predict(config, World.alone())
    undisturbed = (tmp_path / "o.csv").read_bytes()
    os.unlink(tmp_path / "o.csv")
    calls, table = [], module._table

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return table(*arguments)

    monkeypatch.setattr(module, "_table", stopped)
    with pytest.raises(StopRequested, match="SIGTERM"):
        predict(config, World.alone())
    assert predict(config, World.alone()) == whole and len(calls) == 4
    assert (tmp_path / "o.csv").read_bytes() == undisturbed
    assert not (tmp_path / "o.csv.parts").exists()


def test_refused_rows_are_counted_and_too_many_are_an_error(tmp_path, run, capsys):
    (tmp_path / "p.csv").write_text("u1,i1,3\nu2,i2,three\nu3,i3,4\n")
    flags = {"pairs": (str(tmp_path / "p.csv"),), "run_dir": run, "out": str(tmp_path / "o.parquet")}
    with pytest.raises(DataError, match=r"1 of 3 rows were refused.*not a number"):
        predict(PredictConfig(**flags), World.alone())
    assert not (tmp_path / "o.parquet").exists()
    found = predict(PredictConfig(**flags, max_rejected=0.5), World.alone())
    assert found[:4] == (2, 1, 0, 0)


def test_mistakes_are_explained(tmp_path, run):
    with pytest.raises(UsageError, match=r"\.parquet or \.csv"):
        PredictConfig(pairs=("p",), run_dir=run, out="o.txt")
    with pytest.raises(UsageError, match="--out"):
        PredictConfig(pairs=("p",), run_dir=run)
    with pytest.raises(DataError, match="no such file"):
        predict(PredictConfig(pairs=(str(tmp_path / "x"),), run_dir=run, out="o.csv"), World.alone())
    (tmp_path / "a.csv").write_text("u1,i1,3\n")
    (tmp_path / "b.csv").write_text("u1,i1\n")
    both = (str(tmp_path / "a.csv"), str(tmp_path / "b.csv"))
    with pytest.raises(UsageError, match="some of the files have ratings"):
        predict(PredictConfig(pairs=both, run_dir=run, out=str(tmp_path / "o.csv")), World.alone())
