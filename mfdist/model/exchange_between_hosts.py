"""Item rows between hosts: the buffers of ``kernels.hosts``, and which batches are ahead.

    for batch in exchange.follow(loader.epoch(epoch)):     # looks two batches ahead
        step(batch.user, batch.item, ...)

A batch that nobody has announced is a pipeline of its own: an opening of two round trips, then its step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from mfdist.cluster.shared_memory import SharedMemory
from mfdist.cluster.transport import Transport, why_failed
from mfdist.data.loader import Batch
from mfdist.kernels import hosts, messages, sockets, wire
from mfdist.model.tables import ShardedTable

AHEAD = 2
"""Batches beside the one in work that are known."""
OPENING = -2
"""The first step of a pipeline."""


class HostExchange:
    """See the module; every method but ``arrays`` is collective. ``users``: the table of the batches' users.
    ``values``: the ratings of a batch that is announced, in the units that the steps are given."""

    def __init__(
        self, table: ShardedTable, users: ShardedTable, transport: Transport,
        values: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:  # fmt: skip
        self._values = values
        self._table, self._users, self._world, self._transport = table, users, table.world, transport
        self.name = transport.name
        ranks = self._world.size
        self._near = transport.near if self._world.may_share and table.wire_dtype == torch.float32 else [transport.rank]
        self._queue: deque[Batch] = deque()
        self._loaded: deque[torch.Tensor] = deque()  # items of the batches in the ring, the next step's first
        self._next, self._slept = 0, 0.0
        self._rows_are_coming = False
        self._memory: SharedMemory | None = None
        self.control: npt.NDArray[np.int64] = np.zeros(16, np.int64)
        self.control[wire.RANK], self.control[wire.LOST] = self._world.rank, -1
        self._room, self._sizes = 0, np.zeros(ranks, np.int64)
        self.arrays: tuple[Any, ...] = ()

    @property
    def slope(self) -> np.float32:
        """The gradient of the offset in the last step, of all ranks' rows."""
        return self._wire.slopes[-1]  # type: ignore[no-any-return]

    def follow(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """``batches``, while the steps that are taken on them know the next two."""
        ahead = self._queue = deque[Batch]()
        try:
            for batch in batches:
                ahead.append(batch)
                if len(ahead) > AHEAD:
                    yield ahead[0]
                    ahead.popleft()
            while ahead:
                yield ahead[0]
                ahead.popleft()
        finally:
            ahead.clear()

    def steps(self, batch: Batch) -> Iterator[int]:
        """The steps of the pipeline to take for ``batch``: one, with the opening before it where it is the first.

        The caller makes :meth:`run` of each before it asks for the next."""
        announced = bool(self._queue) and self._queue[0].item is batch.item
        ahead = list(self._queue)[: AHEAD + 1] if announced else [batch]
        if not (self._loaded and self._loaded[0] is batch.item):
            self._open(batch.global_rows)
            for step in range(OPENING, 0):
                self._load(step + 2, ahead, announced)
                yield step
        self._load(self._next + 2, ahead, announced)
        yield self._next
        self._loaded.popleft()
        self._next += 1

    def run(self, step: int, call: Callable[[int, int], None]) -> None:
        """Take ``step`` by ``call(stage, step)``, which is ``kernels.hosts.step_of_hosts``, and wait between calls."""
        stage, began, control = hosts.BEGIN, time.monotonic(), self.control
        sent = int(control[wire.SENT_LINES])
        while True:
            call(stage, step)
            stage = int(control[wire.STAGE])
            if control[wire.LOST] >= 0:
                self._lose()
            if stage == hosts.DONE:
                break
            self._wait(began)
        self._rows_are_coming = bool(control[wire.NEXT])
        wide = self._table.wire_dtype.itemsize
        self._table.wire_bytes += (int(control[wire.SENT_LINES]) - sent) * self._table.width * wide

    @property
    def traffic(self) -> dict[str, float]:
        """So far: ``bytes`` that have left this rank, and ``wait_seconds`` for others' messages."""
        waited = float(self.control[wire.WAITED]) * 1e-9 + self._slept
        return {"bytes": float(self.control[wire.SENT_BYTES]), "wait_seconds": waited}

    def close(self) -> None:
        """Close the connections."""
        self._transport.leave(all_alive=True)

    # The pipeline -------------------------------------------------------------------------------------

    def _load(self, step: int, ahead: list[Batch], announced: bool) -> None:
        """Put the batch of ``step`` into the ring, where there is one, and say which of the next ones there are.

        ``announced``: they are as the loader gave them, not as a step is given its batch."""
        first = step - 2  # the step that is taken now, or 0 where that is of the opening: ahead[0]
        index = min(first, 0) + 2
        self.control[wire.NEXT] = first > OPENING and len(ahead) > index - 1
        self.control[wire.AFTER] = len(ahead) > index
        if len(ahead) <= index:
            return
        batch, place, ring = ahead[index], step % wire.RING, self._ring
        ratings = len(batch.rating)
        ring.counts[place] = 0
        ring.counts[place, wire.RATINGS] = ratings
        ring.user[place, :ratings] = self._users.local_int32(batch.user.numpy())
        ring.item[place, :ratings] = batch.item.numpy()
        ring.rating[place, :ratings] = (self._values(batch.rating) if announced else batch.rating).numpy()
        self._loaded.append(batch.item)

    def _open(self, room: int) -> None:
        """Begin a pipeline, of batches of ``room`` ratings over all ranks at most."""
        if self._rows_are_coming:  # of a step that was announced and will not be taken
            began = time.monotonic()
            while not messages.take(wire.ROWS, self._next, *self.arrays):
                if self.control[wire.LOST] >= 0:
                    self._lose()
                self._wait(began)
            self._rows_are_coming = False
        self._loaded.clear()
        self._next = 0
        if room > self._room:
            self._make_room(room)

    def _wait(self, began: float) -> None:
        reading = np.flatnonzero(self._wire.phase != wire.TAKEN).tolist()
        state = self._wire.sent_state
        writing = np.flatnonzero(state[:, sockets.AT] < state[:, sockets.COUNT]).tolist()
        now = time.monotonic()
        self._transport.wait(reading, writing, began, self._world.timeout_seconds)
        self._slept += time.monotonic() - now

    def _lose(self) -> NoReturn:
        peer, code = int(self.control[wire.LOST]), int(self.control[wire.CODE])
        self._transport.lose(peer, why_lost(code))

    def _make_room(self, room: int) -> None:
        """Arrays for batches of ``room`` ratings over all ranks; pages that nothing touches cost nothing."""
        ranks, width, rank = self._world.size, self._table.width, self._world.rank
        segments = self._share(room) or [rank]
        segment = np.full(ranks, -1, np.int64)
        segment[segments] = np.arange(len(segments))
        narrow = self._table.wire_dtype == torch.bfloat16
        self._room = self.control[wire.ROOM] = room

        def ints(*shape: int) -> npt.NDArray[np.int64]:
            return np.zeros(shape, np.int64)

        def small(*shape: int) -> npt.NDArray[np.int32]:
            return np.empty(shape, np.int32)

        def bytes_(*shape: int) -> npt.NDArray[np.uint8]:
            return np.empty(shape, np.uint8)

        few = wire.RING
        self._ring = wire.Ring(
            user=small(few, room), item=small(few, room), rating=np.empty((few, room), np.float32),
            by_user=small(few, 4, room + 2), by_item=small(few, 4, room + 2), by_owner=small(few, 11, room + 2),
            line=small(few, room), counts=ints(few, 6), bounds=ints(few, 4, ranks + 1), pairs=ints(2, room + 1),
        )  # fmt: skip
        lines = [2 * room, room, room, room] if narrow else [0] * 4
        self._wire = wire.Wire(
            connections=self._transport.connections, segment=segment, ends=self._table.ends.numpy().astype(np.int32),
            sent=ints(ranks, sockets.MOST, 2), coming=ints(ranks, sockets.MOST, 2), sent_state=ints(ranks, 3),
            coming_state=ints(ranks, 3), phase=ints(ranks) + wire.TAKEN, heads_out=np.zeros((ranks, 8)),
            heads_in=np.zeros((ranks, 8)), ids_out=bytes_(5 * room), id_bounds=ints(ranks + 1),
            ids_in=bytes_(ranks, 5 * room), bits_out=bytes_(ranks, room // 8 + 1), bits_in=bytes_(ranks, room // 8 + 1),
            slopes=np.zeros(ranks + 1, np.float32),
            narrow=(*(np.empty((n, width), np.uint16) for n in lines),
                    *(array.view(np.uint32).reshape(-1) for array in (self._rows, self._gradients))),
        )  # fmt: skip
        self.arrays = self._ring, self._wire, self.control, self._rows, self._gradients

    def _share(self, room: int) -> list[int] | None:
        """Make ``rows`` and ``gradients``: in memory that the ranks of this host share, whose numbers it returns."""
        width = self._table.width
        sizes = [4 * room * width, 2 * room * width]
        if self._world.any(len(self._near) > 1):
            near = len(self._near)
            memory = self._world.share(SharedMemory.room(near, *(4 * near * size for size in sizes)), self._near)
            if memory is not None:
                self._memory = memory
                self._rows, self._gradients = (
                    memory.array((near * size // width, width), np.float32) for size in sizes
                )
                return self._near
        self._rows, self._gradients = (np.empty((size // width, width), np.float32) for size in sizes)
        return None


def why_lost(code: int) -> str:
    """What a negative code of ``kernels.sockets`` or ``messages`` means."""
    if code == sockets.CLOSED:
        return "it closed its connection"
    if code == wire.OUT_OF_STEP:
        return "it sent another message than the one that was due"
    return why_failed(-code)
