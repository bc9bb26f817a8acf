"""Compile the kernels of all jobs ahead, once a machine, so that no job has to.

python jobs/compile.py
python jobs/compile.py --processes --large recipe,quick

It runs the jobs on a few synthetic ratings in a temporary folder; what they compile is kept where later jobs find it.
scripts/setup does so in the background. Without it the first job of each kind compiles what it needs, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from mfdist import process
from mfdist.config import parse_config
from mfdist.errors import exit_code_of
from mfdist.log import Console
from mfdist.planning.warm_up import CompileConfig, compile_ahead


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(CompileConfig, argv, __doc__ or "")
    console = Console()
    seconds = compile_ahead(config, console)
    console.info(f"the kernels are compiled ({seconds:.0f} s); later jobs find them on the disk")
    return 0


def job() -> int:
    """The program: the exit code of ``main`` (see ``mfdist.errors``)."""
    return exit_code_of(main)


if __name__ == "__main__":
    process.end(job())
