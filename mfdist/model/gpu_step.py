"""The training step on a GPU with row-sharded tables: Triton's kernels, the exchange of item rows, the offset by DDP.

The interface is ``fused.FusedStep``'s: one forward does the whole step but for the offset. In one process no step
waits for the device, and a step as large as the one before it is one CUDA graph: its 30 kernels are queued at once,
where Python would take longer than they do. With several ranks the host waits for the device between many steps, see
``exchange_between_gpus``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import triton
from torch import nn

from mfdist.data.loader import Batch
from mfdist.kernels import gpu, packed, stride_of
from mfdist.kernels import gpu_arguments as given
from mfdist.model.cpu_step import _Fused
from mfdist.model.exchange_between_gpus import GpuExchange
from mfdist.model.gpu_batch import LocalNumbers, Sorted
from mfdist.model.models import MF
from mfdist.model.objective import ITEM, USER, Floats32, Objective
from mfdist.model.optimizers import RowOptimizer
from mfdist.model.tables import ShardedTable

LINE_FLOATS = 8
"""Rows that are copied out begin at multiples of 32 bytes, what the device moves at once."""


class GpuStep(nn.Module):
    """The step of one model; ``forward`` is collective where the item table is sharded over several ranks.

    ``graphs``: queue steps of one process as CUDA graphs. On CPU tensors the kernels run in Triton's interpreter
    (``TRITON_INTERPRET=1``), for tests.
    """

    def __init__(
        self, model: MF, optimizer: RowOptimizer, objective: Objective, shares: tuple[Floats32, Floats32] | None = None,
        graphs: bool = True,
    ) -> None:  # fmt: skip
        """``shares``: as for ``FusedStep``. The kernels must have the form (``gpu_arguments.has_kernel``)."""
        super().__init__()
        assert isinstance(model.user, ShardedTable) and isinstance(model.item, ShardedTable)
        self.model, self._user, self._item = model, model.user, model.item
        form, self._device = model.form, model.user.world.device
        low, high = form.value_range or (0.0, 0.0)
        self._low, self._span = low, high - low
        assert given.has_kernel(form.dim, form.members, form.implicit > 0)
        assert bool(shares) == (objective.penalised or form.implicit > 0)
        self._objective, self._bags = objective, form.implicit > 0
        self._shapes = [self._shape_of(side, optimizer) for side in (USER, ITEM)]
        self._penalties = [
            self._penalties_of(side, shares[side] if shares else np.zeros(1, "f4")) for side in (USER, ITEM)
        ]
        self._rules = given.rules_on(
            self._device, optimizer.rules, optimizer.betas, optimizer.eps, optimizer.weight_decay
        )
        self._tile = given.tile_rows(self._shapes[USER])
        self._pitch = -(-form.width // LINE_FLOATS) * LINE_FLOATS
        through_bags = form.dim + 1 if self._bags else 0  # as ``kernels.cpu.user_pass`` leaves them
        self._user_pitch = -(-(form.width + through_bags) // LINE_FLOATS) * LINE_FLOATS
        self._clock, self._clock_ahead = (torch.zeros(1, dtype=torch.int32, device=self._device) for _ in range(2))
        self._no_offset = torch.zeros(1, device=self._device)
        self._local = [LocalNumbers(table.layout, table.world.rank, self._device) for table in (self._user, self._item)]
        self._exchange = GpuExchange(self._item, self._pitch) if self._item.world.size > 1 else None
        self._graphs: dict[tuple[int, int], Any] = {}
        self._last_size = (-1, -1)
        self._uses_graphs = graphs and self._device.type == "cuda" and self._item.world.size == 1
        self._capacity = -1
        self._reserve(0)
        self.squared_error = torch.zeros((), dtype=torch.float64, device=self._device)  # of this rank's last rows

    def forward(self, user: torch.Tensor, item: torch.Tensor, rating: torch.Tensor, global_rows: int) -> torch.Tensor:
        """Take one step on this rank's rows; returns their share of the loss (without the penalty)."""
        offset = self.model.offset
        if offset is None or not offset.requires_grad or self._item.world.size == 1:
            loss, grad = self._step(user, item, rating, global_rows)
            if offset is not None and offset.requires_grad:
                offset.grad = grad
            return loss
        loss_of: torch.Tensor = _Fused.apply(offset, self, user, item, rating, global_rows)  # type: ignore[no-untyped-call]
        return loss_of

    def follow(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """``batches``; with several ranks the steps know what comes, see ``exchange_between_gpus``."""
        return self._exchange.follow(batches) if self._exchange else iter(batches)

    @property
    def transport(self) -> str:
        """What item rows go through."""
        return "the process group, many steps' requests at once" if self._exchange else "nothing"

    @property
    def traffic(self) -> dict[str, float]:
        """So far: ``bytes`` of rows and gradients that have left this rank; waiting is not seen from the host."""
        return {"bytes": float(self._item.wire_bytes), "wait_seconds": 0.0}

    def close(self) -> None:
        """Give back the graphs and what they hold."""
        self._graphs.clear()

    def settle(self) -> None:
        """Bring every row of both tables to the present, in place."""
        for table, shape in zip((self._user, self._item), self._shapes, strict=True):
            rows = len(table.rows.last)
            self._clock.fill_(table.step)
            if rows:
                grid = (triton.cdiv(rows, self._tile),)
                gpu.settle[grid](*_flat(table), rows, self._clock, self._rules, shape, self._tile, **given.OPTIONS)

    @torch.no_grad()
    def _step(
        self, user: torch.Tensor, item: torch.Tensor, rating: torch.Tensor, global_rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole step but for the offset: returns (loss, gradient of the offset)."""
        number = len(rating)
        self._reserve(number)
        self._clock.fill_(self._user.step)
        self._users[:number].copy_(self._local[0](user))
        self._ratings[:number].copy_(rating)
        if self._exchange is None:
            self._items[:number].copy_(self._local[1](item))
            self._at_home(number, global_rows)
        else:
            self._with_others(self._exchange, item, global_rows)
        self._user.step = self._item.step = self._user.step + 1
        self.squared_error = self._sums[0].clone()  # the next step writes over it
        return (self.squared_error / global_rows).float(), self._sums[1:].float()

    def _at_home(self, number: int, global_rows: int) -> None:
        """All rows are here: one queue of kernels, as a graph from the second batch of one size in a row."""
        key, scale = (number, global_rows), 2 * self._objective.weight(global_rows)
        if self._uses_graphs and key == self._last_size and key not in self._graphs:
            self._graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graphs[key], capture_error_mode="thread_local"):
                self._queue_step(number, scale)  # recorded, not run
        self._last_size = key
        if key in self._graphs:
            self._graphs[key].replay()
        else:
            self._queue_step(number, scale)

    def _queue_step(self, number: int, scale: float) -> None:
        """The kernels of a step on the first ``number`` rows of the batch's buffers."""
        self._by_user.sort(self._users[:number])
        self._by_item.sort(self._items[:number])
        items = self._by_item
        self._gather(number, items.rows, items.count, self._own, self._clock)
        self._user_pass(number, scale, self._own)
        self._item_pass(number, scale, self._own, None)
        self._add_up(number)

    def _with_others(self, exchange: GpuExchange, item: torch.Tensor, global_rows: int) -> None:
        """Item rows come from their owners, and their gradients go back; collective."""
        scale, number = 2 * self._objective.weight(global_rows), len(item)
        asked = exchange.requests(item)
        self._by_item, rows = asked.items, len(asked.mine)
        if number:
            self._by_user.sort(self._users[:number])
        own, current = exchange.bring_rows(asked, self._gather_to)
        gradient = torch.empty(asked.number, self.model.form.width, device=self._device)
        if number:
            self._user_pass(number, scale, own)
            self._item_pass(number, scale, own, gradient)
        total = exchange.give_back(asked, gradient)
        if rows:
            gpu.update[triton.cdiv(rows, self._tile),](
                *_flat(self._item), asked.mine.clone(), asked.count[0, :1], current, total, self._clock, self._rules,
                self._shapes[ITEM], current.stride(0), total.stride(0), self._tile, **given.OPTIONS,
            )  # fmt: skip
        self._add_up(number)

    def _gather_to(self, rows: torch.Tensor, count: torch.Tensor, out: torch.Tensor, ahead: bool) -> None:
        """``exchange_between_gpus.Gather``."""
        if ahead:
            self._clock_ahead.fill_(self._item.step + 1)
        self._gather(len(rows), rows, count, out, self._clock_ahead if ahead else self._clock)

    def _gather(
        self, most: int, rows: torch.Tensor, count: torch.Tensor, out: torch.Tensor, clock: torch.Tensor
    ) -> None:
        """Weights after step ``clock`` of at most ``most`` item rows to ``out``."""
        if most:
            gpu.gather[triton.cdiv(most, self._tile),](
                *_flat(self._item), rows, count, out, clock, self._rules, self._shapes[ITEM], out.stride(0),
                self._tile, **given.OPTIONS,
            )  # fmt: skip

    def _user_pass(self, number: int, scale: float, own: torch.Tensor) -> None:
        """Score all ratings and move the users; ``own``: the items' current weights, in the order of their rows."""
        users, shape, tile, chunk = self._by_user, self._shapes[USER], self._tile, given.CHUNK
        before, parts = self._before.stride(0), self._parts.stride(0)
        offset = self._no_offset if self.model.offset is None else self.model.offset.detach()
        range_ = scale, self._low, self._span
        gpu.user_pass[triton.cdiv(number, tile),](
            *_flat(self._user), users.rows, users.starts, users.count, users.order, self._by_item.slot, own,
            self._ratings, offset, self._before, self._slope, self._error, self._clock, *range_, self._penalties[0],
            self._rules, shape, own.stride(0), before, chunk, tile, **given.OPTIONS,
        )  # fmt: skip
        blocks = (triton.cdiv(number, chunk),)
        gpu.long_parts[blocks](
            users.number, users.starts, users.order, self._by_item.slot, own, self._before, self._ratings, offset,
            self._slope, self._error, self._parts, *range_, number, shape, own.stride(0), before, parts, True,
            chunk, **given.OPTIONS,
        )  # fmt: skip
        gpu.long_rows[blocks](
            *_flat(self._user), users.rows, users.number, users.starts, self._before, self._parts, self._parts,
            self._clock, scale, self._penalties[0], number, self._rules, shape, before, parts, parts, True, self._bags,
            chunk, given.tile_rows(shape, given.PART_TILE, 64), **given.OPTIONS,
        )  # fmt: skip

    def _item_pass(self, number: int, scale: float, own: torch.Tensor, gradient: torch.Tensor | None) -> None:
        """Move the items, or only find their ``gradient`` (rows, width)."""
        items, shape, tile, chunk = self._by_item, self._shapes[ITEM], self._tile, given.CHUNK
        before, parts = self._before.stride(0), self._parts.stride(0)
        out, here = (self._parts, True) if gradient is None else (gradient, False)
        gpu.row_pass[triton.cdiv(number, tile),](
            *_flat(self._item), items.rows, items.starts, items.count, items.order, self._by_user.slot, own,
            self._before, self._slope, out, self._clock, scale, self._penalties[1], self._rules, shape, own.stride(0),
            before, out.stride(0), chunk, here, tile, **given.OPTIONS,
        )  # fmt: skip
        blocks = (triton.cdiv(number, chunk),)
        gpu.long_parts[blocks](
            items.number, items.starts, items.order, self._by_user.slot, self._before, own, self._ratings,
            self._no_offset, self._slope, self._error, self._parts, scale, 0.0, 0.0, number, shape, before,
            own.stride(0), parts, False, chunk, **given.OPTIONS,
        )  # fmt: skip
        gpu.long_rows[blocks](
            *_flat(self._item), items.rows, items.number, items.starts, own, self._parts, out, self._clock, scale,
            self._penalties[1], number, self._rules, shape, own.stride(0), parts, out.stride(0), here, False, chunk,
            given.tile_rows(shape, given.PART_TILE, 64), **given.OPTIONS,
        )  # fmt: skip

    def _shape_of(self, side: int, optimizer: RowOptimizer) -> tuple[int, ...]:
        form = self.model.form
        stride = stride_of(form.stored_width(side), sum(optimizer.state_widths(form.width)))
        return given.shape_of(
            form.dim, form.bias, packed.KINDS[optimizer.kind], stride, form.sigmoid_range is not None,
            self._objective.penalised, form.members, self._bags, side,
        )  # fmt: skip

    def _penalties_of(self, side: int, shares: Floats32) -> tuple[Any, ...]:
        """The kernels' ``penalties`` of users or of items."""
        always, once = self._objective.l2, self._objective.row_l2 or (0.0,) * 6
        pairs = (part for kind in (0, 2, 4) for part in (always[kind + side], once[kind + side]))
        weights = *pairs, self.model.form.implicit
        return (torch.from_numpy(shares).to(self._device), *weights)

    def _add_up(self, number: int) -> None:
        """The sums of squared errors and of slopes, float64, in a fixed order."""
        blocks = triton.cdiv(number, given.SUM_BLOCK)
        if number:
            gpu.block_sums[blocks,](
                self._error,
                self._slope,
                self._block_sums,
                number,
                blocks,
                max(self.model.form.members, 1),
                given.SUM_BLOCK,
                **given.OPTIONS,
            )
        torch.sum(self._block_sums[: 2 * blocks].view(2, blocks), dim=1, out=self._sums)

    def _reserve(self, ratings: int) -> None:
        """Make room for a batch of so many ratings."""
        if ratings <= self._capacity:
            return
        self._graphs.clear()
        self._capacity = ratings + ratings // 8
        room, device = max(self._capacity, 1), self._device
        blocks = 2 * triton.cdiv(room, given.CHUNK)
        alone = 0 if self._exchange else room  # with others these are the exchange's
        self._by_user, self._by_item = Sorted(room, device), Sorted(alone, device)
        self._users, self._items = (torch.zeros(size, dtype=torch.int32, device=device) for size in (room, alone))
        self._ratings, self._error = (torch.zeros(room, device=device) for _ in range(2))
        self._slope = torch.zeros(room * max(self.model.form.members, 1), device=device)
        self._own = torch.zeros(alone, self._pitch, device=device)
        self._before = torch.zeros(room, self._user_pitch, device=device)
        self._parts = torch.zeros(blocks, self._user_pitch, device=device)
        self._block_sums = torch.zeros(2 * triton.cdiv(room, given.SUM_BLOCK), dtype=torch.float64, device=device)
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)


def _flat(table: ShardedTable) -> tuple[torch.Tensor, torch.Tensor]:
    """The packed rows as one float32 tensor, and the same memory as int32."""
    flat = table.packed.view(-1)
    return flat, flat.view(torch.int32)
