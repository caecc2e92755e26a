"""A profile as text: what each run of like blocks saves and costs, and the machine it was measured on.

Bytes, FLOPs and seconds of a line of blocks are those of one block.
"""

from __future__ import annotations

from memo_runtime.records import BlockProfile, Growth, Profile, Role
from memo_runtime.reporting.text_table import (
    amount,
    notes_text,
    reasons_text,
    run_name,
    runs,
    table,
    tokens_text,
)
from memo_runtime.units import format_bytes, format_flops, format_seconds

_HEADER = (
    "blocks",
    "kind",
    "token-wise",
    "mixers",
    "inputs",
    "other",
    "forward",
    "backward",
    "forward FLOPs",
)
_SHOWN = {Role.TOKEN: 0, Role.FIXED: 3, Role.WHOLE: 3, Role.RANDOM: 3, Role.MIXER: 1, Role.INPUT: 2}


def profile_table(profile: Profile) -> str:
    """``profile`` as a readable table, at most 110 columns wide."""
    device = profile.device_name or profile.device_type
    batch = f"{profile.rows} x {tokens_text({block.tokens for block in profile.blocks})}"
    title = f"profile: {batch} on {device}"
    parts = [title, "", *_blocks(profile), "", _machine(profile), *notes_text(profile.notes)]
    return "\n".join(parts)


def _cells(block: BlockProfile) -> tuple[str, ...]:
    sizes = [0, 0, 0, 0]
    for group in block.groups:
        if group.role in _SHOWN:
            sizes[_SHOWN[group.role]] += group.size.at(block.tokens)
    return (
        block.kind,
        *(amount(size, format_bytes) for size in sizes),
        _seconds(block.forward_seconds, block.tokens),
        _seconds(block.backward_seconds, block.tokens),
        amount(block.forward_flops.at(block.tokens), format_flops),
    )


def _seconds(growth: Growth, tokens: int) -> str:
    return amount(growth.exact(tokens), format_seconds)


def _key(block: BlockProfile) -> tuple[object, ...]:
    # Times differ a little between like blocks; what is saved tells them apart.
    return block.kind, block.tokens, block.groups, block.reason


def _blocks(profile: Profile) -> list[str]:
    rows = []
    reasons = []
    for run in runs(profile.blocks, _key):
        name = run_name([block.name for block in run])
        rows.append((name, *_cells(run[0])))
        reasons.append((name, run[0].reason))
    return [table(_HEADER, rows, text_columns=(0, 1)), *reasons_text(reasons)]


def _machine(profile: Profile) -> str:
    states, link = profile.states, profile.link
    assumed = ", assumed" if states.assumed else ""
    measured = "measured" if link.measured else "assumed"
    rows = [
        ("parameters", format_bytes(states.parameters), ""),
        ("gradients", format_bytes(states.gradients), ""),
        ("optimizer state", format_bytes(states.optimizer), states.optimizer_name + assumed),
        *([("its step besides", format_bytes(states.stepping), "")] if states.stepping else []),
        ("device memory", format_bytes(profile.device_bytes), ""),
        ("host memory", format_bytes(profile.host_bytes), profile.host_source),
        ("to host", f"{link.to_host / 1e9:.1f} GB/s", measured),
        ("to device", f"{link.to_device / 1e9:.1f} GB/s", measured),
    ]
    return table(("model and machine", "value", "source"), rows, text_columns=(0, 2))
