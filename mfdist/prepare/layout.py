"""Where the columns of a source stand, and how its rows are written: what the readers need to know."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mfdist.prepare.matrix_market import Matrix

BLANKS = " "
"""As a separator: runs of blanks and tabs."""
COMMENT = "%"
"""What a line of a Matrix Market or KONECT file begins with that is no row."""


@dataclass(frozen=True)
class Layout:
    """Where user, item, rating and timestamp stand: field numbers of text, names in JSON and Parquet (-1, '': none).

    ``header``: records before the first row. ``notes``: what somebody should look at.
    ``constants``: (place among the four, value) of what the file's folders say and its rows do not. ``comment``: what a
    line begins with that is none; ``point``: of decimal numbers; ``matrix``: what a Matrix Market file says of itself.
    """

    kind: str  # a key of readers.FORMATS
    name: str  # said aloud
    columns: tuple[int | str, ...]
    separator: str = ""
    header: int = 0
    num_fields: int = 0
    constants: tuple[tuple[int, str], ...] = ()
    comment: str = ""
    point: str = "."
    matrix: Matrix | None = None
    notes: tuple[str, ...] = ()

    @property
    def has_rating(self) -> bool:
        return self.columns[2] not in (-1, "") or any(role == 2 for role, _ in self.constants)

    @property
    def has_time(self) -> bool:
        return self.columns[3] not in (-1, "") or any(role == 3 for role, _ in self.constants)

    def without_time(self) -> Layout:
        """The same layout with its timestamps left out."""
        return replace(self, columns=(*self.columns[:3], -1 if self.kind == "delimited" else ""),
                       constants=tuple(pair for pair in self.constants if pair[0] != 3))  # fmt: skip
