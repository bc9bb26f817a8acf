"""Before a run: what it will take, in memory, bytes moved and time, for any number of ranks; kernels compiled ahead.

Enters: the flags of ``train`` and a dataset. Leaves: a table; a few seconds of real training measure the time.
May import: every room but ``baseline``.
"""
