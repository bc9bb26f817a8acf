"""Make a dataset directory of raw ratings.

python jobs/prepare.py ratings_Electronics.csv --out data/electronics
python jobs/prepare.py 'reviews/*.jsonl.gz' --out s3://bucket/data/reviews --order blocks
python jobs/prepare.py u1.base --val u1.test --out data/u1
python jobs/prepare.py 'ratings/date=2020-*' --columns user,item,stars,date --out data/year2020
python jobs/prepare.py ratings.csv --dry-run                      # how its columns are read; nothing is written
python jobs/prepare.py --verify data/electronics
python jobs/prepare.py 'raw/*.csv' --out /shared/all --engine spark  # the same files, by Spark (Java 17, mfdist[spark])
python jobs/prepare.py lake/ratings --source-format delta --out data/lake --engine spark   # a table of a lake

What a file is, is told by its content, not by its name; what it was taken for is said. Read are
* text: CSV, TSV, fields separated by ; | :: or blanks (LIBMF; KONECT with its % comments), with a header or without;
  decimal commas where semicolons separate; Matrix Market (coordinate, real or integer, general);
* JSON: an object a line, one array, objects printed over lines; Python dictionaries a line (Amazon 2014), parsed and
  never run;
* Parquet: UUIDs and dictionaries are texts, true and false are 1 and 0;
plain or in gzip, bzip2, zstandard or zip, in UTF-8 or, with a byte-order mark, UTF-16.

Which column is what is read from its names, in any spelling (userId, User-ID, user_id:token; asin, movieId, anime_id;
stars, overall). Text without names is user, item, rating, time, where its values allow that. Where names or values
leave a doubt, the job stops and says which --columns would settle it. Before it reads, it shows the first three records
as it understands them; --dry-run stops there.

An id is its text, without blanks around a field that is not quoted; a whole number written as a float, 11.0, is the
id 11 in every format, in predict and in recommend, and the manifest counts them (float_ids).

A folder is read with the folders in it, and what its name=value folders say are columns. Hidden names, marks such as
_SUCCESS and empty parts are left out, and said. One file under two names is read once; the same bytes in two files and
a name packed and unpacked are refused, and so are tables with a log of their own (Delta, Iceberg, Hudi) without
--source-format. Rows of --val that are trained on too are counted.

Times, stored in whole seconds, are seconds, milliseconds, microseconds or nanoseconds since 1970, told apart by their
size for each file, YYYYMMDD, years from 1900 to 2100, ISO 8601 (UTC where it names no zone), dates of Parquet.
"""

from __future__ import annotations

from collections.abc import Sequence

from mfdist import process
from mfdist.config import parse_config
from mfdist.errors import exit_code_of
from mfdist.log import Console
from mfdist.prepare.config import PrepareConfig
from mfdist.prepare.prepare import look, prepare


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(PrepareConfig, argv, __doc__ or "")
    if config.engine == "spark":
        return _on_spark(config)
    if config.dry_run:
        look(config, Console())
    else:
        prepare(config)
    return 0


def _on_spark(config: PrepareConfig) -> int:
    from mfdist.prepare_spark.engine import SparkEngine, expectation

    console = Console()
    with SparkEngine(config.spark_master) as engine:
        if not config.dry_run:
            prepare(config, console, engine)
            return 0
        sources, layouts = look(config, console, engine)
        if config.source_format is None:
            console.info(expectation(sources, layouts))
    return 0


def job() -> int:
    """The program: the exit code of ``main`` (see ``mfdist.errors``)."""
    process.give_memory_back()
    return exit_code_of(main)


if __name__ == "__main__":
    process.end(job())
