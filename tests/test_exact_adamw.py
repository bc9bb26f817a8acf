"""AdamW means AdamW: after thousands of steps the tables are those of float64 torch.optim.AdamW on dense tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import make_dataset
from ranks import run_ranks
from test_train import Plain, config, exported, train_all

from mfdist.data.dataset import Dataset
from mfdist.data.loader import Loader
from mfdist.training.config import TrainConfig

STEPS = 3000
CASES = [
    {"model": "mf_advanced", "eps": 1e-12, "batch_size": 1},
    {"model": "mf_advanced", "eps": 1e-8, "batch_size": 64},
    {"model": "mf_advanced", "eps": 1e-4, "batch_size": 65536},
    {"model": "mf", "eps": 1e-8, "batch_size": 16},
    {"model": "mf", "eps": 1e-12, "batch_size": 512},
]
COMMON = {"lr": 0.002, "weight_decay": 0.05, "lr_schedule": "cosine"}


def dense(c: TrainConfig, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """The tables after torch.optim.AdamW on dense tables, over the same batches, in float64 for comparison."""
    dataset = Dataset.open(c.data)
    model = Plain(c.form(dataset.manifest), dataset.manifest.num_users, dataset.manifest.num_items, c.seed).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr, weight_decay=c.weight_decay, betas=c.betas, eps=c.eps)
    with Loader(dataset, batch_size=c.batch_size, seed=c.seed, rank=0, world_size=1) as loader:
        schedule = c.row_optimizer(loader.num_steps * c.epochs)
        step = 0
        for epoch in range(c.epochs):
            for batch in loader.epoch(epoch):
                step += 1
                optimizer.param_groups[0]["lr"] = schedule.rate(step)
                error = model(batch.user.long(), batch.item.long()) - batch.rating.to(dtype)
                optimizer.zero_grad()
                error.square().mean().backward()
                optimizer.step()
    found = {"user_embedding": model.tables[0].weight, "item_embedding": model.tables[1].weight}
    if model.form.bias:
        found |= {"user_bias": model.biases[0].weight[:, 0], "item_bias": model.biases[1].weight[:, 0]}
    return {name: table.detach().double().numpy() for name, table in found.items()}


def distance(found: np.ndarray, exact: np.ndarray) -> float:
    """Relative root mean square."""
    return float(np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("data") / "skewed")
    make_dataset(path, rows=1200, lanes=5, val_rows=50, users=400, items=150, row_group=64)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_three_thousand_steps_with_a_schedule_and_decay(data, tmp_path, ranks):
    """Without the catch-up, or with one that forgets the schedule, rows that are seldom touched would be far off."""
    configs = []
    for number, case in enumerate(CASES):
        epochs = max(1, STEPS // -(-1200 // case["batch_size"]))
        configs.append(config(data, tmp_path / str(number), **{**COMMON, **case, "epochs": epochs,
                                                               "checkpoint_every": "1000000"}))  # fmt: skip
    run_ranks(ranks, train_all, configs, timeout=1800.0)
    for c in configs:
        exact, single, found = dense(c, torch.float64), dense(c, torch.float32), exported(c.run_dir)
        for name, table in exact.items():
            allowed = max(2e-6, distance(single[name], table))
            assert distance(found[name], table) <= allowed, (c.model, c.eps, c.batch_size, name, allowed)
