"""A report as text: what each run of like blocks did in the last step, and the totals beside their forecast.

Bytes and FLOPs of a line of blocks are those of one block.
"""

from __future__ import annotations

from collections.abc import Callable

from memo_runtime.config import Policy
from memo_runtime.placement import ArenaReport
from memo_runtime.records import Executor
from memo_runtime.reporting.text_table import amount, notes_text, reasons_text, run_rows, table
from memo_runtime.reports import BlockReport, Report
from memo_runtime.units import format_bytes, format_flops, format_seconds

_HEADER = ("blocks", "executor", "alpha", "to host", "to device", "kept", "recomputed", "attention")


def report_table(report: Report) -> str:
    """``report`` as a readable table, at most 110 columns wide."""
    steps = report.totals.steps
    none = "the model runs as it is, and nothing is measured" if report.policy == Policy.NONE else "no step yet"
    done = {0: none, 1: "after 1 step"}.get(steps, f"after {steps} steps")
    title = f"report: policy {report.policy}, {done}"
    copies = [f"copies by {report.copies}"] if report.copies else []
    arena = [_arena(report.arena)] if report.arena is not None else []
    measured = [*_blocks(report), "", _totals(report)] if steps else _foreseen(report)
    return "\n".join([title, "", *measured, *copies, *arena, *notes_text(report.notes)])


def _arena(arena: ArenaReport) -> str:
    if not arena.requests:
        return f"memory by plan: {arena.state}"
    over = 100 * (arena.planned_peak / max(1, arena.lower_bound) - 1)
    missed = ", ".join(f"{count} {cause.replace('_', ' ')}" for cause, count in arena.misses)
    return (
        f"memory by plan: {arena.state}; {arena.served} of {arena.requests} requests and "
        f"{100 * arena.served_bytes / max(1, arena.bytes):.2f} % of the bytes of the last step"
        f"{f' (not: {missed})' if missed else ''}\n"
        f"  plan {format_bytes(arena.planned_peak)}, {over:.2f} % above the lower bound; arena "
        f"{format_bytes(arena.arena_bytes)} for {arena.plans} plans, beside it {format_bytes(arena.resident_bytes)} "
        f"that outlive the step; reserved {format_bytes(arena.reserved_bytes)}"
    )


def _key(block: BlockReport) -> tuple[object, ...]:
    return (
        block.executor,
        block.reason,
        block.alpha,
        block.bytes_to_host,
        block.bytes_to_device,
        block.bytes_kept,
        block.recomputed_flops,
        block.attention,
    )


def _blocks(report: Report) -> list[str]:
    rows, reasons = run_rows(report.blocks, _key, _cells)
    return [table(_HEADER, rows, text_columns=(0, 1)), *reasons_text(reasons)]


def _cells(block: BlockReport) -> tuple[str, ...]:
    return (
        str(block.executor),
        f"{block.alpha:.3f}" if block.executor in (Executor.REPLAY, Executor.TILED) else "-",
        amount(block.bytes_to_host, format_bytes),
        amount(block.bytes_to_device, format_bytes),
        amount(block.bytes_kept, format_bytes),
        amount(block.recomputed_flops, format_flops),
        ", ".join(block.attention),
    )


def _totals(report: Report) -> str:
    totals, forecast = report.totals, report.totals.forecast

    def line(name: str, actual: float, foreseen: float, show: Callable[[float], str]) -> tuple[str, ...]:
        return name, amount(actual, show), amount(foreseen, show), _error(actual, foreseen)

    rows = [
        line("device peak", totals.peak_bytes, forecast.peak_bytes, format_bytes),
        line("stash peak", totals.stash_peak_bytes, forecast.stash_peak_bytes, format_bytes),
        line("host memory", totals.host_bytes, forecast.host_bytes, format_bytes),
        line("to host", totals.bytes_to_host, forecast.bytes_to_host, format_bytes),
        line("to device", totals.bytes_to_device, forecast.bytes_to_device, format_bytes),
        line("kept", totals.bytes_kept, forecast.bytes_kept, format_bytes),
        line("recomputed", totals.recomputed_flops, forecast.recomputed_flops, format_flops),
        line("step time", totals.step_seconds, forecast.step_seconds, format_seconds),
    ]
    return table(("totals", "actual", "forecast", "difference"), rows)


def _foreseen(report: Report) -> list[str]:
    """What is known before a step: the forecast of a plan that is there, and nothing that was measured."""
    forecast = report.totals.forecast
    rows = [
        (name, amount(foreseen, show))
        for name, foreseen, show in (
            ("device peak", forecast.peak_bytes, format_bytes),
            ("host memory", forecast.host_bytes, format_bytes),
            ("recomputed", forecast.recomputed_flops, format_flops),
            ("step time", forecast.step_seconds, format_seconds),
        )
        if foreseen
    ]
    return [table(("totals", "forecast"), rows)] if rows else []


def _error(actual: float, foreseen: float) -> str:
    if actual == foreseen:
        return "exact"
    return f"{(actual / foreseen - 1) * 100:+.1f} %" if foreseen else "not foreseen"
