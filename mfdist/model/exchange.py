"""Item rows between ranks on CPUs: who asks whom for which rows in a step, the rows, and their gradients back.

The step is ``kernels.ranks.step_of_ranks``; both ways lend it their ``arrays`` and give the same bits:

    requests, lines    what all ranks asked this one for (local rows, in rank order), and the line of each
    rows, gradients    (lines, width or more): this rank writes the rows that it was asked for, reads their gradients
    own, gradient      (items, width or more): it reads the rows that it asked for, and writes their gradients

:class:`SharedExchange`: the ranks are on one host. Owners write rows to where the asking rank reads them, and read
its gradients where it wrote them: nothing is copied. Two ranks of three lines each, six lines of ``rows``: rank 0 owns
items 0 to 9, rank 1 the rest. Rank 0 asks for items 2, 7, 12 and reads them in lines 0 to 2; rank 1 asks for 7 and 15
and reads lines 3 and 4. Rank 0 is asked for 2, 7 and 7, and writes lines 0, 1 and 3; rank 1 writes 2 and 4.

:class:`GroupExchange`: any ranks, by four collectives of the process group: where the others cannot be had.

Between hosts there is ``exchange_between_hosts``, whose step is another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mfdist.cluster.connecting import open_transport
from mfdist.cluster.shared_memory import SharedMemory
from mfdist.errors import MfdistError
from mfdist.kernels import ranks
from mfdist.kernels.row_arithmetic import pitch_of, row_buffer
from mfdist.model.exchange_between_hosts import HostExchange
from mfdist.model.tables import ShardedTable

Floats32 = npt.NDArray[np.float32]
Ints32 = npt.NDArray[np.int32]
Ints64 = npt.NDArray[np.int64]

FIRST_LINES = 1024
"""A rank's lines at first; they grow to what a batch needs."""


def open_exchange(
    table: ShardedTable, users: ShardedTable, values: Callable[[torch.Tensor], torch.Tensor]
) -> SharedExchange | HostExchange | GroupExchange:
    """The fastest way for the ranks of a table that is cut over several; collective. ``users``, ``values``: see
    HostExchange."""
    if table.wire_dtype == torch.float32:
        memory = _memory(table, FIRST_LINES)
        if memory is not None:
            return SharedExchange(table, memory)
    found = open_transport(table.world) if table.world.may_connect else "not wanted"
    if isinstance(found, str):
        return GroupExchange(table, found)
    return HostExchange(table, users, found, values)


class SharedExchange:
    """See the module. Lines of rank r: ``lines r`` to ``lines (r + 1)``, in the order of its items."""

    name = "memory that the ranks share"

    def __init__(self, table: ShardedTable, memory: SharedMemory) -> None:
        self._table, self._world = table, table.world
        self._ends = _ends(table)
        self._use(memory, FIRST_LINES)

    def bring(self, stage: int, items: Ints32, counts: Ints64) -> int:
        """Wait for what ``stage`` needs; returns the stage to go on with. Collective."""
        if stage == ranks.DONE:
            self._count(len(items), int(counts[ranks.REQUESTS]))
            return stage
        self._memory.wait()
        most = int(self._bounds[:, -1].max())
        if stage == ranks.GATHER and most > self._lines:
            lines = most + most // 8
            memory = _memory(self._table, lines)
            if memory is None:
                raise MfdistError(f"the ranks of this host cannot share memory for {lines} item rows each.")
            self._use(memory, lines)
            return ranks.REQUEST
        return stage

    def _use(self, memory: SharedMemory, lines: int) -> None:
        ranks, rank, width = self._world.size, self._world.rank, self._table.width
        self._memory, self._lines = memory, lines
        self._bounds: Ints64 = memory.array((ranks, ranks + 1), np.int64)  # of each rank's items: each owner's first
        wanted = memory.array((ranks, lines), np.int32)
        rows, gradients = (memory.array((ranks * lines, pitch_of(width)), np.float32) for _ in range(2))
        own, gradient = (array[rank * lines : (rank + 1) * lines] for array in (rows, gradients))
        self.room = ranks * lines
        requests, places = np.empty(self.room, np.int32), np.empty(self.room, np.int64)
        first = self._table.held[0][0] if self._table.held else 0
        self.arrays: tuple[Any, ...] = (
            requests, places, rows, own, gradient, gradients,
            (memory.signals, rank, self._ends, first, self._bounds, wanted),
        )  # fmt: skip

    def _count(self, items: int, requests: int) -> None:
        """Count the rows and gradients that went to other ranks."""
        rank = self._world.rank
        own = int(self._bounds[rank, rank + 1] - self._bounds[rank, rank])
        self._table.wire_bytes += (items + requests - 2 * own) * self._table.width * 4


class GroupExchange:
    """See the module."""

    name = "the process group"

    def __init__(self, table: ShardedTable, why: str) -> None:
        """``why``: there are no connections of the ranks' own."""
        self._table, self._world, self.why = table, table.world, why
        self._ends = _ends(table)
        self.room = 0
        self._asked: list[int] = []  # items of this rank's batch, by owner
        self._requests: list[int] = []  # rows asked of this rank, by who asks
        self._incoming = np.empty(0, np.int32)
        self._rows, self._gradients, self._own, self._gradient = (self._new(0) for _ in range(4))
        nowhere = (np.empty((0, 16), np.int64), 0, self._ends, 0, np.empty((0, 1), np.int64), np.empty((0, 1), "i4"))
        self._meeting: tuple[Any, ...] = nowhere

    @property
    def arrays(self) -> tuple[Any, ...]:
        places = np.arange(len(self._incoming))
        return self._incoming, places, self._rows, self._own, self._gradient, self._gradients, self._meeting

    def bring(self, stage: int, items: Ints32, counts: Ints64) -> int:
        """Bring what ``stage`` needs; returns ``stage``. Collective."""
        if stage == ranks.GATHER:
            self._ask(items)
            counts[ranks.REQUESTS] = len(self._incoming)
        elif stage == ranks.LEARN:
            self._send(self._rows, self._requests, self._own, self._asked)
        elif stage == ranks.UPDATE:
            self._send(self._gradient, self._asked, self._gradients, self._requests)
        return stage

    def _ask(self, items: Ints32) -> None:
        asked = np.diff(np.searchsorted(items, self._ends), prepend=0)
        requests, ones = np.empty_like(asked), [1] * self._world.size
        self._world.all_to_all(torch.from_numpy(requests), torch.from_numpy(asked), ones, ones)
        self._asked, self._requests = asked.tolist(), requests.tolist()
        rows = torch.empty(sum(self._requests), dtype=torch.int32)
        self._world.all_to_all(rows, torch.from_numpy(items), self._requests, self._asked)
        self._incoming = self._table.local_int32(rows.numpy())
        self.room = max(self.room, len(rows))
        if len(items) > len(self._own):
            self._own, self._gradient = (self._new(len(items)) for _ in range(2))
        if len(rows) > len(self._rows):
            self._rows, self._gradients = (self._new(len(rows)) for _ in range(2))

    def _send(self, sent: Floats32, sent_rows: list[int], received: Floats32, received_rows: list[int]) -> None:
        wire = self._table.wire_dtype
        width = self._table.width
        outgoing = torch.from_numpy(sent[: sum(sent_rows), :width]).to(wire).contiguous()
        incoming = torch.empty(sum(received_rows), width, dtype=wire)
        self._table.count_wire(outgoing, sent_rows)
        self._world.all_to_all(incoming, outgoing, received_rows, sent_rows)
        torch.from_numpy(received[: len(incoming), :width]).copy_(incoming)

    def _new(self, lines: int) -> Floats32:
        return row_buffer(lines + lines // 8, self._table.width)  # type: ignore[no-any-return]


def _ends(table: ShardedTable) -> Ints32:
    return table.ends.numpy().astype(np.int32)


def _memory(table: ShardedTable, lines: int) -> SharedMemory | None:
    ranks, line_bytes = table.world.size, 4 * pitch_of(table.width)
    sizes = (8 * ranks * (ranks + 1), 4 * ranks * lines, ranks * lines * line_bytes, ranks * lines * line_bytes)
    return table.world.share(SharedMemory.room(ranks, *sizes))
