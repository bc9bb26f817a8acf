"""Embedding tables: whole on every rank, or cut by rows over the ranks, behind one interface.

A table has ``num_rows`` rows of ``width`` float32 weights (the factors and, where the model has one, the bias as the
last column), their optimizer state, and the step that each row was last brought to. A model only calls
``table(rows)``; where the rows lie is not its business.

Rows are cut into as many *parts* as the dataset has lanes, and rank r holds the parts of its lanes. A user part is the
lane's user rows, so the users of the ratings that a rank streams are its own. Item parts are even chunks. Example:
10 items, 4 lanes, 2 ranks: chunks of ceil(10 / 4) = 3 rows, parts [0,3) [3,6) | [6,9) [9,10); item 7 lives on rank 1.
A user table after an append: lane 0 owns rows [0,5) and [20,22), lane 1 [5,20); one rank holds both in part order.

Parts are also what a checkpoint stores, so that it loads on any number of ranks.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mfdist.cluster.world import World
from mfdist.data.dataset import Manifest
from mfdist.kernels import stride_of
from mfdist.model.optimizers import RowOptimizer

Range = tuple[int, int]
Initial = Callable[[int, int], torch.Tensor]
"""(first, end) -> float32 (end - first, width): the initial weights of global rows, the same on any rank."""


@dataclass(frozen=True)
class Layout:
    """Which global rows make each part, and which parts each rank holds."""

    parts: tuple[tuple[Range, ...], ...]
    first_part: tuple[int, ...]  # of each rank, and one past the last

    @property
    def num_rows(self) -> int:
        return sum(end - first for part in self.parts for first, end in part)

    def parts_of(self, rank: int) -> range:
        return range(self.first_part[rank], self.first_part[rank + 1])

    def ranges_of(self, rank: int) -> list[Range]:
        """The global rows of a rank, in the order of its local rows."""
        return [span for part in self.parts_of(rank) for span in self.parts[part]]

    def owner_of_part(self, part: int) -> int:
        return int(np.searchsorted(self.first_part, part, side="right")) - 1


def user_layout(manifest: Manifest, world_size: int) -> Layout:
    return Layout(tuple(lane.user_ranges for lane in manifest.lanes), _first_parts(len(manifest.lanes), world_size))


def item_layout(manifest: Manifest, world_size: int) -> Layout:
    lanes = len(manifest.lanes)
    chunk = -(-manifest.num_items // lanes)
    cuts = [min(part * chunk, manifest.num_items) for part in range(lanes + 1)]
    return Layout(tuple(((cuts[k], cuts[k + 1]),) for k in range(lanes)), _first_parts(lanes, world_size))


def _first_parts(parts: int, world_size: int) -> tuple[int, ...]:
    return tuple(rank * parts // world_size for rank in range(world_size + 1))


@dataclass
class Rows:
    """Rows at hand: weights, optimizer state and ``last`` (see ``kernels/reference``), one line each."""

    weight: torch.Tensor
    state: tuple[torch.Tensor, ...]
    last: torch.Tensor

    def take(self, index: torch.Tensor) -> Rows:
        return Rows(self.weight[index], tuple(s[index] for s in self.state), self.last[index])

    def put(self, index: torch.Tensor, rows: Rows) -> None:
        self.weight[index] = rows.weight
        for mine, theirs in zip(self.state, rows.state, strict=True):
            mine[index] = theirs
        self.last[index] = rows.last

    def slice(self, first: int, end: int) -> Rows:
        """A view of consecutive rows."""
        return Rows(self.weight[first:end], tuple(s[first:end] for s in self.state), self.last[first:end])

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight, **{f"state{k}": s for k, s in enumerate(self.state)}, "last": self.last}


class Table(nn.Module):
    """What both placements share: the rows of this rank's parts, by part, by chunk, or settled."""

    def __init__(
        self, layout: Layout, width: int, optimizer: RowOptimizer, world: World, held: Sequence[Range]
    ) -> None:
        super().__init__()
        self.layout, self.width, self.optimizer, self.world = layout, width, optimizer, world
        self.step = 0  # steps taken so far
        self._held = _joined(held)
        sizes = [end - first for first, end in self._held]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.rows = self._allocate(int(self._starts[-1]))

    @property
    def held(self) -> tuple[Range, ...]:
        """The global rows of this rank, in the order of its local ones."""
        return tuple(self._held)

    def _allocate(self, rows: int) -> Rows:
        device = self.world.device
        return Rows(
            torch.empty(rows, self.width, device=device),
            tuple(torch.zeros(rows, w, device=device) for w in self.optimizer.state_widths(self.width)),
            torch.zeros(rows, dtype=torch.int32, device=device),
        )

    def initialise(self, initial: Initial) -> None:
        """Fill the weights; a row's do not depend on where it lies."""
        for (first, end), start in zip(self._held, self._starts, strict=False):
            for low in range(first, end, 1 << 18):
                high = min(low + (1 << 18), end)
                place = int(start) + low - first
                self.rows.weight.data[place : place + high - low] = initial(low, high).to(self.world.device)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Weights (rows, width) of global rows (rows,), current before this step."""
        raise AssertionError("a table is one of its placements")

    def apply_gradient(self) -> None:
        """Take one step with the gradient of the last forward; every rank calls, after backward."""
        raise AssertionError("a table is one of its placements")

    def read(self, rows: torch.Tensor) -> Rows:
        """Settled weights and ``last`` of global rows (rows,); every rank calls."""
        raise AssertionError("a table is one of its placements")

    def part(self, number: int) -> Rows:
        """A view of the rows of one of this rank's parts."""
        spans = self.layout.parts[number]
        if not spans:
            return self.rows.slice(0, 0)
        first = int(self.local(torch.tensor([spans[0][0]]))[0]) if spans[0][0] < spans[0][1] else 0
        return self.rows.slice(first, first + sum(end - begin for begin, end in spans))

    def local(self, rows: torch.Tensor) -> torch.Tensor:
        """Local numbers of global rows that this rank holds: int64."""
        rows = rows.long()
        if len(self._held) == 1:
            return rows - self._held[0][0]
        order = np.argsort([first for first, _ in self._held], kind="stable")
        firsts = torch.tensor([self._held[k][0] for k in order], device=rows.device)
        shifts = [int(self._starts[k]) - self._held[k][0] for k in order]
        shift = torch.tensor(shifts, dtype=torch.int64, device=rows.device)  # also on a rank that holds nothing
        return rows + shift[torch.searchsorted(firsts, rows, right=True) - 1]

    def local_int32(self, rows: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
        """:meth:`local` for numpy arrays, without torch's threads."""
        if len(self._held) == 1:
            first = self._held[0][0]
            return (rows - first if first else rows).astype(np.int32, copy=False)
        return self.local(torch.from_numpy(rows)).int().numpy()

    @torch.no_grad()
    def settle(self) -> None:
        """Bring every row to the present, in place."""
        for first in range(0, len(self.rows.last), 1 << 18):
            rows = self.rows.slice(first, min(first + (1 << 18), len(self.rows.last)))
            self.optimizer.catch_up(rows.weight, rows.state, rows.last, self.step)
            rows.last.copy_(torch.where(rows.last > 0, self.step, -self.step))

    def current(self, first: int, end: int, zero_untouched: bool = False) -> torch.Tensor:
        """Settled weights of local rows ``first`` to ``end``, on the CPU; untouched ones zero where asked."""
        rows = self.rows.slice(first, end)
        weight = rows.weight.detach()
        return (torch.where(rows.last[:, None] > 0, weight, 0.0) if zero_untouched else weight).cpu()


def _joined(spans: Sequence[Range]) -> list[Range]:
    """Ranges in their order, neighbours as one; empty ones left out."""
    joined: list[Range] = []
    for first, end in spans:
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], end)
        elif first < end:
            joined.append((first, end))
    return joined


class ReplicatedTable(Table):
    """The whole table on every rank, a parameter that DistributedDataParallel reduces: the plain DDP path."""

    def __init__(self, layout: Layout, width: int, optimizer: RowOptimizer, world: World) -> None:
        held = [span for part in layout.parts for span in part]
        super().__init__(layout, width, optimizer, world, held)
        self.weight = nn.Parameter(self.rows.weight)
        self._touched = torch.zeros(len(self.rows.last), dtype=torch.float32, device=world.device)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Weights (rows, width) of global rows (rows,)."""
        index = self.local(rows)
        self._touched[index] = 1.0
        return nn.functional.embedding(index, self.weight)

    @torch.no_grad()
    def apply_gradient(self) -> None:
        """Take one step on all rows; every rank calls, after backward."""
        self.step += 1
        self.world.all_reduce(self._touched)
        touched = self._touched > 0
        assert self.weight.grad is not None
        if self.optimizer.kind == "sparse_adam":
            self._update_touched(touched)
        else:
            self.optimizer.update(self.weight.data, self.rows.state, self.weight.grad, self.step)
        self.rows.last.copy_(torch.where(touched | (self.rows.last > 0), self.step, -self.step))
        self._touched.zero_()

    def _update_touched(self, touched: torch.Tensor) -> None:
        """Move the rows that any rank's batch touched; the others only decay."""
        everything = Rows(self.weight.data, self.rows.state, self.rows.last)
        index = touched.nonzero()[:, 0]
        rows = everything.take(index)
        assert self.weight.grad is not None
        self.optimizer.update(rows.weight, rows.state, self.weight.grad[index], self.step)
        self.optimizer.catch_up(everything.weight, everything.state, everything.last, self.step)
        everything.put(index, rows)

    def read(self, rows: torch.Tensor) -> Rows:
        """Settled rows; every rank calls (it need not, here)."""
        return Rows(self.weight.data, (), self.rows.last).take(self.local(rows))


class ShardedTable(Table):
    """A rank holds the rows of its parts; the rows that its batch needs come by one exchange, gradients go back.

    ``at_home``: every row that this rank asks for is its own (users), so that nothing travels.
    """

    def __init__(
        self, layout: Layout, width: int, optimizer: RowOptimizer, world: World, *, at_home: bool,
        wire_dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__(layout, width, optimizer, world, layout.ranges_of(world.rank))
        self._home = at_home or world.size == 1
        self.wire_dtype = wire_dtype
        self.wire_bytes = 0  # sent to other ranks so far
        self._asked: Exchange | None = None
        self._fetched: torch.Tensor | None = None
        ends = [max((end for _, end in layout.ranges_of(r)), default=0) for r in range(world.size)]
        self.ends = torch.from_numpy(np.maximum.accumulate(ends)).to(world.device)  # of each rank's rows

    def _allocate(self, rows: int) -> Rows:
        """Weights, state and ``last`` of a row side by side in ``packed``, so that a row is one place in memory."""
        widths = (self.width, *self.optimizer.state_widths(self.width))
        stride = stride_of(self.width, sum(widths[1:]))
        self.packed = _zeros(rows, stride, self.world.device)
        parts = torch.split(self.packed[:, : sum(widths)], list(widths), dim=1)
        return Rows(parts[0], tuple(parts[1:]), self.packed.view(torch.int32)[:, stride - 1])

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Weights (rows, width) of global rows (rows,), current before this step; collective unless at home."""
        unique, inverse = torch.unique(rows, return_inverse=True)
        self._asked = self.exchange(unique)
        self._fetched = self._asked.fetch(self._caught_up(self._asked.mine)).requires_grad_(torch.is_grad_enabled())
        return nn.functional.embedding(inverse, self._fetched)

    @torch.no_grad()
    def apply_gradient(self) -> None:
        """Take one step on the rows of the last forward; every rank calls, after backward."""
        self.step += 1
        asked, fetched = self._asked, self._fetched
        assert asked is not None and fetched is not None and fetched.grad is not None
        grad = asked.give_back(fetched.grad)
        index = asked.mine
        if len(index):
            rows = self.rows.take(index)
            self.optimizer.update(rows.weight, rows.state, grad, self.step)
            rows.last.fill_(self.step)
            self.rows.put(index, rows)
        self._asked = self._fetched = None

    @torch.no_grad()
    def read(self, rows: torch.Tensor) -> Rows:
        """Settled weights and ``last`` of global rows (rows,); collective unless at home."""
        if self._home:
            index = self.local(rows)
            return Rows(self.rows.weight[index], (), self.rows.last[index])
        unique, inverse = torch.unique(rows, return_inverse=True)
        exchange = self.exchange(unique)
        weight = exchange.fetch(self.rows.weight[exchange.mine], exact=True)
        last = exchange.fetch(self.rows.last[exchange.mine][:, None], exact=True)[:, 0]
        return Rows(weight[inverse], (), last[inverse])

    def _caught_up(self, index: torch.Tensor) -> torch.Tensor:
        """Bring local rows to the present, in place, and return their weights."""
        rows = self.rows.take(index)
        self.optimizer.catch_up(rows.weight, rows.state, rows.last, self.step)
        rows.last = torch.where(rows.last > 0, self.step, -self.step).int()
        self.rows.put(index, rows)
        return rows.weight

    def exchange(self, unique: torch.Tensor) -> Exchange:
        """Ask the owners of distinct ascending global rows (rows,) for them; collective unless at home."""
        if self._home:
            return Exchange.at_home(self, self.local(unique))
        owner = torch.searchsorted(self.ends, unique.long(), right=True)
        sent = torch.bincount(owner, minlength=self.world.size)
        received = torch.empty_like(sent)
        ones = [1] * self.world.size
        self.world.all_to_all(received, sent, ones, ones)
        asked = torch.empty(int(received.sum()), dtype=torch.int32, device=unique.device)
        self.world.all_to_all(asked, unique.int(), received.tolist(), sent.tolist())
        local = self.local(asked)
        mine, place = torch.unique(local, return_inverse=True)
        return Exchange(self, mine, place, sent.tolist(), received.tolist())

    def count_wire(self, tensor: torch.Tensor, rows: Sequence[int]) -> None:
        """Count the bytes of ``tensor`` that leave this rank."""
        away = sum(n for rank, n in enumerate(rows) if rank != self.world.rank)
        self.wire_bytes += away * tensor[0:1].numel() * tensor.element_size()


class Exchange:
    """Who asked whom for which rows in one step.

    ``mine``: distinct local rows that anybody asked this rank for; ``place``: for each request, in rank order, its
    position among them; ``sent``/``received``: requests to and from each rank.
    """

    def __init__(
        self, table: ShardedTable, mine: torch.Tensor, place: torch.Tensor, sent: list[int], received: list[int]
    ) -> None:
        self.table, self.mine, self.place, self.sent, self.received = table, mine, place, sent, received
        self.home = False

    @staticmethod
    def at_home(table: ShardedTable, mine: torch.Tensor) -> Exchange:
        exchange = Exchange(table, mine, mine, [], [])
        exchange.home = True
        return exchange

    def fetch(self, values: torch.Tensor, exact: bool = False) -> torch.Tensor:
        """Owners' ``values`` of ``mine``, for the rows that this rank asked for."""
        if self.home:
            return values.clone()
        wire = values.dtype if exact else self.table.wire_dtype
        outgoing = values[self.place].to(wire)
        incoming = torch.empty(sum(self.sent), values.shape[1], dtype=wire, device=values.device)
        self.table.count_wire(outgoing, self.received)
        self.table.world.all_to_all(incoming, outgoing, self.sent, self.received)
        return incoming.to(values.dtype)

    def give_back(self, grad: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in rank order, of the gradients of ``mine``."""
        if self.home:
            return grad
        outgoing = grad.to(self.table.wire_dtype)
        incoming = torch.empty(len(self.place), grad.shape[1], dtype=outgoing.dtype, device=grad.device)
        self.table.count_wire(outgoing, self.sent)
        self.table.world.all_to_all(incoming, outgoing, self.received, self.sent)
        total = torch.zeros(len(self.mine), grad.shape[1], device=grad.device)
        for place, part in zip(
            torch.split(self.place, self.received), torch.split(incoming, self.received), strict=True
        ):
            total[place] += part.float()  # a rank asks for a row once, so that no index repeats
        return total


def _zeros(rows: int, stride: int, device: torch.device) -> torch.Tensor:
    """float32 zeros (rows, stride); on a CPU from the kernel's zero pages, in huge ones where it has them."""
    if device.type != "cpu" or not rows:
        return torch.zeros(rows, stride, device=device)
    memory = mmap.mmap(-1, rows * stride * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).view(rows, stride)


def stored_order(layout: Layout) -> Iterator[tuple[int, int, int]]:
    """(part, first, end) over all parts by global row: the order of an export."""
    spans = [(first, end, part) for part, ranges in enumerate(layout.parts) for first, end in ranges if first < end]
    for first, end, part in sorted(spans):
        yield part, first, end
