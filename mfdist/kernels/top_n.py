"""The k items of highest score for each of many users, exactly, without writing a score down.

The score of a user and an item is float32 and the same everywhere: fused multiply-adds from the item's bias through the
factors in their order,

    s = b;  s = fma(p[0], q[0], s);  s = fma(p[1], q[1], s);  ...

and of equal scores (+0 and -0 are equal) the item of the lower row comes first. A list is a heap of 64-bit keys, the
score above the row, so that one comparison orders both.

Items stand in blocks, sorted by what a usual user could at most score them with. For a tile of users a block is

    left      where no score in it can reach a list, nor one in any later block: the tile is done
    skipped   where no score in it can (Cauchy-Schwarz: |p| |q| + b; Teflioudi et al., LEMP, 2015)
    filtered  else: ``dot_tiles`` marks the pairs that may reach their lists, by bytes where the processor has them,
              with the error of the bytes taken from the floor; what is marked is computed exactly

so that bytes, blocks and bounds change how long it takes, and no bit of what comes out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mfdist.kernels.dot_tiles import ITEMS, USERS, bits_of, float_of, fma, marks_of_bytes, marks_of_floats
from mfdist.kernels.numba_intrinsics import kernel

TILES = 8
"""Tiles of items in a block."""
BLOCK = TILES * ITEMS
ROUNDING = 2.0**-23
"""More than what a float32 operation may be off by, relative to its result."""
_U32, _U64 = np.uint32, np.uint64
_SIGN, _ALL, _HALF = np.uint32(1 << 31), np.uint32(0xFFFFFFFF), np.uint64(32)
NOTHING = np.uint64(0)
"""The key of an empty place: below that of every score."""


@kernel
def key_of(score: Any, row: Any) -> Any:
    """uint64 that is higher for a higher score and, of equal ones, for a lower row; NOTHING for NaN and -inf."""
    if not score > -np.inf:
        return NOTHING
    bits = bits_of(score + np.float32(0))
    bits = _U32(~bits) if bits & _SIGN else _U32(bits | _SIGN)
    return (_U64(bits) << _HALF) | _U64(_U32(~_U32(row)))


@kernel
def score_of(key: Any) -> Any:
    """The float32 score of a key; -inf of NOTHING."""
    if key == NOTHING:
        return np.float32(-np.inf)
    bits = _U32(key >> _HALF)
    return float_of(_U32(bits ^ _SIGN) if bits & _SIGN else _U32(~bits))


@kernel
def row_of(key: Any) -> Any:
    """The item row of a key; -1 of NOTHING."""
    if key == NOTHING:
        return np.int64(-1)
    return np.int64(_U32(~_U32(key & _U64(_ALL))))


@kernel
def chain(user: Any, item: Any, bias: Any) -> Any:
    """The score of one user and one item, as defined above."""
    total = np.float32(bias)
    for k in range(user.size):
        total = fma(user[k], item[k], total)
    return total


@kernel
def replace_worst(heap: Any, key: Any) -> None:
    """Put ``key`` in the place of the lowest one, ``heap[0]``, and find the lowest again."""
    size, hole = heap.size, 0
    while True:
        child = 2 * hole + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= key:
            break
        heap[hole] = heap[child]
        hole = child
    heap[hole] = key


@kernel
def holds(rows: Any, low: Any, high: Any, row: Any) -> Any:
    """Whether the ascending ``rows[low:high]`` have ``row``."""
    end = high
    while low < high:
        middle = (low + high) // 2
        if rows[middle] < row:
            low = middle + 1
        else:
            high = middle
    return low < end and rows[low] == row


@kernel
def slack_of(user: Any, block: Any, users: Any, blocks: Any) -> Any:
    """How far the filter's score of ``user`` and an item of ``block`` may be below the exact one."""
    _, _, factors, norm, byte_norm, byte_error, _ = users
    _, norms, byte_errors, biases, _, _ = blocks
    slack = byte_error[user] * norms[block] + byte_norm[user] * byte_errors[block]
    slack += (norms[block] * norm[user] + biases[block]) * ROUNDING * (factors.shape[1] + 8)
    return slack * 1.001


@kernel
def below(lowest: Any, slack: Any) -> Any:
    """A float32 that is below ``lowest`` by ``slack`` or a little more."""
    return np.float32(lowest - slack - abs(lowest) * ROUNDING)


@kernel
def add_marked(marks: Any, first: Any, user: Any, heap: Any, users: Any, items: Any, hidden: Any) -> None:
    """Compute the marked pairs of a user exactly, and take up those that belong into the list."""
    exact_users, exact, bias, rows = users[2], items[3], items[2], items[4]
    starts, hidden_rows = hidden
    position = first
    while marks != 0:
        if marks & 255 == 0:
            marks = (marks >> 8) & 0x00FFFFFFFFFFFFFF
            position += 8
            continue
        if marks & 1 and position < rows.size:
            key = key_of(chain(exact_users[user], exact[position], bias[position]), rows[position])
            if key > heap[0] and not holds(hidden_rows, starts[user], starts[user + 1], rows[position]):
                replace_worst(heap, key)
        marks = (marks >> 1) & 0x7FFFFFFFFFFFFFFF
        position += 1


def _search(marks_of: Any, in_bytes: bool) -> Any:
    group_size = 4 if in_bytes else 1

    @kernel
    def search(low: Any, high: Any, users: Any, items: Any, blocks: Any, hidden: Any, heaps: Any) -> Any:
        """Fill the lists ``heaps`` (uint64, (users, k), NOTHING at first) of the users of tiles ``low`` to ``high``.

        ``users``: words, scale (float32), factors (users, dim), norm, byte_norm, byte_error (float64) and knot
        (int64); ``items``: words, start, bias, factors (items, dim), rows (int64), by position; ``blocks``:
        scale, norms, byte_errors, biases, bounds and bounds of this and all later blocks (float32, (blocks, knots));
        ``hidden``: starts (users + 1,) and ascending item rows that are left out. Returns pairs that were filtered.
        """
        words, scales, factors, _, _, _, knots = users
        item_words, start, bias, _, _ = items
        block_scales, _, _, _, bounds, later = blocks
        dim, num_users = factors.shape[1], factors.shape[0]
        groups = np.int64((dim + group_size - 1) // group_size)
        open_tiles = np.arange(low, high)
        floor, scale, slack = np.empty(USERS, np.float32), np.zeros(USERS, np.float32), np.zeros(USERS)
        lowest = np.full((high - low) * USERS, -np.inf, np.float32)  # score of each list's last place
        out = np.zeros(USERS, np.int64)
        left, filtered = high - low, 0
        for block in range(bounds.shape[0]):
            kept = 0
            for place in range(left):
                tile = open_tiles[place]
                first, useful, coming = tile * USERS, False, False
                for u in range(min(USERS, num_users - first)):
                    knot, least = knots[first + u], lowest[first + u - low * USERS]
                    useful |= bounds[block, knot] >= least
                    coming |= later[block, knot] >= least
                if coming:
                    open_tiles[kept] = tile
                    kept += 1
                if not useful:
                    continue
                for u in range(USERS):
                    if first + u < num_users:
                        slack[u] = slack_of(first + u, block, users, blocks)
                        floor[u] = below(lowest[first + u - low * USERS], slack[u])
                        scale[u] = scales[first + u] * block_scales[block]
                    else:
                        floor[u] = np.inf
                filtered += BLOCK * USERS
                for t in range(block * TILES, (block + 1) * TILES):
                    marks_of(item_words, words, groups, start, bias, scale, floor, out,
                             (t * groups * ITEMS, tile * groups * USERS, t * ITEMS, 0))  # fmt: skip
                    for u in range(USERS):
                        if out[u] != 0:
                            user = first + u
                            add_marked(out[u], t * ITEMS, user, heaps[user], users, items, hidden)
                            least = score_of(heaps[user, 0])
                            lowest[user - low * USERS] = least
                            floor[u] = below(least, slack[u])
            left = kept
            if left == 0:
                break
        return filtered

    return search


search_by_bytes: Any = _search(marks_of_bytes, True) if marks_of_bytes else None
search_by_floats: Any = _search(marks_of_floats, False)


@kernel
def finish(low: Any, high: Any, heaps: Any, rows: Any, scores: Any) -> None:
    """Item rows (int64) and scores (float32) of lists ``low`` to ``high``, best first; -1 and -inf for none."""
    k = heaps.shape[1]
    for user in range(low, high):
        ordered = np.sort(heaps[user])
        for place in range(k):
            key = ordered[k - 1 - place]
            rows[user, place], scores[user, place] = row_of(key), score_of(key)


@kernel
def add_listed(low: Any, high: Any, factors: Any, listed: Any, items: Any, hidden: Any, heaps: Any) -> None:
    """Fill the lists of users ``low`` to ``high`` from their own items: ``listed`` is starts and positions."""
    first, positions = listed
    _, _, bias, exact, rows = items
    starts, hidden_rows = hidden
    for user in range(low, high):
        for place in range(first[user], first[user + 1]):
            position = positions[place]
            if position < 0:
                continue
            key = key_of(chain(factors[user], exact[position], bias[position]), rows[position])
            if key > heaps[user, 0] and not holds(hidden_rows, starts[user], starts[user + 1], rows[position]):
                replace_worst(heaps[user], key)


@kernel
def pack(factors: Any, order: Any, tile: Any, group_size: Any, words: Any) -> None:
    """Rows ``order`` (-1: zeros) of ``factors`` as words [tile][group][row of the tile] of ``group_size`` values each.

    ``words`` has the type of ``factors`` (int8 or float32), 1-D, zeros at first.
    """
    dim = factors.shape[1]
    groups = (dim + group_size - 1) // group_size
    for place in range(order.size):
        row = order[place]
        if row < 0:
            continue
        base = (place // tile) * groups * tile * group_size + place % tile * group_size
        for d in range(dim):
            words[base + d // group_size * tile * group_size + d % group_size] = factors[row, d]
