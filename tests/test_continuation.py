"""--init-from with bags: made anew from the ratings, taken from the users' own factors, new users' kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import make_dataset, training_rows
from test_train import QUIET

from mfdist.cluster.world import World
from mfdist.data.dataset import Dataset
from mfdist.model.models import MFAdvanced
from mfdist.model.objective import ITEM, USER
from mfdist.model.tables import ShardedTable, item_layout, user_layout
from mfdist.results.exported_model import ExportedModel
from mfdist.training.config import TrainConfig
from mfdist.training.continuation import begin_with
from mfdist.training.data_facts import fitted
from mfdist.training.train import train


def model_of(config: TrainConfig, dataset: Dataset) -> MFAdvanced:
    manifest, form, world = dataset.manifest, config.form(dataset.manifest), World.alone()
    optimizer = config.row_optimizer(10)
    return MFAdvanced(
        form, ShardedTable(user_layout(manifest, 1), form.stored_width(USER), optimizer, world, at_home=True),
        ShardedTable(item_layout(manifest, 1), form.width, optimizer, world, at_home=False),
    )  # fmt: skip


def tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def test_known_users_keep_their_factors_and_new_ones_get_a_bag(tmp_path: object) -> None:
    data = str(tmp_path) + "/data"
    make_dataset(data, rows=200, lanes=3, val_rows=20, users=150, items=30, row_group=64)
    dataset = Dataset.open(data)
    config = TrainConfig(data=data, run_dir=f"{tmp_path}/run", device="cpu", emb_dim=16, epochs=2, implicit=1.0)
    train(config, World.alone(), QUIET)
    config, dataset = fitted(config, dataset, World.alone())
    exported = ExportedModel.open(f"{tmp_path}/run")
    model = model_of(config, dataset)
    form = model.form
    begin_with(f"{tmp_path}/run", model, dataset, seed=1)

    users, items = model.user.rows.weight.detach(), model.item.rows.weight.detach()
    rows = training_rows(dataset)
    counts = np.bincount(rows[:, 0].astype(int), minlength=150)
    factors = (items[:, :16] * form.is_factor()).double().numpy()
    sums = np.zeros((150, 16))
    np.add.at(sums, rows[:, 0].astype(int), factors[rows[:, 1].astype(int)])
    want = sums / np.sqrt(np.maximum(counts, 1))[:, None]
    bags = users[:, form.width : form.width + 16].double().numpy()
    np.testing.assert_allclose(bags, want, rtol=1e-4, atol=1e-6)
    assert np.abs(bags[counts > 0]).max() > 1e-3
    known = form.imported(USER, tensor(exported.user_embedding), tensor(exported.user_bias))
    touched = np.array(exported.user_embedding).any(axis=1)
    assert touched.any() and not touched.all()
    np.testing.assert_allclose(form.factors_of_users(users)[touched], known[touched, :16], atol=1e-5)
    # A user that nothing had touched begins like a new one: its own factors as they are initially.
    np.testing.assert_array_equal(users[~touched, :16], form.initial(1, USER, 0, 150)[~touched, :16])
    assert model.offset is not None
    assert float(model.offset.detach()) == pytest.approx(
        (exported.offset - form.exported_shift) / form.exported_scale, abs=1e-6
    )
    known_items = form.imported(ITEM, tensor(exported.item_embedding), tensor(exported.item_bias))
    rated = np.array(exported.item_embedding).any(axis=1)
    np.testing.assert_allclose(items[rated, :16], known_items[rated, :16], atol=1e-6)
    np.testing.assert_array_equal(items[~rated], form.initial(1, ITEM, 0, 30)[~rated])
