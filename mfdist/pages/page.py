"""Templates to pages: what is given is escaped, and a name that a template misses is an error."""

from __future__ import annotations

import functools
import time
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """The page that ``templates/NAME`` makes of ``values``: one self-contained HTML text."""
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mfdist.pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    filters: dict[str, Any] = {"figure": figure, "seconds": seconds, "mib": mib, "percent": percent, "day": day}
    environment.filters.update(filters)
    return environment


def figure(value: Any) -> str:
    """A cell of a table: whole numbers with commas, others to four decimals, '-' for None."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4f}"


def seconds(value: float | None) -> str:
    """A time as people say it: 0.4 s, 12 s, 3 min 20 s, 2 h 05 min."""
    if value is None:
        return "-"
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def mib(value: int | None) -> str:
    """Bytes as MiB or GiB."""
    if not value:
        return "-"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def percent(value: float | None) -> str:
    """A share as 12.3%; one that would seem to be none with a digit more."""
    if value is None:
        return "-"
    return f"{value:.2%}" if 0 < value < 0.001 else f"{value:.1%}"


def day(moment: float) -> str:
    """Seconds since 1970 as a date and time, UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment))
