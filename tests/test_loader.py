"""The loader: every row once an epoch, the same batches on any number of ranks, whatever stops and starts."""

from __future__ import annotations

import itertools
import json
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import make_dataset, sorted_rows, training_rows, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from mfdist.data import shuffle
from mfdist.data.batch_order import lanes_of_rank
from mfdist.data.dataset import Dataset
from mfdist.data.loader import Batch, Loader
from mfdist.data.scan import scan
from mfdist.errors import DataError, UsageError

GOLDEN = Path(__file__).parent / "golden" / "batches.json"


def rows_of(batch: Batch) -> np.ndarray:
    return np.stack([batch.user.numpy(), batch.item.numpy(), batch.rating.numpy()], axis=1).astype(np.float64)


def take(dataset: Dataset, epoch: int, first: int, end: int, world_size: int, **options: object) -> list[np.ndarray]:
    """The batches [first, end) of an epoch, ranks' shares one after the other; checks what every rank must agree on."""
    batches: list[list[np.ndarray]] = [[] for _ in range(end - first)]
    for rank in range(world_size):
        with Loader(dataset, rank=rank, world_size=world_size, **options) as loader:  # type: ignore[arg-type]
            got = list(itertools.islice(loader.epoch(epoch, first), end - first))
            assert [batch.step for batch in got] == list(range(first, end))
            for batch in got:
                batches[batch.step - first].append(rows_of(batch))
                assert batch.global_rows == loader.order.rows_of_step(batch.step)
    return [np.concatenate(shares) for shares in batches]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_exactly_once_across_stops_and_world_sizes(data: st.DataObject) -> None:
    """Random files, batch sizes and chains of stops at other world sizes: an epoch is the dataset."""
    lanes = data.draw(st.integers(1, 5))
    rows = data.draw(st.integers(1, 400))
    groups = data.draw(st.lists(st.sampled_from([0, 1, 2, 7, 31, 97]), min_size=1, max_size=4).map(lambda g: [*g, 53]))
    weights = data.draw(st.lists(st.integers(0, 5), min_size=lanes, max_size=lanes).filter(any))
    order = data.draw(st.sampled_from(["random", "blocks"]))
    options = {"batch_size": data.draw(st.integers(1, 90)), "seed": data.draw(st.integers(0, 2**40)), "threads": 2}
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(folder, rows, lanes, row_group=groups, lane_weights=weights, order=order, block_rows=8)
        with Loader(dataset, rank=0, world_size=1, **options) as loader:
            num_steps = loader.num_steps
        whole = take(dataset, 1, 0, num_steps, 1, **options)
        assert np.array_equal(sorted_rows(*np.concatenate(whole).T), training_rows(dataset))
        assert all(len(batch) == options["batch_size"] for batch in whole[:-1])

        stops = sorted(data.draw(st.lists(st.integers(0, num_steps), max_size=3)))
        for first, end in itertools.pairwise([0, *stops, num_steps]):
            world_size = data.draw(st.integers(1, lanes))
            memory = data.draw(st.sampled_from([0, None]))
            chained = take(dataset, 1, first, end, world_size, memory_bytes=memory, **options)
            assert all(map(np.array_equal, chained, whole[first:end]))


def test_state_goes_through_json_at_every_step(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, 100, 3)
    options = {"batch_size": 17, "seed": 5, "threads": 1}
    whole = [take(dataset, epoch, 0, 6, 1, **options) for epoch in range(2)]
    loader = Loader(dataset, rank=0, world_size=1, **options)
    for epoch, step in itertools.product(range(2), range(7)):
        found = loader.check_state(json.loads(json.dumps(loader.state(epoch, step))))
        assert found == (epoch, step)
        rest = [rows_of(batch) for batch in loader.epoch(*found)]
        assert len(rest) == 6 - step and all(map(np.array_equal, rest, whole[epoch][step:]))


@pytest.mark.parametrize("key", ["order_version", "seed", "batch_size", "stop_fraction", "fingerprint", "num_rows"])
def test_a_state_of_another_run_is_refused(tmp_path: Path, key: str) -> None:
    loader = Loader(make_dataset(tmp_path, 50, 2), batch_size=8, seed=1, rank=0, world_size=1)
    with pytest.raises(UsageError, match=key):
        loader.check_state({**loader.state(0, 1), key: "other"})
    with pytest.raises(UsageError, match="damaged"):
        loader.check_state({**loader.state(0, 1), "step": 99})


def test_seed_and_epoch_change_the_order_and_threads_do_not(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, 3000, 4, row_group=500)
    runs = [take(dataset, epoch, 0, 5, 1, batch_size=64, seed=seed, threads=threads)
            for epoch, seed, threads in ((0, 1, 1), (0, 1, 4), (0, 2, 1), (1, 1, 1))]  # fmt: skip
    assert all(map(np.array_equal, runs[0], runs[1]))
    for other in runs[2:]:
        assert not any(map(np.array_equal, runs[0], other))


def test_first_batches_are_those_of_the_golden_file(tmp_path: Path) -> None:
    """The order may change only together with ORDER_VERSION: a run could otherwise not be continued."""
    found = {}
    for order in ("random", "blocks"):
        user = [np.arange(lane * 1000, lane * 1000 + 997, dtype=np.int32) for lane in range(3)]
        columns = [{"user": u, "item": u % 50, "rating": (u % 5 + 1).astype(np.float32)} for u in user]
        dataset = write_dataset(
            tmp_path / order, [[c] for c in columns], ranges=[(0, 1000), (1000, 2000), (2000, 3000)],
            num_items=50, order=order, block_rows=16,
        )  # fmt: skip
        with Loader(dataset, batch_size=16, seed=42, rank=0, world_size=1) as loader:
            for epoch in range(2):
                batches = itertools.islice(loader.epoch(epoch), 3)
                found[f"{order} epoch {epoch}"] = [batch.user.tolist() for batch in batches]
    assert found == json.loads(GOLDEN.read_text())


def test_every_batch_is_a_fair_sample_of_its_lanes(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, 4000, 4, lane_weights=[1, 2, 3, 4])
    with Loader(dataset, batch_size=100, seed=0, rank=0, world_size=1) as loader:
        for batch in loader.epoch(0):
            lane = batch.user // 250
            assert np.abs(np.bincount(lane, minlength=4) - [10, 20, 30, 40]).max() <= 1


def test_blocks_keep_the_users_of_a_batch_together(tmp_path: Path) -> None:
    distinct = {}
    for order in ("random", "blocks"):
        dataset = make_dataset(tmp_path / order, 40_000, 2, users=4000, row_group=20_000, order=order, block_rows=128)
        with Loader(dataset, batch_size=512, seed=0, rank=0, world_size=1) as loader:
            distinct[order] = np.mean([len(batch.user.unique()) for batch in loader.epoch(0)])
    assert distinct["blocks"] < 0.3 * distinct["random"]


def test_permutations_are_uniform() -> None:
    counts = np.zeros((5, 5))
    for key in range(5000):
        counts[np.arange(5), shuffle.permutation(5, shuffle.key_of(key))] += 1
    assert np.abs(counts / 1000 - 1).max() < 0.15
    assert sorted(shuffle.permutation(1000, 7, 64)) == list(range(1000))


def test_stop_rows_are_held_out_and_found_again(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, 5000, 4, row_group=300)
    options = {"batch_size": 128, "seed": 9, "stop_fraction": 0.1, "threads": 2}
    with Loader(dataset, rank=0, world_size=1, **options) as loader:
        assert loader.num_rows + loader.num_stop_rows == 5000 and 400 < loader.num_stop_rows < 600
        steps = loader.num_steps
    whole = take(dataset, 0, 0, steps, 1, **options)
    assert all(map(np.array_equal, whole, take(dataset, 0, 0, steps, 3, **options)))
    lanes = range(4)
    stop = [np.stack(part[1:4], 1) for part in scan(dataset, "stop", lanes, stop_fraction=0.1, seed=9)]
    train = [np.stack(part[1:4], 1) for part in scan(dataset, "train", lanes, stop_fraction=0.1, seed=9)]
    assert np.array_equal(sorted_rows(*np.concatenate(whole).T), sorted_rows(*np.concatenate(train).T))
    assert np.array_equal(sorted_rows(*np.concatenate([*whole, *stop]).T), training_rows(dataset))


def test_ranks_may_count_stop_rows_of_their_own_lanes_and_sum(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, 900, 3, row_group=100)
    options = {"batch_size": 32, "seed": 2, "stop_fraction": 0.2, "world_size": 2}
    alone = [Loader(dataset, rank=rank, **options) for rank in range(2)]
    shares: list[np.ndarray] = []
    for rank in range(2):
        Loader(dataset, rank=rank, reduce=lambda rows: shares.append(rows) or rows, **options)
    summed = Loader(dataset, rank=1, reduce=lambda rows: shares[0] + shares[1], **options)
    assert summed.order == alone[0].order == alone[1].order


def test_scan_gives_rows_in_file_order_with_timestamps(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, 300, 3, val_rows=90, timestamp=True, row_group=50)
    parts = list(scan(dataset, "val", lanes_of_rank(3, 1, 2), chunk_rows=7))
    assert {part[0] for part in parts} == {1, 2} and max(len(part[1]) for part in parts) == 7
    assert all(part[4] is not None and part[4].dtype == np.int64 for part in parts)
    every = [np.stack(part[1:4], 1) for part in scan(dataset, "val", range(3))]
    assert np.array_equal(sorted_rows(*np.concatenate(every).T), training_rows(dataset, "val"))


def test_empty_and_tiny_epochs(tmp_path: Path) -> None:
    with Loader(make_dataset(tmp_path / "a", 0, 2), batch_size=4, seed=0, rank=1, world_size=2) as loader:
        assert loader.num_steps == 0 and list(loader.epoch(0)) == []
    dataset = make_dataset(tmp_path / "b", 1, 3)
    sizes = []
    for rank in range(3):
        with Loader(dataset, batch_size=4, seed=0, rank=rank, world_size=3) as loader:
            sizes += [(len(batch.user), batch.global_rows) for batch in loader.epoch(0)]
    assert sorted(sizes) == [(0, 1), (0, 1), (1, 1)]


def test_more_ranks_than_lanes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="5 ranks cannot share the 4 lanes"):
        Loader(make_dataset(tmp_path, 50, 4), batch_size=4, seed=0, rank=0, world_size=5)


def test_a_later_pass_reads_no_file_where_the_rows_fit(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, 2000, 2, row_group=200)
    options = {"batch_size": 64, "seed": 4, "rank": 0, "world_size": 1}
    small, large = Loader(dataset, memory_bytes=0, **options), Loader(dataset, memory_bytes=1 << 20, **options)
    assert (small.stats.resident, large.stats.resident) == (False, True)
    first = [rows_of(batch) for batch in large.epoch(0)]
    for file in tmp_path.glob("train/*"):
        file.write_bytes(b"gone")
    second = [rows_of(batch) for batch in large.epoch(1)]
    assert np.array_equal(sorted_rows(*np.concatenate(first).T), sorted_rows(*np.concatenate(second).T))
    assert large.stats.rows == 4000 and large.stats.decode_seconds > 0
    with pytest.raises(DataError, match=r"lane-0000\d.parquet, row group 0"):
        list(small.epoch(0))


@pytest.mark.parametrize("stop_fraction", [0.0, 0.15])
@pytest.mark.parametrize("block_rows", [0, 32])
def test_rows_that_lie_on_the_device_make_the_same_batches(
    tmp_path: Path, stop_fraction: float, block_rows: int
) -> None:
    order = {"order": "blocks", "block_rows": block_rows} if block_rows else {}
    dataset = make_dataset(tmp_path, 3000, 5, row_group=200, **order)
    options = {"batch_size": 64, "seed": 4, "rank": 1, "world_size": 2, "stop_fraction": stop_fraction}
    with Loader(dataset, **options) as host, Loader(dataset, rows_on_device=True, **options) as device:
        assert list(map(len, map(rows_of, device.epoch(0, 3)))) and not device.stats.on_device
        for epoch, start in ((0, 0), (1, 0), (2, 5), (3, host.num_steps)):
            expected, got = list(host.epoch(epoch, start)), list(device.epoch(epoch, start))
            assert [(b.step, b.global_rows) for b in got] == [(b.step, b.global_rows) for b in expected]
            for mine, other in zip(got, expected, strict=True):
                for name in ("user", "item", "rating"):
                    assert torch.equal(getattr(mine, name), getattr(other, name))
                    assert getattr(mine, name).dtype == getattr(other, name).dtype
        assert device.stats.on_device and not host.stats.on_device
        for file in tmp_path.glob("train/*"):
            file.write_bytes(b"gone")
        assert sum(len(batch.user) for batch in device.epoch(4)) > 0


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("mfdist-prefetch")]


def test_kept_batches_do_not_change(tmp_path: Path) -> None:
    with Loader(make_dataset(tmp_path, 3000, 2), batch_size=64, seed=4, rank=0, world_size=1) as loader:
        batches = list(loader.epoch(0))
        copies = [rows_of(batch) for batch in batches]
        list(loader.epoch(1))
        assert all(map(np.array_equal, copies, map(rows_of, batches)))
