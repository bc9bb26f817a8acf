"""Segments of a sorted batch on a GPU, in Triton; see ``gpu`` and ``gpu_batch.Sorted``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n"])
def heads(ids: tl.tensor, head: tl.tensor, n: tl.tensor, B: tl.constexpr) -> None:
    """``head[q]``: whether position q of the sorted ``ids`` begins another segment (position 0 does not)."""
    q = tl.program_id(0) * B + tl.arange(0, B)
    here = tl.load(ids + q, mask=q < n, other=0)
    before = tl.load(ids + q - 1, mask=(q > 0) & (q < n), other=0)
    tl.store(head + q, ((q > 0) & (here != before)).to(tl.int32), mask=q < n)


@triton.jit(do_not_specialize=["n"])
def list_rows(
    ids: tl.tensor, order: tl.tensor, number: tl.tensor, rows: tl.tensor, starts: tl.tensor, slot: tl.tensor,
    count: tl.tensor, n: tl.tensor, B: tl.constexpr,
) -> None:  # fmt: skip
    """From the segment ``number`` of each position: ``rows``, ``starts``, ``slot`` and ``count`` of ``Sorted``."""
    q = tl.program_id(0) * B + tl.arange(0, B)
    inside = q < n
    row = tl.load(ids + q, mask=inside, other=0)
    here = tl.load(number + q, mask=inside, other=0)
    before = tl.load(number + q - 1, mask=inside & (q > 0), other=-1)
    begins = inside & (here != before)
    tl.store(rows + here, row, mask=begins)
    tl.store(starts + here, q, mask=begins)
    tl.store(slot + tl.load(order + q, mask=inside, other=0), here, mask=inside)
    tl.store(starts + here + 1, n + tl.zeros_like(q), mask=q == n - 1)
    tl.store(count + tl.zeros_like(q), here + 1, mask=q == n - 1)
