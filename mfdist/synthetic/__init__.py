"""Ratings with a known answer: planted models, the built-in dataset, a twin of the Electronics file.

Enters: a preset, a number of rows, a seed. Leaves: a rating file and its noise floor, or the built-in dataset.
May import: ``prepare``, ``data``, ``kernels`` and the top level.
"""

import mfdist.kernels  # noqa: F401 (before the first compiled function: where they are kept)
