"""The built-in dataset: 200,000 synthetic ratings, made and prepared on first use."""

from __future__ import annotations

import tempfile

from mfdist.log import Console
from mfdist.prepare.prepare import PrepareConfig, prepare
from mfdist.synthetic.synthesize import SynthesizeConfig, synthesize


def make_builtin(path: str, rows: int = 200_000, console: Console | None = None) -> None:
    """Synthesize ``rows`` planted ratings and prepare them as the dataset ``path``."""
    console = console or Console()
    with tempfile.TemporaryDirectory() as folder:
        source = f"{folder}/builtin.csv"
        synthesize(SynthesizeConfig(rows=rows, out=source), console)
        prepare(PrepareConfig(sources=(source,), out=path), console)
