"""What numba does not say by itself: prefetch, arrays without owners, a barrier for threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload


def _compiled(**options: Any) -> Callable[[Any], Any]:
    """numba.njit, kept on disk (``disk_cache``)."""

    def compiled(function: Any) -> Any:
        return njit(error_model="numpy", cache=True, **options)(function)

    return compiled


kernel = _compiled(nogil=True)
"""Without Python's lock."""
summing = _compiled(nogil=True, fastmath={"reassoc", "contract", "nsz"})
"""The same, with sums in the order that is fastest to the compiler: always the same one, but not the one written."""
short_kernel = _compiled(fastmath=True)
"""For what is shorter than it may take to get the lock back; the order of sums is the compiler's choice."""
inlined: Any = njit(nogil=True, error_model="numpy", inline="always")


def _prefetch(write: int, locality: int) -> Any:
    """An intrinsic that prefetches the cache line of ``array[index]``, to be read or to be written soon.

    ``locality`` as LLVM has it: 3 all caches, 2 from the second on.
    """

    @intrinsic
    def line(typingctx: Any, array: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            from llvmlite import ir

            insert: Any = cgutils.get_or_insert_function
            base = context.make_array(signature.args[0])(context, builder, arguments[0]).data
            pointer = builder.bitcast(builder.gep(base, [arguments[1]]), ir.IntType(8).as_pointer())
            i32 = ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [pointer.type, i32, i32, i32])
            function = insert(builder.module, kind, "llvm.prefetch.p0i8")
            builder.call(function, [pointer, i32(write), i32(locality), i32(1)])
            return context.get_dummy_value()

        return types.void(array, index), generate

    return line


@intrinsic
def _bare(typingctx: Any, array: Any) -> Any:
    """The same array, not counted: numba counts the owners of every slice with atomic instructions otherwise."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        null: Any = cgutils.get_null_value
        view = context.make_array(signature.args[0])(context, builder, value=arguments[0])
        view.meminfo = null(view.meminfo.type)
        view.parent = null(view.parent.type)
        return view._getvalue()

    return array(array), generate


@intrinsic
def _unsigned(typingctx: Any, index: Any) -> Any:
    """An index that is not negative: numba counts from the end otherwise, by four instructions an access."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.cast(builder, arguments[0], signature.args[0], types.uint64)

    return types.uint64(index), generate


@intrinsic
def _arrive(typingctx: Any, gate: Any) -> Any:
    """Add one to ``gate[0]`` (int64), seen by all threads at once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        from llvmlite import ir

        pointer = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "seq_cst")
        return context.get_dummy_value()

    return types.void(gate), generate


@intrinsic
def _arrived(typingctx: Any, gate: Any) -> Any:
    """``gate[0]`` as the other threads have left it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load_atomic(pointer, "seq_cst", 8)

    return types.int64(gate), generate


def constants(numbers: tuple[int, ...]) -> tuple[tuple[None, ...], ...]:
    """Numbers of at least -1 written as lengths of tuples: part of an argument's type, so constants to the compiler."""
    return tuple((None,) * (number + 1) for number in numbers)


def numbers_of(written: Any) -> Any:
    """In a kernel: the numbers of :func:`constants`, or of a tuple of integers as it is."""
    raise NotImplementedError("only compiled code calls this")


@overload(numbers_of, inline="always", strict=False)
def _numbers_of(written: Any) -> Any:
    if all(isinstance(each, types.Integer) for each in written):
        return lambda written: written
    a, b, c, d, e, f, g = (len(each) - 1 for each in written)
    return lambda written: (a, b, c, d, e, f, g)


_clock_gettime: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.uintp))
yield_processor: Any = types.ExternalFunction("sched_yield", types.int32())
SPINS = 2000
"""Looks at the gate before the processor is offered to somebody else."""


prefetch: Any = _prefetch(1, 3)
prefetch_far: Any = _prefetch(0, 2)
"""The second cache can wait for many lines at once; the first, for some twenty, and then all loads wait with it."""
bare: Any = _bare
unsigned: Any = _unsigned
arrived: Any = _arrived
_add_one: Any = _arrive


@kernel
def arrive(gate: Any) -> None:
    """Add one to ``gate[0]`` (int64); what was written before is seen by whoever sees that."""
    _add_one(gate)


@kernel
def wait_for_all(gate: Any, aim: Any) -> None:
    """Say that this thread is here, and wait until ``gate[0]`` (int64) counts ``aim`` arrivals."""
    arrive(gate)
    spins = 0
    while arrived(gate) < aim:
        spins += 1
        if spins > SPINS:
            yield_processor()


@inlined
def barrier(gate: Any, threads: Any, passed: Any) -> Any:
    """Wait for the other threads of this rank; returns the arrivals at ``gate`` so far, ``passed`` before."""
    if threads > 1:
        wait_for_all(gate, passed + threads)
    return passed + threads


@kernel
def clock(space: Any) -> Any:
    """Nanoseconds of the system's steady clock, by way of ``space`` (int64, 2)."""
    _clock_gettime(STEADY, space.ctypes.data)
    return space[0] * 1_000_000_000 + space[1]


STEADY = int(time.CLOCK_MONOTONIC)
LOOKS = 1000
"""Further looks, the processor offered to somebody else after each, before a wait is given up: a millisecond."""


@kernel
def wait_briefly(gate: Any, aim: Any) -> bool:
    """Whether ``gate[0]`` (int64) comes to ``aim``; gives up after some looks."""
    spins = 0
    while arrived(gate) < aim:
        spins += 1
        if spins > SPINS + LOOKS:
            return False
        if spins > SPINS:
            yield_processor()
    return True


@kernel
def all_arrived(lines: Any, aim: Any) -> bool:
    """Whether ``lines[r, 0]`` (int64) of every rank r comes to ``aim``; gives up after some looks at one of them."""
    for rank in range(lines.shape[0]):  # noqa: SIM110 (numba)
        if not wait_briefly(lines[rank], aim):
            return False
    return True
