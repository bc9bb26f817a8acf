"""Ids as numbers: a stable 64-bit hash of an id's bytes, and the filter that keeps one copy of each id.

An id is a byte string (UTF-8). Its hash orders users and items, decides splits and lanes, and must never change;
a change here raises ``HASH_VERSION``. Murmur3's mixing (Appleby) over little-endian 8-byte words, twice with other
constants: the first 64 bits are the hash, the second 64 tell two ids with the same hash apart.

    >>> hash_one("A2CX7LUOHB2NDG") == hash_one("A2CX7LUOHB2NDG")
    True

Two ids with one hash are expected once in 2^64 / n^2 / 2 data sets of n ids (n = 4 million: one in two million).
They are found, never merged: the job begins again with the next salt.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

HASH_VERSION = 1
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

U = np.uint64
_C1, _C2 = U(0x87C37B91114253D5), U(0x4CF5AD432745937F)
_M1, _M2 = U(0xFF51AFD7ED558CCD), U(0xC4CEB9FE1A85EC53)
_S33, _S8, _EIGHT, _FIVE = U(33), U(8), U(8), U(5)
_P1, _P2 = U(0x52DCE729), U(0x38495AB5)


class HashCollision(Exception):
    """Two different ids have one hash under this salt."""


@numba.njit(nogil=True, cache=True, inline="always")
def mix(x: Any) -> Any:
    """Murmur3's 64-bit finaliser: a bijection that spreads every bit over all."""
    x ^= x >> _S33
    x *= _M1
    x ^= x >> _S33
    x *= _M2
    return x ^ (x >> _S33)


@numba.njit(nogil=True, cache=True, inline="always")
def _rotated(x: Any, bits: Any) -> Any:
    return (x << bits) | (x >> (U(64) - bits))


@numba.njit(nogil=True, cache=True, inline="always")
def _word(content: Any, at: Any) -> Any:
    w = U(content[at])
    for j in range(1, 8):
        w |= U(content[at + j]) << (_EIGHT * U(j))
    return w


@numba.njit(nogil=True, cache=True)
def hash_ids(content: Any, start: Any, length: Any, salt: Any, first: Any, second: Any) -> None:
    """``first``, ``second`` (uint64, (n,)) of the ids ``content[start[i] : start[i] + length[i]]``."""
    for i in range(start.size):
        at, left = start[i], length[i]
        a = mix(salt + U(left))
        b = ~a
        while left > 0:
            if left >= 8:
                w = _word(content, at)
            else:
                w = U(0)
                for j in range(left):
                    w |= U(content[at + j]) << (_EIGHT * U(j))
            a = _rotated(a ^ (_rotated(w * _C1, U(31)) * _C2), U(27)) * _FIVE + _P1
            b = _rotated(b ^ (_rotated(w * _C2, U(33)) * _C1), U(31)) * _FIVE + _P2
            at += 8
            left -= 8
        first[i] = mix(a)
        second[i] = mix(b)


def text_spans(texts: pa.Array) -> tuple[Bytes, I64, I64]:
    """(bytes, start, length) of an Arrow array of texts or bytes, (large_)utf8 or (large_)binary; nothing is copied but
    32-bit offsets. What a null holds is the array's own matter.

        >>> content, start, length = text_spans(pa.array(["one", "two", "three"])[1:])
        >>> content.tobytes(), start.tolist(), length.tolist()
        (b'twothree', [0, 3], [3, 5])
    """
    _, offsets, content = texts.buffers()
    if len(texts) == 0:
        return np.zeros(0, np.uint8), np.zeros(0, np.int64), np.zeros(0, np.int64)
    wide = pa.types.is_large_string(texts.type) or pa.types.is_large_binary(texts.type)
    edges = np.frombuffer(offsets, np.int64 if wide else np.int32)[texts.offset : texts.offset + len(texts) + 1]
    edges = edges.astype(np.int64, copy=False)
    whole = np.frombuffer(content, np.uint8) if content is not None and content.size else np.zeros(0, np.uint8)
    return whole[edges[0] : edges[-1]], edges[:-1] - edges[0], np.diff(edges)


@numba.njit(nogil=True, cache=True)
def plain_ids(content: Any, start: Any, length: Any) -> Any:
    """Take the fraction off ids that are whole numbers written as floats: "11.0" becomes "11", "-0.0" becomes "0".

    ``start`` and ``length`` (int64, (n,)) are changed; returns how many ids were so. The rule is ``data.id_text``'s.
    """
    changed = 0
    for i in range(start.size):
        p, point = start[i], length[i] - 1
        if point < 2 or content[p + point] != 48:
            continue
        while point > 0 and content[p + point] == 48:
            point -= 1
        sign = 1 if content[p] == 45 else 0
        digits = point - sign
        if content[p + point] != 46 or digits < 1 or (digits > 1 and content[p + sign] == 48):
            continue
        whole = True
        for k in range(p + sign, p + point):
            whole &= 48 <= content[k] <= 57
        if not whole:
            continue
        minus_zero = sign == 1 and digits == 1 and content[p + 1] == 48
        start[i], length[i] = (p + 1, 1) if minus_zero else (p, point)
        changed += 1
    return changed


def hash_one(text: str, salt: int = 0) -> int:
    """The hash of one id."""
    content = np.frombuffer(text.encode(), np.uint8)
    first, second = np.empty(1, np.uint64), np.empty(1, np.uint64)
    hash_ids(content, np.zeros(1, np.int64), np.array([content.size], np.int64), U(salt), first, second)
    return int(first[0])


@numba.njit(nogil=True, cache=True)
def _admit(first: Any, second: Any, keys: Any, checks: Any, room: Any, new: Any) -> Any:
    mask = U(keys.size - 1)
    added = 0
    for i in range(first.size):
        h = first[i]
        if i > 0 and h == first[i - 1] and second[i] == second[i - 1]:
            continue
        slot = h & mask
        while True:
            key = keys[slot]
            if key == U(0):
                new[i] = True
                if added < room:
                    keys[slot] = h
                    checks[slot] = second[i]
                    added += 1
                break
            if key == h:
                if checks[slot] != second[i]:
                    return -1
                break
            slot = (slot + U(1)) & mask
    return added


@numba.njit(nogil=True, cache=True)
def _refill(old_keys: Any, old_checks: Any, keys: Any, checks: Any) -> None:
    mask = U(keys.size - 1)
    for i in range(old_keys.size):
        h = old_keys[i]
        if h != U(0):
            slot = h & mask
            while keys[slot] != U(0):
                slot = (slot + U(1)) & mask
            keys[slot] = h
            checks[slot] = old_checks[i]


class SeenIds:
    """A hash table of ids already kept, at most ``max_slots`` (a power of two) slots of 16 bytes.

    When it is full it learns no more and lets later ids through more than once; who stores them removes repeats.
    """

    def __init__(self, max_slots: int) -> None:
        self._max_slots = max_slots
        self._keys = np.zeros(min(1 << 16, max_slots), np.uint64)
        self._checks = np.zeros_like(self._keys)
        self._used = 0

    def admit(self, first: U64, second: U64) -> npt.NDArray[np.bool_]:
        """Which ids are to be kept (seen for the first time). HashCollision where two ids share a hash."""
        while 2 * (self._used + first.size) > self._keys.size < self._max_slots:
            keys = np.zeros(2 * self._keys.size, np.uint64)
            checks = np.zeros_like(keys)
            _refill(self._keys, self._checks, keys, checks)
            self._keys, self._checks = keys, checks
        new = np.zeros(first.size, np.bool_)
        room = max(self._keys.size // 4 * 3 - self._used, 0)
        added = _admit(first, second, self._keys, self._checks, room, new)
        if added < 0:
            raise HashCollision
        self._used += added
        return new


@numba.njit(nogil=True, cache=True)
def gather_bytes(content: Any, start: Any, length: Any, out: Any) -> None:
    """The given spans of ``content``, one after another, into ``out`` (uint8, (sum of length,))."""
    at = 0
    for i in range(start.size):
        s = start[i]
        for j in range(length[i]):
            out[at + j] = content[s + j]
        at += length[i]


@numba.njit(nogil=True, cache=True)
def spans_differ(content: Any, start: Any, length: Any, i: Any, j: Any) -> Any:
    """Whether span ``i`` and span ``j`` hold other bytes."""
    if length[i] != length[j]:
        return True
    for k in range(length[i]):  # noqa: SIM110 (compiled)
        if content[start[i] + k] != content[start[j] + k]:
            return True
    return False


@numba.njit(nogil=True, cache=True)
def first_of_each(order: Any, hashes: Any, content: Any, start: Any, length: Any, kept: Any) -> Any:
    """Mark in ``kept`` one of every run of equal hashes along ``order``; -1 where a run holds two different ids."""
    count = 0
    for k in range(order.size):
        i = order[k]
        if k > 0 and hashes[order[k - 1]] == hashes[i]:
            if spans_differ(content, start, length, order[k - 1], i):
                return -1
            continue
        kept[k] = True
        count += 1
    return count


@numba.njit(nogil=True, cache=True)
def row_lookup(hashes: Any, table: Any, starts: Any, shift: Any, out: Any) -> Any:
    """``out[i]`` = place of ``hashes[i]`` in the sorted ``table`` (int64; -1 where absent); returns the absent ones.

    ``starts[b]`` is the first place in ``table`` whose hash, shifted right by ``shift``, is at least b.
    """
    absent = 0
    for i in range(hashes.size):
        h = hashes[i]
        b = np.int64(h >> shift)
        place, end, found = starts[b], starts[b + 1], np.int64(-1)
        while place < end:
            if table[place] == h:
                found = place
                break
            place += 1
        out[i] = found
        if found < 0:
            absent += 1
    return absent


class RowTable:
    """Sorted hashes with fast look-up: the row of a hash is its place."""

    def __init__(self, hashes: U64) -> None:
        self.hashes = hashes
        bits = max(1, int(hashes.size).bit_length())
        self._shift = U(64 - bits)
        edges = np.arange(1, 1 << bits, dtype=np.uint64) << self._shift
        inner = np.searchsorted(hashes, edges)
        self._starts = np.concatenate([[0], inner, [hashes.size]]).astype(np.int64)

    def rows(self, hashes: U64) -> npt.NDArray[np.int64]:
        """Places of ``hashes``, -1 where absent: int64, (n,)."""
        out = np.empty(hashes.size, np.int64)
        row_lookup(hashes, self.hashes, self._starts, self._shift, out)
        return out
