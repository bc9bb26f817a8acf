"""What a run will take: memory, bytes moved and time, for any number of ranks, before it is submitted.

Enters: the flags of ``train`` and a dataset. Leaves: a table; a few seconds of real training measure the time.
May import: every room but ``baseline``.
"""
