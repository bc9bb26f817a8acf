"""Work ahead on threads, results in order.

A *block* of work is a list of parts and one final call that needs them, and may need the parts of earlier blocks.
Workers take parts and final calls strictly in order, at most ``ahead`` blocks beyond the last one handed out, which
bounds what is in flight. A failure is raised where the failed block would have been handed out, after all before it.

Threads, not processes: the work is compiled code and Arrow, which release the GIL. They are daemons that an exit hook
closes, so that neither an early stop of the consumer nor the interpreter's exit can hang on them.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Block = tuple[list[Callable[[], None]], Callable[[], T]]

_open: weakref.WeakSet[Prefetcher[Any]] = weakref.WeakSet()


class Prefetcher(Generic[T]):
    """An iterator over the results of ``blocks`` in order. ``close()`` ends its threads, also with work unfinished."""

    def __init__(self, blocks: Iterator[Block[T]], threads: int, ahead: int) -> None:
        self.wait_seconds = 0.0
        self._blocks = blocks
        self._ahead = ahead
        self._changed = threading.Condition()
        self._parts: list[Callable[[], None]] = []  # of the newest block, last one first
        self._final: Callable[[], T] | None = None
        self._unfinished: dict[int, int] = {}  # block: its parts that are not done
        self._results: dict[int, T] = {}
        self._issued = 0  # blocks taken from the iterator
        self._handed_out = 0
        self._end: int | None = None
        self._failure: tuple[int, BaseException] | None = None
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"mfdist-prefetch-{number}", daemon=True)
            for number in range(threads)
        ]
        _open.add(self)
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        start = time.perf_counter()
        with self._changed:
            number = self._handed_out
            self._changed.wait_for(lambda: number in self._results or self._is_over(number))
            self.wait_seconds += time.perf_counter() - start
            if number not in self._results:
                if self._failure is not None and self._has_failed(number):
                    raise self._failure[1]
                raise StopIteration
            self._handed_out += 1
            self._changed.notify_all()
            return self._results.pop(number)

    def close(self) -> None:
        """Stop after the calls that are running now and join the threads. May be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        with self._changed:
            self._results.clear()
            self._parts.clear()
            self._final = None

    def _is_over(self, number: int) -> bool:
        return self._has_failed(number) or self._closed or (self._end is not None and number >= self._end)

    def _has_failed(self, number: int) -> bool:
        return self._failure is not None and self._failure[0] <= number

    def _parts_done(self, block: int) -> bool:
        return min(self._unfinished, default=block + 1) > block

    def _work(self) -> None:
        while (job := self._take()) is not None:
            block, part, final = job
            try:
                if part is not None:
                    part()
                elif not self._finish(block, final):
                    return
            except BaseException as error:
                self._fail(block, error)
                return
            if part is not None:
                self._part_done(block)

    def _take(self) -> tuple[int, Callable[[], None] | None, Callable[[], T] | None] | None:
        """The next job in order, or None when there will be no more."""
        with self._changed:
            while True:
                if self._closed or self._failure is not None:
                    return None
                if self._parts:
                    return self._issued - 1, self._parts.pop(), None
                if self._final is not None:
                    final, self._final = self._final, None
                    return self._issued - 1, None, final
                if self._end is not None:
                    return None
                if self._issued >= self._handed_out + self._ahead:
                    self._changed.wait()
                    continue
                self._issue()

    def _issue(self) -> None:
        number = self._issued
        try:
            parts, self._final = next(self._blocks)
        except StopIteration:
            self._end = number
        except BaseException as error:
            self._failure = (number, error)
        else:
            self._issued += 1
            self._parts = parts[::-1]
            if parts:
                self._unfinished[number] = len(parts)
        self._changed.notify_all()

    def _part_done(self, block: int) -> None:
        with self._changed:
            self._unfinished[block] -= 1
            if not self._unfinished[block]:
                del self._unfinished[block]
                self._changed.notify_all()

    def _finish(self, block: int, final: Any) -> bool:
        """Run a block's final call once all parts up to it are done; False where that will never be."""
        with self._changed:
            # Parts of this and earlier blocks are all taken: they end, or fail, or everything is closed.
            self._changed.wait_for(lambda: self._closed or self._has_failed(block) or self._parts_done(block))
            if not self._parts_done(block):
                return False
        result = final()
        with self._changed:
            self._results[block] = result
            self._changed.notify_all()
        return True

    def _fail(self, block: int, error: BaseException) -> None:
        with self._changed:
            if self._failure is None or block < self._failure[0]:
                self._failure = (block, error)
            self._changed.notify_all()


def _close_all() -> None:
    for prefetcher in list(_open):
        prefetcher.close()


atexit.register(_close_all)
