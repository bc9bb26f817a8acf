"""torchrun with exit codes: ``python -m mfdist.launch [torchrun's flags] jobs/train.py [the job's flags]``.

It runs torchrun's own agent and takes its flags and ``PET_*`` variables. What differs:

* The exit code is the workers' own (see ``mfdist.errors``), where torchrun turns every failure into 1.
* SIGUSR1 is passed on to the workers like SIGTERM, SIGINT, SIGHUP and SIGQUIT; torchrun dies of it and leaves them
  behind. After a signal the exit code is 75 where a worker ended so (its checkpoint is written), the workers' own where
  they finished (0) or failed by themselves, else 128 + the signal's number. Under nohup SIGHUP stays ignored.
* Workers that end with 75, 2, 3, 4 or 5 are not restarted by ``--max-restarts``: it would not help.
* ``OMP_NUM_THREADS`` is the usable cores divided by the workers of this host, where it is not set.
* The workers of one host meet by a file in a private folder and by 127.0.0.1: nothing listens to other hosts, no name
  has to resolve, and any number of launches goes side by side. Ports and endpoints given for one host are not used.
* With ``--rdzv-backend=c10d`` the host with index 0 of a Kubernetes Indexed Job or a Slurm step keeps the
  rendezvous store; torchrun compares host names instead, and where they differ in form nobody keeps it.

Example: rank 1 of 2 ends with 3 (bad data). The agent sends SIGTERM to rank 0, which ends with -15, and the
exit code is 3.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch.distributed import run
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher import api

from mfdist.cluster import meeting
from mfdist.errors import (
    ComparisonError,
    DataError,
    DivergedError,
    MfdistError,
    StopRequested,
    UsageError,
)
from mfdist.process import STOP_SIGNALS, stop_signals

JOBS_OF_RANKS = ("train", "evaluate", "recommend", "predict", "similar")
"""Jobs that may be given by their name instead of a script: ``mfdist launch --nproc-per-node=4 train [flags]``."""
STOPPED = StopRequested.exit_code
FINAL_CODES = frozenset(kind.exit_code for kind in (UsageError, DataError, DivergedError, ComparisonError))
BY_SIGNAL = 128
"""What a shell adds to the number of the signal that ended a process."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the workers and return the exit code of the whole."""
    parser = run.get_args_parser()
    parser.allow_abbrev = False  # a flag of the job must not be taken for the beginning of one of torchrun's
    args = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    hosts = _check_and_complete(args)
    if args.training_script in JOBS_OF_RANKS and not os.path.exists(args.training_script):
        args.module, args.training_script = True, f"mfdist.jobs.{args.training_script}"
    # The agent reports each stopped worker in its own log format; the workers and this function say it plainly.
    if "LOGLEVEL" not in os.environ:
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with _signals_raise(args), _agent_in_use() as agents:
        try:
            # Without a file to write the workers' error to, torch logs that there is none.
            start = record(run.run) if "TORCHELASTIC_ERROR_FILE" in os.environ else run.run
            with meeting.for_launchers(args, hosts):
                start(args)
        except ChildFailedError as error:
            code = code_of_failures([failure.exitcode for failure in error.failures.values()])
            if code == 1:
                print(error, file=sys.stderr, flush=True)
            return code
        except SignalException as error:
            code = code_after_signal(agents[-1].exit_codes if agents else [], error.sigval)
            said = "; no checkpoint was written for it" if code == BY_SIGNAL + error.sigval else ""
            print(f"launch: {error.sigval.name} received, exit code {code}{said}", file=sys.stderr, flush=True)
            return code
        except RendezvousError as error:
            raise MfdistError(
                f"the hosts did not find each other at {args.rdzv_endpoint} ({_cause(error)}); "
                "is the host with index 0 running, and does every host resolve its name?"
            ) from None
    return 0


def code_of_failures(codes: Sequence[int]) -> int:
    """The exit code of a group whose workers failed with ``codes``, the first one seen first (negative: a signal).

    The first one is the cause: the agent stopped the others because of it, whatever they ended with.
    """
    final = [code for code in codes if code in FINAL_CODES]
    if final:
        return final[0]
    return STOPPED if codes[0] == STOPPED else 1


def code_after_signal(codes: Sequence[int], number: signal.Signals) -> int:
    """The exit code of a group that was asked to stop by signal ``number`` and whose workers ended with ``codes``.

    75 promises a checkpoint: a worker that ended so has written it. One that had no handler yet, or outlived the
    time-out and was killed, promises nothing: 128 + ``number``, as a shell says it.
    """
    final = [code for code in codes if code in FINAL_CODES]
    if final:
        return final[0]
    if codes and not any(codes):
        return 0
    if not all(code <= 0 or code == STOPPED or code >= BY_SIGNAL for code in codes):
        return 1
    return STOPPED if STOPPED in codes else BY_SIGNAL + number


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its container where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as stream:
            quota, period = stream.read().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


class _Agent(LocalElasticAgent):
    """torchrun's agent, which also keeps the exit codes of its workers and knows which ones are final."""

    exit_codes: Sequence[int] = ()

    def _monitor_workers(self, worker_group: Any) -> Any:
        result = super()._monitor_workers(worker_group)
        if any(failure.exitcode in FINAL_CODES | {STOPPED} for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        if isinstance(sys.exc_info()[1], SignalException):
            # A second signal while the workers write their checkpoint would end the agent and orphan them.
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        super()._shutdown(*args, **kwargs)
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        self.exit_codes = [handler.proc.poll() or 0 for _, handler in sorted(handlers.items())]


@contextmanager
def _agent_in_use() -> Iterator[list[_Agent]]:
    """Let the launcher make :class:`_Agent`; yields the list of those it made."""
    made: list[_Agent] = []

    def make(*args: Any, **kwargs: Any) -> _Agent:
        made.append(_Agent(*args, **kwargs))
        return made[-1]

    names = vars(api)  # torchrun has no argument for the agent's class
    original = names["LocalElasticAgent"]
    names["LocalElasticAgent"] = make
    try:
        yield made
    finally:
        names["LocalElasticAgent"] = original


@contextmanager
def _signals_raise(args: Namespace) -> Iterator[None]:
    """Let each of ``stop_signals()`` raise, also before the agent sets its own handlers (waiting for other hosts)."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SignalException(f"signal {number}", signal.Signals(number))

    answered = stop_signals()
    args.signals_to_handle = ",".join(number.name for number in answered)
    before = {number: signal.signal(number, stop) for number in answered}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_and_complete(args: Namespace) -> int:
    """The number of hosts, at most. UsageError for flags that torchrun would answer with a traceback; sets the threads
    and the store's host."""
    try:
        _, hosts = run.parse_min_max_nnodes(args.nnodes)
        workers = run.determine_local_world_size(args.nproc_per_node)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"--nnodes {args.nnodes}, --nproc-per-node {args.nproc_per_node}: {error}.") from None
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // max(1, workers))))
    # Torch 2.13's agent keeps one store over all restarts: restarted gloo ranks read the dead ones' addresses in it.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    index = os.environ.get("JOB_COMPLETION_INDEX", os.environ.get("SLURM_NODEID"))
    named_host = args.rdzv_endpoint and not args.rdzv_endpoint.startswith("localhost")
    if index is not None and named_host and args.rdzv_backend == "c10d" and "is_host" not in args.rdzv_conf:
        is_host = f"is_host={int(index == '0')}"
        args.rdzv_conf = f"{args.rdzv_conf},{is_host}" if args.rdzv_conf else is_host
    return 1 if args.standalone else int(hosts)


def _cause(error: BaseException) -> str:
    """The innermost reason of ``error`` on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
