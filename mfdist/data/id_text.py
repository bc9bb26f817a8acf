"""What text an id is. 7 in JSON or Parquet and "7" in CSV are one id, "007" is another; a whole float (12.0, as pandas
makes of integers beside a missing one) is "12", other floats are their shortest decimal text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from mfdist.errors import UsageError


def float_id(value: float) -> str:
    """The text of a finite float."""
    return str(int(value)) if value == int(value) else repr(value)


def id_text(value: Any) -> str:
    """The text of one id; UsageError for what can be none."""
    if isinstance(value, str):
        return value
    if isinstance(value, (float, np.floating)) and math.isfinite(value):
        return float_id(float(value))
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
