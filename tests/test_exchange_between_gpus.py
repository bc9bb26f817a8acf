"""What ranks on GPUs ask each other for, learned for many batches at once, and rows that travel ahead.

On a CPU, by gloo and Triton's interpreter: the calls, their order and the bits are those of NCCL.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import interpreted
import numpy as np
import pytest
import torch
from ranks import run_ranks

from mfdist.data.loader import Batch
from mfdist.model import exchange_between_gpus as between
from mfdist.model.models import Form, MFAdvanced
from mfdist.model.objective import Objective
from mfdist.model.optimizers import RowOptimizer
from mfdist.model.tables import Layout, ShardedTable

pytestmark = pytest.mark.skipif(interpreted.ON_GPU, reason="its tables are on the CPU, for the interpreter")
ITEMS, WIDTH, PITCH, STEPS = 23, 3, 4, 11
HELD = ((0, 9), (9, 9), (9, 23))
"""Of three ranks; the second has no item."""


def items_of(rank, step):
    """Some batches of some ranks are empty; the first items are in most of them."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    ratings = 0 if (step + rank) % 5 == 0 or step == 6 else 12
    found = torch.randint(0, ITEMS, (ratings,), generator=generator, dtype=torch.int32)
    return torch.where(found % 3 == 0, found // 4, found)


def initial(first, end):
    return torch.arange(first * WIDTH, end * WIDTH, dtype=torch.float32).view(-1, WIDTH) / 7


def gradient_of(rank, step, weight, items):
    """Of the distinct ``items``: what depends on their weights, so that a row of the wrong step is seen."""
    return 0.1 * weight[items] + (rank + 1) / (step + items[:, None] + 3)


def want(epochs):
    """The weights after all steps, and what each rank reads in each of the last epoch, without any exchange."""
    weight, read = initial(0, ITEMS), {}
    for step in itertools.chain(*map(range, epochs)):
        total = torch.zeros_like(weight)
        for rank in range(3):
            items = items_of(rank, step).long().unique()
            read[rank, step] = weight[items]
            total[items] += gradient_of(rank, step, weight, items)
        weight = weight - 0.3 * total
    return weight, read


class Seen(NamedTuple):
    """Of a rank: the rows that it holds at last, what it read in each step, each step's calls in their order, bytes
    sent, and how many rows were gathered for the step after."""

    held: np.ndarray
    read: dict
    calls: list
    bytes: int
    gathered_ahead: int


def take_steps(world, epochs=(STEPS,), wire=torch.float32, announced=True, meeting=(4, 10**6)):
    """So many steps of each epoch, by the exchange; ``meeting``: batches of one, and ratings of a rank."""
    between.STEPS, between.RATINGS = meeting
    calls, read, of_step, ahead_rows, numbers = [], {}, [], [], itertools.count()
    optimizer = RowOptimizer(kind="sgd", lr=0.1, total_steps=100)
    layout = Layout(tuple((span,) for span in HELD), (0, 1, 2, 3))
    table = ShardedTable(layout, WIDTH, optimizer, world, at_home=False, wire_dtype=wire)
    table.initialise(initial)
    exchange, begin = between.GpuExchange(table, PITCH), world.begin_all_to_all

    def recorded(received, sent, received_rows, sent_rows):
        number, wait = next(numbers), begin(received, sent, received_rows, sent_rows)
        calls.append(f"begin {number}")
        return lambda: (calls.append(f"wait {number}"), wait())[1]

    def gather(rows, count, out, ahead):
        assert len(rows) == int(count)
        ahead_rows.append(len(rows) * ahead)
        out[:, :WIDTH] = table.rows.weight[rows.long()]

    world.begin_all_to_all = recorded
    for steps in epochs:
        items = (items_of(world.rank, step) for step in range(STEPS))
        batches = (Batch(item, item, torch.zeros(len(item)), step, 36) for step, item in enumerate(items))
        for batch in itertools.islice(exchange.follow(batches) if announced else batches, steps):
            del calls[:]
            asked = exchange.requests(batch.item)
            calls.append("asked")
            own, current = exchange.bring_rows(asked, gather)
            distinct, weight = batch.item.long().unique(), torch.zeros(ITEMS, WIDTH)
            assert asked.number == len(distinct)
            weight[distinct] = read[world.rank, batch.step] = own[: asked.number, :WIDTH].clone()
            calls.append("arithmetic")
            mine = asked.mine.long()
            total = exchange.give_back(asked, gradient_of(world.rank, batch.step, weight, distinct))
            assert torch.equal(current[: len(mine), :WIDTH], table.rows.weight[mine])
            table.rows.weight[mine] -= 0.3 * total
            of_step.append(list(calls))
    read = {key: rows.numpy() for key, rows in read.items()}  # a tensor would be lent, and the lender ends
    return Seen(table.rows.weight.numpy(), read, of_step, table.wire_bytes, sum(ahead_rows))


@pytest.mark.parametrize(
    ("epochs", "announced", "meeting"),
    [
        ((STEPS,), True, (4, 13)),  # two batches, by their ratings
        ((STEPS,), True, (1, 10**6)),  # one of them is empty on every rank
        ((5, STEPS), True, (4, 10**6)),  # ends early, with rows on their way that nobody takes
        ((5, STEPS), False, (4, 10**6)),
    ],
)
def test_rows_and_sums_are_those_of_one_process_to_the_bit(epochs, announced, meeting):
    weight, read = want(epochs)
    for rank, seen in enumerate(run_ranks(3, take_steps, epochs, torch.float32, announced, meeting)):
        assert np.array_equal(seen.held, weight[slice(*HELD[rank])])
        for step in range(STEPS):
            assert np.array_equal(seen.read[rank, step], read[rank, step]), (rank, step)
        assert bool(seen.gathered_ahead) == (announced and rank != 1)


@pytest.fixture(scope="module")
def by_rank():
    return run_ranks(3, take_steps)


def test_a_step_makes_three_all_to_all_of_which_one_travels_beside_its_arithmetic(by_rank):
    for seen in by_rank:
        assert all(calls[0] == "asked" for calls in seen.calls)  # nobody meets within a step
        before = None
        for calls in seen.calls[1:-1]:
            late, early, gradients = (call.split()[1] for call in calls if call.startswith("begin"))
            at = calls.index("arithmetic")
            assert f"wait {late}" in calls[:at] and f"begin {early}" in calls[:at]
            assert f"wait {early}" not in calls  # in the next step
            assert before is None or f"wait {before}" in calls[:at]
            before = early
            assert calls[at + 1 :] == [f"begin {gradients}", f"wait {gradients}"]
        assert sum(call.startswith("begin") for call in seen.calls[-1]) == 2 and f"wait {before}" in seen.calls[-1]


def test_rows_travel_once_and_bf16_halves_their_bytes(by_rank):
    whole, narrow = (
        [seen.bytes for seen in ranks] for ranks in (by_rank, run_ranks(3, take_steps, (STEPS,), torch.bfloat16))
    )
    for rank in range(3):
        expected = 0
        for step, other in itertools.product(range(STEPS), {0, 1, 2} - {rank}):
            for owner, asker in ((rank, other), (other, rank)):  # its rows to them, its gradients to their owners
                items, (first, end) = items_of(asker, step).unique(), HELD[owner]
                expected += int(((items >= first) & (items < end)).sum()) * WIDTH * 4
        assert whole[rank] == expected and narrow[rank] * 2 == expected


def gpu_steps(world, announced, cuts):
    """Exact AdamW with decay by ``GpuStep``; ``announced`` in epochs of so many steps. The item rows held, and how many
    were gathered for the step after."""
    from mfdist.model.gpu_step import GpuStep

    between.STEPS = 3
    form = Form(model="mf_advanced", dim=4, bias=True, init=True, sigmoid_range=(0.5, 5.5))
    optimizer = RowOptimizer(kind="adamw", lr=0.05, weight_decay=0.1, total_steps=100)
    users, items, number = 40, 400, 7
    layouts = [Layout((((0, rows // 2),), ((rows // 2, rows),)), (0, 1, 2)) for rows in (users, items)]
    tables = [
        ShardedTable(layout, form.width, optimizer, world, at_home=side == 0) for side, layout in enumerate(layouts)
    ]
    for side, table in enumerate(tables):
        table.initialise(lambda first, end, side=side: form.initial(1, side, first, end))
    step, ahead = GpuStep(MFAdvanced(form, *tables), optimizer, Objective()), []
    gather = step._gather_to

    def counted(rows, count, out, is_ahead):
        ahead.append(len(rows) * is_ahead)
        gather(rows, count, out, is_ahead)

    step._gather_to = counted
    generator = torch.Generator().manual_seed(5 + world.rank)
    batches = [
        Batch(
            torch.randint(20 * world.rank, 20 * (world.rank + 1), (15,), generator=generator, dtype=torch.int32),
            torch.randint(0, items // (1 + turn % 3 * 9), (15,), generator=generator, dtype=torch.int32),
            1 + 4 * torch.rand(15, generator=generator), turn, 30,
        )
        for turn in range(number)
    ]  # fmt: skip
    for first, end in itertools.pairwise([0, *cuts, number]):
        for batch in step.follow(batches[first:end]) if announced else batches[first:end]:
            step(batch.user, batch.item, batch.rating, batch.global_rows)
    step.settle()
    return tables[1].packed.numpy().view(np.int32), sum(ahead)


def test_rows_gathered_ahead_are_those_of_their_own_step_under_exact_adamw():
    """They miss one step's decay and momentum where the clock is the step's in work."""
    whole, ahead = (run_ranks(2, gpu_steps, announced, (4,)) for announced in (False, True))
    for (rows, gathered), (want_rows, _) in zip(ahead, whole, strict=True):
        assert np.array_equal(rows, want_rows) and gathered > 15
