"""Plans as the table that people read, a column for each number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

from mfdist.cluster.launch import usable_cores
from mfdist.planning.calibration import Measured
from mfdist.planning.plan import Plan, PlanConfig, batch_that_hides


def format_plans(plans: Sequence[Plan], config: PlanConfig) -> str:
    """The plans as a table, a column for each number of ranks, what was measured, and what would not fit here."""
    times = [plan.times for plan in plans]
    lines: list[tuple[str, list[str]]] = [
        ("ranks", [f"{p.ranks}" for p in plans]),
        ("hosts", [f"{p.hosts}" for p in plans]),
        ("lanes of a rank", ["-".join(str(n) for n in sorted(set(p.lanes))) for p in plans]),
        ("busy share, as lanes stay whole", [f"{p.efficiency:.1%}" for p in plans]),
        ("steps an epoch", [f"{p.steps_per_epoch:,}" for p in plans]),
        ("memory of a rank", [_bytes(p.memory_bytes) for p in plans]),
        ("  tables and optimizer", [_bytes(p.table_bytes) for p in plans]),
        ("  loader", [_bytes(p.loader_bytes) for p in plans]),
        ("  a step's rows", [_bytes(p.step_bytes) for p in plans]),
        ("  report", [_bytes(p.end_bytes) for p in plans]),
        ("  the process itself", [_bytes(p.base_bytes) for p in plans]),
        ("sent by a rank in a step", [_bytes(p.wire_bytes) for p in plans]),
        ("a checkpoint, all ranks", [_bytes(p.checkpoint_bytes) for p in plans]),
        ("start", [_seconds(t.start if t else None) for t in times]),
        *_steps(plans, config),
        ("an epoch", [_seconds(t.epoch if t else None) for t in times]),
        ("pause of a checkpoint", [_seconds(t.checkpoint if t else None) for t in times]),
        ("last checkpoint, export, report", [_seconds(t.end if t else None) for t in times]),
        (f"all of it, {config.epochs} epochs", [_seconds(t.total if t else None) for t in times]),
    ]
    left = max(len(name) for name, _ in lines)
    table = [name.ljust(left) + "".join(value.rjust(12) for value in values) for name, values in lines]
    said = ["no times: those of --objective ranking are not measured"] if config.is_ranking else []
    return "\n".join(
        table + said + [_said(t.measured) for t in times if t] + [p.too_large for p in plans if p.too_large]
    )


def _steps(plans: Sequence[Plan], config: PlanConfig) -> list[tuple[str, list[str]]]:
    """What a step takes, and of which batch size the messages between hosts are a small part."""
    times, hiding = [plan.times for plan in plans], [batch_that_hides(plan, config) for plan in plans]
    lines = [("a step's arithmetic", [_milliseconds(t.arithmetic if t else None) for t in times])]
    if any(plan.hosts > 1 for plan in plans):
        lines += [
            (
                "a step's bytes between hosts",
                [_milliseconds(t.network.line + t.network.copies if t else None) for t in times],
            ),
            ("a step's messages between hosts", [_milliseconds(t.network.messages if t else None) for t in times]),
            ("batch with a tenth of messages", [f"{size:,}" if size else "-" for size in hiding]),
        ]
    return lines


def _said(found: Measured) -> str:
    """What a measurement did, in a line."""
    trial = found.trial
    part = f", {trial.lanes} lanes each, as all do not fit into half of the free memory" if trial.lanes else ""
    who = f"{trial.processes} {'process' if trial.processes == 1 else 'processes'} of {found.threads} threads"
    return (
        f"measured for {trial.ranks}: {who} on {usable_cores()} cores{part}; {found.steps:,} steps of "
        f"{1000 * found.step_seconds:.2f} ms, all rows brought up to date in {found.settle_seconds:.2f} s, "
        f"{found.validation_rows:,} validation rows {found.evaluate_seconds:.2f} s, {_bytes(found.stored_bytes)} "
        f"stored in {found.store_seconds:.2f} s (pause {found.pause_seconds:.2f} s)"
    )


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.2f} ms"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
