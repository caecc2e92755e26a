"""From the choice for a block to an action per group of bytes, and from those to exact bytes.

    rows   0          device_rows        prefix            tokens
           |  device rows  |   host rows    |    rebuilt     |      action PREFIX
           |               dropped          |   host rows    |      action TAIL
           |                 device rows                     |      action KEEP

Execution obeys these actions, and its counters equal the numbers computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from memo_runtime.records import (
    RESIDENT_ROLES,
    Action,
    BlockPlan,
    BlockProfile,
    Executor,
    Role,
    TensorGroup,
    TiledProfile,
)
from memo_runtime.sizes import MIN_SWAP_BYTES, slot_bytes, stored_bytes

_RERUN_INPUTS = (Role.INPUT, Role.MIXER, Role.RANDOM)


def splits(group: TensorGroup) -> bool:
    """Rows of ``group`` can be separated: one token dimension, no padding, the same bytes for every row."""
    size = group.size
    return group.splits and size.multiple == 1 and size.constant == 0 and size.quadratic == 0


def _fills(group: TensorGroup) -> bool:
    """Nothing else stays with ``group`` where it is left as it is."""
    return group.storage is None or group.storage.size == group.size


def row_bytes(group: TensorGroup, rows: int) -> int:
    """Bytes of ``rows`` token rows of a group that splits."""
    return round(group.size.linear * rows)


def block_actions(
    block: BlockProfile, executor: Executor, tokens: int, prefix: int, device_rows: int = 0, *, resident: bool = False
) -> tuple[Action, ...]:
    """One action per group of ``block``; ``prefix``, ``device_rows`` and ``resident`` count for ``REPLAY`` only."""
    if executor in (Executor.KEEP, Executor.NATIVE):
        return (Action.KEEP,) * len(block.groups)
    if executor is Executor.RECOMPUTE:
        return tuple(_recompute_action(group) for group in block.groups)
    if executor is Executor.TILED:
        # Tiles save nothing of what autograd would; what they stash has sizes of its own.
        return tuple(Action.KEEP if group.role in RESIDENT_ROLES else Action.REBUILD for group in block.groups)
    if prefix >= tokens:
        return tuple(_swap_action(group, tokens, device_rows) for group in block.groups)
    actions = tuple(_replay_action(group, tokens, prefix) for group in block.groups)
    if not resident:
        return actions
    stays = [group.saved and group.role in _RERUN_INPUTS for group in block.groups]
    return tuple(Action.KEEP if keep else action for keep, action in zip(stays, actions, strict=True))


def _recompute_action(group: TensorGroup) -> Action:
    if group.role in RESIDENT_ROLES:
        return Action.KEEP
    return Action.HOST if group.role is Role.INPUT else Action.REBUILD


def _host_or_keep(group: TensorGroup, tokens: int) -> Action:
    # Of a bundle what is small is packed, and the rest is not.
    worth = group.bundle is not None or group.size.at(tokens) >= MIN_SWAP_BYTES
    return Action.HOST if worth else Action.KEEP


def _swap_action(group: TensorGroup, tokens: int, device_rows: int) -> Action:
    """Nothing is run again, so what only a rerun would read is not stored at all."""
    if group.role in RESIDENT_ROLES:
        return Action.KEEP
    if not group.saved:
        return Action.REBUILD
    if device_rows and group.role is Role.TOKEN and splits(group):
        # Rows that stay are copied apart, so that the rest can go; where there is no rest they are left where they are.
        return Action.KEEP if device_rows >= tokens and _fills(group) else Action.PREFIX
    return _host_or_keep(group, tokens)


def _replay_action(group: TensorGroup, tokens: int, prefix: int) -> Action:
    """The rerun makes rows [prefix, tokens) of token-wise tensors from input, mixers and random numbers."""
    if group.role in RESIDENT_ROLES:
        return Action.KEEP
    if group.role in _RERUN_INPUTS:
        if not group.saved and splits(group) and prefix:
            return Action.TAIL
        return _host_or_keep(group, tokens)
    if group.role is Role.WHOLE:
        # A rerun on a slice cannot make these; a rerun at full length can, unless they are its own input.
        return Action.REBUILD if group.saved and not prefix else _host_or_keep(group, tokens)
    if group.role is Role.FIXED or not group.saved or not prefix:
        return Action.REBUILD
    return Action.PREFIX if splits(group) else _host_or_keep(group, tokens)


def copied_bytes(group: TensorGroup, action: Action, tokens: int, prefix: int, device_rows: int) -> int:
    """Bytes of ``group`` that go to the host and come back."""
    if action is Action.HOST:
        return (group.size if group.bundle is None else group.bundle.copied).at(tokens)
    if action is Action.PREFIX:
        return row_bytes(group, prefix - device_rows)
    if action is Action.TAIL:
        return row_bytes(group, tokens - prefix)
    return 0


def host_memory(group: TensorGroup, action: Action, tokens: int, copied: int) -> int:
    """Host memory that the ``copied`` bytes of ``group`` occupy."""
    if action is Action.HOST and group.bundle is not None:
        return group.bundle.slots.at(tokens)
    return slot_bytes(copied)


def kept_bytes(pairs: Sequence[tuple[TensorGroup, Action]], tokens: int, device_rows: int) -> int:
    """Bytes that stay on the device until the block's backward."""
    own = [(group, action) for group, action in pairs if group.saved and group.role not in RESIDENT_ROLES]
    rows = sum(row_bytes(group, device_rows) for group, action in own if action is Action.PREFIX)
    return rows + stored_bytes((group for group, action in own if action is Action.KEEP), tokens)


def plan_block(
    block: BlockProfile,
    executor: Executor,
    tokens: int,
    prefix: int = 0,
    device_rows: int = 0,
    *,
    reason: str = "",
    tile: int = 0,
    resident: bool = False,
    sent: int = 0,
    groups: int = 1,
    from_below: bool = False,
    for_above: bool = False,
    late: bool = False,
    passes: int = 0,
    mixer_inputs: bool = False,
) -> BlockPlan:
    """The exact plan of one block.

    Args:
        block: its profile. executor: how it runs. tokens: length of one sequence.
        prefix: rows that ``REPLAY`` stashes, the first ``device_rows`` of them on the device.
            For ``TILED``: rows whose products are kept, and all tokens where the stash stays on the device.
        reason: why the executor is not the policy's. tile: tokens of a tile.
        resident: what a rerun starts from and autograd saved stays on the device.
        sent: the last of the kept rows whose products go to the host. groups: of heads, for ``TILED``.
        from_below: its input is made again from the stash of the block below. for_above: that of the block above from
            its own. late, passes, mixer_inputs: see ``BlockPlan``.
    """
    if executor is Executor.TILED:
        plan = _plan_tiled(block, tokens, (prefix, sent), device_rows, tile, from_below=from_below)
        if late:
            # For every result that is made again its own stash comes once more.
            plan = replace(plan, late=True, passes=passes, bytes_to_device=(1 + passes) * plan.bytes_to_device)
        if for_above and block.tiled is not None:
            more = (passes if late else 1) * block.tiled.result_flops.at(tokens)
            plan = replace(plan, for_above=True, recomputed_flops=plan.recomputed_flops + more)
        if mixer_inputs and block.tiled is not None:
            plan = _with_inputs(plan, block.tiled)
        return plan if groups == 1 or block.tiled is None else _by_groups(plan, block.tiled, groups)
    if executor in (Executor.KEEP, Executor.NATIVE):
        prefix, device_rows = tokens, 0
    elif executor is Executor.RECOMPUTE:
        prefix, device_rows = 0, 0
    actions = block_actions(block, executor, tokens, prefix, device_rows, resident=resident)
    pairs = tuple(zip(block.groups, actions, strict=True))
    copied = [copied_bytes(group, action, tokens, prefix, device_rows) for group, action in pairs]
    return BlockPlan(
        name=block.name,
        executor=executor,
        tokens=tokens,
        prefix=prefix,
        actions=actions,
        device_rows=device_rows,
        bytes_to_host=sum(copied),
        bytes_to_device=sum(copied),
        bytes_kept=kept_bytes(pairs, tokens, device_rows),
        host_bytes=sum(
            host_memory(group, action, tokens, size) for (group, action), size in zip(pairs, copied, strict=True)
        ),
        recomputed_flops=_recomputed_flops(block, executor, tokens, prefix),
        reason=reason,
        resident=resident,
    )


def _plan_tiled(
    block: BlockProfile, tokens: int, kept: tuple[int, int], device_rows: int, tile: int, *, from_below: bool
) -> BlockPlan:
    takes = block.tiled
    prefix, sent = kept
    assert takes is not None, "a block that is planned by tiles was profiled so"
    # The input comes first.
    stash = [size.at(tokens) for size in takes.stash[1 if from_below else 0 :]]
    copied = [*([] if device_rows else stash), *_sent_tiles(takes, prefix, sent, tile)]
    return BlockPlan(
        name=block.name,
        executor=Executor.TILED,
        tokens=tokens,
        prefix=prefix,
        actions=block_actions(block, Executor.TILED, tokens, prefix),
        device_rows=device_rows,
        bytes_to_host=sum(copied),
        bytes_to_device=sum(copied),
        bytes_kept=takes.product_bytes(prefix - sent) + takes.resident.at(tokens) + (sum(stash) if device_rows else 0),
        host_bytes=sum(slot_bytes(size) for size in copied),
        recomputed_flops=takes.again_flops.at(tokens) - takes.saved_flops.at(prefix),
        tile=tile,
        sent=sent,
        from_below=from_below,
    )


def _with_inputs(plan: BlockPlan, takes: TiledProfile) -> BlockPlan:
    """``plan`` with what mixers are given on the device."""
    return replace(
        plan,
        mixer_inputs=True,
        bytes_kept=plan.bytes_kept + takes.mixer_inputs.at(plan.tokens),
        recomputed_flops=plan.recomputed_flops - takes.mixer_input_flops.at(plan.tokens),
    )


def _by_groups(plan: BlockPlan, takes: TiledProfile, groups: int) -> BlockPlan:
    """``plan`` with attention by groups of heads."""
    more = (groups - 1) * takes.group_flops.at(plan.tokens)
    return replace(plan, groups=groups, recomputed_flops=plan.recomputed_flops + more)


def _sent_tiles(takes: TiledProfile, prefix: int, sent: int, tile: int) -> list[int]:
    """Bytes of the products of each tile of each segment that go to the host."""
    tiles = [min(tile, prefix - start) for start in range(prefix - sent, prefix, tile)] if sent else []
    return [size for one in takes.products for rows in tiles if (size := one.at(rows))]


def _recomputed_flops(block: BlockProfile, executor: Executor, tokens: int, prefix: int) -> int:
    if executor is Executor.RECOMPUTE:
        return block.recompute_flops.at(tokens)
    if executor is Executor.REPLAY and prefix < tokens:
        return block.rerun_flops.at(tokens - prefix)
    return 0
