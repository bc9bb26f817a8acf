"""The errors that a user can cause or meet, each with the exit code of its kind.

Raise one of these with one or two plain sentences: what is wrong, where (file, row group, row or flag),
what to do. :func:`exit_code_of` turns it into that text on stderr and the exit code, without a traceback.
"""

from __future__ import annotations

import errno
import re
import sys
import traceback
from collections.abc import Callable

from mfdist import process


class MfdistError(Exception):
    """Anything that mfdist can explain; exit code 1 unless a subclass says better."""

    exit_code = 1
    said_elsewhere = False
    """Another process of this job prints the same sentence."""


class LostRankError(MfdistError):
    """Another rank ended, or cannot be reached any more."""


class UsageError(MfdistError):
    """Bad usage or configuration: running the same command again cannot help."""

    exit_code = 2


class DataError(MfdistError):
    """The input data is missing, damaged or not what it claims to be."""

    exit_code = 3


class DivergedError(MfdistError):
    """The loss became NaN or infinite."""

    exit_code = 4


class ComparisonError(MfdistError):
    """A comparison that was required (``evaluate --require-better``) was not met."""

    exit_code = 5


class StopRequested(MfdistError):
    """Stopped by request with a checkpoint written: run the same command again (EX_TEMPFAIL)."""

    exit_code = 75


def exit_code_of(job: Callable[[], int | None]) -> int:
    """Run ``job`` and return the process's exit code, printing an error of the user's as its sentences alone.

    An unexpected exception keeps its traceback and gives 1; one that the storage raised is a sentence, too. A console
    that is gone ends nothing; in a locale other than UTF-8 the program is started again in one (``process``).
    """
    process.use_utf8()
    with process.lasting_console():
        return _exit_code_of(job)


def _exit_code_of(job: Callable[[], int | None]) -> int:
    try:
        code = job() or 0
        sys.stdout.flush()
        return code
    except MfdistError as error:
        if not error.said_elsewhere:
            kind = "stopped" if error.exit_code == StopRequested.exit_code else "error"
            print(process.visible(f"{kind}: {error}"), file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped: interrupted by the keyboard", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
            where = redact(str(error.filename or "the storage"))
            print(f"error: {error.strerror}: {where}.", file=sys.stderr, flush=True)
        else:
            print(redact(traceback.format_exc()), end="", file=sys.stderr, flush=True)
        return 1


STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)

_SECRETS = (
    # everything up to the last @ before the path: name, password, or both
    (re.compile(r"://[^/\s]*@"), "://***@"),
    # a password with a slash in it (a number there is a port)
    (re.compile(r"://(?!\*)[^/\s@:]+:(?!\d+/)[^\s@]*@"), "://***@"),
    (
        re.compile(
            r"(?i)([?&;](?:[^=&;\s]*(?:key|token|secret|pass|pwd|auth|signature|sig|sas|credential)[^=&;\s]*)=)[^&;\s]*"
        ),
        r"\1***",
    ),
)


def redact(text: str) -> str:
    """A URL, or a text with URLs in it, without user, password and secret query values."""
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text
