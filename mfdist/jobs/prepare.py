"""Make a dataset directory of raw ratings.

python jobs/prepare.py ratings_Electronics.csv --out data/electronics
python jobs/prepare.py 'reviews/*.jsonl.gz' --out s3://bucket/data/reviews --order blocks
python jobs/prepare.py u1.base --val u1.test --out data/u1
python jobs/prepare.py --verify data/electronics
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mfdist.config import parse_config
from mfdist.errors import exit_code_of
from mfdist.prepare.config import PrepareConfig
from mfdist.prepare.prepare import prepare


def main(argv: Sequence[str] | None = None) -> int:
    prepare(parse_config(PrepareConfig, argv, __doc__ or ""))
    return 0


def job() -> int:
    """The program: the exit code of ``main`` (see ``mfdist.errors``)."""
    return exit_code_of(main)


if __name__ == "__main__":
    sys.exit(job())
