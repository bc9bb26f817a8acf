"""The built-in dataset: 200,000 synthetic ratings, made and prepared on first use."""

from __future__ import annotations

import tempfile

from mfdist.prepare.prepare import PrepareConfig, prepare
from mfdist.synthetic.synthesize import SynthesizeConfig, synthesize


def make_builtin(path: str, rows: int = 200_000) -> None:
    """Synthesize ``rows`` planted ratings and prepare them as the dataset ``path``."""
    with tempfile.TemporaryDirectory() as folder:
        source = f"{folder}/builtin.csv"
        synthesize(SynthesizeConfig(rows=rows, out=source))
        prepare(PrepareConfig(sources=(source,), out=path))
