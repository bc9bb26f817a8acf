"""The flags of jobs/prepare.py."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mfdist.config import flag, parse_bytes, parse_range, positional
from mfdist.errors import UsageError
from mfdist.prepare.columns import parse_columns


def _lanes(text: str) -> int:
    if text in ("auto", "0"):
        return 0
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise ValueError("expected auto or a whole number from 1 to 999999")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """The flags of jobs/prepare.py."""

    sources: tuple[str, ...] = positional("files, globs, directories or URLs; the dataset with --verify or --compact",
                                          optional=True)  # fmt: skip
    out: str | None = flag(
        None,
        "the dataset directory to make (path or URL)",
        group="data",
        basic=True,
        metavar="DIR",
        example="data/electronics",
    )
    columns: tuple[str, ...] | None = flag(
        None,
        "user,item,rating[,timestamp]: names, or positions from 0 for headerless files",
        parse=parse_columns,
        group="data",
        basic=True,
        metavar="NAMES",
        example="user,item,stars",
    )
    split: str = flag(
        "random",
        "how validation rows are chosen",
        choices=("random", "last-n", "time"),
        group="validation rows",
        basic=True,
    )
    val_fraction: float = flag(
        0.2,
        "share of the rows that validate (random, time)",
        at_least=0.0,
        at_most=1.0,
        group="validation rows",
        basic=True,
        metavar="SHARE",
    )
    val: tuple[str, ...] = flag(
        (),
        "files of a predefined validation set, instead of a split",
        many=True,
        group="validation rows",
        basic=True,
        metavar="SOURCE",
    )
    seed: int = flag(42, "seed of the split and of the order", group="validation rows", basic=True)
    lanes: int = flag(
        0,
        "parts (lanes) of whole users that the ratings are cut into, at least as many as ranks will train; 0 or auto: "
        "64 up to 10 M rows, 512 above",
        parse=_lanes,
        group="layout",
        metavar="NUMBER",
    )
    duplicates: str = flag(
        "keep",
        "what becomes of equal (user, item) pairs",
        choices=("keep", "last", "mean", "error"),
        group="data",
        basic=True,
    )
    min_user_ratings: int = flag(
        0,
        "remove users with fewer ratings (with --min-item-ratings: until stable)",
        at_least=0,
        group="data",
        basic=True,
        metavar="NUMBER",
    )
    min_item_ratings: int = flag(
        0, "remove items with fewer ratings", at_least=0, group="data", basic=True, metavar="NUMBER"
    )
    last: int = flag(
        1,
        "n of --split last-n: newest ratings of each user that validate",
        at_least=1,
        group="validation rows",
        metavar="N",
    )
    order: str = flag(
        "random",
        "how the ratings of a part (lane) lie in its file: at random, or users beside each other, which is faster",
        choices=("random", "blocks"),
        group="layout",
        basic=True,
    )
    rating_scale: tuple[float, float] | None = flag(
        None,
        "MIN,MAX of valid ratings; else as found",
        parse=parse_range,
        group="data",
        metavar="MIN,MAX",
        example="1,5",
    )
    max_rejected: float = flag(
        0.01, "share of the rows that may be refused", at_least=0.0, at_most=1.0, group="data", metavar="SHARE"
    )
    memory: int = flag(
        4 << 30,
        "bytes of memory to work in, such as 4GiB; with --engine spark, of each task beside Spark's own",
        parse=parse_bytes,
        group="layout",
        metavar="BYTES",
    )
    engine: str = flag(
        "local",
        "what does the work: this machine, or a Spark cluster (the dataset is the same)",
        choices=("local", "spark"),
        group="engine",
    )
    spark_master: str | None = flag(
        None,
        "Spark's master (also yarn, k8s://https://host:6443, local[2]); else what Spark's own settings say",
        group="engine",
        metavar="URL",
        example="spark://head:7077",
    )
    source_format: str | None = flag(
        None,
        "the sources are tables that Spark reads in this format (delta, iceberg, orc, ...), or, for table, by their "
        "names in its catalog",
        group="engine",
        metavar="FORMAT",
        example="delta",
    )
    overwrite: bool = flag(False, "replace another dataset in --out", group="an existing dataset", basic=True)
    append: bool = flag(
        False,
        "add the files to the dataset in --out: known ids keep their rows",
        group="an existing dataset",
        basic=True,
    )
    compact: bool = flag(
        False, "merge the files that appends have added; ids keep their rows", group="an existing dataset"
    )
    verify: bool = flag(
        False,
        "re-read every file of the dataset and compare it with the manifest",
        group="an existing dataset",
        basic=True,
    )
    dry_run: bool = flag(
        False, "show how the sources are read, with the first records of each kind, and write nothing", group="data",
        basic=True
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.append + self.compact + self.verify > 1:
            raise UsageError("--append, --compact and --verify are three jobs: give one of them.")
        if self.compact or self.verify:
            if len(self.sources) + (self.out is not None) != 1:
                raise UsageError("--verify and --compact take one dataset directory and nothing else.")
            if self.dry_run:
                raise UsageError("--dry-run shows how sources are read; --verify and --compact read none.")
        elif not self.out and not self.dry_run:
            raise UsageError("--out is missing: name the dataset directory to make.")
        elif not self.sources:
            raise UsageError("no source: name one or more files of ratings.")
        if self.spark_master and self.engine != "spark":
            raise UsageError("--spark-master is of --engine spark: give both, or leave it out.")
        if self.source_format and self.engine != "spark":
            raise UsageError("--source-format is of --engine spark: give both, or leave it out.")
        if self.source_format and self.append:
            raise UsageError("--append takes files, which are told from those that the dataset holds; write the new "
                             "rows of a table as Parquet.")  # fmt: skip
        if self.engine == "spark" and (self.compact or self.verify):
            raise UsageError("--compact and --verify are work of one machine: leave out --engine spark.")
        if self.memory < 256 << 20:
            raise UsageError(f"--memory {self.memory}: at least 256MiB are needed.")
        if self.val and self.split != "random":
            raise UsageError("--val is a predefined validation set: it cannot be combined with --split.")

    @property
    def target(self) -> str:
        """The dataset directory."""
        return self.out or self.sources[0]
