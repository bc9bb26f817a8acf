"""A search for settings of training, on the training rows alone.

Enters: a prepared dataset, settings to begin with, what to search. Leaves: inner splits of the training rows, the
trials, the best settings as a file for ``train --config``, a page.
May import: training, results, prepare, pages, run, model, data, cluster, kernels and what everybody uses.
"""
