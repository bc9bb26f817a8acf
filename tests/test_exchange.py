"""Item rows by shared memory, sockets and the process group: the same bits, and no wait for a rank that is gone."""

from __future__ import annotations

import dataclasses
import os
import signal
import time

import numpy as np
import pytest
import torch
from datasets import make_dataset
from ranks import run_ranks, start_ranks
from test_train import config, curve, exported, train_all

from mfdist.cluster import connecting, shared_memory
from mfdist.cluster.shared_memory import SharedMemory
from mfdist.cluster.world import World
from mfdist.data.dataset import Dataset
from mfdist.errors import LostRankError
from mfdist.log import Console
from mfdist.model import cpu_step, exchange
from mfdist.model.models import ITEM_TABLE
from mfdist.training.session import build
from mfdist.training.train import _open_loader, batches_of, train_step

CASES = {
    "adamw": {"optimizer": "adamw", "l2": (0.1, 0.05), "lr": 0.01},
    "mf": {"model": "mf", "optimizer": "rowwise_adagrad"},
    "few rows": {"optimizer": "sgd", "batch_size": 3, "epochs": 1, "rating_units": "spread"},  # a rank may have none
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("data") / "small")
    make_dataset(path, rows=600, lanes=7, val_rows=50, users=150, items=60, row_group=64)
    return path


WAYS = {
    "memory": ("memory that the ranks share", 1),  # it has to grow
    "threads": ("memory that the ranks share", 2),
    "sockets": ("sockets between the ranks of {ranks} hosts", 1),
    "sockets, threads": ("sockets between the ranks of {ranks} hosts", 2),
    "hosts of two": ("sockets between the ranks of 2 hosts", 2),
    "group": ("the process group", 1),
}


def go_by(world, way):
    """Make ``world`` go this way from now on."""
    world.may_share = not way.startswith("sockets") and way != "group"
    world.may_connect = way != "group"
    place = {"hosts of two": world.rank // 2, "sockets": world.rank, "sockets, threads": world.rank}.get(way, 0)
    shared_memory.here = connecting.here = lambda: ("host", str(place))
    torch.set_num_threads(WAYS[way][1])


def train_each_way(world, data, folder):
    """Every case every way, those that look ahead with batches at hand and without."""
    exchange.FIRST_LINES, cpu_step.PARALLEL_ROWS = 4, 1
    found = {}
    for way in ways_of(world.size):
        go_by(world, way)
        train_all(world, [config(data, f"{folder}/{way}-{name}", **case) for name, case in CASES.items()])
        found[way] = transport(world, config(data, f"{folder}/{way}-name"))
    follow = cpu_step.FusedStep.follow
    go_by(world, "sockets")
    cpu_step.FusedStep.follow = lambda self, batches: iter(batches)
    train_all(world, [config(data, f"{folder}/one by one-{name}", **case) for name, case in CASES.items()])
    cpu_step.FusedStep.follow = follow
    return found


def ways_of(ranks):
    return [way for way in WAYS if way != "hosts of two" or ranks > 2]


@pytest.mark.timeout(900)  # the first one compiles
@pytest.mark.parametrize("ranks", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_every_way_gives_the_same_bits(data, tmp_path, ranks):
    names = run_ranks(ranks, train_each_way, data, str(tmp_path), timeout=800.0)[0]
    assert names == {way: WAYS[way][0].format(ranks=ranks) for way in ways_of(ranks)}
    for name in CASES:
        first = exported(f"{tmp_path}/memory-{name}")
        for way in (*ways_of(ranks)[1:], "one by one"):
            for key, tensor in exported(f"{tmp_path}/{way}-{name}").items():
                assert (first[key] == tensor).all(), (way, name, key)


def an_epoch(world, c, left_after=None, on_each=lambda session, batch: None):
    """Steps of an epoch, without the bookkeeping of a training: their losses, and the session.

    ``left_after``: the epoch is left after so many steps, and entered again there."""
    dataset = Dataset.open(c.data)
    with _open_loader(c, dataset, world) as loader:
        session = build(c, dataset, world, Console(False), loader)
        for table, number in ((session.model.user, 0), (session.model.item, ITEM_TABLE)):
            table.initialise(lambda first, end, n=number: session.model.form.initial(1, n, first, end))
        losses = []
        for turn in range(1 if left_after is None else 2):
            for batch in batches_of(session, 0, turn * (left_after or 0)):
                on_each(session, batch)
                losses.append(float(train_step(session, batch)))
                if not turn and len(losses) == left_after:
                    break
        session.saver.close()
        session.fused.close()
        return losses, session


def count_all_to_all(world: World) -> list[int]:
    """From now on the only element grows by the bytes that this rank sends to others in ``world.all_to_all``."""
    sent, original = [0], world.all_to_all

    def all_to_all(
        received: torch.Tensor, outgoing: torch.Tensor, received_rows: list[int], sent_rows: list[int]
    ) -> None:
        away = sum(rows for rank, rows in enumerate(sent_rows) if rank != world.rank)
        sent[0] += away * outgoing[0:1].numel() * outgoing.element_size()
        original(received, outgoing, received_rows, sent_rows)

    world.all_to_all = all_to_all  # type: ignore[method-assign]
    return sent


def counted_bytes(world):
    """Rank r sends r + 1 rows of three floats to every rank: bytes counted, and bytes that left this rank."""
    sent = count_all_to_all(world)
    mine = torch.zeros(world.size * (world.rank + 1), 3)
    rows = [rank + 1 for rank in range(world.size)]
    world.all_to_all(torch.empty(sum(rows), 3), mine, rows, [world.rank + 1] * world.size)
    return sent[0], (world.size - 1) * (world.rank + 1) * 12


def test_bytes_between_ranks_are_counted_and_those_to_oneself_are_not():
    for counted, expected in run_ranks(3, counted_bytes):
        assert counted == expected > 0


def count_steps(world, c):
    """What this rank's item table counts as sent, the bytes of a group's calls, the rows asked of others, and what
    the step counts, each way."""
    found = []
    for way in ("memory", "sockets", "group"):
        go_by(world, way)
        sent = count_all_to_all(world) if way == "group" else [0]
        asked = [0]

        def count(session, batch, asked=asked):
            items = np.unique(batch.item.numpy())
            first, end = session.model.item.held[0]
            asked[0] += int(((items < first) | (items >= end)).sum())

        _, session = an_epoch(world, c, on_each=count)
        found.append((session.model.item.wire_bytes, sent[0], asked[0], session.fused.traffic))
    return found


def test_bytes_between_ranks_are_the_same_each_way(data, tmp_path):
    memory, by_socket, group = zip(*run_ranks(2, count_steps, config(data, tmp_path / "run")), strict=True)
    assert [way[0] for way in memory] == [way[0] for way in by_socket] == [way[0] for way in group]
    assert sum(way[0] for way in memory) == sum(2 * way[2] * 9 * 4 for way in memory) > 0
    steps = 3
    for rows, sent, asked, _ in group:
        assert sent == rows + 4 * asked + 8 * steps  # ids, and how many there are
    for rows, _, asked, traffic in by_socket:
        headers = 64 * (2 * steps + 2)  # the opening has two messages more, without rows
        assert rows + headers < traffic["bytes"] < rows + headers + 2 * asked + 8 * steps
        assert 0 < traffic["wait_seconds"] < 60


def narrow_and_wide(world, c):
    found = []
    for wire in ("bf16", "fp32"):
        losses, session = an_epoch(world, dataclasses.replace(c, wire_dtype=wire))
        found.append((session.fused.transport, session.model.item.wire_bytes, losses))
    return found


def test_a_narrow_wire_goes_by_sockets_and_halves_the_bytes(data, tmp_path):
    """Also where the ranks could share memory: what is rounded does not depend on where they run."""
    narrow, wide = run_ranks(2, narrow_and_wide, config(data, tmp_path / "run"))[0]
    assert narrow[0] == "sockets between the ranks of 1 host" and wide[0] == "memory that the ranks share"
    assert narrow[1] * 2 == wide[1] > 0
    np.testing.assert_allclose(narrow[2], wide[2], rtol=2e-3)
    assert narrow[2] != wide[2]


def without_connections(world, c):
    world.may_share = False
    connecting.CONNECT_SECONDS = 0.5
    if world.rank == 1:

        def fails(*args):
            raise ConnectionRefusedError("no way")

        connecting.call = fails
    _, session = an_epoch(world, c)
    return session.fused.transport, session.fused.warning


def test_where_there_are_no_connections_the_group_steps_in_and_the_log_says_why(data, tmp_path):
    found = run_ranks(2, without_connections, config(data, tmp_path / "run"))
    assert [name for name, _ in found] == ["the process group"] * 2
    assert all("rank 1" in said and "did not connect to rank 0" in said for _, said in found)


def with_and_without_leaving(world, c):
    go_by(world, "memory")
    whole, _ = an_epoch(world, c)
    go_by(world, "sockets")
    return whole, an_epoch(world, c, left_after=2)[0]


def test_a_pipeline_that_is_left_does_not_disturb_the_next_one(data, tmp_path):
    whole, left = run_ranks(2, with_and_without_leaving, config(data, tmp_path / "run", batch_size=60))[0]
    assert len(whole) == 10 and left == whole


def transport(world, c):
    return an_epoch(world, c)[1].fused.transport


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
    c = config(data, tmp_path / "run", batch_size=8, epochs=100)
    children, queue = start_ranks(3, train_until_killed, (c,), str(tmp_path / "store"))
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
