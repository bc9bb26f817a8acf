"""Look after the checkpoints of a run: list them, check every byte, remove old ones.

python jobs/checkpoint.py ls runs/advanced
python jobs/checkpoint.py verify runs/advanced         # ends with 3 where one is damaged
python jobs/checkpoint.py prune runs/advanced --keep 1
"""

from __future__ import annotations

from collections.abc import Sequence

from mfdist import process
from mfdist.config import parse_config
from mfdist.errors import exit_code_of
from mfdist.log import Console
from mfdist.run.checkpoint_tool import HousekeepingConfig, manage_checkpoints


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(HousekeepingConfig, argv, __doc__ or "")
    manage_checkpoints(config, Console().info)
    return 0


def job() -> int:
    """The program: the exit code of ``main`` (see ``mfdist.errors``)."""
    return exit_code_of(main)


if __name__ == "__main__":
    process.end(job())
