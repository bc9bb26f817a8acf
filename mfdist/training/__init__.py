"""The training loop: configuration, session, steps, evaluation of an epoch, the end of a run.

Enters: a dataset directory and the flags of ``train``. Leaves: a finished run directory.
May import: every room but ``baseline`` and ``planning``.
"""
