"""What text an id is, the same in every format, job and call.

7 in JSON or Parquet and "7" in CSV are one id, "007" is another. A whole number written as a float is the whole number:
12.0, as pandas makes of integers beside a missing one, and its text "12.0" are the id "12". Other floats are their
shortest decimal text. Blanks around a field of delimited text are no part of it; a quoted field, a JSON string and a
value in Parquet or Python keep theirs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from mfdist.errors import UsageError

ID_RULE = 2
"""Which rule a dataset's ids follow; 1, before, took "12.0" and blanks of text files as they stand."""
OLD_IDS = r"^-?(0|[1-9][0-9]*)\.0+$|^[ \t]|[ \t]$"
"""A regular expression of ids that rule 1 could give and rule 2 might not."""
_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0+")


def plain_id(text: str) -> str:
    """The id that a text is: "12" for "12.0"; ``prepare.ids.plain_ids`` does it for columns."""
    whole = _WHOLE.fullmatch(text)
    return text if whole is None else "0" if whole[1] == "-0" else whole[1]


def float_text(value: float) -> str:
    """A finite float as decimal text, "12.0" where it is whole."""
    return f"{int(value)}.0" if value == int(value) else repr(value)


def id_text(value: Any) -> str:
    """The text of one id; UsageError for what can be none."""
    if isinstance(value, str):
        return plain_id(value)
    if isinstance(value, (float, np.floating)) and math.isfinite(value):
        return plain_id(float_text(float(value)))
    if isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_)):
        return str(int(value))
    raise UsageError(f"{value!r} cannot be an id: ids are texts or whole numbers.")


def id_texts(ids: Iterable[Any]) -> list[str]:
    """The texts of a list, an array, or a column of ids; UsageError where it is none of these."""
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise UsageError(f"expected a list of ids, got {ids!r} alone; give [{ids!r}].")
    if isinstance(ids, (pa.Array, pa.ChunkedArray)):
        ids = ids.to_pylist()
    return [id_text(name) for name in ids]
