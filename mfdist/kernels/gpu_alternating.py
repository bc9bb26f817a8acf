"""What ratings add to the rows of one side of a ranking model on a GPU, in Triton; see ``kernels.alternating``.

A row's ratings are taken in segments of at most ``SEGMENT``, a program each, so that an item with a million ratings
keeps no program waiting for another; the segments of a row are summed in their order, so that a repeated run has the
same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

SEGMENT = 512
"""Ratings that one program takes, one tile after the other."""
TILE = 2048
"""Values of a tile of ratings."""


@triton.jit
def observe(
    row: tl.tensor, first: tl.tensor, end: tl.tensor, grouped: tl.tensor, others: tl.tensor, other_stride: tl.tensor,
    x: tl.tensor, x_stride: tl.tensor, wanted: tl.tensor, sign: tl.tensor, part: tl.tensor, square: tl.tensor,
    DIM: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
) -> None:  # fmt: skip
    """``part`` (segments, DIM): the sum over the ratings ``first[s]`` to ``end[s]`` of row ``row[s]`` of
    sign (wanted - y.x) y; ``square`` (segments,): that of (wanted - y.x)^2. D: DIM as the next power of two."""
    s = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    inside = d < DIM
    here = tl.load(x + tl.load(row + s) * x_stride + d, mask=inside, other=0.0)
    total = tl.zeros([D], tl.float32)
    squares = tl.zeros([R], tl.float32)
    begin, stop = tl.load(first + s), tl.load(end + s)
    for at in range(begin, stop, R):
        k = at + tl.arange(0, R)
        live = k < stop
        other = tl.load(grouped + k, mask=live, other=0).to(tl.int64)
        y = tl.load(
            others + other[:, None] * other_stride + d[None, :], mask=live[:, None] & inside[None, :], other=0.0
        )
        error = tl.where(live, sign * (wanted - tl.sum(y * here[None, :], 1)), 0.0)
        total += tl.sum(error[:, None] * y, 0)
        squares += error * error
    tl.store(part + s * DIM + d, total, mask=inside)
    tl.store(square + s, tl.sum(squares, 0))


@triton.jit
def add_segments(bounds: tl.tensor, part: tl.tensor, out: tl.tensor, DIM: tl.constexpr, D: tl.constexpr) -> None:
    """``out[r]`` (rows, DIM): the sum of ``part[bounds[r] : bounds[r + 1]]``, one after the other."""
    r = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    total = tl.zeros([D], tl.float32)
    for s in range(tl.load(bounds + r), tl.load(bounds + r + 1)):
        total += tl.load(part + s * DIM + d, mask=d < DIM, other=0.0)
    tl.store(out + r * DIM + d, total, mask=d < DIM)
