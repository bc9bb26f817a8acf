"""Delimited text to fields: a compiled scanner that knows where every record begins, ends and goes wrong.

A record is a line, or several where a quoted field holds line ends. Blanks and tabs around a field are no part of it,
nor is a byte-order mark at the beginning of a record, as joined files have them. A field that begins with a double
quote ends at a quote followed by the separator or the line end; a doubled quote inside stands for one. A quote that is
never closed so (within ``MAX_RECORD`` bytes) spoils its own line alone: that line is one bad record, the next line
begins afresh. So what a record is does not depend on how the file is cut into chunks.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from mfdist.prepare.dates import iso_seconds

MAX_RECORD = 1 << 20
"""Bytes that a quoted record may be long."""

OK, FIELDS, QUOTE, RATING, TIME, USER, ITEM, UTF8 = range(8)
"""What is wrong with a record; RATING and TIME only say that the plain number parser does not know the text."""

_NL, _CR, _QUOTE, _SPACE, _TAB = 10, 13, 34, 32, 9


@numba.njit(nogil=True, cache=True, inline="always")
def _is_blank(c: Any, sep0: Any) -> Any:
    return (c == _SPACE or c == _TAB) and c != sep0  # noqa: PLR1714, SIM109 (compiled)


@numba.njit(nogil=True, cache=True, inline="always")
def _after_marks(content: Any, at: Any, size: Any) -> Any:
    """The place behind byte-order marks."""
    while at + 2 < size and content[at] == 0xEF and content[at + 1] == 0xBB and content[at + 2] == 0xBF:
        at += 3
    return at


@numba.njit(nogil=True, cache=True)
def _quoted_end(content: Any, at: Any, size: Any, sep0: Any, sep1: Any) -> Any:  # noqa: PLR0911
    """The closing quote of the field whose first quote stands before ``at``; -1 malformed, -2 cut off."""
    p = at
    while p < size:
        if p - at > MAX_RECORD:
            return -1
        if content[p] != _QUOTE:
            p += 1
            continue
        if p + 1 < size and content[p + 1] == _QUOTE:
            p += 2
            continue
        after = p + 1
        while after < size and _is_blank(content[after], sep0):
            after += 1
        if after >= size:
            return -2
        c = content[after]
        if c == _NL or (c == sep0 and sep1 == 0):
            return p
        if c != _CR and c != sep0:  # noqa: PLR1714 (compiled)
            return -1
        if after + 1 >= size:
            return -2
        return p if content[after + 1] == (_NL if c == _CR else sep1) else -1
    return -2


@numba.njit(nogil=True, cache=True)
def record_end(content: Any, start: Any, size: Any, sep0: Any, sep1: Any, quotes: Any, final: Any) -> Any:
    """Place after the line end of the record at ``start``, -1 where the record is cut off at ``size``.

    A malformed quote makes the record its first line; so does one still open at ``size`` where that is the end
    of the file (``final``).
    """
    p, field_start, bad = _after_marks(content, start, size), True, False
    while p < size and _is_blank(content[p], sep0):
        p += 1
    while p < size:
        c = content[p]
        if c == _NL:
            return p + 1
        if quotes and field_start and c == _QUOTE and not bad:
            q = _quoted_end(content, p + 1, size, sep0, sep1)
            if q == -2 and not final:
                return -1
            if q < 0:
                bad = True
                p = start
                field_start = False
                continue
            p = q + 1
            field_start = False
            continue
        if c == sep0 and (sep1 == 0 or (p + 1 < size and content[p + 1] == sep1)):
            p += 1 if sep1 == 0 else 2
            while p < size and _is_blank(content[p], sep0):
                p += 1
            field_start = True
            continue
        field_start = False
        p += 1
    return -1


@numba.njit(nogil=True, cache=True)
def last_record_end(content: Any, size: Any, sep0: Any, sep1: Any, quotes: Any, final: Any) -> Any:
    """Place after the last whole record of a chunk that begins at a record (0: none is whole)."""
    at = 0
    while at < size:
        end = record_end(content, at, size, sep0, sep1, quotes, final)
        if end < 0:
            break
        at = end
    return at


@numba.njit(nogil=True, cache=True, inline="always")
def _plain_number(content: Any, start: Any, end: Any) -> Any:
    """(value, True) of digits with an optional sign and point, at most 15 digits; else (0, False)."""
    p, negative, digits, scale, point, mantissa = start, False, 0, 1.0, False, np.int64(0)
    while p < end and content[p] == 32:
        p += 1
    while end > p and content[end - 1] == 32:
        end -= 1
    if p < end and (content[p] == 45 or content[p] == 43):
        negative = content[p] == 45
        p += 1
    while p < end:
        c = content[p]
        if 48 <= c <= 57:
            mantissa = mantissa * 10 + np.int64(c - 48)
            digits += 1
            if point:
                scale *= 10.0
        elif c == 46 and not point:
            point = True
        else:
            return 0.0, False
        p += 1
    if digits == 0 or digits > 15:
        return 0.0, False
    value = mantissa / scale
    return (-value if negative else value), True


@numba.njit(nogil=True, cache=True, inline="always")
def _plain_int(content: Any, start: Any, end: Any) -> Any:
    p, negative, value = start, False, np.int64(0)
    if p < end and content[p] == 45:
        negative = True
        p += 1
    if end - p < 1 or end - p > 18:
        return np.int64(0), False
    while p < end:
        c = content[p]
        if c < 48 or c > 57:
            return np.int64(0), False
        value = value * 10 + np.int64(c - 48)
        p += 1
    return (-value if negative else value), True


@numba.njit(nogil=True, cache=True)
def _exact_number(content: Any, start: Any, end: Any, point: Any) -> Any:  # noqa: PLR0912
    """(value, True) of a decimal number, maybe with an exponent, that a float64 holds exactly rounded; (0, False) else.

    At most 15 digits without closing zeros of the fraction, times or over a power of ten up to 22: then one rounding
    is the right one (Clinger).
    """
    p, negative, digits, places, zeros, fraction, any_digit = start, False, 0, 0, 0, False, False
    mantissa, exponent = np.int64(0), 0
    while p < end and content[p] == 32:
        p += 1
    while end > p and content[end - 1] == 32:
        end -= 1
    if p < end and content[p] in (45, 43):
        negative = content[p] == 45
        p += 1
    while p < end and (48 <= content[p] <= 57 or (content[p] == point and not fraction)):
        c = content[p]
        p += 1
        if c == point:
            fraction = True
            continue
        any_digit = True
        if fraction and c == 48:
            zeros += 1
            continue
        for _ in range(zeros):
            mantissa *= 10
        places += zeros + 1 if fraction else 0
        digits += zeros + 1 if mantissa or c != 48 else 0
        zeros = 0
        if digits > 15:
            return 0.0, False
        mantissa = mantissa * 10 + np.int64(c - 48)
    if p < end and content[p] in (69, 101):
        p += 1
        below = p < end and content[p] == 45
        p += 1 if p < end and content[p] in (45, 43) else 0
        if p == end or end - p > 3:
            return 0.0, False
        while p < end and 48 <= content[p] <= 57:
            exponent = exponent * 10 + content[p] - 48
            p += 1
        exponent = -exponent if below else exponent
    shift = exponent - places
    if p < end or not any_digit or shift < -22 or shift > 22:
        return 0.0, False
    power = 1.0
    for _ in range(abs(shift)):
        power *= 10.0
    value = mantissa * power if shift > 0 else mantissa / power
    return (-value if negative else value), True


@numba.njit(nogil=True, cache=True)
def reread(content: Any, start: Any, length: Any, rating: Any, time: Any, dated: Any, status: Any, point: Any,
           with_time: Any) -> None:  # fmt: skip
    """Read ratings and times that the scanner's own parsers do not know: exponents, ``point``, ISO 8601.

    Records of status RATING or TIME become OK where both can be read; ``dated`` says which times were dates.
    """
    for i in range(status.size):
        if status[i] not in (RATING, TIME):
            continue
        value, exact = rating[i], True
        if status[i] == RATING:
            value, exact = _exact_number(content, start[2, i], start[2, i] + length[2, i], point)
        when, valid = np.int64(0), not with_time
        if with_time:
            when, valid = _plain_int(content, start[3, i], start[3, i] + length[3, i])
            if not valid:
                when, valid = iso_seconds(content, start[3, i], length[3, i])
                dated[i] = valid
        if exact and valid:
            rating[i], time[i], status[i] = value, when, OK


@numba.njit(nogil=True, cache=True)
def valid_utf8(content: Any, start: Any, length: Any) -> Any:
    """Whether a span is well-formed UTF-8 (no surrogates, no overlong forms)."""
    p, end = start, start + length
    while p < end:
        c = content[p]
        if c < 0x80:
            p += 1
            continue
        if c < 0xC2 or c > 0xF4:
            return False
        more = 1 if c < 0xE0 else (2 if c < 0xF0 else 3)
        if p + more >= end:
            return False
        low, high = 0x80, 0xBF
        if c == 0xE0:
            low = 0xA0
        elif c == 0xED:
            high = 0x9F
        elif c == 0xF0:
            low = 0x90
        elif c == 0xF4:
            high = 0x8F
        if content[p + 1] < low or content[p + 1] > high:
            return False
        for k in range(2, more + 1):
            if content[p + k] < 0x80 or content[p + k] > 0xBF:
                return False
        p += more + 1
    return True


@numba.njit(nogil=True, cache=True)
def _blank(content: Any, start: Any, length: Any) -> Any:
    for k in range(length):
        c = content[start + k]
        if c != 32 and c != 9:  # noqa: PLR1714 (compiled)
            return False
    return True


@numba.njit(nogil=True, cache=True)
def check_ids(content: Any, start: Any, length: Any, status: Any, empty: Any) -> None:
    """Set ``status`` where an id is empty or blank (to ``empty``) or no valid UTF-8."""
    for i in range(start.size):
        if status[i] != OK:
            continue
        high = False
        for k in range(length[i]):
            high |= content[start[i] + k] >= 0x80
        if high and not valid_utf8(content, start[i], length[i]):
            status[i] = UTF8
        elif _blank(content, start[i], length[i]):
            status[i] = empty


@numba.njit(nogil=True, cache=True)
def _unescape(content: Any, start: Any, length: Any, out: Any, at: Any) -> Any:
    """Copy a span with doubled quotes made single to ``out[at:]``; the new length."""
    p, end, n = start, start + length, 0
    while p < end:
        out[at + n] = content[p]
        n += 1
        p += 2 if content[p] == _QUOTE else 1
    return n


@numba.njit(nogil=True, cache=True)
def scan_delimited(content: Any, size: Any, sep0: Any, sep1: Any, quotes: Any, num_fields: Any, columns: Any,  # noqa: PLR0912, PLR0915
                   begin: Any, end: Any, line: Any, start: Any, length: Any, rating: Any, time: Any, status: Any,
                   extra: Any) -> Any:  # fmt: skip
    """Scan the whole records in ``content[:size]``; every record must end with a line end.

    ``columns`` (int64, (4,)): field numbers of user, item, rating, timestamp (-1: none). Outputs per record:
    ``begin``, ``end`` (without the line end), ``line`` (0 the chunk's first), ``start`` and ``length`` (int64, (4, n))
    of the four fields, ``rating`` (float64), ``time`` (int64), ``status``. Ids with doubled quotes are rewritten to
    ``extra`` (as long as content), their start counted from ``size``. Returns (records, lines, bytes in extra).
    """
    at, n, lines, used = 0, 0, 0, 0
    while at < size:
        stop = record_end(content, at, size, sep0, sep1, quotes, True)
        last = stop - 1
        if last > at and content[last - 1] == _CR:
            last -= 1
        p = _after_marks(content, at, last)
        if last == p:
            at = stop
            lines += 1
            continue
        begin[n], end[n], line[n], status[n] = at, last, lines, OK
        field, more = 0, True
        while more:
            escaped = False
            while p < last and _is_blank(content[p], sep0):
                p += 1
            if quotes and p < last and content[p] == _QUOTE:
                q = _quoted_end(content, p + 1, stop, sep0, sep1)
                if q < 0:
                    status[n] = QUOTE
                    break
                s, e = p + 1, q
                p = q + 1
                for k in range(s, e):
                    escaped |= content[k] == _QUOTE
                    lines += content[k] == _NL
                while p < last and _is_blank(content[p], sep0):
                    p += 1
            else:
                s = p
                while p < last and not (content[p] == sep0 and (sep1 == 0 or content[p + 1] == sep1)):
                    p += 1
                e = p
                while e > s and _is_blank(content[e - 1], sep0):
                    e -= 1
            for c in range(4):
                if columns[c] == field:
                    start[c, n], length[c, n] = s, e - s
                    if escaped:
                        length[c, n] = _unescape(content, s, e - s, extra, used)
                        start[c, n] = size + used
                        used += length[c, n]
            field += 1
            more = p < last
            p += 1 if sep1 == 0 else 2
        if status[n] == OK:
            if field != num_fields:
                status[n] = FIELDS
            else:
                value, plain = _plain_number(content, start[2, n], start[2, n] + length[2, n]) \
                    if start[2, n] < size else (0.0, False)  # fmt: skip
                rating[n] = value
                if not plain:
                    status[n] = RATING
                if columns[3] >= 0:
                    when, whole = _plain_int(content, start[3, n], start[3, n] + length[3, n]) \
                        if start[3, n] < size else (np.int64(0), False)  # fmt: skip
                    time[n] = when
                    if not whole and status[n] == OK:
                        status[n] = TIME
        n += 1
        lines += 1
        at = stop
    return n, lines, used
