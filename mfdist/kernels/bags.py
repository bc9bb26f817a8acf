"""Users' bags: what a user chose to rate counts beside how, see ``model.Form.implicit``."""

from __future__ import annotations

from typing import Any

import numpy as np

from mfdist.kernels import BIAS_COLUMN
from mfdist.kernels.numba_intrinsics import inlined
from mfdist.kernels.row_arithmetic import add_times, copy


@inlined
def stride_with_bag(shape: Any) -> Any:
    """The stride of users' rows where they have bags, which only sgd moves."""
    return -(-(shape[1] + 2 * shape[0] * shape[4] + 1) // 4) * 4


@inlined
def leading_biases(shape: Any) -> Any:
    """Columns at the start of a member's part that are no factors."""
    return len(BIAS_COLUMN) if 0 <= shape[6] < shape[0] else 0


@inlined
def join_bag(shape: Any, was: Any, table: Any, base: Any, weight: Any) -> None:
    """Add the bag of the row at ``base`` to the factors in ``was``, and put its gradient and ``weight`` behind them."""
    dim, width = shape[0] * shape[4], shape[1]
    bag, behind = table[base + width : base + width + dim], was[width : width + dim]
    add_times(was, np.float32(1), bag, 0, dim)
    copy(table, base + width + dim, behind, dim)
    was[width + dim] = weight


@inlined
def refill(
    shape: Any, table: Any, base: Any, items: Any, item_slot: Any, order: Any, first: Any, end: Any, slope: Any,
    share: Any, weight: Any,
) -> None:  # fmt: skip
    """Renew bag and bag gradient of the row at ``base`` by the ratings ``order[first:end]``, see ``Form.implicit``."""
    part, width, members, lead = shape[0], shape[1], shape[4], leading_biases(shape)
    dim = part * members
    bag = table[base + width : base + width + dim]
    bag_gradient = table[base + width + dim : base + width + 2 * dim]
    gone = -np.float32(end - first) * share
    add_times(bag, gone, bag, 0, dim)
    add_times(bag_gradient, gone, bag_gradient, 0, dim)
    for place in range(first, end):
        k = order[place]
        item = items[item_slot[k]]
        add_times(bag, weight, item, 0, dim)
        for member in range(members):
            add_times(bag_gradient, weight * slope[k * members + member], item, member * part, part)
    for member in range(members):
        for d in range(member * part, member * part + lead):
            bag[d] = bag_gradient[d] = 0


@inlined
def add_bag_gradient(shape: Any, grad: Any, own: Any, user: Any, slope: Any, k: Any) -> None:
    """Add to an item's ``grad`` what rating ``k`` brings through its user's bag, the item's own part in it left out."""
    part, width, members, lead = shape[0], shape[1], shape[4], leading_biases(shape)
    dim = part * members
    weight = user[width + dim]
    add_times(grad, np.float32(1), user[width : width + dim], 0, dim)
    for member in range(members):
        first, c = member * part, weight * slope[k * members + member]
        add_times(grad, -c, own, first, part)
        for d in range(first, first + lead):
            grad[d] += c * own[d]
