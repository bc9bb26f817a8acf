"""Make a dataset directory of raw ratings.

python jobs/prepare.py ratings_Electronics.csv --out data/electronics
python jobs/prepare.py 'reviews/*.jsonl.gz' --out s3://bucket/data/reviews --order blocks
python jobs/prepare.py u1.base --val u1.test --out data/u1
python jobs/prepare.py --verify data/electronics
"""

import sys
from collections.abc import Sequence

from mfdist.config import parse_config
from mfdist.errors import exit_code_of
from mfdist.prepare import prepare
from mfdist.prepare_config import PrepareConfig


def main(argv: Sequence[str] | None = None) -> int:
    prepare(parse_config(PrepareConfig, argv, __doc__ or ""))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
