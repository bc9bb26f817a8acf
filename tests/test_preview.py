"""What prepare shows before it reads, ``--dry-run``, what an append says, and one id for one thing in every job."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_evaluate import write_run

import mfdist
from mfdist.cluster.world import World
from mfdist.data.dataset import Dataset
from mfdist.errors import exit_code_of
from mfdist.jobs import prepare as job
from mfdist.results.predict import PredictConfig, predict
from mfdist.results.recommend import RecommendConfig, recommend

RATINGS = "11.0,7,5,100\n11.0,8.0,3,200\n12,7,4,300\n"


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures: they would take most of the time."""
    for module in ("append", "write_pass"):
        monkeypatch.setattr(f"mfdist.prepare.{module}.write_dataset_report", lambda *_: None)


def run(*argv: object) -> int:
    return exit_code_of(lambda: job.main([str(a) for a in argv]))


def test_a_dry_run_shows_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text("userId,movieId,rating\n" + "u1,a,5\nu2,b,3.5\n" * 3)
    (tmp_path / "b.csv").write_text("userId,movieId,rating\nu9,z,1\n")
    for flags in ([], ["--out", tmp_path / "d"]):
        assert run(tmp_path / "a.csv", tmp_path / "b.csv", "--dry-run", *flags) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[1:5] == ["  user 'u1', item 'a', rating 5", "  user 'u2', item 'b', rating 3.5",
                             "  user 'u1', item 'a', rating 5",
                             "  6 rows: 2 users, 2 items, 2 different ratings from 3.5 to 5"]  # fmt: skip
        assert len(said) == 7 and "b.csv" in said[5] and said[6] == "--dry-run: nothing was written"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv"]


def test_a_dry_run_of_what_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text("user,item,rating\nu1,a,good\nu2,b,bad\n")
    assert run(tmp_path / "a.csv", "--dry-run") == 3
    assert "none of the first 2 rows" in capsys.readouterr().err
    (tmp_path / "a.csv").write_text("user,item,rating\nu1,a,5\nu2,b,bad\n")
    assert run(tmp_path / "a.csv", "--dry-run") == 0
    assert (
        "1 of the first 2 rows are refused, for example 'u2,b,bad': rating is not a number" in capsys.readouterr().err
    )
    assert run(tmp_path, "--dry-run", "--verify") == 2 and run("--dry-run") == 2


def test_an_append_says_the_mean_of_today_and_adds_up_float_ids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text(RATINGS)
    (tmp_path / "b.csv").write_text("12.0,7.0,1,400\n13,7,1,500\n")
    assert run(tmp_path / "a.csv", "--out", tmp_path / "d", "--lanes", 2, "--val-fraction", 0) == 0
    assert "mean 4.0000" in capsys.readouterr().out
    assert run(tmp_path / "b.csv", "--out", tmp_path / "d", "--append") == 0
    dataset = Dataset.open(str(tmp_path / "d"))
    assert dataset.manifest.global_mean == pytest.approx(14 / 5)
    assert "mean 2.8000" in capsys.readouterr().out
    assert dataset.manifest.extra["float_ids"] == {"user_id": 3, "item_id": 2}
    assert sorted(dataset.ids("users").to_pylist()) == ["11", "12", "13"]
    assert sorted(dataset.ids("items").to_pylist()) == ["7", "8"]


@pytest.mark.parametrize("old", ["11.0", " u1"])
def test_a_dataset_whose_ids_would_be_others_today_takes_no_append(
    old: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text("u0,a,5\nu2,a,4\n")
    (tmp_path / "b.csv").write_text("u3,a,4\n")
    assert run(tmp_path / "a.csv", "--out", tmp_path / "d", "--lanes", 2) == 0
    manifest = json.loads((tmp_path / "d/dataset.json").read_text())
    del manifest["extra"]["id_rule"], manifest["extra"]["float_ids"]  # as an earlier version wrote it
    (tmp_path / "d/dataset.json").write_text(json.dumps(manifest))
    users = pq.read_table(tmp_path / "d/users.parquet")
    pq.write_table(users.set_column(1, "id", pa.array([old, "u2"])), tmp_path / "d/users.parquet")
    assert run(tmp_path / "b.csv", "--out", tmp_path / "d", "--append") == 3
    assert f"1 user ids such as {old!r}" in capsys.readouterr().err
    pq.write_table(users, tmp_path / "d/users.parquet")
    assert run(tmp_path / "b.csv", "--out", tmp_path / "d", "--append") == 0


def test_one_id_in_every_job(tmp_path: Path) -> None:
    """11.0, 11 and "11" are one user to predict, recommend, files of ids and Python."""
    (tmp_path / "a.csv").write_text(RATINGS)
    assert run(tmp_path / "a.csv", "--out", tmp_path / "d", "--lanes", 2) == 0
    write_run(tmp_path / "run", Dataset.open(str(tmp_path / "d")))
    (tmp_path / "pairs.csv").write_text("11.0,8\n 12 ,7.0\n13,7\n")
    out = str(tmp_path / "p.parquet")
    predict(PredictConfig(pairs=(str(tmp_path / "pairs.csv"),), run_dir=str(tmp_path / "run"), out=out), World.alone())
    found = pq.read_table(out)
    assert found["user_id"].to_pylist() == ["11", "12", "13"] and found["item_id"].to_pylist() == ["8", "7", "7"]
    assert found["known_user"].to_pylist() == [True, True, False] and all(found["known_item"].to_pylist())
    (tmp_path / "users").write_text("user_id\n11.0\n 12\n")
    out = str(tmp_path / "r.parquet")
    recommend(RecommendConfig(run_dir=str(tmp_path / "run"), users=str(tmp_path / "users"), out=out, include_seen=True),
              World.alone(), None)  # fmt: skip
    assert set(pq.read_table(out)["user_id"].to_pylist()) == {"11", "12"}
    model = mfdist.load(str(tmp_path / "run"))
    same = [model.predict([user], [item])[0] for user in (11, 11.0, "11.0", "11") for item in (8, 8.0, "8.00")]
    assert len(set(same)) == 1
