"""The commands of README.md and jobs/README.md do what they say, one after the other in one folder, on small files."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.orc as orc
import pytest

ROOT = Path(__file__).parents[1]
COMMAND = re.compile(r"    ((?:python|torchrun|mfdist) .*)")
SMALLER = {
    "s3://bucket/": "bucket/",
    " /shared/": " shared/",
    "--rows 5000000": "--rows 50000",
    "--preset electronics": "--rows 20000",
    "--source-format delta": "--source-format orc",
    "jobs/tune.py ": "jobs/tune.py --trials 3 --splits 2 ",
}
"""What stands in the place of an object store, of millions of rows, of a package of Spark's, and of half an hour."""
MAY_FAIL = {"--require-better": 5}
"""Flags whose commands may end with another exit code than 0, as they say."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def commands_of(document: str) -> list[str]:
    """The walk-through, which is part of jobs/README.md, has a folder and a test of its own."""
    walk = set((ROOT / "jobs/walk_through.md").read_text().splitlines())
    lines = [line for line in (ROOT / document).read_text().splitlines() if document == "README.md" or line not in walk]
    found = [match[1] for line in lines if (match := COMMAND.fullmatch(line))]
    return [command for command in found if "s3://your-bucket" not in command]


def write_files(folder: Path) -> None:
    """Every file that the commands read and do not write."""
    rng = np.random.default_rng(1)
    users, items = rng.integers(0, 300, 6000), np.minimum(rng.geometric(0.02, 6000), 150)
    stars = np.clip(np.rint(3.6 + (items % 7 - 3) * 0.3 + rng.normal(0, 1, 6000)), 1, 5).astype(int)
    rows = pl.DataFrame({
        "user": [f"A{user}" for user in users], "item": [f"B{item:05d}" for item in items], "rating": stars,
        "timestamp": rng.integers(1_400_000_000, 1_500_000_000, 6000),
    }).unique(["user", "item"], keep="first", maintain_order=True)  # fmt: skip
    for name in ("ratings_Electronics.csv", "ratings.csv"):
        rows.write_csv(folder / name, include_header=False)
    for name, part in (("u1.base", rows[:4000]), ("u1.test", rows[4000:])):
        part.write_csv(folder / name, separator="\t", include_header=False)
    for month, part in (("01-31", rows[:2000]), ("02-29", rows[2000:4000])):
        (folder / f"ratings/date=2020-{month}").mkdir(parents=True)
        part.select("user", "item", stars="rating").write_csv(folder / f"ratings/date=2020-{month}/part-0.csv")
    (folder / "lake/ratings").mkdir(parents=True)
    orc.write_table(rows[:3000].to_arrow(), folder / "lake/ratings/part-0.orc")
    (folder / "raw").mkdir()
    rows[:3000].write_csv(folder / "raw/one.csv", include_header=False)
    (folder / "reviews").mkdir()
    keys = ("reviewerID", "asin", "overall", "unixReviewTime")
    lines = [json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows.iter_rows()]
    (folder / "reviews/one.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    rows[:500].select("user", "item").write_csv(folder / "pairs.csv")
    (folder / "pairs").mkdir()
    rows[500:900].select("user", "item").write_csv(folder / "pairs/part-0.csv")
    rows[900:1200].write_parquet(folder / "held_out.parquet")
    rows[:40].select(pl.lit("new").alias("user"), "item", "rating", "timestamp").unique("item").write_csv(
        folder / "today.csv"
    )
    (folder / "users.txt").write_text("\n".join(rows["user"].unique(maintain_order=True)[:20]) + "\n")
    (folder / "items.txt").write_text("\n".join(rows["item"].unique(maintain_order=True)[:20]) + "\n")
    (folder / "sold_out.txt").write_text(rows["item"][0] + "\n")
    (folder / "jobs").symlink_to(ROOT / "jobs")


@pytest.mark.parametrize("document", ["README.md", "jobs/README.md"])
def test_every_command_runs(document: str, tmp_path: Path) -> None:
    write_files(tmp_path)
    done = 0
    for command in commands_of(document):
        if "faiss" in command and importlib.util.find_spec("faiss") is None:
            continue
        if "--engine spark" in command and not (importlib.util.find_spec("pyspark") and shutil.which("java")):
            continue
        if "data/large" in command and not (tmp_path / "data/large").exists():
            (tmp_path / "data/large").symlink_to(tmp_path / "data/electronics")
        for shown, smaller in SMALLER.items():
            command = command.replace(shown, smaller)
        env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900
        )
        allowed = {0, *(code for flag, code in MAY_FAIL.items() if flag in command)}
        assert ended.returncode in allowed, f"{command}\n{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
        assert "Traceback" not in ended.stderr, f"{command}\n{ended.stderr[-3000:]}"
        done += 1
    assert done >= 10
