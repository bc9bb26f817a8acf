"""The plan against what the parts that it speaks of really do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import make_dataset
from ranks import run_ranks

from mfdist import plan
from mfdist.dataset import Dataset
from mfdist.distributed import World
from mfdist.embedding import ReplicatedTable, ShardedTable, item_layout, user_layout
from mfdist.errors import UsageError
from mfdist.loader import Loader


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("plan") / "data"
    return make_dataset(path, rows=6000, val_rows=500, lanes=7, items=300, lane_weights=[3, 1, 1, 1, 1, 1, 1])


def config_of(dataset: Dataset, **changes: Any) -> plan.PlanConfig:
    return plan.PlanConfig(data=dataset.path, **{"calibrate_seconds": 0.0, "batch_size": 512, **changes})


def tensor_bytes(table: torch.nn.Module) -> int:
    if isinstance(table, ShardedTable):
        return table.packed.numel() * 4
    rows = table.rows
    return sum(t.numel() * t.element_size() for t in (rows.weight, *rows.state, rows.last))


@pytest.mark.parametrize("optimizer", ["adamw", "rowwise_adagrad", "sgd"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_table_bytes_are_those_of_the_fullest_rank(dataset: Dataset, ranks: int, optimizer: str) -> None:
    config = config_of(dataset, optimizer=optimizer)
    width, rule, manifest = config.form(dataset.manifest).width, config.row_optimizer(1), dataset.manifest
    fullest = 0
    for rank in range(ranks):
        world = World(rank, ranks, torch.device("cpu"), connected=False)
        layouts = user_layout(manifest, ranks), item_layout(manifest, ranks)
        fullest = max(fullest, sum(tensor_bytes(ShardedTable(x, width, rule, world, at_home=True)) for x in layouts))
    assert plan.plan_for(config, dataset, ranks).table_bytes == fullest


def test_replicated_tables_are_whole_with_a_gradient(dataset: Dataset) -> None:
    config = config_of(dataset, sharding="replicated")
    width, rule, world = config.form(dataset.manifest).width, config.row_optimizer(1), World.alone()
    layouts = user_layout(dataset.manifest, 1), item_layout(dataset.manifest, 1)
    tables = [ReplicatedTable(layout, width, rule, world) for layout in layouts]
    gradients = sum(table.weight.numel() * 4 for table in tables)
    expected = sum(map(tensor_bytes, tables)) + gradients
    assert plan.plan_for(config, dataset, 2).table_bytes == expected


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_steps_and_lanes_are_the_loaders(dataset: Dataset, ranks: int) -> None:
    made = plan.plan_for(config_of(dataset), dataset, ranks)
    shares = []
    for rank in range(ranks):
        with Loader(dataset, batch_size=512, seed=0, rank=rank, world_size=ranks) as loader:
            assert made.steps_per_epoch == loader.num_steps
            shares.append(sum(len(batch.user) for batch in loader.epoch(0)))
    assert plan.rows_of_ranks(dataset.manifest, ranks) == shares
    assert made.efficiency == pytest.approx(np.mean(shares) / max(shares))
    assert made.lanes == (7 // ranks, -(-7 // ranks))


def wire_of_a_step(world: World, path: str, batch_size: int) -> float:
    dataset = Dataset.open(path)
    config = config_of(dataset, batch_size=batch_size)
    manifest, rule = dataset.manifest, config.row_optimizer(100)
    layout = item_layout(manifest, world.size)
    table = ShardedTable(layout, config.form(manifest).width, rule, world, at_home=False)
    ids = 0
    with Loader(dataset, batch_size=batch_size, seed=0, rank=world.rank, world_size=world.size) as loader:
        for batch in loader.epoch(0):
            if batch.global_rows < batch_size:
                continue
            table(batch.item).sum().backward()
            first, end = layout.ranges_of(world.rank)[0][0], layout.ranges_of(world.rank)[-1][1]
            asked = torch.unique(batch.item)
            ids += 4 * int(((asked < first) | (asked >= end)).sum())
            table.apply_gradient()
        return (table.wire_bytes + ids) / (loader.num_rows // batch_size)


def test_bytes_on_the_wire(dataset: Dataset) -> None:
    measured = run_ranks(2, wire_of_a_step, dataset.path, 512)
    planned = plan.plan_for(config_of(dataset), dataset, 2).wire_bytes
    assert planned == pytest.approx(max(measured), rel=0.1)
    assert plan.plan_for(config_of(dataset), dataset, 1).wire_bytes == 0


def test_expected_unique() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 50, 200)
    drawn = [len(np.unique(rng.choice(200, 300, p=counts / counts.sum()))) for _ in range(50)]
    assert plan.expected_unique(counts, 300) == pytest.approx(np.mean(drawn), rel=0.02)


def test_the_job_prints_a_column_for_each_number_of_ranks(
    dataset: Dataset, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from jobs import plan as job

    code = job.main(["--data", dataset.path, "--ranks", "1,2", "--calibrate-seconds", "0.05", "--batch-size", "256"])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    assert lines[0].split() == ["ranks", "1", "2"]
    assert next(line for line in lines if line.startswith("an epoch")).count(" s") == 2


def test_more_ranks_than_lanes_and_no_data_are_refused(dataset: Dataset) -> None:
    with pytest.raises(UsageError, match="7 lanes"):
        plan.plan(config_of(dataset, ranks=(8,)))
    with pytest.raises(UsageError, match="--data"):
        plan.plan(plan.PlanConfig())


def test_checkpoint_bytes(dataset: Dataset, tmp_path: Path) -> None:
    from mfdist.train import train

    run = tmp_path / "run"
    config = config_of(dataset, epochs=1, run=str(run), device="cpu", keep=1)
    with World.open("cpu") as world:
        train(config, world)
    files = [path for path in run.glob("checkpoints/*/*") if path.suffix == ".distcp"]
    planned = plan.plan_for(config, dataset, 1).checkpoint_bytes
    assert planned <= sum(path.stat().st_size for path in files) <= 1.25 * planned + 200_000
