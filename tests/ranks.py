"""Real gloo ranks for tests: one process a rank, a file store, a hard time-out, a child's traceback as text."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any


def run_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float = 600.0) -> list[Any]:
    """``function(world, *args)`` on ``size`` ranks; their results in rank order.

    ``function`` is a module-level function of the test. World size 1 runs here, in this process.
    """
    if size == 1:
        from mfdist.cluster.world import World

        return [function(World.alone(), *args)]
    with tempfile.TemporaryDirectory() as folder:
        children, queue = start_ranks(size, function, args, os.path.join(folder, "store"))
        try:
            results: dict[int, Any] = {}
            for _ in range(size):
                try:
                    rank, ok, value = queue.get(timeout=timeout)
                except Empty:
                    raise AssertionError(f"ranks {sorted(set(range(size)) - set(results))} gave no answer") from None
                assert ok, f"rank {rank} failed:\n{value}"
                results[rank] = value
            return [results[rank] for rank in range(size)]
        finally:
            for child in children:
                child.join(timeout=5)
                if child.is_alive():
                    child.kill()
                    child.join()
            queue.close()


def start_ranks(size: int, function: Callable[..., Any], args: tuple[Any, ...], store: str) -> tuple[list[Any], Any]:
    """Processes that have been started, by rank, and the queue of (rank, whether it went well, result or traceback)."""
    context = multiprocessing.get_context("forkserver")  # forks of a process that has imported everything once
    context.set_forkserver_preload(["torch.distributed", "mfdist.training.train", "mfdist.results.evaluate"])
    queue = context.Queue()
    children = [
        context.Process(target=_child, args=(queue, store, rank, size, function, args, dict(os.environ)), daemon=True)
        for rank in range(size)
    ]
    for child in children:
        child.start()
    return children, queue


def _child(
    queue: Any, store: str, rank: int, size: int, function: Callable[..., Any], args: tuple[Any, ...],
    variables: dict[str, str],
) -> None:  # fmt: skip
    try:
        os.environ.clear()  # those of the process that was forked are as old as that
        os.environ.update(variables)
        import torch
        import torch.distributed as dist

        from mfdist.cluster.world import World

        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
        world = World(rank, size, torch.device("cpu"), connected=True)
        value = function(world, *args)
        world._leave(all_alive=True)
        queue.put((rank, True, value))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
