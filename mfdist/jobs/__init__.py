"""The programs: parse the flags, open the World where ranks work, one library call, exit code.

``jobs/NAME.py`` of a checkout, ``mfdist NAME`` of an installation and ``python -m mfdist.jobs.NAME`` are the same
(``jobs/baseline_svd.py`` is ``mfdist baseline``).
Enters: a command line. Leaves: an exit code (``mfdist.errors``).
May import: everything; nothing imports it.
"""
