"""The ranks of a run and the few collectives that mfdist uses.

One process is a world of size 1 through the same calls. Under torchrun (or ``python -m mfdist.launch``)
:meth:`World.open` joins the process group: gloo on CPUs, nccl for tensors on GPUs with gloo beside it for
the small float64 sums and for objects. This module is the only importer of process-group calls.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import re
import socket
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mfdist.cluster import meeting, shared_memory
from mfdist.cluster.shared_memory import SharedMemory
from mfdist.cluster.transport import Transport
from mfdist.errors import LostRankError, MfdistError, UsageError
from mfdist.loading import loading

Floats = npt.NDArray[np.float64]
T = TypeVar("T")


class World:
    """This process among its peers: ``rank`` of ``size``, and the ``device`` that it computes on.

    ``alone()`` gives a world of size 1 without a process group, for library use in one process.
    """

    def __init__(
        self, rank: int, size: int, device: torch.device, *, connected: bool, timeout_seconds: float = 600.0
    ) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.may_share = True
        """Whether ranks of one host use memory that they share; the same on every rank."""
        self.may_connect = True
        """Whether ranks of several hosts use connections of their own; the same on every rank."""
        self.interface: str | None = None
        """Network interface or address of this host for these; not set: that of the rendezvous."""
        self._connected = connected
        self.timeout_seconds = timeout_seconds
        self._replicas: list[DistributedDataParallel] = []
        self._shared: weakref.WeakSet[SharedMemory] = weakref.WeakSet()
        self.transports: weakref.WeakSet[Transport] = weakref.WeakSet()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @staticmethod
    def alone(device: str = "cpu") -> World:
        return World(0, 1, choose_device(device, 0), connected=False)

    @staticmethod
    @contextlib.contextmanager
    def open(device: str = "auto", timeout_seconds: float = 600.0) -> Iterator[World]:
        """Join the process group that the environment describes; every rank calls. Leaves it on every way out."""
        world = _connect(device, timeout_seconds)
        try:
            yield world
        except Exception as error:
            cause = _cause(error, world.transports)
            if isinstance(cause, MfdistError):
                cause.said_elsewhere = not world._first_to_say(cause)
            world._leave(all_alive=False)
            if cause is not error:
                raise cause from None
            raise
        except BaseException:
            world._leave(all_alive=False)
            raise
        world._leave(all_alive=True)

    # Collectives: every rank calls each of these, in the same order --------------------------------

    def sum(self, values: npt.ArrayLike) -> Floats:
        """The elementwise float64 sum over all ranks, on every rank."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: npt.ArrayLike) -> Floats:
        """The elementwise float64 maximum over all ranks, on every rank."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether any rank's flag is set."""
        return bool(self.max([float(flag)])[0])

    def broadcast(self, value: T | None) -> T:
        """Rank 0's ``value`` on every rank (any picklable object)."""
        if self.size == 1:
            return value  # type: ignore[return-value]
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first_error(self, work: Callable[[], T]) -> T:
        """``work()`` of this rank; where it fails on any with an error of the user's or the system's, the first rank's
        error on all."""
        outcome: Any
        try:
            outcome = work()
        except (MfdistError, OSError) as error:
            outcome = error
        errors = [error for error in self.gather(outcome if isinstance(outcome, Exception) else None) if error]
        if errors:
            raise errors[0]
        return outcome  # type: ignore[no-any-return]

    def barrier(self) -> None:
        if self.size > 1:
            self.sum([0.0])

    def all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_rows: list[int], sent_rows: list[int]
    ) -> None:
        """Send rows of ``sent``, ``sent_rows[r]`` to rank r in rank order; ``received`` is filled likewise."""
        self.begin_all_to_all(received, sent, received_rows, sent_rows)()

    def begin_all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_rows: list[int], sent_rows: list[int]
    ) -> Callable[[], None]:
        """:meth:`all_to_all` that goes on beside what the caller does next; what is returned waits for it, on a GPU the
        stream and not the host."""
        if self.size == 1:
            received.copy_(sent)
            return lambda: None
        work = dist.all_to_all_single(received, sent, received_rows, sent_rows, async_op=True)
        assert work is not None

        def wait() -> None:
            work.wait()

        return wait

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum ``tensor`` over all ranks, in place, on its own device."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def share(self, size_bytes: int, ranks: Sequence[int] | None = None) -> SharedMemory | None:
        """Memory that ``ranks`` (default all) see, zeros at first; each rank names its own group. None on every rank
        where the ranks of any group are on several hosts or cannot share it."""
        if self.size == 1 or not self.may_share or self.device.type != "cpu":
            return None
        ranks = ranks or range(self.size)
        leader = ranks[0]
        made = shared_memory.make(size_bytes) if self.rank == leader else None
        offer = self.gather(made[0] if made else None)[leader]
        memory = made[1] if made else shared_memory.attach(offer, size_bytes) if offer and self.rank != leader else None
        processes = self.gather(os.getpid() if memory else 0)
        if made:
            os.close(made[0].file)
        found = None
        if memory and all(processes):
            with contextlib.suppress(OSError, AttributeError):  # no pidfd_open in this system
                mine = [processes[rank] for rank in ranks]
                found = SharedMemory(memory, ranks.index(self.rank), mine, self.timeout_seconds)
        if self.any(found is None):
            return None
        assert found is not None
        self._shared.add(found)
        return found

    def send(self, tensor: torch.Tensor, to: int) -> None:
        dist.send(tensor, to)

    def receive(self, tensor: torch.Tensor, source: int) -> None:
        dist.recv(tensor, source)

    def replicate(self, module: torch.nn.Module) -> torch.nn.Module:
        """``module`` under DistributedDataParallel, its gradients added (not averaged) over the ranks.

        As it is where there is nothing to reduce: one rank (DDP would take a tenth of a millisecond a step), or no
        parameter (DDP refuses that).
        """
        if self.size == 1 or not any(p.requires_grad for p in module.parameters()):
            return module
        replica = DistributedDataParallel(module, gradient_as_bucket_view=True)
        replica.register_comm_hook(_Adder(self), _add_gradients)
        self._replicas.append(replica)
        return replica

    # Inside ----------------------------------------------------------------------------------------

    def _reduce(self, values: npt.ArrayLike, op: Any) -> Floats:
        array = np.array(values, dtype=np.float64)
        if self.size > 1:
            dist.all_reduce(torch.from_numpy(array), op)
        return array

    def _first_to_say(self, error: MfdistError) -> bool:
        """Whether no other rank has met this very error; where the ranks' store does not answer, say it."""
        first = [True]

        def ask() -> None:
            store = dist.distributed_c10d._get_default_store()
            key = hashlib.blake2b(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT')} {error}".encode()).hexdigest()
            with contextlib.suppress(Exception):
                first[0] = store.add(f"mfdist/said/{key}", 1) == 1

        if self._connected and self.size > 1 and dist.is_initialized():
            asking = threading.Thread(target=ask, daemon=True)
            asking.start()
            asking.join(STORE_SECONDS)
        return first[0]

    def _leave(self, all_alive: bool) -> None:
        """Delete the DDP objects, then the group: a gloo DDP alive at exit can abort the process."""
        for memory in self._shared:
            memory.leave()
        for found in self.transports:
            found.leave(all_alive)
        while self._replicas:
            del self._replicas[-1].reducer
            self._replicas.pop()
        if self._connected and dist.is_initialized():
            if all_alive:
                self.barrier()
            dist.destroy_process_group()


STORE_SECONDS = 2.0
LOST = re.compile(r"gloo|NCCL|closed by peer|reset by peer|timed out|Broken pipe|Socket Timeout", re.IGNORECASE)


def _cause(error: Exception, transports: Iterable[Transport] = ()) -> Exception:
    """``error``, or one sentence in its place where it only says that another rank is gone: which, where one knows."""
    if not (isinstance(error, RuntimeError) and LOST.search(str(error))):
        return error
    for transport in transports:
        if (named := transport.named()) is not None:
            return named
    return LostRankError(shared_memory.GONE)


class _Adder:
    """Adds up a few floats over the ranks, in rank order: through memory that they share, or the group."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._memory = world.share(SharedMemory.room(world.size, 2 * world.size * 4 * FEW_FLOATS))
        if self._memory:
            # Two in turn: who is quick begins with one while others still read the last.
            self._turns = self._memory.array((2, world.size, FEW_FLOATS), np.float32)

    def takes(self, tensor: torch.Tensor) -> bool:
        return tensor.numel() <= FEW_FLOATS and tensor.dtype == torch.float32 and tensor.device.type == "cpu"

    def add_up(self, tensor: torch.Tensor) -> None:
        """Add up ``tensor`` (floats,) in place; collective."""
        mine = tensor.numpy()
        if self._memory:
            turn = self._turns[0, :, : len(mine)]
            self._turns = self._turns[::-1]
            turn[self._world.rank] = mine
            self._memory.signal()
            self._memory.wait()
            self._add(mine, turn)
        elif self._world.size > 1:
            parts = [torch.empty_like(tensor) for _ in range(self._world.size)]
            dist.all_gather(parts, tensor)
            self._add(mine, parts)

    @staticmethod
    def _add(total: Any, parts: Any) -> None:
        total[:] = parts[0]
        for part in parts[1:]:
            total += np.asarray(part)


def _add_gradients(adder: _Adder, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A step's loss is already divided by its global number of rows, so that ranks' gradients simply add up."""
    future: torch.futures.Future[torch.Tensor]
    buffer = bucket.buffer()
    if adder.takes(buffer):
        adder.add_up(buffer)
        future = torch.futures.Future()
        future.set_result(buffer)
    else:
        future = dist.all_reduce(buffer, async_op=True).get_future().then(lambda done: done.value()[0])
    return future


FEW_FLOATS = 256
"""What is worth no reduction of its own; also in rank order, the same bits either way."""

# DDP compares a hook's annotations with the types themselves, not with their names.
_add_gradients.__annotations__ |= {"bucket": dist.GradBucket, "return": torch.futures.Future[torch.Tensor]}


def _connect(device: str, timeout_seconds: float) -> World:
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    started_alone = "RANK" not in os.environ
    if started_alone:
        size = 1
    if started_alone or meeting.one_host(size):
        meeting.keep_to_loopback()
    with loading("waiting for the other ranks ..."):
        store = dist.HashStore() if started_alone else meeting.store_of_ranks(rank, size, timeout)
        if store is None:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    if size > 1:
        _notice_lost_hosts()
    return World(rank, size, chosen, connected=True, timeout_seconds=timeout_seconds)


LOST_HOST_SECONDS = 30


def _notice_lost_hosts() -> None:
    """Let the connections to other ranks end half a minute after their host is cut off, also while nothing is sent.

    gloo sets no keepalive: a rank whose peer's host vanished would wait for the group's time-out. Linux only.
    """
    if not os.path.isdir("/proc/self/fd"):
        return
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4),
                                          (socket.TCP_USER_TIMEOUT, 1000 * LOST_HOST_SECONDS)):  # fmt: skip
                        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device for ``--device auto|cpu|cuda`` and a local rank; UsageError where there is no such device."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here; use --device cpu.")
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: local rank {local_rank} has no GPU of its own, this host has "
            f"{torch.cuda.device_count()}; start fewer processes (--nproc_per_node) or use --device cpu."
        )
    return torch.device("cuda", local_rank)
