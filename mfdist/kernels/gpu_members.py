"""Members and bags on a GPU, in Triton: scores and slopes of each member, what a rating gives through a bag.

A row is ``MEMBERS`` parts of ``PART`` columns, both powers of two (``gpu.has_kernel``), so that a tile (R, columns) is
seen as (R, MEMBERS, PART) without a copy. In a part, column ``BIAS_COLUMN[side]`` is the bias of that side's row and
scales the other side's (``model.Form``). SHAPE as in ``gpu``.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from mfdist.kernels import BIAS_COLUMN

(FACTORS, HAS_BIAS, STRIDE, KIND, COLUMNS, HAS_SIGMOID, HAS_PENALTY, MEMBERS, HAS_BAGS, OWN_BIAS) = (
    tl.constexpr(place) for place in range(10)
)
"""Places of SHAPE: see ``gpu``."""
USER_BIAS = tl.constexpr(BIAS_COLUMN[0])
ITEM_BIAS = tl.constexpr(BIAS_COLUMN[1])


@triton.jit
def place_in_part(SHAPE: tl.constexpr) -> Any:
    """int32 (columns,): the column of its part that each column of a row is."""
    return tl.arange(0, SHAPE[COLUMNS]) % (SHAPE[FACTORS] // SHAPE[MEMBERS])


@triton.jit
def of_factors(SHAPE: tl.constexpr) -> Any:
    """float32 (columns,): 1 for factors, 0 for biases and scales."""
    place = place_in_part(SHAPE)
    return ((place != USER_BIAS) & (place != ITEM_BIAS)).to(tl.float32)


@triton.jit
def of_own_bias(SHAPE: tl.constexpr) -> Any:
    """float32 (columns,): 1 for the biases of this side's rows: what a score's derivative has beside the other row."""
    return (place_in_part(SHAPE) == SHAPE[OWN_BIAS]).to(tl.float32)


@triton.jit
def error_and_slope(
    score: tl.tensor, rating: tl.tensor, scale: tl.tensor, low: tl.tensor, span: tl.tensor, SHAPE: tl.constexpr
) -> Any:
    """Of scores the error, and the derivative of the loss by the score; ``rating`` in any shape that goes with it."""
    if SHAPE[HAS_SIGMOID]:
        s = 1 / (1 + tl.exp(-score))
        error = low + span * s - rating
        slope = scale * error * span * s * (1 - s)
    else:
        error = score - rating
        slope = scale * error
    return error, slope


@triton.jit
def member_slopes(
    user: tl.tensor, item: tl.tensor, weight: tl.tensor, offset: tl.tensor, rating: tl.tensor, scale: tl.tensor,
    low: tl.tensor, span: tl.tensor, SHAPE: tl.constexpr,
) -> Any:  # fmt: skip
    """Per rating (R,) the mean of the members' errors, and (R, MEMBERS) the derivatives of the loss by their scores.

    ``user``, ``item`` (R, columns), a user's with its bag; ``weight`` (R,): of a rated item in the bag, whose own part
    is taken from the score as a constant."""
    R: tl.constexpr = user.shape[0]
    M: tl.constexpr = SHAPE[MEMBERS]
    place = place_in_part(SHAPE)[None, :]
    terms = user * item + tl.where(place == USER_BIAS, user, 0.0) + tl.where(place == ITEM_BIAS, item, 0.0)
    if SHAPE[HAS_BAGS]:
        terms -= weight[:, None] * of_factors(SHAPE)[None, :] * item * item
    score = tl.sum(tl.reshape(terms, (R, M, SHAPE[FACTORS] // M)), axis=2) + offset
    error, slope = error_and_slope(score, rating[:, None], scale, low, span, SHAPE)
    return tl.sum(error, axis=1) / M, slope


@triton.jit
def over_parts(values: tl.tensor, SHAPE: tl.constexpr) -> Any:
    """(R, columns): of ``values`` (R, MEMBERS) each member's in all columns of its part."""
    R: tl.constexpr = values.shape[0]
    M: tl.constexpr = SHAPE[MEMBERS]
    return tl.reshape(tl.broadcast_to(values[:, :, None], (R, M, SHAPE[FACTORS] // M)), (R, SHAPE[FACTORS]))


@triton.jit
def load_slopes(slope: tl.tensor, k: tl.tensor, use: tl.tensor, SHAPE: tl.constexpr) -> Any:
    """(R, MEMBERS) slopes of ratings ``k``, zeros where not ``use``."""
    place = k[:, None].to(tl.int64) * SHAPE[MEMBERS] + tl.arange(0, SHAPE[MEMBERS])[None, :]
    return tl.load(slope + place, mask=use[:, None], other=0.0)


@triton.jit
def store_slopes(slope: tl.tensor, k: tl.tensor, values: tl.tensor, use: tl.tensor, SHAPE: tl.constexpr) -> None:
    place = k[:, None].to(tl.int64) * SHAPE[MEMBERS] + tl.arange(0, SHAPE[MEMBERS])[None, :]
    tl.store(slope + place, values, mask=use[:, None])


@triton.jit
def load_columns(source: tl.tensor, base: tl.tensor, live: tl.tensor, SHAPE: tl.constexpr) -> Any:
    """(R, columns) at ``source + base``, zeros where not ``live``."""
    return tl.load(source + base[:, None] + tl.arange(0, SHAPE[COLUMNS])[None, :], mask=live[:, None], other=0.0)


@triton.jit
def store_columns(
    target: tl.tensor, base: tl.tensor, values: tl.tensor, live: tl.tensor, SHAPE: tl.constexpr
) -> None:  # fmt: skip
    tl.store(target + base[:, None] + tl.arange(0, SHAPE[COLUMNS])[None, :], values, mask=live[:, None])


@triton.jit
def bag_weight(rows: tl.tensor, live: tl.tensor, penalties: tl.tensor) -> Any:
    """(R,) each: one over the training ratings of users ``rows``, and the weight of a rated item in their bags."""
    share = tl.load(penalties[0] + rows, mask=live, other=0.0)
    return share, penalties[7] * tl.sqrt(share)


@triton.jit
def renewed(
    bag: tl.tensor, running: tl.tensor, ratings: tl.tensor, share: tl.tensor, weight: tl.tensor, rated: tl.tensor,
    learned: tl.tensor, SHAPE: tl.constexpr,
) -> Any:  # fmt: skip
    """Bag and bag gradient after ``ratings`` (R,) ratings of a user: ``rated``, the sum of their items, and
    ``learned``, that of slope times item; see ``model.Form.implicit``."""
    kept = (1 - ratings.to(tl.float32) * share)[:, None]
    new = weight[:, None] * of_factors(SHAPE)[None, :]
    return kept * bag + new * rated, kept * running + new * learned


@triton.jit
def item_terms(
    c: tl.tensor, user: tl.tensor, before: tl.tensor, place: tl.tensor, own: tl.tensor, use: tl.tensor,
    SHAPE: tl.constexpr,
) -> Any:  # fmt: skip
    """(R, columns): what ratings with slopes ``c`` (R, MEMBERS) add to the gradients of their items ``own``; the users'
    rows stand at ``before + place`` with their bags, which bring a part of their own."""
    slopes = over_parts(c, SHAPE)
    terms = slopes * (user + of_own_bias(SHAPE)[None, :])
    if SHAPE[HAS_BAGS]:
        running = load_columns(before + SHAPE[FACTORS], place, use, SHAPE)
        weight = tl.load(before + place + 2 * SHAPE[FACTORS], mask=use, other=0.0)
        terms += running - weight[:, None] * of_factors(SHAPE)[None, :] * slopes * own
    return terms
