"""Matrix Market files: a banner, comments, the matrix's size, and an entry a line: row (the user), column, value.

Only ``coordinate`` matrices of ``real`` or ``integer`` values with ``general`` symmetry are ratings. Rows and columns
count from 1, and their numbers are the ids.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from mfdist.errors import DataError
from mfdist.prepare.row_checks import Block

BANNER = "%%MatrixMarket"
OUTSIDE = "row or column is outside the matrix"


@dataclass(frozen=True)
class Matrix:
    """Size of a matrix, number of its entries, and the line (0: the first) that says so."""

    rows: int
    columns: int
    entries: int
    line: int


def matrix_of(head: str, shown: str) -> Matrix:
    """What the beginning of a file says; DataError where it is no matrix of ratings."""
    lines = head.splitlines()
    words = lines[0].lower().split()[1:]
    kind = " ".join(words)
    if len(words) != 4 or words[0] != "matrix":
        raise DataError(f"{shown}: its first line is no whole Matrix Market banner: {lines[0][:100]!r}.")
    if words[1] != "coordinate":
        raise DataError(f"{shown} is a dense Matrix Market file ({kind}), in which every pair has a rating; write a "
                        "coordinate matrix of the ratings that were given.")  # fmt: skip
    if words[2] not in ("real", "integer"):
        raise DataError(f"{shown} holds {words[2]} entries ({kind}), which are no ratings; real or integer ones are "
                        "read.")  # fmt: skip
    if words[3] != "general":
        raise DataError(f"{shown} is {words[3]} ({kind}): it holds half of its entries, and rows and columns are the "
                        "same things. Write it as a general matrix.")  # fmt: skip
    line, text = next(((k, line) for k, line in enumerate(lines) if line.strip() and not line.startswith("%")), (0, ""))
    if not re.fullmatch(r"\s*\d{1,18}\s+\d{1,18}\s+\d{1,18}\s*", text):
        raise DataError(f"{shown} line {line + 1}: expected rows, columns and entries of the matrix, found "
                        f"{text[:100]!r}.")  # fmt: skip
    rows, num_columns, entries = map(int, text.split())
    return Matrix(rows, num_columns, entries, line)


def inside(block: Block, matrix: Matrix) -> Block:
    """The block without rows whose place is not in the matrix; they are refused."""
    good = np.ones(block.rating.size, np.bool_)
    for side, most in enumerate((matrix.rows, matrix.columns)):
        _check_places(block.content, block.start[side], block.length[side], most, good)
    return block if good.all() else block.refuse(~good, OUTSIDE)


@numba.njit(nogil=True, cache=True)
def _check_places(content: Any, start: Any, length: Any, most: Any, good: Any) -> None:
    """``good`` becomes False where an id is no whole number, written plainly, from 1 to ``most``."""
    for i in range(start.size):
        value = np.int64(0)
        if length[i] > 18 or content[start[i]] == 48:
            good[i] = False
        for k in range(min(length[i], 18)):
            c = content[start[i] + k]
            if c < 48 or c > 57:
                good[i] = False
                break
            value = value * 10 + np.int64(c - 48)
        if value < 1 or value > most:
            good[i] = False
