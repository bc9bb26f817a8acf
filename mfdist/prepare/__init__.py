"""Raw files to a dataset directory, out of core, every row accounted for.

Enters: sources (CSV, TSV, JSON lines, Parquet, gzip, zip, data frames; paths or URLs) and the flags of ``prepare``.
Leaves: a dataset directory (``dataset.json``, lanes, vocabularies, rejected rows, report).
A rating's way: ``sources``, ``columns``, ``readers``, ``row_checks``, ``read_pass``, ``count_pass``, ``write_pass``.
May import: ``pages``, ``data``, ``kernels`` and the top level.
"""

import mfdist.kernels  # noqa: F401 (before the first compiled function: where they are kept)
