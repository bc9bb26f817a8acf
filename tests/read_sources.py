"""What the readers make of files, for tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mfdist.prepare import readers
from mfdist.prepare.columns import recognise
from mfdist.prepare.input_files import find_sources
from mfdist.prepare.row_checks import Block, Rules
from mfdist.prepare.times import TimeUnit, in_seconds, unit_of

Row = tuple[Any, ...]


@dataclass
class Read:
    """What the readers make of a file: rows and refused rows (line, reason, text), in order."""

    rows: list[Row]
    refused: list[tuple[int, str, str]]
    num_in: int
    units: list[TimeUnit | None] = field(default_factory=list)


def read(*paths: Path, columns: tuple[str, ...] | None = None, units: Sequence[TimeUnit | None] = ()) -> Read:
    """Every row of the files as the read pass takes it; DataError and UsageError as it raises them.

    ``units``: of the times of each file, where its first block may be too small to show it.
    """
    found = Read([], [], 0)
    for source in find_sources(tuple(map(str, paths))):
        layout = recognise(source, columns)
        rules = Rules(0, None, layout.has_time)
        unit = units[len(found.units)] if units else None
        line = 1
        for piece in readers.chunks(source, layout):
            if isinstance(piece, str):
                continue
            block = readers.parse(piece, layout, rules)
            unit = unit or unit_of(block)
            if unit:
                block = in_seconds(block, unit)
            found.rows += rows_of(block)
            found.refused += [(line + at, reason, text) for at, reason, text in block.rejects]
            found.num_in += block.num_in
            assert block.num_in == block.rating.size + len(block.rejects)
            line += block.lines
        found.units.append(unit)
    return found


def rows_of(block: Block) -> list[Row]:
    content = block.content.tobytes()
    sides = [[content[a : a + n].decode() for a, n in zip(start.tolist(), length.tolist(), strict=True)]
             for start, length in zip(block.start, block.length, strict=True)]  # fmt: skip
    times = [] if block.time is None else [block.time.tolist()]
    return list(zip(*sides, block.rating.tolist(), *times, strict=True))


def ratings(rng: random.Random, n: int = 30) -> list[Row]:
    return [(f"u{rng.randrange(9)}", f"ï{rng.randrange(99)}", rng.randrange(2, 11) / 2, 10**9 + rng.randrange(10**8))
            for _ in range(n)]  # fmt: skip


KEYS = ("user_id", "item_id", "rating", "timestamp")
