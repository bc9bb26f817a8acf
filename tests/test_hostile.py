"""Directories that are damaged, or made by somebody who means ill: a sentence and exit code 3 (or 2), never a
traceback, and nothing outside of them is read or removed."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import make_dataset
from hostile import mutated, watched

import mfdist
from mfdist import storage
from mfdist.cluster.world import World
from mfdist.data.dataset import Dataset, verify
from mfdist.data.scan import scan
from mfdist.errors import DataError, MfdistError, UsageError
from mfdist.json_tables import typed
from mfdist.log import Console, MetricsLog
from mfdist.prepare.compact import compact
from mfdist.results.comparison_page import _report_of
from mfdist.results.trained_on import dataset_of_run, sample_of_run
from mfdist.run import checkpoint, directory, stored_form, tensor_files
from mfdist.run.checkpoint_tool import HousekeepingConfig, manage_checkpoints
from mfdist.training.config import TrainConfig
from mfdist.training.session import read_state
from mfdist.training.train import train

QUIET = Console(speaks=False)


def config(data, run, **values):
    values = {"epochs": 1, "batch_size": 100, "emb_dim": 4, "device": "cpu", "checkpoint_every": "2", **values}
    return TrainConfig.ready("vignette_mf_advanced", data=str(data), run_dir=str(run), **values)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with a dataset ``data``, a finished run ``run`` and, in ``outside``, files that must not be opened."""
    home = tmp_path_factory.mktemp("hostile")
    make_dataset(home / "data", rows=600, lanes=3, val_rows=90, users=60, items=30)
    train(config(home / "data", home / "run"), World.alone(), QUIET)
    (home / "outside").mkdir()
    step = checkpoint.committed_steps(str(home / "run"))[-1]
    inside = [*(home / "data").glob("**/*.parquet"), *(home / "run/model").iterdir(),
              *Path(checkpoint.folder_of(str(home / "run"), step)).iterdir()]  # fmt: skip
    for path in inside:
        shutil.copy(path, home / "outside" / path.name)
    return home


def newest(home):
    return Path(checkpoint.folder_of(str(home / "run"), checkpoint.committed_steps(str(home / "run"))[-1]))


# What is done with each kind of file ---------------------------------------------------------------


def use_dataset(home):
    dataset = Dataset.open(str(home / "data"))
    dataset.check_files()
    dataset.check_vocabularies()
    for _ in verify(dataset):
        pass
    for side in ("users", "items"):
        dataset.counts(side)
        dataset.ids(side).to_pylist()
    for split in ("train", "val"):
        for _ in scan(dataset, split, range(len(dataset.manifest.lanes))):
            pass


def use_checkpoint(home):
    folder = str(newest(home))
    manage_checkpoints(HousekeepingConfig(action_and_run=("ls", str(home / "run"))), lambda line: None)
    damaged = None
    try:
        manage_checkpoints(HousekeepingConfig(action_and_run=("verify", str(home / "run"))), lambda line: None)
    except DataError as error:
        damaged = error
    sizes = tensor_files.sizes(folder)
    tensor_files.read(folder, {name: torch.zeros(size) for name, size in sizes.items()})
    read_state(folder)
    if damaged is not None:
        raise damaged


def use_run(home):
    run, dataset = str(home / "run"), Dataset.open(str(home / "data"))
    _report_of(run)
    directory.finished_epochs(run)
    directory.prepare(run, config("", run), dataset, job="train", resume="auto", overwrite=False)
    sample_of_run(run)
    dataset_of_run(run)
    MetricsLog(str(home / "run/metrics.jsonl"), keep_until_step=10**9).records("epoch")


def use_model(home):
    model = mfdist.load(str(home / "run"))
    exported = model.exported
    users, items = np.arange(exported.num_users), np.arange(exported.num_items)
    exported.predict(users, np.resize(items, len(users)))
    names = exported.ids("users").to_pylist()
    exported.ids("items").to_pylist()
    if exported.num_items and names and None not in names:
        model.recommend(names[:2], k=3)


FILES = {
    "dataset.json": ("data/dataset.json", use_dataset),
    "users.parquet": ("data/users.parquet", use_dataset),
    "lane": ("data/train/lane-00001.parquet", use_dataset),
    "COMMIT": ("CHECKPOINT/COMMIT", use_checkpoint),
    "state.json": ("CHECKPOINT/state.json", use_checkpoint),
    "metadata": ("CHECKPOINT/.metadata", use_checkpoint),
    "run.json": ("run/run.json", use_run),
    "report.json": ("run/report.json", use_run),
    "config.toml": ("run/config.toml", use_run),
    "metrics.jsonl": ("run/metrics.jsonl", use_run),
    "config.json": ("run/model/config.json", use_model),
    "safetensors": ("run/model/model.safetensors", use_model),
    "model users": ("run/model/users.parquet", use_model),
}
SHARE = {"dataset.json": 3, "config.json": 2, "COMMIT": 2, "state.json": 2}
"""Weights of the files among all mutations, else 1."""


def count(name, total):
    return round(total * SHARE.get(name, 1) / sum(SHARE.get(each, 1) for each in FILES))


def fuzz(home, name, total):
    where, use = FILES[name]
    path = newest(home) / where.removeprefix("CHECKPOINT/") if where.startswith("CHECKPOINT/") else home / where
    whole, rng = path.read_bytes(), random.Random(name)
    use(home)
    refused = 0
    try:
        with watched(home / "outside") as opened:
            for number in range(count(name, total)):
                path.write_bytes(mutated(whole, rng, home / "outside"))
                try:
                    with warnings.catch_warnings(), np.errstate(all="ignore"):
                        warnings.simplefilter("ignore", RuntimeWarning)  # figures that a flipped bit has made huge
                        use(home)
                except MfdistError as error:
                    assert isinstance(error, (DataError, UsageError)), (number, error)
                    assert len(str(error)) < 2000
                    refused += 1
                except Exception:
                    kept = home / "failing"
                    kept.write_bytes(path.read_bytes())
                    pytest.fail(f"mutation {number} of {name}, kept as {kept}:\n{traceback.format_exc()}")
    finally:
        path.write_bytes(whole)
    assert opened == []
    return refused


@pytest.mark.parametrize("name", FILES)
def test_a_mutated_file_is_refused_with_a_sentence(places, name):
    assert fuzz(places, name, 400) or name == "metrics.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_two_thousand_mutations(places, name):
    fuzz(places, name, 2000)


def test_the_canary_sings(places):
    with watched(places / "outside") as opened:
        (places / "outside/users.parquet").read_bytes()
    assert set(opened) == {"users.parquet"}


# Paths ---------------------------------------------------------------------------------------------


def copied(places, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(places, home, symlinks=True)
    return home


def change_manifest(home, change):
    path = home / "data/dataset.json"
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def rename_lane(name):
    def change(table):
        old = table["lanes"][0]["files"][0]
        table["lanes"][0]["files"][0] = name
        next(entry for entry in table["files"] if entry["path"] == old)["path"] = name

    return change


@pytest.mark.parametrize(
    "name", ["../outside/lane-00000.parquet", "train/../../outside/lane-00000.parquet", "/etc/hostname", "train//x",
             "file:///etc/hostname", "train/\\..\\x"]
)  # fmt: skip
def test_a_manifest_that_names_files_elsewhere_is_refused_by_every_job(places, tmp_path, name):
    home = copied(places, tmp_path)
    change_manifest(home, rename_lane(name))
    before = sorted((home / "outside").iterdir())
    for use in (
        lambda: Dataset.open(str(home / "data")),
        lambda: compact(str(home / "data"), 1 << 30, QUIET),
        lambda: train(config(home / "data", home / "next"), World.alone(), QUIET),
    ):
        with pytest.raises(DataError, match=r"is damaged .*no path inside of its folder.*run prepare again"):
            use()
    assert sorted((home / "outside").iterdir()) == before


@pytest.mark.parametrize("where", ["data/train/lane-00000.parquet", "data/users.parquet", "data/train"])
def test_a_link_that_leads_out_of_a_dataset_is_not_followed(places, tmp_path, where):
    home = copied(places, tmp_path)
    path = home / where
    (home / "kept").mkdir()
    path.rename(home / "kept" / path.name)
    path.symlink_to(home / "kept" / path.name)
    with watched(home / "kept") as opened, pytest.raises(DataError, match="is a link that leads out of its folder"):
        use_dataset(home)
    assert opened == []


@pytest.mark.parametrize("where", ["config.json", "model.safetensors", "users.parquet"])
def test_a_link_that_leads_out_of_a_model_is_not_followed(places, tmp_path, where):
    home = copied(places, tmp_path)
    path = home / "run/model" / where
    path.rename(home / "outside" / where)
    path.symlink_to(home / "outside" / where)
    with watched(home / "outside") as opened, pytest.raises(DataError, match="is a link that leads out of its folder"):
        use_model(home)
    assert opened == []


def test_a_dataset_that_is_itself_a_link_is_one(places, tmp_path):
    (tmp_path / "linked").symlink_to(places / "data")
    dataset = Dataset.open(str(tmp_path / "linked"))
    dataset.check_files()
    assert list(verify(dataset)) == []


def test_a_checkpoint_that_names_files_elsewhere_is_refused(places, tmp_path):
    home = copied(places, tmp_path)
    folder = newest(home)
    with open(folder / ".metadata", "rb") as stream:
        about = stored_form._Unpickler(stream).load()
    file = next(place.relative_path for place in about.storage_data.values())
    own = {index: place.relative_path for index, place in about.storage_data.items()}
    for name in (f"../{file}", f"/{file}"):
        for place in about.storage_data.values():
            place.relative_path = name
        (folder / ".metadata").write_bytes(pickle.dumps(about))
        with pytest.raises(DataError, match="outside of its folder"):
            tensor_files.sizes(str(folder))
    for index, place in about.storage_data.items():
        place.relative_path = own[index]
    (folder / ".metadata").write_bytes(pickle.dumps(about))
    (folder / file).rename(home / "outside" / file)
    (folder / file).symlink_to(home / "outside" / file)
    with pytest.raises(DataError, match="leads out of its folder"):
        tensor_files.sizes(str(folder))
    table = json.loads((folder / "COMMIT").read_text())
    table["files"]["../../run.json"] = {"bytes": 1, "checksum": "x"}
    (folder / "COMMIT").write_text(json.dumps(table))
    with watched(home / "outside") as opened:
        faults = checkpoint.verify(str(folder))
    assert any("no path inside of its folder" in fault for fault in faults)
    assert any("leads out of its folder" in fault for fault in faults) and opened == []


# Counts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda t: t["lanes"][0]["files"].append("train/none.parquet"), "not among its files"),
        (lambda t: t["lanes"][0]["files"].pop(), "belongs to no lane"),
        (lambda t: t["lanes"][1]["files"].append(t["lanes"][0]["files"][0]), "two lanes have the same file"),
        (lambda t: t["files"].append(t["files"][0]), "twice"),
        (lambda t: t["files"][0].update(rows=-1), "has -1 rows"),
        (lambda t: t["files"][0].update(bytes=True), r"files\[0\].bytes is true, expected a whole number"),
        (lambda t: t["lanes"][0].update(train_rows=t["lanes"][0]["train_rows"] + 1), "its files"),
        (lambda t: t["num_ratings"].update(train=10**9), "its lanes"),
        (lambda t: t.update(num_users=2**62), "its lanes have 60 users"),
        (lambda t: t.update(num_items="30"), "num_items is \"30\", expected a whole number"),
        (lambda t: t["lanes"][0].update(user_ranges=[[0, 2**63]]), "expected a whole number"),
        (lambda t: t["lanes"][0].update(user_ranges=[[5, 0]]), "do not follow"),
        (lambda t: t.update(rating_scale=[5.0, 1.0]), "no range of numbers"),
        (lambda t: t.update(rating_scale=[1.0]), "has 1 values, expected 2"),
        (lambda t: t.update(lanes={}), "expected a list"),
        (lambda t: t.update(surprise=1), "unknown key"),
        (lambda t: t.pop("files"), "has no files"),
        (lambda t: t["split"].update(kind=3), "split.kind is 3, expected text"),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_says_where(places, tmp_path, change, fault):
    home = copied(places, tmp_path)
    change_manifest(home, change)
    with pytest.raises(DataError, match=rf"dataset.json is damaged \(.*{fault}.*\); run prepare again"):
        Dataset.open(str(home / "data"))


def test_users_without_names_are_noticed_before_tables_are_made(places, tmp_path):
    home = copied(places, tmp_path)

    def change(table):
        table["num_users"] = 2**50
        table["lanes"][-1]["user_ranges"][-1][1] = 2**50

    change_manifest(home, change)
    with pytest.raises(DataError, match=r"users.parquet has 60 rows, the manifest says 1125899906842624"):
        train(config(home / "data", home / "next"), World.alone(), QUIET)


@pytest.mark.parametrize("name", ["", ".", "..", "a/../b", "/a", "a//b", "a/", "c:d", "a\\b", "a\nb"])
def test_names_that_may_lie_elsewhere(name):
    with pytest.raises(ValueError, match="no path inside of its folder"):
        storage.check_relative(name)
    storage.check_relative("train/lane-00000.append-001.parquet")


def test_json_as_types():
    assert typed(tuple[float, ...] | None, [1, 2.5], "x") == (1.0, 2.5)
    assert typed(float | None, None, "x") is None
    for kind, value in ((int, 1.0), (int, True), (float, "1"), (str, 1), (bool, 1), (str, "\ud800"), (int, 2**63)):
        with pytest.raises(ValueError, match=r"^x is .* expected"):
            typed(kind, value, "x")
