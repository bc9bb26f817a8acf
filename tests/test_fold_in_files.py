"""``--fold-in``: users of new ratings get the rows that ``model.fold_in`` gives them, in recommend and predict."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import make_dataset, training_rows
from ranks import run_ranks
from test_evaluate import job, write_run
from test_fold_in import FORMS

import mfdist
from mfdist.cluster.world import World
from mfdist.data.dataset import Dataset
from mfdist.errors import DataError, StopRequested, UsageError
from mfdist.log import Console
from mfdist.results import folded_model
from mfdist.results.fold_in import FoldIn
from mfdist.results.predict import PredictConfig, predict
from mfdist.results.recommend import RecommendConfig, recommend

NEW = [
    ("u7", "i1", 5.0), ("new b", "i2", 1.0), ("new a", "i2", 5.0), ("u7", "i3", 1.0), ("new b", "i9", 4.0),
    ("new a", "nothing", 3.0), ("u120", "i1", 2.0), ("new c", "nothing", 5.0), ("new b", "i5", 2.0),
]  # fmt: skip


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "data", rows=1200, lanes=5, users=150, items=60)


@pytest.fixture(params=["biases", "members"])
def run(request, tmp_path, dataset):
    write_run(tmp_path / "run", dataset, FORMS[request.param])
    (tmp_path / "new.csv").write_text("".join(f"{user},{item},{rating:g}\n" for user, item, rating in NEW))
    return str(tmp_path / "run")


def folded_users(run, dataset):
    """User -> what ``model.fold_in`` says of them, one at a time, and what they have seen."""
    model, rows = mfdist.load(run), training_rows(dataset)
    found = {}
    for user in dict.fromkeys(user for user, _, _ in NEW):
        mine = [(item, rating) for name, item, rating in NEW if name == user]
        items, ratings = zip(*mine)
        known = {"user_id": user, "data": dataset.path} if user.startswith("u") else {}
        seen = {item for item, _ in mine}
        if known:
            seen |= {f"i{int(item)}" for item in rows[rows[:, 0] == int(user[1:])][:, 1]}
        found[user] = model.fold_in(items, ratings, **known), seen
    return found


def wanted_lines(run, dataset, users, k):
    folded, model, lines = folded_users(run, dataset), mfdist.load(run), []
    every = [f"i{item}" for item in range(60)]
    rows = training_rows(dataset)
    for user in users:
        if user in folded:
            one, seen = folded[user]
            score = one.predict(every)
        else:
            score = model.predict([user] * 60, every)
            seen = {f"i{int(item)}" for item in rows[rows[:, 0] == int(user[1:])][:, 1]}
        score[[int(item[1:]) for item in seen if item != "nothing"]] = -np.inf
        best = np.argsort(-score, kind="stable")[:k]
        lines += [(user, f"i{item}", place + 1) for place, item in enumerate(best)]
    return lines


def lines_of(path):
    return [tuple(row.values())[:3] for row in pq.read_table(path).to_pylist()]


def test_recommendations_of_new_and_known_users(tmp_path, dataset, run, capsys):
    out = str(tmp_path / "o.parquet")
    flags = ["--run-dir", run, "--out", out, "--top-k", "6", "--fold-in", str(tmp_path / "new.csv"), "--device", "cpu"]
    assert job("recommend").main([*flags, "--users", "folded"]) == 0
    assert lines_of(out) == wanted_lines(run, dataset, ["u7", "u120", "new b", "new a", "new c"], 6)
    said = capsys.readouterr()
    assert "2 of 9 rows of --fold-in are of items that training did not know" in said.err and "5 users" in said.out
    assert job("recommend").main(flags) == 0
    assert lines_of(out) == wanted_lines(run, dataset, [*(f"u{k}" for k in range(150)), "new b", "new a", "new c"], 6)
    (tmp_path / "users").write_text("new a\nu8\nu7\nstranger\n")
    assert job("recommend").main([*flags, "--users", str(tmp_path / "users")]) == 0
    assert lines_of(out)[:-6] == wanted_lines(run, dataset, ["u7", "u8", "new a"], 6)
    assert {user for user, _, _ in lines_of(out)[-6:]} == {"stranger"}
    assert sorted(os.listdir(tmp_path)) == ["data", "new.csv", "o.parquet", "run", "users"]


def test_predictions_of_new_and_known_users(tmp_path, dataset, run):
    pairs = [(user, f"i{item}") for user in ("new a", "u7", "u8", "nobody") for item in (4, 1, 77)]
    (tmp_path / "pairs.csv").write_text("user_id,item_id\n" + "".join(f"{user},{item}\n" for user, item in pairs))
    flags = [str(tmp_path / "pairs.csv"), "--run-dir", run, "--out", str(tmp_path / "o.parquet")]
    assert job("predict").main([*flags, "--fold-in", str(tmp_path / "new.csv")]) == 0
    table, model, folded = pq.read_table(tmp_path / "o.parquet"), mfdist.load(run), folded_users(run, dataset)
    wanted = [(folded[user][0].predict([item]) if user in folded else model.predict([user], [item]))[0]
              for user, item in pairs]  # fmt: skip
    np.testing.assert_allclose(table["prediction"].to_numpy(), wanted, atol=1e-6)
    assert table["known_user"].to_pylist() == [user != "nobody" for user, _ in pairs]
    assert sorted(os.listdir(tmp_path)) == ["data", "new.csv", "o.parquet", "pairs.csv", "run"]


def test_lists_of_one_user_hold_for_new_ones(tmp_path, dataset, run):
    (tmp_path / "allow.csv").write_text("user_id,item_id\nnew a,i4\nnew a,i5\n")
    (tmp_path / "deny.csv").write_text("user_id,item_id\nnew a,i5\nnew b,i0\n")
    config = RecommendConfig(run_dir=run, out=str(tmp_path / "o.parquet"), top_k=60, users="folded",
                             fold_in=(str(tmp_path / "new.csv"),), allow=str(tmp_path / "allow.csv"),
                             deny=str(tmp_path / "deny.csv"))  # fmt: skip
    recommend(config, World.alone(), dataset)
    found = lines_of(tmp_path / "o.parquet")
    assert [line for line in found if line[0] == "new a"] == [("new a", "i4", 1)]
    assert {item for user, item, _ in found if user == "new b"} == {f"i{k}" for k in range(60)} - {
        "i0", "i2", "i5", "i9"}  # fmt: skip


def on_ranks(world, run, data, new, pairs, *outs):
    folded_model.SEGMENT_USERS = 2
    recommend(RecommendConfig(run_dir=run, out=outs[0], fold_in=(new,)), world, Dataset.open(data))
    predict(PredictConfig(pairs=(pairs,), run_dir=run, out=outs[1], fold_in=(new,)), world)
    return os.path.exists(outs[0] + ".folded.parts")


def test_three_ranks_write_what_one_writes(tmp_path, dataset, run):
    (tmp_path / "pairs.csv").write_text("new a,i1\nu7,i4\n")
    shared = (run, dataset.path, str(tmp_path / "new.csv"), str(tmp_path / "pairs.csv"))
    outs = [[str(tmp_path / f"{ranks}-{job}.csv") for job in ("recommend", "predict")] for ranks in (1, 3)]
    assert run_ranks(1, on_ranks, *shared, *outs[0]) == [False]
    assert run_ranks(3, on_ranks, *shared, *outs[1]) == [False] * 3
    for one, three in zip(*outs):
        assert Path(one).read_bytes() == Path(three).read_bytes()


def test_a_stop_keeps_solved_users(tmp_path, dataset, run, monkeypatch):
    """The signal comes while the second lane's users are solved: the first lane's are not solved again."""
    config = RecommendConfig(run_dir=run, out=str(tmp_path / "o.csv"), fold_in=(str(tmp_path / "new.csv"),))
    recommend(config, World.alone(), dataset)
    undisturbed = Path(config.out).read_bytes()
    os.unlink(config.out)
    calls, solve = [], FoldIn.solve

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return solve(*arguments)

    monkeypatch.setattr(FoldIn, "solve", stopped)
    with pytest.raises(StopRequested, match="SIGTERM"):
        recommend(config, World.alone(), dataset)
    assert sorted(os.listdir(tmp_path)) == ["data", "new.csv", "o.csv.folded.parts", "run"]
    recommend(config, World.alone(), dataset)
    assert len(calls) == 2 + 4, "u7 is kept; u120, and the three new users"
    assert Path(config.out).read_bytes() == undisturbed
    assert sorted(os.listdir(tmp_path)) == ["data", "new.csv", "o.csv", "run"]


def test_other_ratings_are_another_request(tmp_path, dataset, run, monkeypatch):
    """Solved users of a file that was written again are not used."""
    config = RecommendConfig(run_dir=run, out=str(tmp_path / "o.parquet"), fold_in=(str(tmp_path / "new.csv"),),
                             users="folded", top_k=3)  # fmt: skip
    monkeypatch.setattr("mfdist.results.part_files.Parts.join", lambda *_: None)
    monkeypatch.setattr("mfdist.results.part_files.Parts.remove", lambda *_: None)
    recommend(config, World.alone(), dataset)
    monkeypatch.undo()
    (tmp_path / "new.csv").write_text("new d,i2,5\nnew d,i3,1\n")
    recommend(config, World.alone(), dataset)
    one = mfdist.load(run).fold_in(["i2", "i3"], [5, 1]).recommend(3)["item_id"].to_pylist()
    assert lines_of(tmp_path / "o.parquet") == [("new d", item, place + 1) for place, item in enumerate(one)]


def test_new_users_alone_need_no_dataset(tmp_path, dataset, run):
    (tmp_path / "new.csv").write_text("who,what,stars\nnew d,i2,5\n")
    config = RecommendConfig(run_dir=run, out=str(tmp_path / "o.parquet"), fold_in=(str(tmp_path / "new.csv"),),
                             fold_in_columns=("who", "what", "stars"), users="folded", include_seen=True,
                             data=str(tmp_path / "gone"))  # fmt: skip
    assert recommend(config, World.alone(), None) == (1, 0)


def test_mistakes_are_explained(tmp_path, dataset, run):
    flags = {"run_dir": run, "out": str(tmp_path / "o.parquet")}
    with pytest.raises(UsageError, match="--fold-in; give that"):
        RecommendConfig(**flags, users="folded")
    (tmp_path / "new.csv").write_text("u1,i1,5\nu1,i2,many\n")
    fold_in = (str(tmp_path / "new.csv"),)
    with pytest.raises(DataError, match=r"1 of 2 rows of --fold-in were refused.*not a number.*many"):
        recommend(RecommendConfig(**flags, fold_in=fold_in), World.alone(), dataset)
    recommend(RecommendConfig(**flags, fold_in=fold_in, max_rejected=0.5), World.alone(), dataset, Console(False))
    (tmp_path / "new.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="--fold-in-columns"):
        recommend(RecommendConfig(**flags, fold_in=fold_in), World.alone(), dataset)
    with pytest.raises(DataError, match="no such file"):
        recommend(RecommendConfig(**flags, fold_in=("nowhere.csv",)), World.alone(), dataset)
    other = make_dataset(tmp_path / "other", rows=100, lanes=2, seed=3)
    (tmp_path / "new.csv").write_text("u1,i1,5\n")
    with pytest.raises(UsageError, match="was not trained on"):
        recommend(RecommendConfig(**flags, fold_in=fold_in, include_seen=True, data=other.path), World.alone(), None)
