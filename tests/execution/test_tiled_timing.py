"""Seconds of tiles, with FLOPs for seconds: what is measured on a few tiles is what the whole block takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from memo_runtime.blocks import stopwatch
from memo_runtime.blocks.call import BlockCall
from memo_runtime.execution import tiled_timing
from memo_runtime.execution.mixers import attention
from memo_runtime.execution.mixers.attention import Kernel
from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.execution.tiled_profile import tiled_profile
from memo_runtime.execution.tiled_timing import time_tiles
from tests.capture.blocks import DocumentMask
from tests.exactness import hand_written
from tests.execution.test_tiled import double, hidden
from tests.execution.tiles import assert_exact, call_of

aten = torch.ops.aten


def _pairs(query: Any, key: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    batch, heads, tokens, depth = query
    return 4 * batch * heads * tokens * key[2] * depth


def _added(total: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def flops_of(run: Callable[[], object]) -> float:
    """Of attention as of one matrix product in each direction, whatever kernel it is; and of what is added to sums."""
    mapping = {
        aten.addmm_: _added,
        aten._scaled_dot_product_flash_attention_for_cpu: _pairs,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, *rest, **more: _pairs(*rest, **more),
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return float(counter.get_total_flops())


def flops_of_each(runs: list[Callable[[], object]], device: torch.device) -> list[float]:
    return [flops_of(run) for run in runs]


@pytest.mark.parametrize("longest", [64, 48])
def test_a_few_tiles_tell_what_the_whole_block_takes(longest, monkeypatch):
    monkeypatch.setattr(tiled_timing, "LONGEST_ATTENTION", longest)
    monkeypatch.setattr(stopwatch, "laps", flops_of_each)
    monkeypatch.setattr(tiled_timing, "longest_tile", lambda rows: 24 // rows)
    tiles, x = TiledBlock(double(hand_written.TwoMixers), tile=8), hidden(64)
    call = BlockCall.of((x,), {})
    captured = tiles.captured(call)
    found = time_tiles(tiles, captured, call)
    assert found is not None
    profile = tiled_profile(captured, call, found)
    assert profile.seconds_per_flop == 1.0  # a FLOP takes one second here
    assert profile.saved_seconds == profile.saved_flops
    for tokens in (64, 40):
        again = hidden(tokens)
        outputs: list[torch.Tensor] = []
        forward = flops_of(lambda again=again, outputs=outputs: outputs.append(tiles(again)))
        backward = flops_of(lambda outputs=outputs: outputs.pop().sum().backward())
        assert profile.forward_seconds.exact(tokens) == pytest.approx(forward, rel=1e-12)
        repeated = profile.again_flops.at(tokens) * profile.seconds_per_flop
        assert profile.backward_seconds.exact(tokens) + repeated == pytest.approx(backward, rel=1e-12)


def test_one_group_of_heads_stands_for_all(monkeypatch):
    whole = {}
    for busy in (10**9, 1):
        monkeypatch.setattr(stopwatch, "laps", flops_of_each)
        monkeypatch.setitem(tiled_timing._BUSY_ROWS, "cpu", busy)
        tiles = TiledBlock(double(hand_written.Attention), tile=8)
        call = BlockCall.of((hidden(64),), {})
        whole[busy] = time_tiles(tiles, tiles.captured(call), call)
    assert whole[1] == whole[10**9]


def test_the_fastest_kernel_of_attention_is_taken_and_named(monkeypatch):
    def both(inputs: Any, settings: Any) -> Iterator[str]:
        yield from ("cpu", "rows")

    for module in (tiled_timing, attention):
        monkeypatch.setattr(module, "kernels_for", both)
    seconds = {Kernel("cpu"): (1.0, 3.0), Kernel("rows"): (2.0, 1.0)}
    monkeypatch.setattr(tiled_timing._Attention, "seconds", lambda self, inputs, kernel, _=None: seconds[kernel])
    tiles = TiledBlock(double(hand_written.Attention), tile=8)
    call = BlockCall.of((hidden(),), {})
    captured = tiles.captured(call)
    assert time_tiles(tiles, captured, call) is not None
    assert tiled_profile(captured, call, kernels=tiles.programs.kernels).attention == ("rows",)
    assert_exact(call_of(tiles.block, hidden()), tiles)
    assert tiles.kernels == ["rows"]


def test_a_mask_of_all_pairs_is_not_timed_and_gradients_are_left_alone():
    tiles = TiledBlock(double(DocumentMask), tile=8)
    call = BlockCall.of((hidden(), torch.zeros(3, 29, dtype=torch.long)), {})
    assert time_tiles(tiles, tiles.captured(call), call) is None
    block = double(hand_written.Attention)
    tiles, call = TiledBlock(block, tile=8), BlockCall.of((hidden(),), {})
    before = torch.random.get_rng_state()
    found = time_tiles(tiles, tiles.captured(call), call)
    assert found is not None
    assert found.forward.exact(29) > 0
    assert found.backward.exact(29) > 0
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(one.grad is None for one in [*block.parameters(), call.leaves[0]])


def _causal_pairs(query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
    return _pairs(query, key) // (2 if causal else 1)


def causal_flops_of_each(runs: list[Callable[[], object]], device: torch.device) -> list[float]:
    found = []
    for run in runs:
        mapping = {aten._scaled_dot_product_flash_attention_for_cpu: _causal_pairs}
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            run()
        found.append(float(counter.get_total_flops()))
    return found


@pytest.mark.parametrize("tokens", [24, 29])
def test_chunks_are_timed_as_they_run(tokens, monkeypatch):
    """A FLOP takes a second: each candidate has those of all its chunks, whose causal half they cut differently."""
    monkeypatch.setattr(stopwatch, "laps", causal_flops_of_each)
    monkeypatch.setattr(tiled_timing, "_CHUNKS", (16, 8, 4))
    tiles = TiledBlock(double(hand_written.Attention), tile=8)
    captured = tiles.captured(BlockCall.of((hidden(tokens),), {}))
    one = tiled_timing._Attention(captured, captured.attentions[0])
    found = one._by_chunks(Kernel("cpu"), tokens, {})
    assert [kernel.queries for kernel in found] == [0, 8, 4]  # of 16 there are fewer than three
    inputs = one.inputs(tokens)
    for kernel, seconds in found.items():
        run = partial(attention.attention_forward, inputs, one._settings(inputs), seed=0, kernel=kernel)
        (whole,) = causal_flops_of_each([run], torch.device("cpu"))
        assert seconds == whole * one._times(inputs)
    # What was timed at this length is not timed again, and longer sequences are compared at this one.
    whole = {Kernel("cpu"): (1.0, 2.0)}
    assert one._by_chunks(Kernel("cpu"), tokens, whole) == found | {Kernel("cpu"): 1.0}
    monkeypatch.setattr(tiled_timing, "_CHUNKED_TOKENS", tokens)
    assert one._by_chunks(Kernel("cpu"), 4 * tokens, whole) == found


@pytest.mark.parametrize(("chunked", "taken"), [(0.97, 16), (1.0, 0)])
def test_chunks_are_taken_where_they_save_enough_and_the_longest_of_equals(chunked, taken, monkeypatch):
    forwards = {0: 2.0, 16: 2.0 * chunked, 8: 1.99 * chunked}
    monkeypatch.setattr(
        tiled_timing._Attention, "seconds", lambda self, inputs, kernel, _=None: (forwards[kernel.queries], 6.0)
    )
    monkeypatch.setattr(tiled_timing._Attention, "_chunk_sizes", lambda self, inputs, name: [16, 8])
    tiles = TiledBlock(double(hand_written.Attention), tile=8)
    captured = tiles.captured(BlockCall.of((hidden(),), {}))
    one = tiled_timing._Attention(captured, captured.attentions[0])
    one.choose(tiles.programs.kernels, 29)
    assert tiles.programs.kernels[one.key] == Kernel("cpu", taken)
    assert tiled_profile(captured, BlockCall.of((hidden(),), {}), kernels=tiles.programs.kernels).queries == (taken,)


def test_a_kernel_that_is_far_behind_is_not_timed_at_full_length(monkeypatch):
    monkeypatch.setattr(tiled_timing, "kernels_for", lambda inputs, settings: iter(("cpu", "rows")))
    monkeypatch.setattr(tiled_timing, "_COMPARED_TOKENS", 16)
    timed: list[tuple[str, int]] = []

    def seconds(self: Any, inputs: Any, kernel: Kernel) -> tuple[float, float]:
        timed.append((kernel.name, inputs.query.shape[2]))
        return (1.0, 3.0) if kernel.name == "cpu" else (4.0, 4.0)

    monkeypatch.setattr(tiled_timing._Attention, "seconds", seconds)
    tiles = TiledBlock(double(hand_written.Attention), tile=8)
    captured = tiles.captured(BlockCall.of((hidden(),), {}))
    one = tiled_timing._Attention(captured, captured.attentions[0])
    one.choose(tiles.programs.kernels, 29)
    # One is left, and no chunks to compare it with.
    assert timed == [("cpu", 16), ("rows", 16)]
    assert tiles.programs.kernels == {one.key: Kernel("cpu")}
