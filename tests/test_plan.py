"""The plan against what the parts that it speaks of really do."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import make_dataset
from ranks import run_ranks

from mfdist.cluster.world import World
from mfdist.data.dataset import Dataset
from mfdist.data.loader import Loader
from mfdist.errors import MfdistError, UsageError
from mfdist.log import Console
from mfdist.model.tables import ReplicatedTable, ShardedTable, item_layout, user_layout
from mfdist.planning import calibration, plan
from mfdist.planning.calibration import Trial
from mfdist.planning.plan_table import format_plans
from mfdist.training import memory
from mfdist.training.config import TrainConfig
from mfdist.training.train import train


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("plan") / "data"
    return make_dataset(path, rows=6000, val_rows=500, lanes=7, items=300, lane_weights=[3, 1, 1, 1, 1, 1, 1])


def config_of(dataset: Dataset, **changes: Any) -> plan.PlanConfig:
    return plan.PlanConfig.ready(
        "vignette_mf_advanced", data=dataset.path, **{"calibrate_seconds": 0.0, "batch_size": 512, **changes}
    )


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


def test_tables_that_do_not_fit_are_named_with_a_remedy(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is written, by train and by plan; what fits is not spoken of."""
    room = [10**6]
    monkeypatch.setattr(memory, "available_bytes", lambda: room[0])
    assert plan.plan_for(config_of(dataset, emb_dim=4), dataset, 1).too_large == ""
    room[0] = 10**4
    config = TrainConfig(data=dataset.path, run_dir=str(tmp_path / "run"), device="cpu")
    with pytest.raises(UsageError, match=r"the tables of its one rank .* --config quick takes .* --emb-dim"):
        train(config, World.alone(), Console(False))
    assert not (tmp_path / "run").exists()
    found = plan.plan_for(config_of(dataset, emb_dim=128, ranks_per_host=2), dataset, 2)
    assert "the 2 ranks of a host (2 in all)" in found.too_large
    assert format_plans([found], config_of(dataset)).endswith(found.too_large)
    room[0] = 1 << 40
    assert plan.plan_for(config_of(dataset, emb_dim=128), dataset, 2).too_large == ""


def test_replicated_tables_are_whole_with_a_gradient(dataset: Dataset) -> None:
    config = config_of(dataset, sharding="replicated")
    width, rule, world = config.form(dataset.manifest).width, config.row_optimizer(1), World.alone()
    layouts = user_layout(dataset.manifest, 1), item_layout(dataset.manifest, 1)
    tables = [ReplicatedTable(layout, width, rule, world) for layout in layouts]
    gradients = sum(table.weight.numel() * 4 for table in tables)
    expected = sum(map(tensor_bytes, tables)) + gradients
    assert plan.plan_for(config, dataset, 2).table_bytes == expected


def test_times_between_hosts_are_those_of_one_and_the_network(dataset: Dataset) -> None:
    """What a slower network and more hosts add, and the batch from which messages alone are a tenth of a step."""
    measured = calibration.Measured(
        trial=Trial(ranks=4, processes=4, lanes=None, seconds=1.0), threads=1, largest_rows=1500,
        start_seconds=1.0, read_seconds=1.0, steps=100, step_seconds=0.002, settle_seconds=0.1,
        validation_rows=500, evaluate_seconds=0.1, floors_seconds=0.1, stored_bytes=10**6, pause_seconds=0.1,
        store_seconds=0.1, peak_bytes=10**9,
    )  # fmt: skip

    def planned(**changes: Any) -> tuple[plan.Plan, plan.PlanConfig]:
        config = config_of(dataset, **changes)
        one = plan.plan_for(config, dataset, 4)
        return plan.with_times(one, config, dataset.manifest, measured, 0), config

    together, config = planned(ranks_per_host=4)
    assert together.times and together.times.network.seconds == 0 and plan.batch_that_hides(together, config) is None
    assert "between hosts" not in format_plans([together], config)
    apart, config = planned(ranks_per_host=1, network_latency=500.0)
    assert apart.times
    steps, network = apart.steps_per_epoch, apart.times.network
    assert apart.times.epoch - together.times.epoch == pytest.approx(steps * network.seconds)
    assert network.messages == pytest.approx(2 * (500e-6 + 3 * plan.MESSAGE_SECONDS))
    batch = plan.batch_that_hides(apart, config)
    assert batch and apart.times.arithmetic * batch / 512 == pytest.approx(10 * network.messages, rel=1e-2)
    slower, _ = planned(ranks_per_host=1, network_gbps=1.0)
    assert slower.times and slower.times.network.line == pytest.approx(10 * network.line)
    shown = format_plans([together, apart], config)
    assert f"{batch:,}" in shown and f"{1000 * network.messages:.2f} ms" in shown


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


ROOT = Path(__file__).parents[1]


def planned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *flags: str) -> list[str]:
    monkeypatch.syspath_prepend(str(ROOT))
    from jobs import plan as job

    assert job.main([*flags, "--calibrate-seconds", "0.05"]) == 0
    said = capsys.readouterr().out.splitlines()
    return [line for line in said if not line.startswith(("trying it", "counting the ratings"))]  # on a slow machine


def test_the_job_prints_a_column_for_each_number_of_ranks_and_what_it_measured(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [
        "--config",
        "vignette_mf_advanced",
        "--data",
        dataset.path,
        "--batch-size",
        "256",
        "--run-dir",
        str(tmp_path / "run"),
        "--ranks-per-host",
        "2",
    ]
    lines = planned(capsys, monkeypatch, *flags, "--ranks", "1,2,5")
    assert lines[0].split() == ["ranks", "1", "2", "5"] and lines[1].split() == ["hosts", "1", "1", "3"]
    assert next(line for line in lines if line.startswith("an epoch")).count(" s") == 3
    said = [line for line in lines if line.startswith("measured for")]
    assert [line.split(" of ")[0] for line in said] == [
        "measured for 1: 1 process", "measured for 2: 2 processes", "measured for 5: 2 processes"
    ]  # fmt: skip
    assert "500 validation rows" in said[1] and os.listdir(tmp_path) == []


def test_tables_of_which_a_part_fits_are_planned_by_fewer_lanes(
    dataset: Dataset, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, config = dataset.manifest, config_of(dataset)
    row = plan.bytes_of_row(config, config.form(manifest).width)
    trial = Trial(ranks=2, processes=2, lanes=None, seconds=1.0)
    need = {
        lanes: row * (manifest.num_items + sum(lane.num_users for lane in share.lanes))
        for lanes in (1, 2, 3)
        for share in [calibration.share_of(manifest, dataclasses.replace(trial, lanes=lanes))]
    }
    for lanes, bytes_needed in need.items():
        assert calibration.lanes_that_fit(config, manifest, trial, row, bytes_needed) == lanes
    assert calibration.lanes_that_fit(config, manifest, trial, row, need[1] - 1) is None
    monkeypatch.setattr(plan, "available_bytes", lambda: 2 * need[2])
    lines = planned(
        capsys,
        monkeypatch,
        "--config",
        "vignette_mf_advanced",
        "--data",
        dataset.path,
        "--batch-size",
        "256",
        "--ranks",
        "2",
    )
    assert "2 lanes each" in lines[-1]
    monkeypatch.setattr(plan, "available_bytes", lambda: 2 * need[1] - 2)
    lines = planned(capsys, monkeypatch, "--data", dataset.path, "--batch-size", "256", "--ranks", "2")
    assert next(line for line in lines if line.startswith("an epoch")).split()[-1] == "-"


def test_the_processes_of_a_trial_have_the_lanes_and_the_share_of_a_batch_of_their_ranks(dataset: Dataset) -> None:
    manifest = dataset.manifest
    assert calibration.share_of(manifest, Trial(ranks=2, processes=2, lanes=None, seconds=1)).lanes == manifest.lanes
    part = calibration.share_of(manifest, Trial(ranks=3, processes=2, lanes=None, seconds=1))
    assert part.lanes == manifest.lanes[:4]  # 2, 2 and 3 lanes
    assert part.num_ratings["train"] == sum(lane.train_rows for lane in manifest.lanes[:4])
    few = calibration.share_of(manifest, Trial(ranks=2, processes=2, lanes=2, seconds=1))
    assert few.lanes == manifest.lanes[:2] + manifest.lanes[3:5]


def test_a_calibration_that_fails_is_a_sentence(dataset: Dataset, tmp_path: Path) -> None:
    config = config_of(dataset, calibrate_seconds=0.05, ranks=(1,), init_from=str(tmp_path / "nothing"))
    with pytest.raises(MfdistError, match=r"this machine failed: .*nothing.* --calibrate-seconds 0 plans without"):
        plan.plan(config)


def test_more_ranks_than_lanes_and_no_data_are_refused(dataset: Dataset) -> None:
    with pytest.raises(UsageError, match="7 lanes"):
        plan.plan(config_of(dataset, ranks=(8,)))
    with pytest.raises(UsageError, match="--data"):
        plan.plan(plan.PlanConfig())


def test_checkpoint_bytes(dataset: Dataset, tmp_path: Path) -> None:
    from mfdist.training.train import train

    run = tmp_path / "run"
    config = config_of(dataset, epochs=1, run_dir=str(run), device="cpu", keep=1)
    with World.open("cpu") as world:
        train(config, world)
    files = [path for path in run.glob("checkpoints/*/*") if path.suffix == ".distcp"]
    planned = plan.plan_for(config, dataset, 1).checkpoint_bytes
    assert planned <= sum(path.stat().st_size for path in files) <= 1.25 * planned + 200_000


# At Electronics' size -----------------------------------------------------------------------------

EPOCHS = "4"


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The synthetic file of Electronics' size, prepared; MFDIST_TEST_TWIN names one that stands already."""
    if found := os.environ.get("MFDIST_TEST_TWIN"):
        return found
    folder = tmp_path_factory.mktemp("twin")
    run_job("synthesize.py", "--preset", "electronics", "--out", str(folder / "ratings.csv"))
    run_job("prepare.py", str(folder / "ratings.csv"), "--out", str(folder / "data"))
    return str(folder / "data")


def run_job(name: str, *flags: str, launch: tuple[str, ...] = ()) -> float:
    """Seconds that a job takes."""
    began = time.monotonic()
    subprocess.run([sys.executable, *launch, f"jobs/{name}", *flags], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_within_15_and_time_within_30_percent_of_a_training(twin: str, tmp_path: Path, ranks: int) -> None:
    """For a machine that does nothing else: plan, train, compare."""
    run = tmp_path / "run"
    flags = [
        "--config",
        "vignette_mf_advanced",
        "--data",
        twin,
        "--run-dir",
        str(run),
        "--epochs",
        EPOCHS,
        "--device",
        "cpu",
    ]
    config = plan.PlanConfig.ready(
        "vignette_mf_advanced", data=twin, run_dir=str(run), epochs=int(EPOCHS), ranks=(ranks,)
    )
    began = time.monotonic()
    (made,) = plan.plan(config)
    planning = time.monotonic() - began
    launch = ("-m", "mfdist.launch", "--standalone", f"--nproc-per-node={ranks}")
    seconds = run_job("train.py", *flags, launch=launch)
    report = json.loads((run / "report.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ends = [record["time"] for record in records if record["kind"] == "epoch"]
    epoch = (ends[-1] - ends[0]) / (len(ends) - 1)
    assert made.times is not None
    figures = {
        "memory, GB": (made.memory_bytes / 1e9, report["peak_rss_bytes"] / 1e9),
        "an epoch, s": (made.times.epoch, epoch), "all of it, s": (made.times.total, seconds),
    }  # fmt: skip
    shown = "; ".join(f"{name}: planned {p:.2f}, found {f:.2f}" for name, (p, f) in figures.items())
    print(f"{ranks} ranks, planned in {planning:.1f} s. {shown}\n{format_plans([made], config)}")
    assert made.memory_bytes == pytest.approx(report["peak_rss_bytes"], rel=0.15), shown
    assert made.times.epoch == pytest.approx(epoch, rel=0.3), shown
    assert made.times.total == pytest.approx(seconds, rel=0.3), shown
