"""One side of a ranking model, solved while the other stands: a few steps of conjugate gradients a row.

The row x of a user with rated items' rows y_1 .. y_n minimises

    sum over rated of (1 - y.x)^2 + w sum over all y of (y.x)^2 + c |x|^2

whose minimum solves A x = b with A = sum y y' + w G + c I, b = sum y, and G = sum over all y of y y' (the Gram matrix,
which makes the items that nobody rated cost nothing: Hu, Koren, Volinsky 2008). Conjugate gradients from where the row
stood need A times a vector only, n products of two rows and one with G (Takacs, Pilaszy, Tikk 2011). Float32.

The pieces of a step stand by themselves, because the ratings of an item may lie on several ranks: ``observe`` is what a
rank adds, ``begin`` and ``advance`` are its owner's. ``solve`` is all of them where all ratings are at hand.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mfdist.kernels.numba_intrinsics import kernel, summing


@kernel
def group(rows: Any, others: Any, starts: Any, grouped: Any) -> None:
    """Sort ratings by row, stably: those of row r have their ``others`` in ``grouped[starts[r] : starts[r + 1]]``.

    ``starts`` int64 (rows + 1,), zeros when called.
    """
    for k in range(rows.size):
        starts[rows[k] + 1] += 1
    for r in range(starts.size - 1):
        starts[r + 1] += starts[r]
    for k in range(rows.size):
        place = starts[rows[k]]
        grouped[place] = others[k]
        starts[rows[k]] = place + 1
    for r in range(starts.size - 1, 0, -1):
        starts[r] = starts[r - 1]
    starts[0] = 0


@summing
def _observe(
    first: int, end: int, grouped: Any, others: Any, x: Any, row: int, wanted: Any, sign: Any, out: Any, to: int
) -> Any:
    """Add to ``out[to]`` the sum over a row's ratings of sign (wanted - y.x) y; returns that of (wanted - y.x)^2."""
    width, squares = out.shape[1], np.float64(0)
    for k in range(first, end):
        y, dot = grouped[k], np.float32(0)
        for c in range(width):
            dot += others[y, c] * x[row, c]
        error = sign * (wanted - dot)
        squares += np.float64(error) * np.float64(error)
        for c in range(width):
            out[to, c] += error * others[y, c]
    return squares


@summing
def _dense(x: Any, row: int, gram: Any, pull: Any, out: Any, to: int, sign: Any) -> None:
    """Add to ``out[to]`` sign times (w G + pull I) x, ``gram`` being w G."""
    width = gram.shape[0]
    for c in range(width):
        out[to, c] += sign * pull * x[row, c]
    for j in range(width):
        factor = sign * x[row, j]
        for c in range(width):
            out[to, c] += factor * gram[j, c]


@summing
def _advance(x: Any, row: int, rest: Any, ahead: Any, image: Any, to: int) -> bool:
    """One step along ``ahead[to]`` whose image under A is ``image[to]``; False where there is nothing left to do."""
    width = rest.shape[1]
    before, along = np.float32(0), np.float32(0)
    for c in range(width):
        before += rest[to, c] * rest[to, c]
        along += ahead[to, c] * image[to, c]
    if not along > 0:
        return False
    length, after = before / along, np.float32(0)
    for c in range(width):
        x[row, c] += length * ahead[to, c]
        rest[to, c] -= length * image[to, c]
        after += rest[to, c] * rest[to, c]
    turn = after / before
    for c in range(width):
        ahead[to, c] = rest[to, c] + turn * ahead[to, c]
        image[to, c] = 0
    return True


@kernel
def solve(
    low: int, high: int, starts: Any, grouped: Any, others: Any, x: Any, gram: Any, pulls: Any, steps: int
) -> Any:
    """Rows ``low`` to ``high`` of ``x`` (rows, dim), in place, all ratings at hand; rows without one stay.

    ``gram`` float32 (dim, dim): w G. ``pulls`` float32 (rows,): c. Returns the sum of (1 - y.x)^2 before.
    """
    width, squares = gram.shape[0], 0.0
    rest = np.empty((1, width), np.float32)
    ahead = np.empty((1, width), np.float32)
    image = np.zeros((1, width), np.float32)
    for row in range(low, high):
        first, end = starts[row], starts[row + 1]
        if first == end:
            continue
        rest[:] = 0
        squares += _observe(first, end, grouped, others, x, row, np.float32(1), np.float32(1), rest, 0)
        _dense(x, row, gram, pulls[row], rest, 0, np.float32(-1))
        ahead[:] = rest
        for _ in range(steps):
            _observe(first, end, grouped, others, ahead, 0, np.float32(0), np.float32(-1), image, 0)
            _dense(ahead, 0, gram, pulls[row], image, 0, np.float32(1))
            if not _advance(x, row, rest, ahead, image, 0):
                image[:] = 0
                break
    return squares


@kernel
def observe(
    low: int, high: int, starts: Any, grouped: Any, others: Any, x: Any, wanted: Any, sign: Any, out: Any
) -> None:
    """Set ``out`` (rows, dim) ``low`` to ``high`` to the sums over this rank's ratings of sign (wanted - y.x) y."""
    for row in range(low, high):
        out[row] = 0
        _observe(starts[row], starts[row + 1], grouped, others, x, row, wanted, sign, out, row)


@kernel
def begin(low: int, high: int, x: Any, gram: Any, pulls: Any, rest: Any) -> None:
    """``rest``, the sums of :func:`observe` with wanted 1 and sign 1 over all ranks, becomes b - A x."""
    for row in range(low, high):
        _dense(x, row, gram, pulls[row], rest, row, np.float32(-1))


@kernel
def advance(low: int, high: int, x: Any, gram: Any, pulls: Any, rest: Any, ahead: Any, image: Any) -> None:
    """A step of rows; ``image``: the sums over all ranks of :func:`observe` of ``ahead``, wanted 0 and sign -1."""
    for row in range(low, high):
        _dense(ahead, row, gram, pulls[row], image, row, np.float32(1))
        _advance(x, row, rest, ahead, image, row)
