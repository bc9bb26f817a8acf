"""The training step on CPUs with row-sharded tables: the fused kernels, the exchange of item rows, the offset by DDP.

One forward does the whole step but for the offset: it groups the batch, fetches item rows, scores and updates users,
adds up item gradients and updates items (or sends gradients to their owners). The loss that it returns depends on the
offset alone, whose gradient backward hands to DistributedDataParallel (one process sets it at once).

No torch operation touches a batch here: torch's threads wait actively after each, on the kernels' processors.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mfdist.data.loader import Batch
from mfdist.kernels import bags, cpu, hosts, packed, ranks, row_arithmetic
from mfdist.kernels.numba_intrinsics import constants
from mfdist.kernels.worker_threads import StepThreads, Workers
from mfdist.model.exchange import GroupExchange, SharedExchange, open_exchange
from mfdist.model.exchange_between_hosts import HostExchange
from mfdist.model.models import MF
from mfdist.model.objective import ITEM, USER, Objective
from mfdist.model.optimizers import RowOptimizer
from mfdist.model.tables import ShardedTable

Floats32 = npt.NDArray[np.float32]
Ints32 = npt.NDArray[np.int32]

PARALLEL_ROWS = 2048
"""Smaller batches are not worth a second thread."""
SETTLE_ROWS = 4096
OWN_KERNELS_RATINGS = 1_000_000
"""From so many ratings an epoch on, a fifth less time a step is worth compiling for half a minute, once a machine. The
results are the same bits."""


class Grouped:
    """A batch's ratings by row of one side, see ``kernels.grouping.group``; the arrays are reused from step to step."""

    def __init__(self) -> None:
        self.reserve(0)

    def reserve(self, ratings: int) -> None:
        """Make room for a batch of so many ratings."""
        self.room = ratings
        self.order, self.rows, self.slot = (np.empty(ratings + 1, np.int32) for _ in range(3))
        self.starts, self.pairs = np.empty(ratings + 2, np.int32), np.empty((2, ratings + 1), np.int64)

    @property
    def arrays(self) -> tuple[Ints32, npt.NDArray[np.int64], Ints32, Ints32, Ints32]:
        """In the order of the arguments of ``kernels.grouping.group``."""
        return self.order, self.pairs, self.rows, self.starts, self.slot


class FusedStep(nn.Module):
    """The step of one model; ``forward`` is collective where the item table is sharded over several ranks.

    :meth:`close` it: its threads hold on to the tables.
    """

    def __init__(
        self, model: MF, optimizer: RowOptimizer, objective: Objective, threads: int,
        shares: tuple[Floats32, Floats32] | None = None, ratings: int = 0,
    ) -> None:  # fmt: skip
        """``shares``: with a penalty or bags, ``objective.shares_of`` this rank's user rows, and of all items.

        ``ratings``: of an epoch; kernels are compiled for this very shape of a row where they have that much to do.
        """
        super().__init__()
        assert isinstance(model.user, ShardedTable) and isinstance(model.item, ShardedTable)
        self.model, self._pair = model, (model.user, model.item)  # a tuple: torch looks long for a module's modules
        self._optimizer, self._objective = optimizer, objective
        form = model.form
        self._shape = packed.shape_of(form.dim, form.bias, form.members, packed.KINDS[optimizer.kind])
        nothing = np.empty((2, 0), np.float32)
        self._sizes = constants(self._shape) if ratings >= OWN_KERNELS_RATINGS else self._shape
        self._shares = shares or (nothing[0], nothing[0])
        assert bool(shares) == (objective.penalised or form.implicit > 0)
        stride = bags.stride_with_bag(self._shape)
        self._user_shape: Any = (*self._shape[:2], stride, *self._shape[3:]) if form.implicit else self._sizes
        self._user_penalties, self._item_penalties = (
            objective.penalties(side, form.dim, form.width, form.members) if objective.penalised else nothing
            for side in (USER, ITEM)
        )
        self._rules = packed.rule_arrays(optimizer.rules)
        self._workers, self._alone, self._step_threads = Workers(threads), Workers(1), StepThreads(1, ())
        self._gate, self._counts = np.zeros(1, np.int64), np.zeros(5, np.int64)
        self._numbers = np.zeros(len(packed.STEP_FIELDS), np.float32)
        self._by_user, self._by_item, self._by_owner = Grouped(), Grouped(), Grouped()
        self._world = model.item.world
        self._exchange = open_exchange(model.item, model.user, form.units.values) if self._world.size > 1 else None
        self._compiled = False
        self._capacity = -1
        self._own, self._before = (np.empty((0, form.width), np.float32) for _ in range(2))
        self._slopes, self._errors = np.empty(0, np.float32), np.empty(0, np.float32)
        self._batch = np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32)
        self._squared_error = [torch.zeros((), dtype=torch.float64)]  # torch looks long at what a module is given
        self._tables = _flat(model.user), _flat(model.item)
        self._flat_tables = (*self._tables[USER], *self._tables[ITEM])
        self._penalties = self._user_penalties, self._item_penalties, *self._shares
        self._in_order = np.empty(0, np.int32)

    def forward(self, user: torch.Tensor, item: torch.Tensor, rating: torch.Tensor, global_rows: int) -> torch.Tensor:
        """Take one step on this rank's rows; returns their share of the loss (without the penalty)."""
        offset = self.model.offset
        if offset is None or not offset.requires_grad or not self.needs_reduction:
            loss, grad = self._step(user, item, rating, global_rows)
            if offset is not None and offset.requires_grad:
                offset.grad = grad
            return loss
        loss_of: torch.Tensor = _Fused.apply(offset, self, user, item, rating, global_rows)  # type: ignore[no-untyped-call]
        return loss_of

    @property
    def squared_error(self) -> torch.Tensor:
        """Of this rank's rows in the last step, float64."""
        return self._squared_error[0]

    @property
    def transport(self) -> str:
        """What item rows go through."""
        return self._exchange.name if self._exchange else "nothing"

    @property
    def traffic(self) -> dict[str, float]:
        """So far: ``bytes`` that have left this rank, and ``wait_seconds`` for what came; of rows and gradients alone,
        and no waiting, where they go by shared memory or the process group."""
        if isinstance(self._exchange, HostExchange):
            return self._exchange.traffic
        return {"bytes": float(self._pair[ITEM].wire_bytes), "wait_seconds": 0.0}

    @property
    def warning(self) -> str | None:
        """Why item rows go a slow way between hosts, where they do."""
        return self._exchange.why if isinstance(self._exchange, GroupExchange) else None

    @property
    def needs_reduction(self) -> bool:
        """Whether the offset's gradient is this rank's alone: DistributedDataParallel has to add it up."""
        return self._world.size > 1 and not isinstance(self._exchange, HostExchange)

    def follow(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """``batches``, a step to be taken on each; where it pays the next ones are looked at ahead."""
        return self._exchange.follow(batches) if isinstance(self._exchange, HostExchange) else iter(batches)

    def close(self) -> None:
        """End the kernels' threads, and close connections."""
        self._workers.close()
        self._step_threads.close()
        if isinstance(self._exchange, HostExchange):
            self._exchange.close()

    def settle(self) -> None:
        """Bring every row of both tables to the present, in place."""
        shapes = self._user_shape, self._sizes
        for table, (flat, lasts), shape in zip(self._pair, self._tables, shapes, strict=True):
            numbers = self._numbers_of(table.step + 1, 1)
            rows = np.arange(len(table.rows.last), dtype=np.int32)

            def settle(low: int, high: int, flat: Any = flat, lasts: Any = lasts, rows: Any = rows,
                       numbers: Any = numbers, now: int = table.step, shape: Any = shape) -> None:  # fmt: skip
                out = np.empty((SETTLE_ROWS, self.model.form.width), np.float32)
                for first in range(low, high, SETTLE_ROWS):
                    part = rows[first : min(first + SETTLE_ROWS, high)]
                    cpu.gather(shape, flat, lasts, part, 0, len(part), out, now, self._rules, numbers)

            self._workers.ranges(len(rows), settle)

    def _step(
        self, user: torch.Tensor, item: torch.Tensor, rating: torch.Tensor, global_rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole step but for the offset: returns (loss, gradient of the offset)."""
        ratings, now = len(rating), self._pair[USER].step
        if ratings > self._capacity:
            self._grow(ratings)
        self._numbers_of(now + 1, global_rows)
        alone = ratings < PARALLEL_ROWS
        if isinstance(self._exchange, HostExchange):
            self._step_with_hosts(self._exchange, Batch(user, item, rating, now, global_rows), now, alone)
        else:
            ids = self._pair[USER].local_int32(user.numpy()), item.numpy()
            for buffer, values in zip(self._batch, (*ids, rating.numpy()), strict=True):
                buffer[:ratings] = values
            if self._world.size == 1:
                self._step_threads.take(ratings, now, alone)
            else:
                self._step_with_others(ratings, now, alone)
        for table in self._pair:
            vars(table)["step"] = now + 1  # a module's own assignment takes 8 microseconds
        squares, slopes = cpu.sums(self._errors[:ratings], self._slopes[: ratings * self._shape[4]])
        self._squared_error[0] = torch.tensor(squares, dtype=torch.float64)
        if isinstance(self._exchange, HostExchange):
            slopes = float(self._exchange.slope)
        return torch.tensor(squares / global_rows), torch.tensor([slopes], dtype=torch.float32)

    def _step_with_others(self, ratings: int, now: int, alone: bool) -> None:
        """Item rows come from their owners, and their gradients go back; collective."""
        exchange, stage = self._exchange, ranks.REQUEST
        assert isinstance(exchange, SharedExchange | GroupExchange)
        workers = self._alone if alone else self._workers
        batch = tuple(values[:ratings] for values in self._batch)
        learned = self._before, self._slopes[: ratings * self._shape[4]], self._errors[:ratings]
        while stage != ranks.DONE:
            if exchange.room > self._by_owner.room:
                self._by_owner.reserve(exchange.room)
            self._gate[0] = 0
            arguments = (
                workers.threads, self._gate, stage, self._sizes, batch, self._by_user.arrays, self._by_item.arrays,
                self._by_owner.arrays, self._counts, self._in_order, self._flat_tables, learned, self._penalties, now,
                self._rules, self._numbers, *exchange.arrays,
            )  # fmt: skip
            if not self._compiled:
                self._compile(ranks.step_of_ranks, arguments)
            workers.all(lambda thread, arguments=arguments: ranks.step_of_ranks(thread, *arguments))  # type: ignore[misc]
            items = self._by_item.rows[: self._counts[ranks.ITEMS]]
            stage = exchange.bring(int(self._counts[ranks.STAGE]), items, self._counts)

    def _step_with_hosts(self, exchange: HostExchange, batch: Batch, now: int, alone: bool) -> None:
        """The same by messages to other hosts, which know the next batches; collective."""
        workers = self._alone if alone else self._workers

        def call(stage: int, step: int) -> None:
            self._gate[0] = 0
            learned = self._before, self._slopes, self._errors
            arguments = (
                workers.threads, self._gate, stage, step, self._sizes, *exchange.arrays, self._flat_tables, learned,
                self._penalties, now + min(step, 0), self._rules, self._numbers,
            )  # fmt: skip
            if not self._compiled:
                self._compile(hosts.step_of_hosts, arguments)
            workers.all(lambda thread: hosts.step_of_hosts(thread, *arguments))

        for step in exchange.steps(batch):
            exchange.run(step, call)

    def _compile(self, kernel: Any, arguments: tuple[Any, ...]) -> None:
        """Let one rank of a host compile, and the others find the code on the disk; collective."""
        threads, gate, _stage, *others = arguments
        if int(os.environ.get("LOCAL_RANK", self._world.rank)) == 0:
            done = hosts.DONE if kernel is hosts.step_of_hosts else ranks.DONE
            kernel(0, threads, gate, done, *others)
        self._world.barrier()
        self._compiled = True

    def _numbers_of(self, step: int, global_rows: int) -> Floats32:
        """``kernels.packed.STEP_FIELDS`` of a step, in the array that all steps use."""
        optimizer, form = self._optimizer, self.model.form
        rate, (beta1, beta2) = optimizer.rate(step), optimizer.betas
        scale = 2 * self._objective.weight(global_rows)
        low, high = form.value_range or (0.0, 0.0)
        offset = float(self.model.offset.detach()) if self.model.offset is not None else 0.0
        self._numbers[:] = (
            1 - rate * optimizer.weight_decay, rate / (1 - beta1**step), (1 - beta2**step) ** -0.5, 1 - beta1, beta2,
            optimizer.eps, rate, scale, low, high - low, form.sigmoid_range is not None, offset, 1 - beta2,
            form.implicit,
        )  # fmt: skip
        return self._numbers

    def _grow(self, ratings: int) -> None:
        """Make room for a batch of so many ratings."""
        rows = ratings + ratings // 8
        self._by_user.reserve(rows)
        self._by_item.reserve(rows)
        form = self.model.form
        through_bags = form.dim + 1 if form.implicit else 0
        self._batch = np.empty(rows, np.int32), np.empty(rows, np.int32), np.empty(rows, np.float32)
        self._own = row_arithmetic.row_buffer(rows, form.width)
        self._before = row_arithmetic.row_buffer(rows, form.width + through_bags)
        self._errors, self._in_order = np.empty(rows, np.float32), np.arange(rows, dtype=np.int32)
        self._slopes = np.empty(rows * self._shape[4], np.float32)
        if self._world.size == 1:
            self._step_threads.close()
            self._step_threads = StepThreads(
                self._workers.threads,
                (self._sizes, self._batch, self._by_user.arrays, self._by_item.arrays, self._counts,
                 *self._tables[USER], *self._tables[ITEM], self._own, self._before, self._slopes, self._errors,
                 self._user_penalties, self._item_penalties, *self._shares, self._rules, self._numbers),
            )  # fmt: skip
        self._capacity = rows


def _flat(table: ShardedTable) -> tuple[Floats32, Ints32]:
    """The packed rows as one float32 array, and the same memory as int32."""
    flat = table.packed.view(-1).numpy()
    return flat, flat.view(np.int32)


class _Fused(torch.autograd.Function):
    """The step as a function of the offset."""

    @staticmethod
    def forward(
        ctx: Any, offset: torch.Tensor, step: FusedStep, user: torch.Tensor, item: torch.Tensor, rating: torch.Tensor,
        global_rows: int,
    ) -> torch.Tensor:  # fmt: skip
        loss, grad = step._step(user, item, rating, global_rows)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        return grad * upstream, None, None, None, None, None
