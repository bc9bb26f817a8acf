"""Threads that run compiled arithmetic beside the caller.

:class:`Workers` is a pool for calls of any kind, and costs some 50 microseconds a call, most of it for waking threads.
A step of one process at batch 8192 lasts little more than half a millisecond, so it has :class:`StepThreads`: they wait
for the next step in compiled code, looking for it (:func:`follow`) without Python's lock, and go to sleep only after a
millisecond without one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mfdist.kernels.cpu import whole_step
from mfdist.kernels.numba_intrinsics import arrive, arrived, kernel, short_kernel, wait_briefly

WAITS = 4
"""Times that the threads of a step wait for each other, with the one at the end."""
RATINGS, NOW, PASSED, STOP = range(4)
"""Places of ``control`` (int64): size of the batch, the step that rows stand after, the arrivals at ``gate`` before
this step, and whether there will be no more steps."""


class Workers:
    """``threads`` threads that share out ranges of rows; the caller is one of them."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="kernel") if threads > 1 else None

    def all(self, call: Callable[[int], None]) -> None:
        """``call(thread)`` on every thread at once."""
        pending = [self._pool.submit(call, thread) for thread in range(1, self.threads)] if self._pool else []
        call(0)
        for future in pending:
            future.result()

    def ranges(self, rows: int, call: Callable[[int, int], None]) -> None:
        """``call(low, high)`` for as many even ranges of ``rows`` rows as there are threads."""
        self.all(lambda thread: call(rows * thread // self.threads, rows * (thread + 1) // self.threads))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


@kernel
def follow(thread: Any, seen: Any, go: Any, sleeps: Any, control: Any, threads: Any, gate: Any, step: Any) -> Any:
    """Take part as ``thread`` in every step that ``go[0]`` (int64) counts after the first ``seen``.

    Returns the steps seen when it found none for a while, having added one to ``sleeps[0]`` (int64); -1 at the end.
    """
    while True:
        if not wait_briefly(go, seen + 1):
            arrive(sleeps)
            if arrived(go) <= seen:
                return seen
        seen += 1
        if control[STOP] > 0:
            return -1
        whole_step(thread, threads, gate, control[PASSED], control[RATINGS], control[NOW], *step)


@short_kernel
def announce(go: Any, sleeps: Any, counted: Any) -> None:
    """Count a step in ``go[0]``, then copy to ``counted`` (int64) how often each helper has gone to sleep until now.

    A helper that counts a sleep looks for a step once more before it sleeps, so that one of both sees the other."""
    arrive(go)
    for k in range(len(counted)):
        counted[k] = arrived(sleeps[k])


class StepThreads:
    """``threads`` threads for :func:`kernels.cpu.whole_step`, of which the caller is one.

    ``step``: its arguments from the shape on, which stay the same arrays from step to step.
    """

    def __init__(self, threads: int, step: tuple[Any, ...]) -> None:
        self.threads, self._step = threads, step
        self._gate, self._go, self._control = (np.zeros(16, np.int64) for _ in range(3))  # cache lines of their own
        self._sleeps = np.zeros((threads - 1, 16), np.int64)
        self._counted, self._passed = np.zeros(threads - 1, np.int64), 0
        self._woken = [0] * (threads - 1)
        self._wakers = [threading.Semaphore(0) for _ in range(threads - 1)]
        self._control[STOP] = 1
        self._go[0] = 1
        if threads > 1:
            follow(1, 0, self._go, self._sleeps[0], self._control, threads, self._gate, step)  # compiles
        self._go[0] = self._control[STOP] = 0
        self._threads = [threading.Thread(target=self._follow, args=(k,), daemon=True) for k in range(threads - 1)]
        for thread in self._threads:
            thread.start()

    def take(self, ratings: int, now: int, alone: bool) -> None:
        """The step of a batch of ``ratings``, whose rows stand after step ``now``; ``alone``: by the caller only."""
        if alone or self.threads == 1:
            whole_step(0, 1, self._gate, 0, ratings, now, *self._step)
            return
        assert self._threads, "closed"
        passed = self._passed
        self._passed += WAITS * self.threads
        self._control[: STOP + 1] = ratings, now, passed, 0
        self._call()
        whole_step(0, self.threads, self._gate, passed, ratings, now, *self._step)

    def close(self) -> None:
        """End the threads."""
        self._control[STOP] = 1
        self._call()
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _call(self) -> None:
        """Announce a step, and wake who sleeps."""
        announce(self._go, self._sleeps, self._counted)
        for k, sleeps in enumerate(self._counted.tolist()):
            if sleeps != self._woken[k]:
                self._woken[k] = sleeps
                self._wakers[k].release()

    def _follow(self, k: int) -> None:
        seen = 0
        while seen >= 0:
            seen = follow(
                k + 1, seen, self._go, self._sleeps[k], self._control, self.threads, self._gate, self._step
            )  # fmt: skip
            if seen >= 0:
                self._wakers[k].acquire()
