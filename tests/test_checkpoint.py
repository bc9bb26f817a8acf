"""Checkpoints: written beside the training, loaded on other ranks and placements, damaged, planted, looked after."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from datasets import make_dataset
from ranks import run_ranks

from jobs import checkpoint as job
from mfdist.cluster.world import World
from mfdist.data.dataset import Dataset
from mfdist.data.loader import Loader
from mfdist.errors import DataError, MfdistError, UsageError
from mfdist.log import Console
from mfdist.run import background_save, checkpoint, tensor_files
from mfdist.run.checkpoint import Retention
from mfdist.training import session
from mfdist.training.config import TrainConfig
from mfdist.training.train import train

QUIET = Console(speaks=False)
LANES = {"users": 5, "items": 6, "lanes": 9, "lane_weights": [0, 5, 0, 1, 0, 30, 0, 2, 60]}
"""Lanes of very unequal size, five of them without a user; of nine item parts three are empty."""
CASES = [
    {"model": model, "optimizer": optimizer}
    for model in ("mf", "mf_advanced")
    for optimizer in ("adamw", "sparse_adam", "rowwise_adagrad", "sgd")
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("data") / "uneven")
    make_dataset(path, rows=600, val_rows=100, **LANES)
    return path


def config(data, run, **values):
    small = {"batch_size": 64, "epochs": 1, "emb_dim": 4, "device": "cpu", "lr": 0.01, "checkpoint_every": "4"}
    return TrainConfig.ready(
        "vignette_mf_advanced", data=data, run_dir=str(run), **{**small, "sharding": "row", **values}
    )


def configs(data, folder, cases, **values):
    return [config(data, folder / f"{case['model']}-{case['optimizer']}", **case, **values) for case in cases]


def held(c, world):
    """What this rank's tables hold once the newest checkpoint is loaded: {part: values of each row}."""
    dataset = Dataset.open(c.data)
    with Loader(dataset, batch_size=c.batch_size, seed=c.seed, rank=world.rank, world_size=world.size) as loader:
        found = session.build(c, dataset, world, QUIET, loader)
        session.restore_or_initialise(found)
        try:
            return {
                f"{side}{part}.{key}": tensor.detach().clone().numpy()
                for side, table in (("user", found.model.user), ("item", found.model.item))
                for part in session._parts(found, table, c.sharding == "replicated")
                for key, tensor in table.part(part).tensors().items()
            }
        finally:
            if found.fused:
                found.fused.close()


def save_all(world, all_configs):
    for c in all_configs:
        train(c, world, QUIET)


def load_all(world, all_configs, more):
    """The tables after loading, and the losses of one more epoch."""
    tables = [held(c, world) for c in all_configs]
    return tables, [train(c, world, QUIET)["epochs"] for c in more]


def merged(parts):
    return {key: value for part in parts for key, value in part.items()}


FEW = [CASES[0], CASES[5]]


@pytest.mark.parametrize(("cases", "ranks"), [(FEW, (3, 1)), pytest.param(CASES, (1, 2, 3, 7), marks=pytest.mark.slow)])
def test_saved_on_four_ranks_loads_on_any_number(data, tmp_path, cases, ranks):
    """Tables equal bit by bit, and the losses of one more epoch as on 4 ranks."""
    run_ranks(4, save_all, configs(data, tmp_path / "saved", cases), timeout=900)
    tables = losses = None
    for size in (4, *ranks):
        runs = tmp_path / f"on{size}"
        shutil.copytree(tmp_path / "saved", runs)
        more = configs(data, runs, cases, epochs=2)
        results = run_ranks(size, load_all, configs(data, runs, cases), more, timeout=900)
        got = [merged(result[0][k] for result in results) for k in range(len(cases))]
        tables, losses = tables or got, losses or results[0][1]
        for k, case in enumerate(cases):
            assert got[k].keys() == tables[k].keys() and len(got[k]) > 30
            for key, value in got[k].items():
                assert (value == tables[k][key]).all(), (size, case, key)
            for one, other in zip(results[0][1][k], losses[k], strict=True):
                assert one["train_rmse"] == pytest.approx(other["train_rmse"], rel=1e-5), (size, case)
                assert one["val_rmse"] == pytest.approx(other["val_rmse"], rel=1e-5), (size, case)


@pytest.mark.parametrize("optimizer", ["sparse_adam", "rowwise_adagrad", "sgd"])
def test_a_checkpoint_loads_into_the_other_placement(data, tmp_path, optimizer):
    for first, second in (("row", "replicated"), ("replicated", "row")):
        run = tmp_path / f"{first}-{second}"
        train(config(data, run, optimizer=optimizer, sharding=first), World.alone(), QUIET)
        before = held(config(data, run, optimizer=optimizer, sharding=first), World.alone())
        after = held(config(data, run, optimizer=optimizer, sharding=second), World.alone())
        assert before.keys() == after.keys()
        assert all((before[key] == after[key]).all() for key in before if not key.endswith("last"))


# Beside the training ------------------------------------------------------------------------------


def tensors_of(world, value=1.0, rows=1000):
    return {f"user.part-{world.rank:05d}.rows": torch.full((rows, 8), value), f"w{world.rank}": torch.ones(3)}


def test_a_snapshot_is_what_the_tensors_were_when_it_began(tmp_path, monkeypatch):
    go = threading.Event()
    flush = background_save._flush
    monkeypatch.setattr(background_save, "_flush", lambda path: (go.wait(10), flush(path)))
    world, run = World.alone(), str(tmp_path)
    tensors = tensors_of(world)
    one = background_save.Saver(run, world, Retention(3))
    one.begin(5, tensors, {"a": 1}, None)
    assert one.flags() == [1.0, 0.0] and one.advance(1.0, 0.0) is None
    assert checkpoint.committed_steps(run) == []
    for tensor in tensors.values():
        tensor.fill_(7)
    go.set()
    done = one.wait()
    assert done["step"] == 5 and done["bytes"] > 32_000 and done["pause_seconds"] < done["background_seconds"] + 10
    assert checkpoint.committed_steps(run) == [5] and checkpoint.verify(checkpoint.folder_of(run, 5)) == []
    got = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    tensor_files.read(checkpoint.folder_of(run, 5), got)
    assert all((tensor == 1).all() for tensor in got.values())
    assert one.wait() is None


@pytest.mark.parametrize("files", [1, 2, 5, 9])
def test_several_files_of_a_rank_hold_what_one_does(tmp_path, files):
    rng = np.random.default_rng(3)
    sizes = (1000, 1, 700, 0, 300, 300)
    tensors = {f"user.part-{k:05d}.rows": torch.from_numpy(rng.random((n, 8), np.float32)) for k, n in enumerate(sizes)}
    tensors["offset"] = torch.ones(1)
    places = tensor_files.write(str(tmp_path), 3, tensors, files)
    assert {place.file for place in places} == {f"__3_{k}.distcp" for k in range(min(files, len(tensors)))}
    assert {place.name for place in places} == set(tensors)
    if files == 2:
        held = [os.path.getsize(tmp_path / f"__3_{k}.distcp") for k in range(2)]
        assert max(held) < 1.3 * min(held)
    tensor_files.write_metadata(str(tmp_path / ".metadata"), places)
    got = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    tensor_files.read(str(tmp_path), got)
    assert all(torch.equal(got[name], tensors[name]) for name in tensors)


def test_a_checkpoint_is_written_over_the_files_that_were_made_for_it(tmp_path, monkeypatch):
    world, run = World.alone(), str(tmp_path)
    monkeypatch.setattr(background_save, "_on_a_disk_here", lambda run: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    one = background_save.Saver(run, world, Retention(1))
    tensors = tensors_of(world) | {"user.part-00001.rows": torch.ones(900, 8)}
    assert one.unprepared
    one.prepare(tensors)
    assert not one.unprepared
    one._making.join()
    made = {name: os.stat(tmp_path / "checkpoints/spare" / name).st_ino for name in ("__0_0.distcp", "__0_1.distcp")}
    one.begin(1, tensors, {}, None)
    one.wait()
    folder = checkpoint.folder_of(run, 1)
    assert {name: os.stat(os.path.join(folder, name)).st_ino for name in made} == made
    assert checkpoint.verify(folder) == [] and os.listdir(tmp_path / "checkpoints/spare") == []
    got = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    tensor_files.read(folder, got)
    assert all(torch.equal(got[name], tensors[name]) for name in tensors)
    one.close()


def test_making_files_ahead_ends_with_the_run_and_its_failure_is_none_of_the_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(background_save, "_on_a_disk_here", lambda run: True)
    monkeypatch.setattr(background_save, "PAGES_BYTES", 1)
    one = background_save.Saver(str(tmp_path), World.alone(), Retention(1))
    one.prepare({"w": torch.ones(10_000_000)})
    began = time.monotonic()
    one.close()
    assert time.monotonic() - began < 5
    monkeypatch.setattr(background_save, "_make_pages", lambda *rest: refuse())
    one.prepare({"w": torch.ones(10)})
    one.begin(1, {"w": torch.ones(10)}, {}, None)
    assert one.wait()["step"] == 1


def break_rank_1(world, run, where):
    """Two saves, the second fails on rank 1 only; returns what each rank hears, and the steps that stand."""
    if world.rank == 1:
        if where == "pause":
            write = tensor_files.write
            tensor_files.write = lambda folder, *rest: refuse() if "00000002" in folder else write(folder, *rest)
        else:
            entry = checkpoint.entry
            checkpoint.entry = lambda path: refuse() if "00000002" in path else entry(path)
    one = background_save.Saver(run, world, Retention(3))
    one.begin(1, tensors_of(world), {}, None)
    one.begin(2, tensors_of(world, 2.0), {}, None)
    with pytest.raises(MfdistError, match="No space left") as caught:
        one.wait()
    return str(caught.value), checkpoint.committed_steps(run), os.listdir(f"{run}/checkpoints")


def refuse():
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["pause", "background"])
def test_a_failure_on_one_rank_is_heard_by_all_and_leaves_the_old_checkpoint(tmp_path, where):
    heard = run_ranks(2, break_rank_1, str(tmp_path), where)
    assert heard[0][0] == heard[1][0] and heard[0][1:] == ([1], ["step-00000001"])


def test_a_failing_background_ends_the_run_and_the_rest_is_intact(data, tmp_path, monkeypatch):
    entry = checkpoint.entry
    monkeypatch.setattr(checkpoint, "entry", lambda path: refuse() if "00000008" in path else entry(path))
    c = config(data, tmp_path / "run", checkpoint_every="4", epochs=2)
    with pytest.raises(MfdistError, match=r"step-00000008 could not be written.*No space left"):
        train(c, World.alone(), QUIET)
    assert checkpoint.committed_steps(c.run_dir) == [4]


def test_saving_changes_no_number_and_is_logged(data, tmp_path):
    plain = train(config(data, tmp_path / "plain", checkpoint_every="epoch", epochs=2), World.alone(), QUIET)
    often = train(config(data, tmp_path / "often", checkpoint_every="1", epochs=2), World.alone(), QUIET)
    assert [e["train_rmse"] for e in plain["epochs"]] == [e["train_rmse"] for e in often["epochs"]]
    first, second = ((tmp_path / name / "model/model.safetensors").read_bytes() for name in ("plain", "often"))
    assert first == second
    records = [json.loads(line) for line in (tmp_path / "often/metrics.jsonl").read_text().splitlines()]
    saves = [record for record in records if record["kind"] == "checkpoint"]
    assert [record["step"] for record in saves] == list(range(1, 21))
    assert all(record["pause_seconds"] > 0 and record["background_seconds"] > 0 for record in saves)
    assert not (tmp_path / "often/checkpoints/spare").exists()


# Which stay ---------------------------------------------------------------------------------------


def write_steps(run, steps):
    one = background_save.Saver(str(run), World.alone(), Retention(99))
    for step in steps:
        one.begin(step, tensors_of(World.alone(), step), {"progress": {"stop_rmse": []}}, None)
    one.wait()


def test_pruning_keeps_the_last_every_nth_and_the_chosen(tmp_path):
    write_steps(tmp_path, range(1, 11))
    os.unlink(tmp_path / "checkpoints/step-00000003/COMMIT")
    assert checkpoint.prune(str(tmp_path), Retention(2, 4), chosen=5) == [1, 2, 3, 6, 7]
    assert checkpoint.all_steps(str(tmp_path)) == [4, 5, 8, 9, 10]
    assert all(checkpoint.verify(checkpoint.folder_of(str(tmp_path), step)) == [] for step in (4, 5, 8, 9, 10))
    write_steps(tmp_path, [11])  # into the spare files, whose content is another step's
    assert checkpoint.verify(checkpoint.folder_of(str(tmp_path), 11)) == []
    got = {"w0": torch.zeros(3), "user.part-00000.rows": torch.zeros(1000, 8)}
    tensor_files.read(checkpoint.folder_of(str(tmp_path), 11), got)
    assert (got["user.part-00000.rows"] == 11).all()


def test_files_are_made_ahead_on_a_disk_alone():
    assert not background_save._on_a_disk_here("/proc") and not background_save._on_a_disk_here("/no/such/folder")


def test_keep_every_of_a_run(data, tmp_path):
    train(config(data, tmp_path / "run", checkpoint_every="1", keep=2, keep_every=4), World.alone(), QUIET)
    assert checkpoint.committed_steps(str(tmp_path / "run")) == [4, 8, 9, 10]


def test_the_job_lists_verifies_and_prunes(tmp_path, capsys):
    run = str(tmp_path)
    with pytest.raises(DataError, match="no run"):
        job.main(["ls", run])
    about = {"job": "train", "dataset": {"name": "d", "fingerprint": "f"}, "config": {"keep": 2, "keep_every": None}}
    (tmp_path / "run.json").write_text(json.dumps(about))
    write_steps(run, range(1, 6))
    os.unlink(tmp_path / "checkpoints/step-00000002/COMMIT")
    job.main(["ls", run])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and "no COMMIT" in lines[2] and lines[5].split()[0] == "5"
    job.main(["verify", run])
    assert capsys.readouterr().out.count("intact") == 4
    with open(tmp_path / "checkpoints/step-00000004/__0_0.distcp", "r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(DataError, match="1 of 4 checkpoints"):
        job.main(["verify", run])
    assert "__0_0.distcp has 1000 bytes" in capsys.readouterr().out
    job.main(["prune", run])
    assert checkpoint.all_steps(run) == [4, 5]
    job.main(["prune", run, "--keep", "1"])
    assert checkpoint.all_steps(run) == [5] and sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000005"]
    for argv in (["ls"], ["tidy", run], ["ls", run, "--keep", "1"]):
        with pytest.raises(UsageError):
            job.main(argv)


# Damage and malice --------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "commit", "metadata"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(data, tmp_path, capsys, damage):
    whole = train(config(data, tmp_path / "whole", epochs=2), World.alone(), QUIET)
    c = config(data, tmp_path / "run", epochs=1)
    train(c, World.alone(), QUIET)
    folder = tmp_path / "run/checkpoints" / f"step-{checkpoint.committed_steps(c.run_dir)[-1]:08d}"
    path = folder / {"commit": "COMMIT", "metadata": ".metadata"}.get(damage, "__0_0.distcp")
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    again = train(config(data, tmp_path / "run", epochs=2), World.alone(), Console())
    assert f"{folder} is damaged" in capsys.readouterr().err
    assert [e["train_rmse"] for e in again["epochs"]] == [e["train_rmse"] for e in whole["epochs"]]


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_planted_pickle_runs_nothing(data, tmp_path):
    """Even with checksums that agree: who plants a pickle can write COMMIT as well."""
    c = config(data, tmp_path / "run")
    train(c, World.alone(), QUIET)
    proof = str(tmp_path / "proof")
    pickle.loads(pickle.dumps(Planted(proof)))  # the pickle works where it is trusted
    os.rmdir(proof)
    for name in (".metadata", "__0_0.distcp"):
        step = checkpoint.committed_steps(c.run_dir)[-1]
        folder = tmp_path / "run/checkpoints" / f"step-{step:08d}"
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps(Planted(proof)))
        about = json.loads((folder / "COMMIT").read_text())
        about["files"][name] = checkpoint.entry(str(folder / name))
        (folder / "COMMIT").write_text(json.dumps(about))
        assert checkpoint.verify(str(folder)) == []
        with pytest.raises(DataError, match=r"metadata|cannot be read"):
            train(config(data, tmp_path / "run", epochs=2), World.alone(), QUIET)
        assert not os.path.exists(proof)
        (folder / name).write_bytes(before)
        about["files"][name] = checkpoint.entry(str(folder / name))
        (folder / "COMMIT").write_text(json.dumps(about))


def test_metadata_that_points_elsewhere_is_refused(tmp_path):
    place = tensor_files.Place("w", torch.float32, (3,), "../other.distcp", 0, 10)
    tensor_files.write_metadata(str(tmp_path / ".metadata"), [place])
    with pytest.raises(DataError, match="outside"):
        tensor_files.read(str(tmp_path), {"w": torch.zeros(3)})


def test_an_object_store_gets_whole_checkpoints_and_staging_is_removed(data, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = f"memory://checkpoints-{time.time_ns()}"
    whole = train(config(data, tmp_path / "whole", epochs=2), World.alone(), QUIET)
    train(config(data, run, epochs=1), World.alone(), QUIET)
    again = train(config(data, run, epochs=2), World.alone(), QUIET)
    np.testing.assert_array_equal(*[[e["train_rmse"] for e in r["epochs"]] for r in (whole, again)])
    assert not [name for name in os.listdir(tmp_path) if name.endswith("-mfdist")]
