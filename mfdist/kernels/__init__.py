"""Compiled arithmetic of a training step on packed rows: one interface, a plain torch reference and fast ones.

Enters: packed rows, ids, ratings, the rules of an optimizer, as arrays. Leaves: the same rows, one step further.
May import: nothing of mfdist.
"""

from mfdist.kernels import disk_cache

disk_cache.use()

BIAS_COLUMN = (1, 0)
"""Of a member's columns, the one that is the bias of a user, and of an item; on the other side it is a scale."""


def stride_of(width: int, state_width: int) -> int:
    """Floats of a packed row: weights, optimizer state and ``last`` (an int32's bits), up to a multiple of four."""
    return -(-(width + state_width + 1) // 4) * 4
