"""Planted ratings: every row is a pure function of its number, so that any size streams in bounded memory.

Rows are sorted by item. Item j owns the rows ``item_first_row[j] : item_first_row[j + 1]``; which user a row
belongs to comes from a keyed bijection of the row numbers onto the users' places (a user with d ratings has d
of them), so that both degree distributions hold exactly. The truth is an ordered logit:

    s(u, i)  = user_bias_u + item_bias_i + sum_f p_uf q_if       (each from a hash of seed, id and component)
    rating   = 1 + the number of thresholds t_k below s + noise,  noise from the logistic distribution
    P(rating > k | u, i) = 1 / (1 + exp(t_k - s))

so the best possible error, that of a model which knows s and the thresholds, is known for every row.
Worked example, 3 items with 2, 1, 1 rows and 2 users with 3, 1 rows: item_first_row = (0, 2, 3, 4), places
(0, 1, 2) belong to user 0 and (3,) to user 1; the bijection 0->3, 1->0, 2->1, 3->2 gives item 0 the users 1, 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from mfdist.synthetic.degrees import DegreeClasses, FloatArray, Int64Array

NUM_STARS = 5
NUM_BINS = 1 << 20
BIN_RANGE = 32.0  # logits on either side of zero; what lies outside counts in the outermost bins
SWAP_TRIES = 64

_USER, _ITEM, _NOISE, _SWAP, _DAY, _USER_ID, _ITEM_ID, _ITEM_ORDER, _ROW_ORDER = range(1, 10)

U = np.uint64


@dataclass(frozen=True, kw_only=True)
class Effects:
    """The truth's sizes, in logits (the noise's scale is 1): standard deviations, and the number of factors.

    The inner product of a user's and an item's factors has standard deviation ``factor_sd``.
    """

    user_bias_sd: float
    item_bias_sd: float
    factor_sd: float
    rank: int


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A run of consecutive rows: user (place in the degree order), item, score s (logits) and score plus noise."""

    first_row: int
    user: Int64Array
    item: Int64Array
    score: FloatArray
    noisy: FloatArray
    repeated: int  # (user, item) pairs that could not be made unique


class Planted:
    """The planted rows of given degrees, effects and seed; holds 8 bytes an item and nothing a row or a user."""

    def __init__(self, users: DegreeClasses, items: DegreeClasses, effects: Effects, seed: int) -> None:
        self.effects = effects
        self.seed = seed
        self.num_users, self.num_items = int(users.counts.sum()), int(items.counts.sum())
        self.num_rows = int(users.first_row[-1])
        self._users = users
        self.item_first_row = _item_first_rows(items.degrees, items.first_id, U(seed))

    def pieces(self, rows: int) -> list[tuple[int, int]]:
        """Consecutive item ranges of about ``rows`` rows each (more where one item has more)."""
        cuts, first = [], 0
        while first < self.num_items:
            end = int(np.searchsorted(self.item_first_row, self.item_first_row[first] + rows, side="right")) - 1
            cuts.append((first, max(end, first + 1)))
            first = cuts[-1][1]
        return cuts

    def rows(self, piece: tuple[int, int]) -> Rows:
        """The rows of the items ``piece``; a user has an item once, wherever a swap within the piece allows it."""
        first, last = int(self.item_first_row[piece[0]]), int(self.item_first_row[piece[1]])
        starts = self.item_first_row[piece[0] : piece[1] + 1] - first
        u = self._users
        user = _users_of_rows(first, last, u.first_row, u.first_id, u.degrees, U(self.seed))
        repeated = _swap_repeats(user, starts, first, U(self.seed))
        item = np.repeat(np.arange(*piece), np.diff(starts))
        e = self.effects
        sizes = (e.user_bias_sd, e.item_bias_sd, e.factor_sd / max(e.rank, 1) ** 0.5)
        score, noisy = _scores(user, item, first, sizes, e.rank, U(self.seed))
        return Rows(first_row=first, user=user, item=item, score=score, noisy=noisy, repeated=int(repeated))


def bins_of(noisy: FloatArray) -> Int64Array:
    """The bin of each noisy score, 0 to NUM_BINS - 1, monotone in it."""
    place: FloatArray = (noisy + BIN_RANGE) * (NUM_BINS / (2 * BIN_RANGE))
    return np.clip(place, 0, NUM_BINS - 1).astype(np.int64)


def ratings_of(rows: Rows, thresholds: FloatArray) -> tuple[npt.NDArray[np.int8], float, float]:
    """Stars (rows,), and the sums of the least possible expected squared and absolute errors."""
    return _ratings(rows.score, rows.noisy, thresholds)  # type: ignore[no-any-return]


def days_of(rows: Rows, num_rows: int, first_day: int, last_day: int, seed: int) -> Int64Array:
    """A day for each row, denser towards the end; the first and the last row of all hold the two ends."""
    return _days(rows.first_row, len(rows.user), num_rows, first_day, last_day, U(seed))  # type: ignore[no-any-return]


def user_ids(user: Int64Array, seed: int) -> npt.NDArray[np.uint8]:
    """(rows, 14) characters: 'A', a digit 1 to 4, twelve of 0-9A-Z; another id for another user, always."""
    return _user_ids(user, U(seed))  # type: ignore[no-any-return]


def item_ids(item: Int64Array, num_items: int, seed: int) -> npt.NDArray[np.uint8]:
    """(rows, 10) characters, rising with the item: one in a hundred like a book's number, the others like 'B00...'."""
    return _item_ids(item, num_items, U(seed))  # type: ignore[no-any-return]


# Kernels: numba, one thread each, without the GIL ------------------------------------------------


def _jit(function: Any) -> Any:
    return numba.njit(nogil=True, cache=True)(function)


@_jit
def _hash(seed: Any, purpose: int, number: Any) -> Any:
    """splitmix64 of (seed, purpose, number): for a given seed and purpose a bijection of 64 bits."""
    x = U(number) * U(0x9E3779B97F4A7C15) + (seed * U(0xD1342543DE82EF95) + U(purpose)) * U(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U(30))) * U(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U(27))) * U(0x94D049BB133111EB)
    return x ^ (x >> U(31))


@_jit
def _place(number: int, count: int, key: Any) -> int:
    """A keyed bijection of 0..count-1: mixed within the next power of two until it falls inside."""
    bits = 1
    while (1 << bits) < count:
        bits += 1
    mask, shift = U((1 << bits) - 1), U((bits + 1) // 2)
    x = U(number)
    while True:
        for turn in range(3):
            x = (x * (U(0x9E3779B97F4A7C15) ^ (key << U(1 + 8 * turn))) + (key >> U(16 * turn))) & mask
            x ^= x >> shift
            x = (x * U(0x2545F4914F6CDD1D)) & mask
            x ^= x >> shift
        if x < U(count):
            return np.int64(x)  # type: ignore[return-value]


@_jit
def _class_of(place: int, firsts: Any) -> int:
    """The class c with firsts[c] <= place < firsts[c + 1]."""
    low, high = 0, len(firsts) - 1
    while high - low > 1:
        middle = (low + high) >> 1
        if firsts[middle] <= place:
            low = middle
        else:
            high = middle
    return low


@_jit
def _item_first_rows(degrees: Any, first_id: Any, seed: Any) -> Any:
    count = first_id[-1]
    key = _hash(seed, _ITEM_ORDER, 0)
    firsts = np.zeros(count + 1, np.int64)
    for item in range(count):
        firsts[item + 1] = firsts[item] + degrees[_class_of(_place(item, count, key), first_id)]
    return firsts


@_jit
def _users_of_rows(first: int, last: int, first_place: Any, first_id: Any, degrees: Any, seed: Any) -> Any:
    key = _hash(seed, _ROW_ORDER, 0)
    user = np.empty(last - first, np.int64)
    for row in range(first, last):
        place = _place(row, first_place[-1], key)
        c = _class_of(place, first_place)
        user[row - first] = first_id[c] + (place - first_place[c]) // degrees[c]
    return user


@_jit
def _swap_repeats(user: Any, starts: Any, first_row: int, seed: Any) -> int:
    """Swap users between items until no item has a user twice; returns how many repeats are left."""
    repeated = 0
    for item in range(len(starts) - 1):
        start, end = starts[item], starts[item + 1]
        if end - start == 1:
            continue
        before = user[start:end].copy()
        order = np.argsort(before)
        for k in range(1, end - start):
            if before[order[k - 1]] == before[order[k]] and not _swap(
                user, starts, item, start + order[k], first_row, seed
            ):
                repeated += 1
    return repeated


@_jit
def _swap(user: Any, starts: Any, item: int, row: int, first_row: int, seed: Any) -> bool:
    rows = starts[-1]
    for turn in range(SWAP_TRIES):
        other = np.int64(_hash(seed, _SWAP, (first_row + row) * SWAP_TRIES + turn) % U(rows))
        its = _class_of(other, starts)
        if its == item or _has(user, starts[its], starts[its + 1], user[row]):
            continue
        if _has(user, starts[item], starts[item + 1], user[other]):
            continue
        user[row], user[other] = user[other], user[row]
        return True
    return False


@_jit
def _has(user: Any, start: int, end: int, wanted: int) -> bool:
    found = False
    for k in range(start, end):
        found |= user[k] == wanted
    return found


@_jit
def _normal(seed: Any, purpose: int, number: int) -> float:
    """Nearly normal, mean 0, standard deviation 1: the sum of four uniform numbers of 16 bits."""
    h = _hash(seed, purpose, number)
    low = U(0xFFFF)
    total = (h & low) + ((h >> U(16)) & low) + ((h >> U(32)) & low) + (h >> U(48))
    return (np.float64(total) / 65536.0 - 2.0 + 2.0 / 65536.0) * 1.7320508075688772


@_jit
def _uniform(seed: Any, purpose: int, number: int) -> float:
    """Between 0 and 1, neither included."""
    return (np.float64(_hash(seed, purpose, number) >> U(11)) + 0.5) / 9007199254740992.0


@_jit
def _scores(user: Any, item: Any, first_row: int, sizes: Any, rank: int, seed: Any) -> Any:
    user_sd, item_sd, product_sd = sizes
    score, noisy = np.empty(len(user)), np.empty(len(user))
    factors = np.zeros(rank + 1)
    current = -1
    for k in range(len(user)):
        if item[k] != current:
            current = item[k]
            for f in range(rank + 1):
                factors[f] = _normal(seed, _ITEM, current * (rank + 1) + f)
        base = user[k] * (rank + 1)
        total = user_sd * _normal(seed, _USER, base) + item_sd * factors[0]
        for f in range(1, rank + 1):
            total += product_sd * _normal(seed, _USER, base + f) * factors[f]
        u = _uniform(seed, _NOISE, first_row + k)
        score[k] = total
        noisy[k] = total + np.log(u / (1.0 - u))
    return score, noisy


@_jit
def _ratings(score: Any, noisy: Any, thresholds: Any) -> Any:
    stars = np.empty(len(score), np.int8)
    squared = absolute = 0.0
    above = np.empty(len(thresholds))
    for k in range(len(score)):
        star = 1
        mean, square, median = 1.0, 1.0, 1
        for t in range(len(thresholds)):
            if noisy[k] > thresholds[t]:
                star = t + 2
            above[t] = 1.0 / (1.0 + np.exp(thresholds[t] - score[k]))
            mean += above[t]
            square += above[t] * (2 * t + 3)
            if above[t] > 0.5:
                median = t + 2
        stars[k] = star
        squared += square - mean * mean
        for t in range(len(thresholds)):  # E|r - m| = sum over the gaps between m and r
            absolute += 1.0 - above[t] if t + 2 <= median else above[t]
    return stars, squared, absolute


@_jit
def _days(first_row: int, count: int, num_rows: int, first_day: int, last_day: int, seed: Any) -> Any:
    day = np.empty(count, np.int64)
    for k in range(count):
        share = np.sqrt(np.sqrt(np.sqrt(_uniform(seed, _DAY, first_row + k))))
        day[k] = first_day + np.int64(share * (last_day - first_day + 1))
    if first_row == 0:
        day[0] = first_day
    if first_row + count == num_rows:
        day[-1] = last_day
    return day


@_jit
def _write36(out: Any, row: int, column: int, width: int, value: Any) -> None:
    for k in range(width):
        digit = value % U(36)
        value = value // U(36)
        out[row, column + width - 1 - k] = digit + U(48) if digit < U(10) else digit + U(55)


@_jit
def _user_ids(user: Any, seed: Any) -> Any:
    out = np.empty((len(user), 14), np.uint8)
    for k in range(len(user)):
        h = _hash(seed, _USER_ID, user[k])
        out[k, 0] = 65
        out[k, 1] = U(49) + h // U(36**12)
        _write36(out, k, 2, 12, h % U(36**12))
    return out


@_jit
def _item_ids(item: Any, num_items: int, seed: Any) -> Any:
    out = np.empty((len(item), 10), np.uint8)
    books = num_items // 100
    book_gap = U((10**10 - 10**8) // max(books, 1))
    gap = U(21 * 36**6 // (num_items - books))
    for k in range(len(item)):
        if k > 0 and item[k] == item[k - 1]:
            out[k] = out[k - 1]
            continue
        jitter = _hash(seed, _ITEM_ID, item[k])
        if item[k] < books:
            value = U(10**8) + U(item[k]) * book_gap + jitter % book_gap
            for c in range(10):
                out[k, 9 - c] = U(48) + value % U(10)
                value = value // U(10)
        else:
            value = U(item[k] - books) * gap + jitter % gap
            out[k, 0], out[k, 1], out[k, 2] = 66, 48, 48
            _write36(out, k, 3, 7, value)
    return out


@_jit
def csv_lines(users: Any, items: Any, stars: Any, seconds: Any) -> Any:
    """Lines ``user,item,5.0,1365811200`` as bytes: users (rows, 14), items (rows, 10), stars int8, seconds int64."""
    out = np.empty(len(stars) * 48, np.uint8)
    at = 0
    for k in range(len(stars)):
        for c in range(14):
            out[at + c] = users[k, c]
        out[at + 14] = 44
        for c in range(10):
            out[at + 15 + c] = items[k, c]
        out[at + 25], out[at + 26], out[at + 27] = 44, 48 + stars[k], 46
        out[at + 28], out[at + 29] = 48, 44
        at += 30
        width, scale = 1, 10
        while seconds[k] >= scale:
            width += 1
            scale *= 10
        value = seconds[k]
        for c in range(width):
            out[at + width - 1 - c] = 48 + value % 10
            value //= 10
        out[at + width] = 10
        at += width + 1
    return out[:at]
