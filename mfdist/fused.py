"""The training step on CPUs with row-sharded tables: the fused kernels, the exchange of item rows, the offset by DDP.

One forward does the whole step but for the offset: it groups the batch, fetches item rows, scores and updates users,
adds up item gradients and updates items (or sends gradients to their owners). The loss that it returns depends on the
offset alone, whose gradient backward hands to DistributedDataParallel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mfdist.embedding import ShardedTable
from mfdist.kernels import cpu
from mfdist.model import MF
from mfdist.optim import RowOptimizer

PARALLEL_ROWS = 2048
"""Smaller batches are not worth a second thread."""
SETTLE_ROWS = 4096


class Grouped:
    """A batch's ratings by row of one side, see ``kernels.cpu.group``; the arrays are reused from step to step."""

    def __init__(self) -> None:
        self._capacity = -1

    def fill(self, ids: npt.NDArray[np.int32]) -> None:
        if len(ids) > self._capacity:
            self._capacity = len(ids)
            self.order, self._scratch, self.rows, self.slot = (np.empty(len(ids) + 1, np.int32) for _ in range(4))
            self.starts = np.empty(len(ids) + 2, np.int32)
        self.count = int(cpu.group(ids, self.order, self._scratch, self.rows, self.starts, self.slot))


class FusedStep(nn.Module):
    """The step of one model; ``forward`` is collective where the item table is sharded over several ranks."""

    def __init__(self, model: MF, optimizer: RowOptimizer, l2: tuple[float, float], threads: int) -> None:
        super().__init__()
        assert isinstance(model.user, ShardedTable) and isinstance(model.item, ShardedTable)
        self.model, self._user, self._item = model, model.user, model.item
        self._optimizer, self._l2 = optimizer, l2
        form = model.form
        self._shape = cpu.shape_of(form.dim, form.bias, cpu.KINDS[optimizer.kind])
        self._rules = cpu.rule_arrays(optimizer.rules)
        self._workers = cpu.Workers(threads)
        self._alone = cpu.Workers(1)
        self._by_user, self._by_item = Grouped(), Grouped()
        self._work: dict[str, npt.NDArray[np.float32]] = {}
        self.squared_error = torch.zeros((), dtype=torch.float64)  # of this rank's rows in the last step

    def forward(self, user: torch.Tensor, item: torch.Tensor, rating: torch.Tensor, global_rows: int) -> torch.Tensor:
        """Take one step on this rank's rows; returns their share of the loss (without the penalty)."""
        offset = self.model.offset
        if offset is None:
            loss, _ = self._step(user, item, rating, global_rows)
            return loss
        loss_of: torch.Tensor = _Fused.apply(offset, self, user, item, rating, global_rows)  # type: ignore[no-untyped-call]
        return loss_of

    def close(self) -> None:
        """End the kernels' threads."""
        self._workers.close()

    def settle(self) -> None:
        """Bring every row of both tables to the present, in place."""
        for table in (self._user, self._item):
            flat, lasts = _flat(table)
            numbers = self._numbers(table.step + 1, 1)
            rows = np.arange(len(table.rows.last), dtype=np.int32)

            def settle(low: int, high: int, flat: Any = flat, lasts: Any = lasts, rows: Any = rows,
                       numbers: Any = numbers, now: int = table.step) -> None:  # fmt: skip
                out = np.empty((SETTLE_ROWS, self.model.form.width), np.float32)
                for first in range(low, high, SETTLE_ROWS):
                    part = rows[first : min(first + SETTLE_ROWS, high)]
                    cpu.gather(self._shape, flat, lasts, part, 0, len(part), out, now, self._rules, numbers)

            cuts = [len(rows) * k // self._workers.threads for k in range(self._workers.threads + 1)]
            self._workers.ranges(cuts, settle)

    def _step(
        self, user: torch.Tensor, item: torch.Tensor, rating: torch.Tensor, global_rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole step but for the offset: returns (loss, gradient of the offset)."""
        users, items = self._by_user, self._by_item
        workers = self._workers if len(rating) >= PARALLEL_ROWS else self._alone
        local = self._user.local(user).int().numpy()
        ids = item.int().numpy()
        workers.both(lambda: users.fill(local), lambda: items.fill(ids))
        now = self._user.step
        numbers = self._numbers(now + 1, global_rows)
        own, exchange = self._item_rows(items, workers, now, numbers)
        before, slope, error = (
            self._buffer("before", users.count),
            self._vector("slope", len(ids)),
            self._vector("error", len(ids)),
        )
        flat, lasts = _flat(self._user)
        ratings, shape, rules = rating.numpy(), self._shape, self._rules
        workers.ranges(
            workers.cuts(users.starts, users.count),
            lambda low, high: cpu.user_pass(
                shape, flat, lasts, users.rows, users.starts, users.order, low, high, items.slot, own, ratings, before,
                slope, error, now, rules, numbers,
            ),
        )  # fmt: skip
        self._update_items(items, users, workers, own, before, slope, now, numbers, exchange)
        self._user.step = self._item.step = now + 1
        self.squared_error = torch.from_numpy(error).double().square().sum()
        loss = (self.squared_error / global_rows).float()
        return loss, torch.from_numpy(slope).double().sum().float().view(1)

    def _item_rows(
        self, items: Grouped, workers: cpu.Workers, now: int, numbers: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.float32], Any]:
        """Weights of the batch's item rows, current; from their owners where there are several ranks."""
        if self._item.world.size == 1:
            return self._gather(items.rows, items.count, workers, now, numbers, "own"), None
        exchange = self._item.exchange(torch.from_numpy(items.rows[: items.count].astype(np.int64)))
        mine = exchange.mine.int().numpy()
        values = self._gather(mine, len(mine), workers, now, numbers, "mine")
        return exchange.fetch(torch.from_numpy(values[: len(mine)])).numpy(), exchange

    def _gather(
        self, rows: npt.NDArray[np.int32], count: int, workers: cpu.Workers, now: int, numbers: Any, name: str
    ) -> npt.NDArray[np.float32]:
        flat, lasts = _flat(self._item)
        out, shape, rules = self._buffer(name, count), self._shape, self._rules
        cuts = [count * k // workers.threads for k in range(workers.threads + 1)]
        workers.ranges(
            cuts, lambda low, high: cpu.gather(shape, flat, lasts, rows, low, high, out, now, rules, numbers)
        )
        return out

    def _update_items(
        self, items: Grouped, users: Grouped, workers: cpu.Workers, own: Any, before: Any, slope: Any, now: int,
        numbers: Any, exchange: Any,
    ) -> None:  # fmt: skip
        flat, lasts = _flat(self._item)
        shape, cuts = self._shape, workers.cuts(items.starts, items.count)
        if exchange is None:
            workers.ranges(
                cuts,
                lambda low, high: cpu.item_pass(
                    shape, flat, lasts, items.rows, items.starts, items.order, low, high, users.slot, own, before,
                    slope, now, numbers,
                ),
            )  # fmt: skip
            return
        grad = self._buffer("gradient", items.count)
        workers.ranges(
            cuts,
            lambda low, high: cpu.gradient(
                shape, items.starts, items.order, low, high, users.slot, own, before, slope, numbers, grad
            ),
        )
        total = exchange.give_back(torch.from_numpy(grad[: items.count])).numpy()
        mine = exchange.mine.int().numpy()
        cuts = [len(mine) * k // workers.threads for k in range(workers.threads + 1)]
        workers.ranges(cuts, lambda low, high: cpu.update(shape, flat, lasts, mine, low, high, total, now, numbers))

    def _numbers(self, step: int, global_rows: int) -> npt.NDArray[np.float32]:
        """``kernels.cpu.STEP_FIELDS`` of a step."""
        optimizer, form = self._optimizer, self.model.form
        rate, (beta1, beta2), scale = optimizer.rate(step), optimizer.betas, 2 / global_rows
        low, high = form.sigmoid_range or (0.0, 0.0)
        offset = float(self.model.offset.detach()) if self.model.offset is not None else 0.0
        return np.array(
            [1 - rate * optimizer.weight_decay, rate / (1 - beta1**step), (1 - beta2**step) ** -0.5, beta1, beta2,
             optimizer.eps, rate, scale, scale * self._l2[0], scale * self._l2[1], low, high - low,
             form.sigmoid_range is not None, offset], np.float32,
        )  # fmt: skip

    def _buffer(self, name: str, rows: int) -> npt.NDArray[np.float32]:
        kept = self._work.get(name)
        if kept is None or len(kept) < rows:
            kept = self._work[name] = np.empty((rows + rows // 8, self.model.form.width), np.float32)
        return kept

    def _vector(self, name: str, rows: int) -> npt.NDArray[np.float32]:
        kept = self._work.get(name)
        if kept is None or len(kept) < rows:
            kept = self._work[name] = np.empty(rows, np.float32)
        return kept[:rows]


def _flat(table: ShardedTable) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
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
