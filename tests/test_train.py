"""Training against a plain torch loop, against itself on other ranks, and after a stop."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import make_dataset, training_rows, write_dataset
from ranks import run_ranks
from safetensors.numpy import load_file

from mfdist.cluster.world import World
from mfdist.config import parse_config
from mfdist.data.dataset import Dataset
from mfdist.data.loader import Loader
from mfdist.errors import DataError, DivergedError, StopRequested, UsageError
from mfdist.log import Console
from mfdist.metrics import round_to_scale
from mfdist.model.models import ITEM_TABLE, USER_TABLE, sigmoid_range
from mfdist.results.exported_model import ExportedModel
from mfdist.results.ranking import rank_metrics, ranked_users, top_of_model
from mfdist.run import checkpoint
from mfdist.training import validation
from mfdist.training.config import TrainConfig
from mfdist.training.train import train

CONFIGS = Path(__file__).parents[1] / "mfdist/configs"
QUIET = Console(speaks=False)
VIGNETTE = {
    "mf": {"model": "mf", "lr": 0.002},
    "mf_advanced": {"model": "mf_advanced", "lr": 0.0005},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("data") / "small")
    make_dataset(path, rows=1500, lanes=7, val_rows=200, users=150, items=60, row_group=64)
    return path


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """20,000 ratings with planted factors: something to learn beyond biases."""
    path = str(tmp_path_factory.mktemp("planted") / "data")
    rng = np.random.default_rng(3)
    p, q = rng.normal(0, 0.5, (400, 3)), rng.normal(0, 0.5, (150, 3))
    bias = rng.normal(0, 0.3, 400), rng.normal(0, 0.3, 150)
    lanes: dict[str, list[list[dict[str, np.ndarray]]]] = {"train": [], "val": []}
    ranges = [(100 * lane, 100 * lane + 100) for lane in range(4)]
    for first, end in ranges:
        for split, rows in (("train", 5000), ("val", 1200)):
            user, item = rng.integers(first, end, rows), rng.integers(0, 150, rows)
            score = 3.2 + (p[user] * q[item]).sum(1) + bias[0][user] + bias[1][item] + rng.normal(0, 0.9, rows)
            rating = np.clip(np.rint(score), 1, 5).astype(np.float32)
            lanes[split].append([{"user": user.astype(np.int32), "item": item.astype(np.int32), "rating": rating}])
    write_dataset(path, lanes["train"], lanes["val"], ranges=ranges, num_items=150)
    return path


def config(data, run, **values):
    small = {"batch_size": 256, "epochs": 2, "emb_dim": 8, "device": "cpu"}
    return TrainConfig.ready("vignette_mf_advanced", data=data, run_dir=str(run), **{**small, **values})


def of_file(name, data, run, epochs):
    """One of the ready configurations."""
    flags = ["--config", str(CONFIGS / f"{name}.toml"), "--data", data, "--run-dir", str(run), "--epochs", str(epochs)]
    return parse_config(TrainConfig, flags, "train")


def train_all(world, configs):
    """Several runs, one after the other, in one world; module level for the spawned ranks."""
    return [train(c, world, QUIET) for c in configs]


def curve(report):
    return np.array([[e["train_rmse"], e["val_rmse"]] for e in report["epochs"]])


def exported(run):
    return load_file(f"{run}/model/model.safetensors")


class Plain(torch.nn.Module):
    """The vignette's models as anybody would write them."""

    def __init__(self, form, users, items, seed):
        super().__init__()
        rows = [form.initial(seed, USER_TABLE, 0, users), form.initial(seed, ITEM_TABLE, 0, items)]
        tables = [torch.nn.Embedding.from_pretrained(r[:, : form.dim], freeze=False) for r in rows]
        self.tables = torch.nn.ModuleList(tables)
        self.biases = torch.nn.ModuleList()
        if form.bias:
            self.biases.extend(torch.nn.Embedding.from_pretrained(r[:, form.dim :], freeze=False) for r in rows)
            self.offset = torch.nn.Parameter(torch.zeros(1))
        self.form = form

    def forward(self, user, item):
        score = (self.tables[0](user) * self.tables[1](item)).sum(1)
        if self.form.bias:
            score = score + self.biases[0](user)[:, 0] + self.biases[1](item)[:, 0] + self.offset
        if self.form.sigmoid_range is None:
            return score
        low, high = self.form.sigmoid_range
        return torch.sigmoid(score) * (high - low) + low


def plain_train_rmse(c):
    """The running train RMSE of each epoch of a torch.nn.Embedding + torch.optim.AdamW loop on the same batches."""
    dataset = Dataset.open(c.data)
    model = Plain(c.form(dataset.manifest), dataset.manifest.num_users, dataset.manifest.num_items, c.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr, weight_decay=c.weight_decay, betas=c.betas, eps=c.eps)
    found = []
    with Loader(dataset, batch_size=c.batch_size, seed=c.seed, rank=0, world_size=1) as loader:
        for epoch in range(c.epochs):
            total = 0.0
            for batch in loader.epoch(epoch):
                error = model(batch.user.long(), batch.item.long()) - batch.rating
                optimizer.zero_grad()
                error.square().mean().backward()
                optimizer.step()
                total += error.detach().double().square().sum().item()
            found.append((total / loader.num_rows) ** 0.5)
    return np.array(found)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_equals_a_plain_torch_loop(data, tmp_path, ranks):
    configs = [
        config(data, tmp_path / f"{name}-{sharding}", sharding=sharding, epochs=3, **values)
        for name, values in VIGNETTE.items()
        for sharding in ("row", "replicated")
    ]
    reports = run_ranks(ranks, train_all, configs)[0]
    for c, report in zip(configs, reports, strict=True):
        np.testing.assert_allclose(curve(report)[:, 0], plain_train_rmse(c), rtol=2e-6, err_msg=c.run_dir)


def test_world_size_is_not_a_hyper_parameter(data, tmp_path):
    def configs(ranks):
        return [
            config(data, tmp_path / f"{ranks}-{name}", lr_schedule="cosine", **VIGNETTE["mf_advanced"], **values)
            for name, values in OPTIMIZER_CASES.items()
        ]

    base = [train(c, World.alone(), QUIET) for c in configs(1)]
    for ranks in (2, 3):
        for one, many, c in zip(base, run_ranks(ranks, train_all, configs(ranks))[0], configs(ranks), strict=True):
            np.testing.assert_allclose(curve(many), curve(one), atol=1e-5)
            for name, tensor in exported(c.run_dir).items():
                want = exported(c.run_dir.replace(f"{ranks}-", "1-"))[name].astype("f8")
                assert np.linalg.norm(tensor - want) <= 1e-5 * np.linalg.norm(want), (c.run_dir, name)


OPTIMIZER_CASES = {
    "adamw": {"optimizer": "adamw", "l2": (0.1, 0.05)},
    "sparse_adam": {"optimizer": "sparse_adam"},
    "adagrad": {"optimizer": "rowwise_adagrad"},
    "sgd": {"optimizer": "sgd"},
    "replicated": {"optimizer": "sparse_adam", "sharding": "replicated"},
}


@pytest.mark.parametrize("kind", ["sparse_adam", "rowwise_adagrad", "sgd"])
def test_placements_are_equal(data, tmp_path, kind):
    values = {"optimizer": kind, "lr": 0.01, "weight_decay": 0.1}
    reports = [
        train(config(data, tmp_path / sharding, **values, sharding=sharding), World.alone(), QUIET)
        for sharding in ("row", "replicated")
    ]
    np.testing.assert_allclose(curve(reports[0]), curve(reports[1]), rtol=1e-6)


def test_same_run_twice_is_bitwise_equal_and_the_export_gives_the_reported_error(data, tmp_path):
    for sharding in ("row", "replicated"):
        runs = [tmp_path / f"{sharding}{k}" for k in range(2)]
        reports = [train(config(data, run, sharding=sharding), World.alone(), QUIET) for run in runs]
        assert curve(reports[0]).tolist() == curve(reports[1]).tolist()
        first, second = exported(runs[0]), exported(runs[1])
        assert all((first[k] == second[k]).all() for k in first)
        rows = training_rows(Dataset.open(data), "val")
        user, item = rows[:, 0].astype(int), rows[:, 1].astype(int)
        score = (first["user_embedding"][user] * first["item_embedding"][item]).sum(1)
        score = score + first["user_bias"][user] + first["item_bias"][item] + first["offset"][0]
        error = 0.5 + 5 / (1 + np.exp(-score.astype("f8"))) - rows[:, 2]
        assert abs(np.sqrt((error**2).mean()) - reports[0]["final"]["val_rmse"]) < 1e-5


def ranking_of_export(world, c, items_at_a_time):
    """The ranking that a run reports, and that of its export."""
    validation.RANKED_ITEMS = items_at_a_time
    reported = train(c, world, QUIET)["ranking"]
    dataset, model = Dataset.open(c.data), ExportedModel.open(c.run_dir)
    return reported, rank_metrics(partial(top_of_model, model), ranked_users(dataset, world), dataset, world)


@pytest.mark.parametrize("values", [{"model": "mf"}, {"cold": "known-side", "no_sigmoid": True, "members": 2}])
def test_the_ranking_reported_is_that_of_the_export(data, tmp_path, monkeypatch, values):
    """From the tables of ranks and a few items at a time, as from the whole files."""
    monkeypatch.setattr(validation, "RANKED_ITEMS", 1 << 16)
    for ranks, sharding, items in ((1, "row", 17), (2, "replicated", 25)):
        c = config(data, tmp_path / f"{ranks}{sharding}", sharding=sharding, **values)
        for reported, exported_one in run_ranks(ranks, ranking_of_export, c, items, timeout=600):
            assert reported == exported_one and reported["users"] > 20 and reported["coverage@10"] > 0.2
    written = json.loads((tmp_path / "2replicated/report.json").read_text())
    assert written["ranking"] == reported
    assert f"{reported['ndcg@10']:.4f}" in (tmp_path / "2replicated/report.html").read_text()
    assert f"{reported['popularity']['mrr@10']:.4f}" in (tmp_path / "2replicated/model/README.md").read_text()


def stop_once(c, world):
    """Run into the STOP file, then again to the end."""
    from pathlib import Path

    Path(c.run_dir).mkdir(exist_ok=True)
    if world.is_main:
        (Path(c.run_dir) / "STOP").touch()
    world.barrier()
    with pytest.raises(StopRequested):
        train(c, world, QUIET)
    return train(c, world, QUIET)


def stop_all(world, configs):
    return [stop_once(c, world) for c in configs]


def test_stop_and_resume_changes_no_bit(data, tmp_path):
    for name, values in {**OPTIMIZER_CASES, "mf": {"model": "mf"}}.items():
        whole = train(config(data, tmp_path / f"{name}-whole", **values), World.alone(), QUIET)
        cut = stop_once(config(data, tmp_path / f"{name}-cut", **values), World.alone())
        assert not (tmp_path / f"{name}-cut" / "STOP").exists()
        assert curve(whole).tolist() == curve(cut).tolist()
        first, second = exported(tmp_path / f"{name}-whole"), exported(tmp_path / f"{name}-cut")
        assert all((first[k] == second[k]).all() for k in first), name


def test_two_ranks_stop_and_resume_on_three_and_one(data, tmp_path):
    whole = train(config(data, tmp_path / "whole"), World.alone(), QUIET)
    runs = {again: tmp_path / f"on{again}" for again in (3, 1)}
    run_ranks(2, train_all, [config(data, run, epochs=1) for run in runs.values()])
    for again, run in runs.items():
        (report,) = run_ranks(again, train_all, [config(data, run)])[0]
        np.testing.assert_allclose(curve(report), curve(whole), atol=1e-5)


def test_a_step_checkpoint_restores_the_middle_of_an_epoch(data, tmp_path):
    whole = train(config(data, tmp_path / "whole", checkpoint_every="2", keep=99), World.alone(), QUIET)
    steps = checkpoint.committed_steps(str(tmp_path / "whole"))
    assert 2 in steps and 8 in steps
    for step in (2, 8):
        folder = checkpoint.folder_of(str(tmp_path / "whole"), step)
        again = train(config(data, tmp_path / f"from{step}", resume=folder), World.alone(), QUIET)
        assert curve(again).tolist() == curve(whole).tolist()
        first, second = exported(tmp_path / "whole"), exported(tmp_path / f"from{step}")
        assert all((first[k] == second[k]).all() for k in first)


def test_a_damaged_checkpoint_is_passed_over(data, tmp_path):
    run = tmp_path / "run"
    whole = train(config(data, tmp_path / "whole", epochs=3), World.alone(), QUIET)
    train(config(data, run, epochs=2), World.alone(), QUIET)
    newest = checkpoint.folder_of(str(run), checkpoint.committed_steps(str(run))[-1])
    path = next(p for p in (run / "checkpoints").rglob("*.distcp") if str(p).startswith(newest))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    again = train(config(data, run, epochs=3), World.alone(), QUIET)
    assert curve(again).tolist() == curve(whole).tolist()


def test_every_hyper_parameter_changes_the_result(data, tmp_path):
    base = {"l2": (0.01, 0.01)}
    changed = {
        "emb_dim": 4, "lr": 0.01, "weight_decay": 0.5, "l2": (0.5, 0.01), "betas": (0.8, 0.999), "eps": 1e-3,
        "batch_size": 100, "epochs": 1, "seed": 1, "optimizer": "sgd", "lr_schedule": "linear", "model": "mf",
        "no_bias": True, "no_sigmoid": True, "no_init": True, "sigmoid_range": (0.0, 6.0), "stop_fraction": 0.2,
        "cold": "known-side",
    }  # fmt: skip
    data = str(tmp_path / "data")
    make_dataset(data, rows=300, lanes=3, val_rows=200, users=200, items=60)
    reference = train(config(data, tmp_path / "base", **base), World.alone(), QUIET)["final"]["val_rmse"]
    for name, value in changed.items():
        values = {**base, name: value}
        found = train(config(data, tmp_path / name, **values), World.alone(), QUIET)["final"]["val_rmse"]
        assert found != reference, name


def test_stop_rows_choose_the_epoch_and_validation_never_does(data, tmp_path):
    c = config(data, tmp_path / "run", lr=0.05, epochs=8, stop_fraction=0.2, patience=2, checkpoint_every="epoch")
    report = train(c, World.alone(), QUIET)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert report["final"]["how_chosen"] == "lowest error on the stop rows"
    assert len(report["epochs"]) < 8 and report["final"]["epoch"] == len(report["epochs"]) - 2
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == list(range(1, len(report["epochs"]) + 1))
    assert "patience" in report["config"]


def test_cold_known_side_zeroes_untouched_rows_in_the_export(tmp_path):
    data = str(tmp_path / "cold")
    make_dataset(data, rows=100, lanes=3, val_rows=100, users=200, items=60)
    train(config(data, tmp_path / "run", cold="known-side"), World.alone(), QUIET)
    users = exported(tmp_path / "run")["user_embedding"]
    touched = Dataset.open(data).counts("users") > 0
    assert (users[~touched] == 0).all() and (users[touched] != 0).any(axis=1).all()


def test_continuing_with_more_epochs_and_what_may_not_change(data, tmp_path):
    whole = train(config(data, tmp_path / "whole", epochs=3), World.alone(), QUIET)
    run = tmp_path / "run"
    train(config(data, run, epochs=2), World.alone(), QUIET)
    assert train(config(data, run, epochs=2), World.alone(), QUIET) is None
    for values in ({"lr": 0.1}, {"seed": 7}, {"emb_dim": 4}, {"model": "mf"}, {"batch_size": 9}, {"optimizer": "sgd"}):
        with pytest.raises(UsageError, match="another configuration"):
            train(config(data, run, **{"epochs": 3, **values}), World.alone(), QUIET)
    with pytest.raises(UsageError, match="--overwrite"):
        train(config(data, run, resume="never"), World.alone(), QUIET)
    again = train(config(data, run, epochs=3), World.alone(), QUIET)
    assert curve(again).tolist() == curve(whole).tolist()
    fresh = train(config(data, run, epochs=1, resume="never", overwrite=True), World.alone(), QUIET)
    assert len(fresh["epochs"]) == 1


def test_wrong_places_are_refused(data, tmp_path):
    with pytest.raises(DataError, match="not a dataset"):
        train(config(str(tmp_path), tmp_path / "r"), World.alone(), QUIET)
    make_dataset(str(tmp_path / "other"), rows=100, lanes=2, seed=5)
    train(config(str(tmp_path / "other"), tmp_path / "run", epochs=1), World.alone(), QUIET)
    with pytest.raises(UsageError, match="run on the dataset"):
        train(config(data, tmp_path / "run"), World.alone(), QUIET)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="not empty"):
        train(config(data, tmp_path / "mine"), World.alone(), QUIET)


def test_divergence_names_the_batch(data, tmp_path):
    c = config(data, tmp_path / "run", optimizer="sgd", lr=1e6, weight_decay=0.0, no_sigmoid=True, epochs=3)
    with pytest.raises(DivergedError, match=r"epoch 1, batch \d+"):
        train(c, World.alone(), QUIET)


def test_a_rate_ten_times_too_high_is_named(planted, tmp_path, capsys):
    """It ends as diverged, or with a warning that speaks of --lr; at its own rate neither happens."""

    def outcome(recipe, times):
        c = of_file(recipe, planted, tmp_path / f"{recipe}-{times}", 12)
        try:
            train(dataclasses.replace(c, lr=c.lr * times), World.alone(), Console(speaks=True))
        except DivergedError as error:
            return str(error)
        return "".join(line for line in capsys.readouterr().err.splitlines() if "--lr" in line)

    assert "biases alone: --lr 0.05" in outcome("svd", 10)
    assert "Lower --lr" in outcome("svd", 1000)
    assert outcome("recipe", 1) == ""


def test_the_recipe_gives_the_same_on_1_2_and_4_ranks(planted, tmp_path):
    found = []
    for ranks in (1, 2, 4):
        c = of_file("recipe", planted, tmp_path / str(ranks), 8)
        report = run_ranks(ranks, train_all, [c], timeout=400.0)[0][0]
        found.append(report["final"]["val_rmse_clipped"])
        assert found[-1] < report["floors"]["global_mean"]["rmse"]
    assert max(found) - min(found) < 1e-3


def test_bf16_wire_is_close(data, tmp_path):
    configs = [config(data, tmp_path / wire, wire_dtype=wire) for wire in ("fp32", "bf16")]
    full, half = run_ranks(2, train_all, configs)[0]
    assert curve(full).tolist() != curve(half).tolist()
    np.testing.assert_allclose(curve(full), curve(half), atol=0.02)


def test_init_from_begins_where_the_other_run_ended(data, tmp_path):
    first = train(config(data, tmp_path / "first"), World.alone(), QUIET)
    values = {"init_from": str(tmp_path / "first"), "lr": 1e-9, "epochs": 1}
    second = train(config(data, tmp_path / "second", **values), World.alone(), QUIET)
    assert abs(second["final"]["val_rmse"] - first["final"]["val_rmse"]) < 1e-5


def test_sigmoid_range_and_rounding():
    assert sigmoid_range(1, 5, 1) == (0.5, 5.5)
    assert sigmoid_range(0.5, 5, 0.5) == (0.25, 5.25)
    assert sigmoid_range(0, 100, 0.001) == (-0.5, 100.5)
    assert round_to_scale([0.2, 1.49, 1.5, 3.2, 9], 1, 5, 1).tolist() == [1, 1, 2, 3, 5]
