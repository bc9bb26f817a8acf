"""Rows of float32 as bfloat16 and back: their upper half, rounded to the nearest, ties to even."""

from __future__ import annotations

from typing import Any

import numpy as np

from mfdist.kernels.numba_intrinsics import kernel

NO_NUMBER, QUIET = np.uint32(0x7F800000), np.uint32(0x400000)


@kernel
def narrow_lines(bits: Any, narrow: Any, begin: Any, end: Any, first: Any) -> None:
    """Lines ``begin`` to ``end`` of ``bits`` (uint32, all lines one after the other) to ``narrow`` (uint16) from line
    ``first`` on."""
    width = narrow.shape[1]
    source = bits[begin * width : end * width]
    target = narrow.reshape(-1)[first * width : (first + end - begin) * width]
    for k in range(source.size):
        value = source[k]
        rounded = value + np.uint32(0x7FFF) + (value >> np.uint32(16) & np.uint32(1))
        if value & np.uint32(0x7FFFFFFF) > NO_NUMBER:
            rounded = value | QUIET
        target[k] = np.uint16(rounded >> np.uint32(16))


@kernel
def widen_lines(narrow: Any, bits: Any, begin: Any, end: Any, first: Any) -> None:
    """Lines ``begin`` to ``end`` of ``narrow`` to ``bits``, from line ``first + begin`` on."""
    width = narrow.shape[1]
    source = narrow.reshape(-1)[begin * width : end * width]
    target = bits[(first + begin) * width : (first + end) * width]
    for k in range(source.size):
        target[k] = np.uint32(source[k]) << np.uint32(16)
