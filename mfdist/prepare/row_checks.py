"""Blocks of checked rows, which every format becomes, and what ids, ratings and times may be.

An id is its text (``data.id_text``). A time that is a number stays as given, its fraction cut off, until the read pass
knows the unit of its file (``times``); dates and times as text or of Parquet are seconds since 1970.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mfdist.prepare import delimited_text
from mfdist.prepare.dates import text_seconds
from mfdist.prepare.ids import U64

MAX_RAW_TEXT = 10_000
REASONS = {
    delimited_text.FIELDS: "wrong number of fields",
    delimited_text.QUOTE: "quote that is not closed",
    delimited_text.USER: "empty user id",
    delimited_text.ITEM: "empty item id",
    delimited_text.UTF8: "not valid UTF-8",
}
NOT_A_NUMBER, NOT_FINITE, BAD_TIME = "rating is not a number", "rating is not finite", "timestamp is not a number"
OUT_OF_SCALE, NOT_JSON, MISSING = "rating is outside the scale", "not valid JSON", "missing field"
NOT_LITERAL = "not a Python literal"
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
_NOT_FINITE = re.compile(r"(?i)\s*[+-]?(nan|inf|infinity)\s*")


@dataclass(frozen=True)
class Rules:
    """How ids are hashed and ratings judged; ``scale`` None: any finite rating; ``time_unit``: ticks per second."""

    salt: int
    scale: tuple[float, float] | None
    with_time: bool
    time_unit: int = 1


@dataclass
class Block:
    """Checked rows: (2, n) spans of user and item ids in ``content``, their hashes, ratings, times; and the refused.

    ``dated``: which times came as dates and are seconds already. ``rejects`` holds (line or row, counted from the
    block's first as 0; reason; raw text), and ``where`` gives line and raw text of a row that was not refused.
    ``float_ids``: how many of the users' and of the items' were whole numbers written as floats.
    ``lines`` is what the next block's lines begin after.
    """

    content: npt.NDArray[np.uint8]
    start: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    rating: npt.NDArray[np.float32]
    time: npt.NDArray[np.int64] | None
    dated: npt.NDArray[np.bool_] | None
    lines: int
    num_in: int
    rejects: list[tuple[int, str, str]]
    where: Callable[[int], tuple[int, str]]
    packed_bytes: int = 0
    hashes: list[tuple[U64, U64]] = field(default_factory=list)
    float_ids: list[int] = field(default_factory=list)

    def refuse(self, bad: npt.NDArray[np.bool_], reason: str) -> Block:
        """The block without these rows, which are among its rejects."""
        rejects = [(line, reason, raw) for line, raw in (self.where(int(i)) for i in np.flatnonzero(bad))]
        kept = np.flatnonzero(~bad)
        return replace(
            self, start=self.start[:, kept], length=self.length[:, kept], rating=self.rating[kept],
            time=None if self.time is None else self.time[kept],
            dated=None if self.dated is None else self.dated[kept],
            rejects=sorted(self.rejects + rejects, key=lambda reject: reject[0]),
            where=lambda i: self.where(int(kept[i])), hashes=[(a[kept], b[kept]) for a, b in self.hashes],
        )  # fmt: skip


def parse_number(text: str) -> float | str:
    """A finite decimal number, or the reason why it is none."""
    if not _NUMBER.fullmatch(text):
        return NOT_FINITE if _NOT_FINITE.fullmatch(text) else NOT_A_NUMBER
    return float(text)


def parse_time(text: str) -> tuple[int, bool] | None:
    """(time, False) of a whole number of 64 bits, fractions cut off; (seconds, True) of a date; None of neither."""
    if not _NUMBER.fullmatch(text):
        seconds = text_seconds(text)
        return None if seconds is None else (seconds, True)
    try:
        value = int(text) if re.fullmatch(r"\s*[+-]?\d+\s*", text, re.ASCII) else int(float(text))
    except (OverflowError, ValueError):
        return None
    return (value, False) if -(2**63) <= value < 2**63 else None


def judge(rating: npt.NDArray[np.float64], good: npt.NDArray[np.bool_], rules: Rules, where: Any,
           rejects: list[tuple[int, str, str]]) -> npt.NDArray[np.bool_]:  # fmt: skip
    """Which ratings are finite as float32 and inside the scale; the others are added to ``rejects``."""
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(rating.astype(np.float32))
        inside = (rating >= rules.scale[0]) & (rating <= rules.scale[1]) if rules.scale else finite
    for i in np.flatnonzero(good & ~(finite & inside)):
        line, raw = where(int(i))
        rejects.append((line, OUT_OF_SCALE if finite[i] else NOT_FINITE, raw))
    rejects.sort(key=lambda reject: reject[0])
    return finite & inside
