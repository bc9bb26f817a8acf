"""Item rows between ranks on GPUs: who asks whom is learned for many batches at once, rows travel while others work.

    for batch in exchange.follow(loader.epoch(epoch)):     # learns the requests of up to STEPS batches in one meeting
        asked = exchange.requests(batch.item)
        own = exchange.bring_rows(asked, gather)           # and begins to send the next batch's
        total = exchange.give_back(asked, gradient)

The order is a pure function of (dataset, seed, epoch, step), so that the requests of many steps are known ahead:
counts, ids, and which rows wait for which step travel in three all_to_all for all of them, and only there the host
waits for the device. A step makes two all_to_all of rows and one of gradients, of sizes that the host knows, and waits
for nothing. Rows of the next batch that the batch in work does not move travel beside its arithmetic, by an all_to_all
that is begun before it and waited for in the next step; the others follow the update. These are the same bits.

All ranks make the same calls in the same order, as the backend needs (NCCL runs a group's collectives in the order of
their calls, on a stream of its own). The meeting is on the stream of the steps, so that it waits for those queued.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch

from mfdist.data.loader import Batch
from mfdist.model.gpu_batch import LocalNumbers, Sorted
from mfdist.model.tables import ShardedTable

STEPS, RATINGS = 64, 4_194_304
"""Batches of one meeting at most, and from how many ratings, a rank's share of theirs, there are no more: on the device
some 60 bytes each while they are known, and 12 while the next ones are gathered."""

Gather = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], None]
"""``gather(rows, count, out, ahead)``: the current weights of ``rows[:count]`` (local item rows int32, ``count`` (1,)
int32) to ``out`` (rows, pitch); ``ahead``: as they are after the step in work, which moves none of them."""


@dataclass
class Share:
    """Rows of one batch that travel together, in the order of ranks. ``place``: int64, for each that this rank sends,
    its position in ``Requests.mine``; ``at``: int64, for each that comes, its position among the batch's items."""

    place: torch.Tensor
    at: torch.Tensor
    to: list[int]  # how many go to each rank
    coming: list[int]  # how many come from each


@dataclass
class Requests:
    """Who asks whom for which items of one batch, whose ratings' are ``item``: ``items`` (``number`` of them) are what
    this rank asks for.

    ``mine``: int32 (rows,) the distinct local rows that anybody asked this rank for; the first ``num_early`` are those
    that the batch before does not move. ``count``: int32 (3, 4), how many in all, early and late, each in [k, 0].
    ``place``: int64, for each request in the order of ranks its position in ``mine``.
    """

    item: torch.Tensor
    items: Sorted
    number: int
    mine: torch.Tensor
    num_early: int
    count: torch.Tensor
    place: torch.Tensor
    early: Share
    late: Share

    @property
    def asked(self) -> list[int]:
        """Items that this rank asks each rank for."""
        return [a + b for a, b in zip(self.early.coming, self.late.coming, strict=True)]

    @property
    def gotten(self) -> list[int]:
        """Rows that each rank asks this one for."""
        return [a + b for a, b in zip(self.early.to, self.late.to, strict=True)]


@dataclass
class Travelling:
    """The early rows of a batch on their way; ``current``: (mine, pitch), of which the early ones are filled."""

    requests: Requests
    current: torch.Tensor
    arrive: Callable[[], torch.Tensor]


class _Ahead:
    """The batches of the next meeting, taken from ``batches`` one by one, so that the device has work meanwhile."""

    def __init__(self, batches: Iterator[Batch], ratings: int) -> None:
        self._batches, self._most = batches, ratings
        self._found: list[Batch] = []
        self._ratings = 0

    def look(self) -> bool:
        """Take one more batch, where one belongs to the meeting."""
        if len(self._found) == STEPS or self._ratings >= self._most:
            return False
        batch = next(self._batches, None)
        if batch is None:
            return False
        self._found.append(batch)
        self._ratings += batch.global_rows
        return True

    def any(self) -> bool:
        """Whether there is another meeting."""
        return bool(self._found) or self.look()

    def take(self) -> list[Batch]:
        """All batches of the meeting."""
        while self.look():
            pass
        found, self._found, self._ratings = self._found, [], 0
        return found


class GpuExchange:
    """See the module; every method is collective. ``pitch``: floats from one row to the next in what is gathered."""

    def __init__(self, table: ShardedTable, pitch: int) -> None:
        self._table, self._world, self._pitch = table, table.world, pitch
        self._device = table.world.device
        self._local = LocalNumbers(table.layout, table.world.rank, self._device)
        self._held = max(len(table.rows.last), 1)
        self._known: list[tuple[Batch, Requests]] = []
        self._travelling: Travelling | None = None

    # Many batches at once -----------------------------------------------------------------------------

    def follow(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """``batches``, while the steps that are taken on them know theirs and the next one's requests."""
        known = self._known = []
        ahead, last = _Ahead(iter(batches), RATINGS * self._world.size), None
        try:
            while some := ahead.take():
                known += zip(some, self._meet([batch.item for batch in some], last), strict=True)
                last = known[-1][1]
                while len(known) > ahead.any():  # the last one is taken when the first of the next are known
                    yield known[0][0]
                    known.pop(0)
                    ahead.look()
        finally:
            known.clear()
            self._travelling = None  # every rank has sent its rows, and none waits for them

    def requests(self, item: torch.Tensor) -> Requests:
        """Those of the batch in work, whose items are ``item`` (ratings,); one that nobody announced meets alone."""
        if self._known:
            first = self._known[0][1]
            if first.item.data_ptr() == item.data_ptr() and len(first.item) == len(item):
                return first
        return self._meet([item], None)[0]

    # A step -------------------------------------------------------------------------------------------

    def bring_rows(self, asked: Requests, gather: Gather) -> tuple[torch.Tensor, torch.Tensor]:
        """Current weights of the items of ``asked``, (items, pitch), and of its ``mine``, (rows, pitch).

        Begins to send those of the next batch that this one does not move.
        """
        ready, self._travelling = self._travelling, None
        if ready is None or ready.requests is not asked:
            ready = self._send_early(asked, gather, ahead=False)
        late = self._send(asked, asked.late, ready.current, gather, ahead=False)
        if len(self._known) > 1 and self._known[0][1] is asked:
            self._travelling = self._send_early(self._known[1][1], gather, ahead=True)
        own = self._room_for(asked.number)
        for share, arrive in ((asked.early, ready.arrive), (asked.late, late)):
            own[:, : self._table.width].index_copy_(0, share.at, arrive())
        return own, ready.current

    def give_back(self, asked: Requests, gradient: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in rank order, of the gradients of ``asked.mine``, (rows, width); ``gradient``: (items,
        width)."""
        outgoing = gradient.to(self._table.wire_dtype)
        incoming = torch.empty(len(asked.place), gradient.shape[1], dtype=outgoing.dtype, device=self._device)
        self._table.count_wire(outgoing, asked.asked)
        self._world.all_to_all(incoming, outgoing, asked.gotten, asked.asked)
        total = torch.zeros(len(asked.mine), gradient.shape[1], device=self._device)
        for place, part in zip(
            torch.split(asked.place, asked.gotten), torch.split(incoming, asked.gotten), strict=True
        ):
            total[place] += part.float()  # a rank asks for a row once, so that no index repeats
        return total

    def _send_early(self, asked: Requests, gather: Gather, ahead: bool) -> Travelling:
        current = self._room_for(len(asked.mine))
        return Travelling(asked, current, self._send(asked, asked.early, current, gather, ahead))

    def _send(
        self, asked: Requests, share: Share, current: torch.Tensor, gather: Gather, ahead: bool
    ) -> Callable[[], torch.Tensor]:
        """Gather the rows of ``share`` into ``current`` and begin to send them; what is returned waits, and returns
        those that come, (rows, width)."""
        early = share is asked.early
        first, end = (0, asked.num_early) if early else (asked.num_early, len(asked.mine))
        if first < end:
            rows = asked.mine[first:end].clone()  # at an aligned place, so that no kernel is compiled twice
            gather(rows, asked.count[1 if early else 2, :1], current[first:end], ahead)
        outgoing = current[:, : self._table.width][share.place].to(self._table.wire_dtype)
        incoming = torch.empty(sum(share.coming), self._table.width, dtype=outgoing.dtype, device=self._device)
        self._table.count_wire(outgoing, share.to)
        wait = self._world.begin_all_to_all(incoming, outgoing, share.coming, share.to)

        def arrive() -> torch.Tensor:
            wait()
            return incoming.float()

        return arrive

    def _room_for(self, rows: int) -> torch.Tensor:
        return torch.empty(max(rows, 1), self._pitch, device=self._device)

    # The meeting --------------------------------------------------------------------------------------

    def _meet(self, batches: list[torch.Tensor], last: Requests | None) -> list[Requests]:
        """The requests of consecutive batches, whose ratings' items these are; ``last``: of the batch before them."""
        steps, ranks = len(batches), self._world.size
        head = torch.zeros(max(map(len, batches)), dtype=torch.int32, device=self._device)
        lists = [Sorted(len(item), self._device, head) for item in batches]
        cut = torch.stack([self._cuts(items, item.int()) for items, item in zip(lists, batches, strict=True)])
        asked = torch.diff(cut, dim=1, prepend=cut.new_zeros(steps, 1)).T.contiguous()  # [of whom, step]
        gotten = torch.empty_like(asked)  # [by whom, step]
        self._world.all_to_all(gotten, asked, [1] * ranks, [1] * ranks)
        per_step, by_rank = torch.stack((asked, gotten)).tolist()  # the host waits
        coming, to = ([sum(row) for row in side] for side in (per_step, by_rank))
        incoming = torch.empty(sum(to), dtype=torch.int32, device=self._device)
        self._world.all_to_all(incoming, torch.cat(_by_owner(lists, per_step)), to, coming)

        order, step, rank = self._by_step(gotten, sum(to))
        key = step * self._held + self._local(incoming)[order].long()
        rows, position = torch.unique(key, return_inverse=True)  # the host waits
        late = self._moved_before(rows, last)
        answer, told = (torch.empty(sum(some), dtype=torch.uint8, device=self._device) for some in (to, coming))
        answer[order] = late[position].to(torch.uint8)
        self._world.all_to_all(told, answer, coming, to)
        my_order, my_step, my_rank = self._by_step(asked, sum(coming))

        row_group = rows // self._held * 2 + late  # of a step the early ones, then its late ones
        rows_order = torch.argsort(row_group, stable=True)
        place = torch.empty_like(rows_order)
        place[rows_order] = torch.arange(len(rows), device=self._device)
        group, my_group = step * 2 + late[position], my_step * 2 + told[my_order].long()
        counts = torch.cat((
            _count(row_group, 2 * steps),
            _count(group * ranks + rank, 2 * steps * ranks),
            _count(my_group * ranks + my_rank, 2 * steps * ranks),
        )).tolist()  # the host waits  # fmt: skip
        mine = (rows % self._held)[rows_order].int()
        return self._cut(batches, lists, mine, place[position], (group, my_group), counts)

    def _cuts(self, items: Sorted, ids: torch.Tensor) -> torch.Tensor:
        """Sort a batch's ids; returns int64 (ranks,): how many distinct ones lie before the end of each rank's rows."""
        if not len(ids):
            return torch.zeros(self._world.size, dtype=torch.int64, device=self._device)
        below = torch.searchsorted(items.sort(ids), self._table.ends.int()).long()
        return torch.where(below > 0, items.number[(below - 1).clamp(min=0)].long() + 1, 0)

    def _by_step(self, counts: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of ``total`` things that lie by rank and by step within, ``counts`` (ranks, steps) of each: their order by
        step and by rank within, and in that order the step and the rank of each; int64."""
        ranks, steps = counts.shape
        groups = torch.arange(ranks * steps, device=self._device)
        group = torch.repeat_interleave(groups, counts.reshape(-1), output_size=total)
        order = torch.argsort(group % steps, stable=True)
        group = group[order]
        return order, group % steps, group // steps

    def _moved_before(self, rows: torch.Tensor, last: Requests | None) -> torch.Tensor:
        """int64 (rows,), 1 where the batch before moves a row; ``rows``: ascending, step * held + local row."""
        before = rows if last is None else torch.cat((last.mine.long().sort().values - self._held, rows))
        wanted = rows - self._held
        late = torch.zeros_like(rows)
        if len(before):
            found = before[torch.searchsorted(before, wanted).clamp(max=len(before) - 1)]
            late = (found == wanted).long()
        return late if last is not None else torch.where(rows < self._held, 1, late)

    def _cut(
        self, batches: list[torch.Tensor], lists: list[Sorted], mine: torch.Tensor, place: torch.Tensor,
        groups: tuple[torch.Tensor, torch.Tensor], counts: list[int],
    ) -> list[Requests]:  # fmt: skip
        """The requests of each batch, from those of all; ``groups``: step * 2 + late of each request, of each item."""
        steps, ranks = len(batches), self._world.size
        of_rows = counts[: 2 * steps]
        to, coming = (
            [counts[first + k * ranks : first + (k + 1) * ranks] for k in range(2 * steps)]
            for first in (2 * steps, 2 * steps * (1 + ranks))
        )  # fmt: skip
        rows = [of_rows[2 * k] + of_rows[2 * k + 1] for k in range(steps)]
        requests, items = ([sum(side[2 * k]) + sum(side[2 * k + 1]) for k in range(steps)] for side in (to, coming))
        first_row, _, first_item = torch.tensor(
            [[0, *accumulate(some)] for some in (rows, requests, items)], device=self._device
        )
        place = place - first_row[groups[0] // 2]
        places = torch.split(place[torch.argsort(groups[0], stable=True)], [sum(some) for some in to])
        order = torch.argsort(groups[1], stable=True)
        at = torch.split(order - first_item[groups[1][order] // 2], [sum(some) for some in coming])
        count = torch.zeros(steps, 3, 4, dtype=torch.int32)  # each at a multiple of 16 bytes
        count[:, 1:, 0] = torch.tensor(of_rows).view(steps, 2)
        count[:, 0, 0] = count[:, 1:, 0].sum(dim=1)
        count = count.to(self._device)
        shares = [Share(*some) for some in zip(places, at, to, coming, strict=True)]
        return [
            Requests(batches[k], lists[k], items[k], mine_of, of_rows[2 * k], count[k], place_of, *shares[2 * k :][:2])
            for k, (mine_of, place_of) in enumerate(
                zip(torch.split(mine, rows), torch.split(place, requests), strict=True)
            )
        ]


def _by_owner(lists: list[Sorted], counts: list[list[int]]) -> list[torch.Tensor]:
    """Each batch's distinct items, by owner and by step within; ``counts``: [owner][step]."""
    firsts = [[0, *accumulate(of_step)] for of_step in zip(*counts, strict=True)]
    return [
        items.rows[first[owner] : first[owner + 1]]
        for owner in range(len(counts))
        for items, first in zip(lists, firsts, strict=True)
    ]


def _count(numbers: torch.Tensor, groups: int) -> torch.Tensor:
    """int64 (groups,): how often each of 0 to ``groups`` - 1 is in ``numbers``."""
    counts = torch.zeros(groups, dtype=torch.int64, device=numbers.device)
    return counts.index_add_(0, numbers, torch.ones_like(numbers))
