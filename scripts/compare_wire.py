#!/usr/bin/env python
"""Does --wire-dtype bf16 cost accuracy? The same trainings on two ranks, rows and gradients sent as fp32 and as bf16.

    python jobs/prepare.py ml-1m.parquet --out data/ml-1m
    python scripts/compare_wire.py data/ml-1m [data/core164k ...] [--configs vignette_mf_advanced,quick,recipe]

Printed for each dataset and configuration: the validation RMSE of the last epoch, clipped, by seed, and the mean and
the largest of the differences between the two. Rounding to bf16 is stochastic, see ``kernels/bfloat16``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIRES = ("fp32", "bf16")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="prepared datasets")
    parser.add_argument("--configs", default="vignette_mf_advanced,quick,recipe", help="(default %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="(default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(default %(default)s)")
    flags = parser.parse_args(argv)
    for data in flags.data:
        for config in flags.configs.split(","):
            found = [[_rmse(data, config, wire, seed, flags.ranks) for wire in WIRES] for seed in range(flags.seeds)]
            differences = [narrow - whole for whole, narrow in found]
            shown = "  ".join(f"{whole:.5f} {narrow:.5f}" for whole, narrow in found)
            print(
                f"{Path(data).name:16}{config:24}fp32 bf16 by seed: {shown}   difference: mean "
                f"{statistics.mean(differences):+.5f}, largest {max(map(abs, differences)):.5f}",
                flush=True,
            )
    return 0


def _rmse(data: str, config: str, wire: str, seed: int, ranks: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "jobs/train.py",
            "--data", str(Path(data).resolve()), "--run-dir", f"{folder}/run", "--config", config, "--seed", str(seed),
            "--wire-dtype", wire, "--device", "cpu",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return float(json.loads(Path(folder, "run/report.json").read_text())["final"]["val_rmse_clipped"])


if __name__ == "__main__":
    sys.exit(main())
