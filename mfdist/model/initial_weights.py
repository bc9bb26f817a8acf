"""The factors that rows begin with: a function of seed, table and global row, wherever a row lies."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

_BLOCK = 4096


def initial_block(seed: int, table: int, block: int, width: int, kind: str) -> npt.NDArray[np.float32]:
    """float32 (4096, width) for global rows 4096 block onwards: numpy's Philox keyed by (seed, table, block).

    ``kind``: "normal" is normal(0, 1), "uniform" is uniform(0, 0.05).
    """
    key = np.array([seed, table], np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, block, 0]))
    if kind == "normal":
        return generator.standard_normal((_BLOCK, width), np.float32)
    return generator.random((_BLOCK, width), np.float32) * np.float32(0.05)


def initial_rows(seed: int, table: int, first: int, end: int, width: int, kind: str) -> torch.Tensor:
    """The initial factors of global rows ``first`` to ``end``, (end - first, width) float32."""
    blocks = range(first // _BLOCK, -(-end // _BLOCK))
    if not blocks:
        return torch.empty(0, width)
    rows = np.concatenate([initial_block(seed, table, block, width, kind) for block in blocks])
    start = blocks.start * _BLOCK
    return torch.from_numpy(rows[first - start : end - start])
