"""A dataset directory to batches: its manifest, the order of its ratings, the loader.

Enters: a dataset directory, a seed, a batch size, rank and world size as plain integers.
Leaves: :class:`~mfdist.data.dataset.Dataset`, and a rank's share of every global batch, exactly once an epoch.
May import: ``kernels`` and the top level.
"""
