"""Text as the scanner of delimited text wants it: comments emptied, and runs of blanks made one separator.

Line for line: what stood in line 7 stands in line 7 afterwards, so that a refused row keeps its number and its text.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

_NL, _CR, _TAB, _BLANK = 10, 13, 9, 32


def plain_lines(content: bytes, comment: str, blanks: bool) -> npt.NDArray[np.uint8]:
    """Whole lines without those that begin with ``comment`` ('': none do); ``blanks``: one tab for each run of them."""
    view = np.frombuffer(content, np.uint8)
    out = np.empty(view.size, np.uint8)
    size = _plain_lines(view, out, ord(comment) if comment else -1, blanks)
    return out[:size]


@numba.njit(nogil=True, cache=True)
def _plain_lines(content: Any, out: Any, comment: Any, blanks: Any) -> Any:
    size, p = 0, 0
    while p < content.size:
        begin = p
        while p < content.size and content[p] != _NL:
            p += 1
        first, last = begin, p
        while first < last and content[first] in (_BLANK, _TAB):
            first += 1
        if first < last and content[first] == comment:
            last = first
        elif blanks:
            while last > first and content[last - 1] in (_BLANK, _TAB, _CR):
                last -= 1
            for q in range(first, last):
                if content[q] not in (_BLANK, _TAB):
                    out[size] = content[q]
                    size += 1
                elif content[q + 1] not in (_BLANK, _TAB):
                    out[size] = _TAB
                    size += 1
        else:
            for q in range(begin, last):
                out[size] = content[q]
                size += 1
        if p < content.size:
            out[size] = _NL
            size += 1
        p += 1
    return size
