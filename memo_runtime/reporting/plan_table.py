"""A plan as text: what was asked, what each run of like blocks does, and what the step is forecast to cost.

    plan: policy memo, alpha 0.375, 3 x 4,096 tokens on cpu

    blocks             executor  alpha    to host  to device  kept  host memory   recomputed
    model.layers.0-29  replay    0.375  48.00 MiB  48.00 MiB     -    48.00 MiB  12.00 GFLOP

Bytes and FLOPs are those of one block; the line ``total`` is the sum over all of them. ``sent``: tokens whose products
go to the host, where a block by tiles sends some. Behind the table is how attention runs, where that is not all heads
and all queries at once.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from memo_runtime.records import BlockPlan, Executor, Plan
from memo_runtime.reporting.text_table import (
    WIDTH,
    amount,
    notes_text,
    reasons_text,
    run_name,
    run_rows,
    runs,
    table,
    tokens_text,
)
from memo_runtime.units import format_bytes, format_flops, format_seconds

_HEADER = ("blocks", "executor", "alpha", "to host", "to device", "kept", "host memory", "recomputed", "tile")


def plan_table(plan: Plan) -> str:
    """``plan`` as a readable table, at most 110 columns wide."""
    notes = notes_text((*plan.notes, *plan.profile.notes))
    return "\n".join([_title(plan), "", *_blocks(plan), "", _forecast(plan), *notes])


def _title(plan: Plan) -> str:
    asked = f"policy {plan.policy}"
    if plan.alpha is not None:
        asked += f", alpha {plan.alpha:g}"
    profile = plan.profile
    batch = f"{profile.rows} x {tokens_text({block.tokens for block in plan.blocks})}"
    device = profile.device_name or profile.device_type
    several = f", one of {plan.gpus} for {tokens_text({plan.seq_len})}" if plan.gpus > 1 else ""
    return f"plan: {asked}, {batch} on {device}{several}"


def _key(block: BlockPlan) -> tuple[object, ...]:
    """All that a line shows, so that only blocks with the same line become one."""
    return (
        block.executor,
        block.alpha,
        block.bytes_to_host,
        block.bytes_to_device,
        block.bytes_kept,
        block.host_bytes,
        block.recomputed_flops,
        block.reason,
        block.tile,
        block.sent,
        block.groups,
        block.from_below,
        block.mixer_inputs,
    )


def _blocks(plan: Plan) -> list[str]:
    rows, reasons = run_rows(plan.blocks, _key, _cells)
    if len(plan.blocks) > 1:
        rows.append(_total(plan.blocks))
    sends = any(block.sent for block in plan.blocks)
    header = (*_HEADER, "sent") if sends else _HEADER
    shown = table(header, [row[: len(header)] for row in rows], text_columns=(0, 1))
    below = [block.name for block in plan.blocks if block.from_below]
    stay = [block.name for block in plan.blocks if block.mixer_inputs]
    told = [*_named("inputs made again from the block below", below), *_named("what attention is given stays", stay)]
    return [shown, *_attention(plan), *told, *reasons_text(reasons)]


def _named(what: str, names: Sequence[str]) -> list[str]:
    """Blocks of which something is true: ``inputs made again from the block below: 8, of layers.1 ... layers.15``."""
    if not names:
        return []
    ends = dict.fromkeys((names[0], names[-1]))
    return ["", *textwrap.wrap(f"{what}: {len(names)}, of {' ... '.join(ends)}", WIDTH)]


def _attention(plan: Plan) -> list[str]:
    """How attention runs, by blocks: ``attention of model.layers.0-29: cudnn, 4 groups, queries by 32,768``."""
    by_tiles = {block.name: block.tiled for block in plan.profile.blocks}
    told: dict[str, tuple[str, ...]] = {}
    for block in plan.blocks:
        takes = by_tiles.get(block.name)
        if block.executor is not Executor.TILED or takes is None:
            continue
        told[block.name] = takes.attention_texts(block.groups)
    lines = []
    for some in runs(list(told), lambda name: told[name]):
        if any("," in text for text in told[some[0]]):
            lines += textwrap.wrap(f"attention of {run_name(some)}: {'; '.join(told[some[0]])}", WIDTH)
    return ["", *lines] if lines else []


def _cells(block: BlockPlan) -> tuple[str, ...]:
    return (
        str(block.executor),
        f"{block.alpha:.3f}" if block.executor in (Executor.REPLAY, Executor.TILED) else "-",
        amount(block.bytes_to_host, format_bytes),
        amount(block.bytes_to_device, format_bytes),
        amount(block.bytes_kept, format_bytes),
        amount(block.host_bytes, format_bytes),
        amount(block.recomputed_flops, format_flops),
        f"{block.tile:,}" if block.tile else "",
        f"{block.sent:,}" if block.sent else "",
    )


def _total(blocks: Sequence[BlockPlan]) -> tuple[str, ...]:
    return (
        "total",
        "",
        "",
        amount(sum(block.bytes_to_host for block in blocks), format_bytes),
        amount(sum(block.bytes_to_device for block in blocks), format_bytes),
        amount(sum(block.bytes_kept for block in blocks), format_bytes),
        amount(sum(block.host_bytes for block in blocks), format_bytes),
        amount(sum(block.recomputed_flops for block in blocks), format_flops),
        "",
        "",
    )


def _forecast(plan: Plan) -> str:
    forecast, limits = plan.forecast, plan.limits
    rows = [
        (
            "device peak",
            format_bytes(forecast.peak_bytes),
            format_bytes(limits.device_bytes),
            limits.device_source,
        ),
        (
            "host memory",
            format_bytes(forecast.host_bytes),
            format_bytes(limits.host_bytes),
            limits.host_source,
        ),
    ]
    if plan.floor_bytes:
        rows.append(("device floor", format_bytes(plan.floor_bytes), "", "with every activation sent away"))
    if forecast.collective_bytes:
        alone = f"{format_seconds(forecast.collective_seconds)} alone; in the step time as far as nothing hides it"
        rows.append(("sent to GPUs", format_bytes(forecast.collective_bytes), "", alone))
    rows.append(("step time", format_seconds(forecast.step_seconds), "", ""))
    if forecast.mfu:
        rows.append(("MFU", f"{100 * forecast.mfu:.1f} %", "", "of the dense bf16 peak; nothing repeated is counted"))
    return table(("forecast", "value", "limit", "source"), rows, text_columns=(0, 3))
