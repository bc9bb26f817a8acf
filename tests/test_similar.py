"""The job ``similar``: the lists of all pairs, in order, the same from any number of ranks; mistakes explained."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import make_dataset
from ranks import run_ranks
from test_evaluate import job
from test_export import CONFIG, export

from mfdist.cluster.world import World
from mfdist.errors import StopRequested, UsageError
from mfdist.results import similar as module
from mfdist.results.exported_model import ExportedModel
from mfdist.results.neighbours import Neighbours
from mfdist.results.similar import SimilarConfig, similar


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_ROWS", 16)
    export(tmp_path / "run", make_dataset(tmp_path / "data", rows=600, lanes=3, users=70, items=60), CONFIG)
    return str(tmp_path / "run")


def expected(run, side, rows, k, measure="cosine"):
    """(id, similar_id, rank) by sorting all the others of each row."""
    model = ExportedModel.open(run)
    table = np.asarray(model.item_embedding if side == "items" else model.user_embedding, np.float64)
    unit = table / np.linalg.norm(table, axis=1)[:, None] if measure == "cosine" else table
    lines = []
    for row in rows:
        score = unit @ unit[row]
        score[row] = -np.inf
        best = np.argsort(-score, kind="stable")[: min(k, len(table) - 1)]
        lines += [(f"{side[0]}{row}", f"{side[0]}{other}", place + 1) for place, other in enumerate(best)]
    return lines


def lines_of(path, side):
    table = pq.read_table(path)
    assert table.column_names == [f"{side[:-1]}_id", "similar_id", "rank", "score"]
    return [tuple(row.values())[:3] for row in table.to_pylist()]


@pytest.mark.parametrize("measure", ["cosine", "inner"])
@pytest.mark.parametrize("side", ["items", "users"])
def test_the_job_writes_the_lists_of_all_pairs(tmp_path, run, side, measure, capsys):
    out = str(tmp_path / "o.parquet")
    flags = ["--run-dir", run, "--out", out, "--side", side, "--measure", measure, "--top-k", "4", "--device", "cpu"]
    assert job("similar").main(flags) == 0
    count = 60 if side == "items" else 70
    assert lines_of(out, side) == expected(run, side, range(count), 4, measure)
    assert f"{count} {side}" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["data", "o.parquet", "run"]


def test_csv_has_the_same_rows_and_scores_are_cosines(tmp_path, run):
    similar(SimilarConfig(run_dir=run, out=str(tmp_path / "o.csv"), top_k=3), World.alone())
    head, *rows = (line.split(",") for line in (tmp_path / "o.csv").read_text().splitlines())
    assert head == ["item_id", "similar_id", "rank", "score"]
    assert [(a, b, int(rank)) for a, b, rank, _ in rows] == expected(run, "items", range(60), 3)
    table = ExportedModel.open(run).item_embedding.astype(float)
    for a, b, _, score in rows[::17]:
        one, other = table[int(a[1:])], table[int(b[1:])]
        assert float(score) == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other), abs=1e-6)


def test_a_file_of_ids_leaves_out_or_refuses_unknown_ones(tmp_path, run):
    (tmp_path / "ids").write_text("i40\nstranger\ni7\ni40\n")
    flags = {"run_dir": run, "out": str(tmp_path / "o.parquet"), "ids": str(tmp_path / "ids"), "top_k": 2}
    assert similar(SimilarConfig(**flags), World.alone()) == (2, 1)
    assert lines_of(tmp_path / "o.parquet", "items") == expected(run, "items", [7, 40], 2)
    with pytest.raises(UsageError, match=r"1 of the 3 items .*'stranger'.*--unknown-ids skip"):
        similar(SimilarConfig(**flags, unknown_ids="error"), World.alone())
    (tmp_path / "ids").write_text("user_id,x\nu3,1\nnobody,2\n")
    assert similar(SimilarConfig(**flags, side="users"), World.alone()) == (1, 1)
    assert lines_of(tmp_path / "o.parquet", "users") == expected(run, "users", [3], 2)
    for content, words in (("nobody\n", "1 of the 1 items"), ("\n", "no item ids")):
        (tmp_path / "ids").write_text(content)
        with pytest.raises(UsageError, match=words):
            similar(SimilarConfig(**flags), World.alone())


def test_more_neighbours_than_there_are(tmp_path, run):
    similar(SimilarConfig(run_dir=run, out=str(tmp_path / "o.parquet"), top_k=1000), World.alone())
    assert lines_of(tmp_path / "o.parquet", "items") == expected(run, "items", range(60), 1000)


def on_ranks(world, run, out):
    module.SEGMENT_ROWS = 16
    return tuple(similar(SimilarConfig(run_dir=run, out=out), world))


def test_three_ranks_write_what_one_writes(tmp_path, run):
    one, three = tmp_path / "1.parquet", tmp_path / "3.parquet"
    assert run_ranks(1, on_ranks, run, str(one)) == [(60, 0)]
    assert run_ranks(3, on_ranks, run, str(three)) == [(60, 0)] * 3
    assert one.read_bytes() == three.read_bytes()


def test_a_stop_keeps_finished_parts_and_the_same_command_goes_on(tmp_path, run, monkeypatch):
    config = SimilarConfig(run_dir=run, out=str(tmp_path / "o.csv"))
    similar(config, World.alone())
    undisturbed = Path(config.out).read_bytes()
    os.unlink(config.out)
    calls, of = [], Neighbours.of

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return of(*arguments)

    monkeypatch.setattr(Neighbours, "of", stopped)
    with pytest.raises(StopRequested, match="SIGTERM"):
        similar(config, World.alone())
    assert not os.path.exists(config.out)
    assert similar(config, World.alone()) == (60, 0)
    assert len(calls) == 5, "two of the four parts are kept, the one that was cut off is made again"
    assert Path(config.out).read_bytes() == undisturbed
    assert sorted(os.listdir(tmp_path)) == ["data", "o.csv", "run"]


def test_parts_of_another_choice_of_ids_are_not_used(tmp_path, run, monkeypatch):
    """Rows 1 and 4 as many, and of the same sum, as rows 2 and 3."""
    flags = {"run_dir": run, "out": str(tmp_path / "o.parquet"), "ids": str(tmp_path / "ids"), "top_k": 2}
    (tmp_path / "ids").write_text("i1\ni4\n")
    monkeypatch.setattr(module.Parts, "join", lambda *_: None)
    similar(SimilarConfig(**flags), World.alone())
    monkeypatch.undo()
    (tmp_path / "ids").write_text("i2\ni3\n")
    similar(SimilarConfig(**flags), World.alone())
    assert lines_of(tmp_path / "o.parquet", "items") == expected(run, "items", [2, 3], 2)


@pytest.mark.parametrize("flag", ["run_dir", "out"])
def test_required_flags(flag):
    with pytest.raises(UsageError, match=f"--{flag.replace('_', '-')} is missing"):
        SimilarConfig(**({"run_dir": "r", "out": "o"} | {flag: ""}))
