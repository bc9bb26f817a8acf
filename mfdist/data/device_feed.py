"""Blocks of batches to a GPU: pinned buffers in a ring, copies on a side stream, no synchronisation per step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch

from mfdist.data.batch_blocks import AssembledBlock

SLOTS = 3


class DeviceFeed:
    """An iterator over the blocks of ``blocks`` on ``device``; copies run up to two blocks ahead of the consumer.

    A slot's pinned buffers are written again only after the event behind its last copy: the host waits there at most
    once a block, and only when it is SLOTS blocks ahead. The consumer's stream waits for a block's copy by an event.
    ``then``: done to a block behind its copy, on the side stream.
    """

    def __init__(
        self, blocks: Iterator[AssembledBlock], device: torch.device,
        then: Callable[[AssembledBlock], AssembledBlock] | None = None,
    ) -> None:  # fmt: skip
        self._blocks, self._device, self._then = blocks, device, then
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))  # what ``then`` reads was written there
        self._pinned: list[list[torch.Tensor]] = [[] for _ in range(SLOTS)]
        self._copied = [torch.cuda.Event() for _ in range(SLOTS)]  # type: ignore[no-untyped-call]
        self._ready: deque[tuple[AssembledBlock, torch.cuda.Event]] = deque()
        self._number = 0

    def __iter__(self) -> Iterator[AssembledBlock]:
        return self

    def __next__(self) -> AssembledBlock:
        while len(self._ready) < SLOTS - 1:
            block = next(self._blocks, None)
            if block is None:
                break
            self._ready.append(self._send(block))
        if not self._ready:
            raise StopIteration
        block, copied = self._ready.popleft()
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for tensor in block.columns:
            tensor.record_stream(current)  # the allocator must not reuse it while that stream still reads
        return block

    def _send(self, block: AssembledBlock) -> tuple[AssembledBlock, torch.cuda.Event]:
        slot = self._number % SLOTS
        self._number += 1
        self._copied[slot].synchronize()
        given = block.columns
        pinned = self._pinned[slot]
        if not pinned or len(pinned[0]) < len(given[0]):
            pinned[:] = [torch.empty_like(tensor, pin_memory=True) for tensor in given]
        with torch.cuda.stream(self._stream):
            sent = []
            for tensor, buffer in zip(given, pinned, strict=True):
                staged = buffer[: len(tensor)].copy_(tensor)
                sent.append(staged.to(self._device, non_blocking=True))
            ready = AssembledBlock(tuple(sent), block.first_step, block.sizes)
            if self._then:
                ready = self._then(ready)
            self._copied[slot] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied[slot].record(self._stream)
        return ready, self._copied[slot]
