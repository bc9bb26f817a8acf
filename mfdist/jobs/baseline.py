"""Surprise's SVD with its defaults on a prepared dataset: the baseline, on the very same split.

python jobs/baseline_svd.py --data data/electronics --run-dir runs/svd
python jobs/baseline_svd.py --data data/large --run-dir runs/svd-sample --sample-users 0.1 --max-memory 8GiB
"""

from __future__ import annotations

from collections.abc import Sequence

from mfdist import process, storage
from mfdist.config import parse_config
from mfdist.errors import exit_code_of


def main(argv: Sequence[str] | None = None) -> int:
    from mfdist.baseline.run import BaselineConfig, run_baseline  # imports surprise, and says so where it is missing

    config = parse_config(BaselineConfig, argv, __doc__ or "")
    final = run_baseline(config)["final"]
    sample = "" if config.sample_users >= 1.0 else f" on {config.sample_users:g} of the users"
    print(
        f"svd{sample}: validation RMSE {final['val_rmse_clipped']:.4f}, MAE {final['val_mae_clipped']:.4f}, clipped to "
        f"the scale as Surprise does; {storage.redact(config.run_dir)}/report.html"
    )
    return 0


def job() -> int:
    """The program: the exit code of ``main`` (see ``mfdist.errors``)."""
    return exit_code_of(main)


if __name__ == "__main__":
    process.end(job())
