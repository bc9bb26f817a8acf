"""Make synthetic ratings with a known noise floor.

python jobs/synthesize.py --out ratings.csv
python jobs/synthesize.py --rows 5000000 --seed 7 --out ratings.parquet
python jobs/synthesize.py --preset electronics --out twin.csv
"""

from __future__ import annotations

from collections.abc import Sequence

from mfdist import process, storage
from mfdist.config import parse_config
from mfdist.errors import exit_code_of
from mfdist.log import Console
from mfdist.synthetic.synthesize import SynthesizeConfig, synthesize, truth_path


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(SynthesizeConfig, argv, __doc__ or "")
    truth = synthesize(config, Console())
    floor = truth.noise_floor
    print(
        f"{storage.redact(config.out)}: {truth.rows:,} synthetic ratings of {truth.num_users:,} users and "
        f"{truth.num_items:,} items; noise floor RMSE {floor['rmse']:.4f}, MAE {floor['mae']:.4f} "
        f"({storage.redact(truth_path(config.out))})"
    )
    return 0


def job() -> int:
    """The program: the exit code of ``main`` (see ``mfdist.errors``)."""
    return exit_code_of(main)


if __name__ == "__main__":
    process.end(job())
