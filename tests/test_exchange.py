"""Item rows through shared memory and through the process group: the same bits, and no wait for a rank that is gone."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import make_dataset
from ranks import _child, run_ranks
from test_train import config, curve, exported, train_all

from mfdist.cluster import shared_memory
from mfdist.cluster.shared_memory import SharedMemory
from mfdist.cluster.world import World
from mfdist.data.dataset import Dataset
from mfdist.errors import LostRankError
from mfdist.log import Console
from mfdist.model import cpu_step, exchange
from mfdist.model.models import ITEM_TABLE
from mfdist.training.session import build
from mfdist.training.train import _open_loader, train_step

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
CASES = {
    "adamw": {"optimizer": "adamw", "l2": (0.1, 0.05), "lr": 0.01},
    "mf": {"model": "mf", "optimizer": "rowwise_adagrad"},
    "few rows": {"optimizer": "sgd", "batch_size": 3, "epochs": 1},  # steps in which a rank has none
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("data") / "small")
    make_dataset(path, rows=600, lanes=7, val_rows=50, users=150, items=60, row_group=64)
    return path


def train_each_way(world, data, folder):
    """Every case through memory that has to grow, the same with two threads, and through the group."""
    exchange.FIRST_LINES, cpu_step.PARALLEL_ROWS = 4, 1
    for way, may_share, threads in (("memory", True, 1), ("threads", True, 2), ("group", False, 1)):
        world.may_share = may_share
        torch.set_num_threads(threads)
        train_all(world, [config(data, f"{folder}/{way}-{name}", **case) for name, case in CASES.items()])


@pytest.mark.timeout(900)  # the first one compiles
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_both_ways_give_the_same_bits(data, tmp_path, ranks):
    run_ranks(ranks, train_each_way, data, str(tmp_path), timeout=800.0)
    for name in CASES:
        first, second, third = (exported(f"{tmp_path}/{way}-{name}") for way in ("memory", "threads", "group"))
        for key, tensor in first.items():
            assert (tensor == second[key]).all() and (tensor == third[key]).all(), (name, key)


def count_steps(world, c):
    """What this rank's item table counts as sent, and the bytes of a group's calls, in ten steps each way."""
    from bench_scale import count_all_to_all

    found = []
    for may_share in (True, False):
        world.may_share = may_share
        dataset = Dataset.open(c.data)
        with _open_loader(c, dataset, world) as loader:
            session = build(c, dataset, world, Console(False), loader)
            for table, number in ((session.model.user, 0), (session.model.item, ITEM_TABLE)):
                table.initialise(lambda first, end, n=number: session.model.form.initial(1, n, first, end))
            sent = count_all_to_all(world) if not may_share else [0]
            asked = 0
            for batch in loader.epoch(0):
                items = np.unique(batch.item.numpy())
                first, end = session.model.item.held[0]
                asked += int(((items < first) | (items >= end)).sum())
                train_step(session, batch)
            found.append((session.model.item.wire_bytes, sent[0], asked, session.fused.transport))
            session.saver.close()
    return found


def test_bytes_between_ranks_are_the_same_each_way(data, tmp_path):
    c = config(data, tmp_path / "run")
    shared_way, group_way = zip(*run_ranks(2, count_steps, c), strict=True)
    assert [way[0] for way in shared_way] == [way[0] for way in group_way]
    assert sum(way[0] for way in shared_way) == sum(2 * way[2] * 9 * 4 for way in shared_way) > 0
    steps = 3
    for rows, sent, asked, _ in group_way:
        assert sent == rows + 4 * asked + 8 * steps  # ids, and how many there are
    assert {way[3] for way in shared_way} == {"memory that the ranks share"}
    assert {way[3] for way in group_way} == {"the process group"}


def test_a_narrow_wire_goes_through_the_group(data, tmp_path):
    assert run_ranks(2, transport, config(data, tmp_path / "run", wire_dtype="bf16")) == ["the process group"] * 2


def transport(world, c):
    dataset = Dataset.open(c.data)
    with _open_loader(c, dataset, world) as loader:
        session = build(c, dataset, world, Console(False), loader)
        session.saver.close()
        return session.fused.transport


# A rank that is gone ------------------------------------------------------------------------------


def train_until_killed(world, c):
    if world.rank == 1:
        left, bring = [20], exchange.SharedExchange.bring

        def killed(*args):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return bring(*args)

        exchange.SharedExchange.bring = killed
    return curve(train_all(world, [c])[0])


def test_a_rank_killed_in_the_exchange_ends_the_others_in_seconds(data, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue, store = context.Queue(), str(tmp_path / "store")
    c = config(data, tmp_path / "run", batch_size=8, epochs=100)
    children = [
        context.Process(target=_child, args=(queue, store, r, 3, train_until_killed, (c,)), daemon=True)
        for r in range(3)
    ]
    for child in children:
        child.start()
    children[1].join(120)
    assert children[1].exitcode == -signal.SIGKILL
    began = time.monotonic()
    for _ in range(2):
        rank, ok, text = queue.get(timeout=20)
        assert not ok and rank != 1
        assert "contact to another rank" in text or "Connection" in text, text
    assert time.monotonic() - began < 10
    for child in children:
        child.join(10)
        assert not child.is_alive()


def wait_in_vain(world):
    """Seconds until rank 0 knows that rank 1 has left, and that it does not come in time."""
    found = []
    for what in ("leaves", "sleeps"):
        memory = world.share(SharedMemory.room(world.size, 64))
        assert memory is not None
        memory._timeout_seconds = 60 if what == "leaves" else 0.3
        began = time.monotonic()
        if world.rank == 0:
            memory.signal()
            with pytest.raises(LostRankError):
                memory.wait()
        elif what == "leaves":
            memory.leave()
        found.append(time.monotonic() - began)
        world.barrier()
    return found


def test_who_leaves_or_sleeps_is_not_waited_for():
    left, slept = run_ranks(2, wait_in_vain)[0]
    assert left < 10 and 0.3 <= slept < 10  # at first with the time to load compiled code


def say_much(world):
    """Each turn's values as the others have written them."""
    memory = world.share(SharedMemory.room(world.size, 2 * 8 * world.size))
    assert memory is not None
    turns = memory.array((2, world.size), np.int64)
    for turn in range(3000):
        turns[turn % 2, world.rank] = turn * 10 + world.rank
        memory.signal()
        memory.wait()
        assert turns[turn % 2].tolist() == [turn * 10 + rank for rank in range(world.size)]
    return len(os.listdir("/proc/self/fd"))


def share_often(world):
    counts = [say_much(world)]
    for _ in range(20):
        memory = world.share(4096)
        assert memory is not None
        memory.leave()
        del memory
    return counts[0], len(os.listdir("/proc/self/fd"))


def test_signals_order_what_is_written_and_nothing_stays_open():
    for before, after in run_ranks(4, share_often):
        assert after <= before


def test_memory_of_another_host_or_process_is_refused():
    offer, memory = shared_memory.make(4096)
    memory[0] = 7
    again = shared_memory.attach(offer, 4096)
    assert again is not None and again[0] == 7
    for wrong in ({"host": ("elsewhere",)}, {"name": "mfdist-another"}, {"file": 99999}, {"process": 2**22 + 1}):
        assert shared_memory.attach(dataclasses.replace(offer, **wrong), 4096) is None, wrong
    os.close(offer.file)
    assert shared_memory.attach(offer, 4096) is None
    assert World.alone().share(4096) is None
