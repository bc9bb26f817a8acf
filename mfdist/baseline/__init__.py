"""Surprise's SVD on a prepared dataset, as a run to compare with. The only importer of ``surprise``.

Enters: a dataset directory. Leaves: a run directory with the files of a trained one.
May import: ``results``, ``run``, ``data``, ``cluster`` and the top level.
"""
