"""What the host gives the kernels of ``gpu``: the shape of rows, the rules of an optimizer, sizes of tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton

from mfdist.kernels import BIAS_COLUMN, packed
from mfdist.kernels.missed_steps import AdamRules

CHUNK = 32
"""Segments of more ratings are long; also the positions of a block of ``gpu.long_parts``."""
TILE = 512
"""Values of a tile of rows."""
PART_TILE = 2048
"""Values of a tile of partial sums."""
SORT_BLOCK = 1024
SUM_BLOCK = 4096
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def has_kernel(dim: int, members: int, bags: bool) -> bool:
    """Whether the kernels have rows of ``members`` parts (0: one part, with its bias behind): Triton sees them as a
    third dimension, whose sizes are powers of two; bags are those of members."""
    if not members:
        return not bags
    return all(size & (size - 1) == 0 for size in (members, dim // members))


def shape_of(
    dim: int, bias: bool, kind: int, stride: int, sigmoid: bool, penalised: bool, members: int = 0, bags: bool = False,
    side: int = 0,
) -> tuple[int, ...]:  # fmt: skip
    """SHAPE of the rows of one side of a model under an optimizer of ``packed.KINDS``, ``stride`` floats apart."""
    apart = bias and not members
    columns = triton.next_power_of_2(dim)
    return dim, int(apart), stride, kind, columns, int(sigmoid), int(penalised), members, int(bags), BIAS_COLUMN[side]


def step_table(rules: AdamRules, betas: tuple[float, float], weight_decay: float) -> np.typing.NDArray[np.float32]:
    """float32 (steps + 1, STEP_COLUMNS): of each step, amplitude and spread, the rule as a polynomial (c,
    p0..p6), and the pace of the step itself: -lr wd, lr / (1 - b1^t), 1 / sqrt(1 - b2^t), lr; two columns are free."""
    t = np.arange(len(rules.amplitude))
    rate = rules.amplitude * (1 - rules.betas[0] ** t)
    safe = np.maximum(t, 1)
    pace = (-rate * weight_decay, rate / (1 - betas[0] ** safe), 1 / np.sqrt(1 - betas[1] ** safe), rate)
    columns = (rules.amplitude, rules.spread, rules.polynomials(), *pace, 0 * rate, 0 * rate)
    return np.column_stack(columns).astype(np.float32)


def rules_on(
    device: torch.device, rules: AdamRules, betas: tuple[float, float], eps: float, weight_decay: float
) -> tuple[Any, ...]:
    """The kernels' ``rules``: log_decay float64 (steps + 1,), :func:`step_table`, by_gap float32 (steps + 1, 4) (powers
    of the betas, the root of the second), early float32 (plain_below + horizon, 2, NODES), horizon, plain_below, eps,
    1 - betas.
    """
    _by_step, powers, _polynomials, early, horizon, plain_below = packed.rule_arrays(rules)
    by_gap = np.column_stack([powers, np.zeros(len(powers))])
    arrays = (rules.log_decay, step_table(rules, betas, weight_decay), by_gap.astype("f4"), early.astype("f4"))
    tables = [torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays]
    return (*tables, horizon, plain_below, eps, 1 - betas[0], 1 - betas[1])


def tile_rows(shape: tuple[int, ...], values: int = TILE, most: int = 16) -> int:
    """Rows of a tile of about so many values. Triton 3.6 fails to compile ``gpu.row_pass`` with 32 rows and a bias."""
    return max(4, min(most, values // shape[4]))
