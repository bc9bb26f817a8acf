"""What training does without flags and with one: every switch trains alone, the recipe gives way where it must."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from datasets import make_dataset
from test_train import QUIET, curve, exported

from mfdist.cluster.world import World
from mfdist.config import parse_config, read_toml
from mfdist.errors import UsageError
from mfdist.training.config import TrainConfig
from mfdist.training.defaults import members_of
from mfdist.training.train import train

SMALL = ["--epochs", "1", "--device", "cpu"]
FLAGS = [
    [], ["--model", "mf"], ["--no-bias"], ["--no-init"], ["--no-sigmoid"], ["--sigmoid-range", "0,6"],
    ["--emb-dim", "1"], ["--emb-dim", "10"], ["--optimizer", "adamw"], ["--optimizer", "sparse_adam"],
    ["--optimizer", "rowwise_adagrad"], ["--weight-decay", "0.01"], ["--sharding", "replicated"], ["--cold", "own"],
    ["--reduction", "mean"], ["--offset", "mean"], ["--rating-units", "given"],
    ["--model", "mf", "--optimizer", "adamw"],
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("data") / "small")
    make_dataset(path, rows=600, lanes=4, val_rows=100, users=60, items=30, row_group=64)
    return path


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_each_flag_alone_trains(data: str, tmp_path: object, flags: list[str]) -> None:
    argv = ["--data", data, "--run-dir", str(tmp_path), *SMALL, *flags]
    report = train(parse_config(TrainConfig, argv, ""), World.alone(), QUIET)
    assert report is not None and np.isfinite(report["final"]["val_rmse"])


@pytest.mark.parametrize("flags", [["--reduction", "mean"], ["--optimizer", "rowwise_adagrad"]], ids=" ".join)
def test_rates_stand_a_short_last_batch(data: str, tmp_path: object, flags: list[str]) -> None:
    """600 ratings in batches of 500: in the last one the mean is over a hundred, at full rate."""
    argv = ["--data", data, "--run-dir", str(tmp_path), *SMALL, "--epochs", "8", "--batch-size", "500", *flags]
    report = train(parse_config(TrainConfig, argv, ""), World.alone(), QUIET)
    assert report is not None and curve(report)[-1, 0] < curve(report)[0, 0]


def test_no_flags_are_the_recipe() -> None:
    """But for the batch size, which the data decides where the recipe does not force it."""
    ours, recipe = TrainConfig(), TrainConfig.ready("recipe")
    assert replace(ours, batch_size=recipe.batch_size) == recipe
    assert ours.model == "mf_advanced" and ours.offset == "learned"


@pytest.mark.parametrize("name", ["vignette_mf", "vignette_mf_advanced"])
def test_the_vignettes_settings_are_whole(name: str) -> None:
    """Nothing of the recipe's may be left in them: each flag of it is given in the file."""
    given = read_toml(TrainConfig, name)
    recipe = set(read_toml(TrainConfig, "recipe"))
    assert recipe - set(given) == set()
    config = TrainConfig.ready(name)
    assert (config.optimizer, config.reduction, config.members, config.implicit) == ("adamw", "mean", 0, 0.0)
    assert not any(config.row_l2) and not any(config.l2) and config.cold == "own" and config.rating_units == "given"


@pytest.mark.parametrize(("dim", "members"), [(1, 0), (2, 0), (3, 1), (16, 1), (32, 2), (50, 2), (128, 8), (100, 5)])
def test_members_of_about_sixteen_factors(dim: int, members: int) -> None:
    found = members_of(dim)
    assert found == members and (not found or dim % found == 0)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_finished_run_is_lengthened(data: str, tmp_path: object, schedule: str) -> None:
    values = {"data": data, "run_dir": str(tmp_path), "device": "cpu", "emb_dim": 16, "lr_schedule": schedule}
    before = train(TrainConfig(**values, epochs=2), World.alone(), QUIET)
    after = train(TrainConfig(**values, epochs=4), World.alone(), QUIET)
    assert before is not None and after is not None
    assert np.array_equal(curve(after)[:2], curve(before)) and len(after["epochs"]) == 4
    if schedule == "constant":
        whole = train(TrainConfig(**{**values, "run_dir": f"{tmp_path}/whole"}, epochs=4), World.alone(), QUIET)
        assert np.array_equal(curve(after), curve(whole))
        for name, tensor in exported(f"{tmp_path}/whole").items():
            np.testing.assert_array_equal(exported(str(tmp_path))[name], tensor)
    with pytest.raises(UsageError, match="begun with another"):
        train(TrainConfig(**values, epochs=4, seed=9), World.alone(), QUIET)
