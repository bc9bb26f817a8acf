"""Append, compact and training that goes on with what was appended; killed anywhere, all rows are there."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from prepare_files import Row, bare, check_whole, files_of, rows_of, run, sample, write_csv  # noqa: F401
from safetensors.numpy import load_file

from mfdist.cluster.world import World
from mfdist.data.dataset import Dataset, verify
from mfdist.errors import UsageError
from mfdist.log import Console
from mfdist.prepare.lanes import BLOCK_ROWS
from mfdist.prepare.replace import commit
from mfdist.training.config import TrainConfig
from mfdist.training.train import train

ROOT = Path(__file__).parents[1]


def test_append_and_compact(tmp_path: Path) -> None:
    rows = sample(n=5000, users=400)
    old = [r for r in rows if int(r[0][1:]) < 300 and r[1] != "i5"][:2500]
    more = [[r for r in rows if r not in old][k::2] for k in range(2)]
    dataset = run(write_csv(tmp_path / "a.csv", old), "--out", tmp_path / "d", "--lanes", 4, "--order", "blocks")
    before = dataset.ids("users").to_pylist(), dataset.ids("items").to_pylist()
    done = list(old)
    for k, part in enumerate(more):
        command = [write_csv(tmp_path / f"m{k}.csv", part), "--out", tmp_path / "d", "--append"]
        dataset = run(*command)
        done += part
        check_whole(dataset)
        assert rows_of(dataset) == sorted(done)
        assert dataset.ids("users").to_pylist()[: len(before[0])] == before[0]
        assert dataset.ids("items").to_pylist()[: len(before[1])] == before[1]
        assert rows_of(run(*command)) == sorted(done)  # the same files again change nothing
    appended, val = rows_of(dataset), rows_of(dataset, "val")
    lanes = [lane.train_rows + lane.val_rows for lane in dataset.manifest.lanes]
    assert max(lanes) / min(lanes) < 1.1
    users = dataset.ids("users").to_pylist()
    commit(dataset.path, replace(dataset.manifest, extra={**dataset.manifest.extra, "block_rows": 512}))
    compacted = run("--compact", tmp_path / "d")
    check_whole(compacted)
    assert compacted.manifest.extra["block_rows"] == BLOCK_ROWS  # all files are written anew
    assert (rows_of(compacted), rows_of(compacted, "val")) == (appended, val)
    assert compacted.ids("users").to_pylist() == users
    on_disk = {str(p.relative_to(tmp_path / "d")) for p in (tmp_path / "d").glob("*/lane-*")}
    assert on_disk == {f for lane in compacted.manifest.lanes for f in lane.files}
    with pytest.raises(UsageError, match="--seed 1"):
        run(write_csv(tmp_path / "z.csv", old[:9]), "--out", tmp_path / "d", "--append", "--seed", 1)


def test_an_append_that_was_killed_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mfdist.prepare import append

    rows = sample(n=1000)
    run(write_csv(tmp_path / "a.csv", rows[:700]), "--out", tmp_path / "d", "--lanes", 2)
    moved: list[str] = []

    def dies(path: str, text: str) -> None:
        if path.endswith("dataset.json"):
            raise KeyboardInterrupt
        moved.append(path)
        real(path, text)

    real = append.storage.write_text
    monkeypatch.setattr(append.storage, "write_text", dies)
    command = [write_csv(tmp_path / "b.csv", rows[700:]), "--out", tmp_path / "d", "--append"]
    with pytest.raises(KeyboardInterrupt):
        run(*command)
    monkeypatch.undo()
    dataset = run(*command)
    assert rows_of(dataset) == sorted(rows)
    check_whole(dataset)


def test_training_goes_on_with_an_appended_dataset(tmp_path: Path) -> None:
    """Known ids keep their rows and values, new ones begin at initial values, and training learns from both."""
    rows = sample(n=5000, users=400)
    old = [r for r in rows if int(r[0][1:]) < 300 and r[1] != "i5"]
    run(write_csv(tmp_path / "old.csv", old), "--out", tmp_path / "d", "--lanes", 4)
    first = trained(tmp_path, "first", epochs=2)
    run(write_csv(tmp_path / "new.csv", [r for r in rows if r not in old]), "--out", tmp_path / "d", "--append")
    # steps too small to move a float32: what is exported is what the run began with
    begun = trained(tmp_path, "begun", init_from=str(tmp_path / "first"), epochs=1, lr=1e-30, weight_decay=0.0)
    for side in ("user", "item"):
        before, after = first[side], begun[side]
        assert len(before) < len(after), f"the append brought no {side}"
        assert all(after[name].tolist() == row.tolist() for name, row in before.items())
        fresh = np.stack([row for name, row in after.items() if name not in before])
        assert (fresh[:, :-1] >= 0).all() and (fresh[:, :-1] <= 0.05).all() and (np.abs(fresh[:, -1]) < 1e-20).all()
    more = trained(tmp_path, "more", init_from=str(tmp_path / "first"), epochs=2)
    moved = [np.abs(more["user"][name] - row).max() > 0 for name, row in begun["user"].items()]
    assert all(moved)


def trained(folder: Path, name: str, **settings: Any) -> dict[str, dict[str, np.ndarray]]:
    """Train on ``folder``/d; the exported row, bias last, of every user and item id."""
    config = TrainConfig.ready("vignette_mf_advanced", data=str(folder / "d"), run_dir=str(folder / name),
                               emb_dim=4, batch_size=512, device="cpu",
                         **{"lr": 0.01, **settings})  # fmt: skip
    train(config, World.alone(), Console(speaks=False))
    tensors = load_file(folder / name / "model/model.safetensors")
    found = {}
    for side in ("user", "item"):
        ids = pq.read_table(folder / name / f"model/{side}s.parquet").column("id").to_pylist()
        rows = np.column_stack([tensors[f"{side}_embedding"], tensors[f"{side}_bias"]])
        found[side] = dict(zip(ids, rows, strict=True))
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_at_twenty_moments(tmp_path: Path) -> None:
    rows = sample(n=60_000, users=2000, items=500)
    source = write_csv(tmp_path / "a.csv", rows)
    expected = files_of(run(source, "--out", tmp_path / "reference"))
    command = [sys.executable, "jobs/prepare.py", str(source), "--out", str(tmp_path / "d")]
    began = time.monotonic()
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    whole = time.monotonic() - began
    rng = random.Random(3)
    for _ in range(20):
        if rng.random() < 0.5:
            subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0, whole))
        process.send_signal(signal.SIGKILL)
        process.wait()
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
        dataset = Dataset.open(str(tmp_path / "d"))
        assert files_of(dataset) == expected and list(verify(dataset)) == []
        assert not (tmp_path / "d" / ".scratch").exists()
