"""torch's record of what ended a worker, for what nobody expected."""

from __future__ import annotations

from collections.abc import Callable

from torch.distributed.elastic.multiprocessing.errors import record

from mfdist.errors import MfdistError


def recorded(main: Callable[[], int | None]) -> Callable[[], int | None]:
    """``main``, whose unexpected exceptions leave their traceback for the launcher's summary.

    An MfdistError leaves none: the rank says it in a sentence, and a traceback of it beside the true cause, such as the
    rank that was killed, would lead astray.
    """

    def run() -> int | None:
        expected: list[MfdistError] = []

        def without_expected() -> int | None:
            try:
                return main()
            except MfdistError as error:
                expected.append(error)
                return None

        code: int | None = record(without_expected)()
        if expected:
            raise expected[0]
        return code

    return run
