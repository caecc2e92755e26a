"""Seconds at lengths that were not timed: the block without its attention on a line, attention by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

import memo_runtime as memo
from memo_runtime.blocks import stopwatch
from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.stopwatch import Beside
from memo_runtime.profiling import mixers, timing
from memo_runtime.profiling.mixers import Attention, is_attention, time_attention
from memo_runtime.profiling.observe import OperatorRecord, observe
from memo_runtime.profiling.outside_time import outside_seconds
from memo_runtime.profiling.timing import lengths_to_time
from memo_runtime.records import BlockProfile, Growth
from tests.api.towers import Block, tower


def attention(*, rows: int = 2, heads: int = 4, groups: int = 4, masked: bool = False) -> OperatorRecord:
    """What attention on 24 tokens looked like."""
    q, k, v = (torch.randn(rows, 24, n, 8).transpose(1, 2) for n in (heads, groups, groups))
    mask = torch.zeros(24, 24) if masked else None

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=not masked, enable_gqa=heads != groups
        )

    seen = observe(forward, BlockCall.of((q.requires_grad_(), k, v), {}))
    return next(record for record in seen.operators if "scaled_dot_product" in record.key[0])


def test_attention_is_run_at_the_asked_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one row, and on as few groups of heads as keep the device busy; then times what was left out."""
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(stopwatch, "laps", lambda runs, _: [(run(), 2.0)[1] for run in runs])
    run = mixers._result

    def watched(record: OperatorRecord, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        shapes.append(tuple(tensors[0].shape))
        return run(record, tensors)

    monkeypatch.setattr(mixers, "_result", watched)
    found = time_attention([attention()], [16, 70, 300])
    assert list(dict.fromkeys(shapes)) == [(1, 4, 16, 8), (1, 4, 70, 8), (1, 1, 300, 8)]
    assert found == {16: Attention(4.0, 4.0), 70: Attention(4.0, 4.0), 300: Attention(16.0, 16.0)}


def test_stretched_tokens_are_those_of_the_crop_repeated() -> None:
    tensor = torch.randn(2, 4, 24, 8)
    made = mixers._stretched(tensor, 60, 2)
    assert made.shape == (1, 2, 60, 8)
    assert torch.equal(made[0], torch.cat([tensor[0, :2], tensor[0, :2], tensor[0, :2, :12]], dim=1))
    assert made.requires_grad


def test_what_cannot_be_stretched_is_not_timed_alone() -> None:
    assert is_attention(attention())
    assert not is_attention(attention(masked=True)), "a mask is as large as all scores"
    record = attention()
    record.key = ("aten.bmm.default", 0)
    assert not is_attention(record)


def samples(*, quadratic: float) -> list[timing._Sample]:
    """At three lengths: launches, a line, and attention of ``quadratic``."""
    seconds = {n: 1.0 + 0.5 * n + quadratic * n * n for n in (10, 20, 40)}
    return [timing._Sample(n, value, value, 0.0) for n, value in seconds.items()]


def test_attention_that_gets_slower_with_length_is_told_from_the_rest() -> None:
    at = {n: 0.01 * n * n for n in (10, 20, 40)} | {160: 0.02 * 160 * 160}
    growth = timing._seconds(samples(quadratic=0.01), lambda sample: sample.forward, at)
    assert growth.exact(160) == pytest.approx(1.0 + 0.5 * 160 + 0.02 * 160 * 160)
    plain = timing._seconds(samples(quadratic=0.01), lambda sample: sample.forward, {})
    assert plain.exact(160) == pytest.approx(1.0 + 0.5 * 160 + 0.01 * 160 * 160)


def test_attention_that_takes_longer_alone_than_in_its_block_says_nothing() -> None:
    at = {10: 100.0, 20: 100.0, 40: 100.0, 160: 400.0}
    assert timing._seconds(samples(quadratic=0.01), lambda sample: sample.forward, at).exact(160) == pytest.approx(
        1.0 + 0.5 * 160 + 0.01 * 160 * 160
    )


def test_a_long_block_has_its_attention_timed_at_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    inner = timing.time_attention

    def watched(records: Sequence[OperatorRecord], lengths: Sequence[int], beside: object) -> object:
        asked.append(list(lengths))
        return inner(records, lengths)

    monkeypatch.setattr(timing, "time_attention", watched)
    for tokens in (512, 640):
        memo.profile(tower(2), (torch.randn(1, tokens, 8, dtype=torch.float64),))
    assert asked == [[128, 256, 512, 640]]
    monkeypatch.setattr(timing, "LONGEST_ATTENTION", 600)
    memo.profile(tower(2), (torch.randn(1, 640, 8, dtype=torch.float64),))
    assert asked[1:] == [[128, 256, 512, 600]], "beyond that it is continued"


def test_attention_for_which_there_is_no_room_is_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> object:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(timing, "time_attention", full)
    block = memo.profile(tower(2), (torch.randn(1, 640, 8, dtype=torch.float64),)).blocks[0]
    assert block.sliceable
    assert block.forward_seconds.exact(640) > 0


@pytest.mark.parametrize("steady", [True, False])
def test_samples_are_taken_until_two_agree(steady: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def sample(_: object, tokens: int) -> timing._Sample:
        taken.append(tokens)
        seconds = 0.1 if steady else 0.1 * 2 ** len(taken)
        return timing._Sample(tokens, seconds, seconds, seconds)

    monkeypatch.setattr(timing._Timer, "sample", sample)
    monkeypatch.setattr(timing, "_LONG_SECONDS", 100.0)
    block = Block()
    call, cpu = BlockCall.of((torch.randn(1, 8, 32),), {}), torch.device("cpu")
    timer = timing._Timer(block, block.forward, call, None, None, cpu)  # type: ignore[arg-type]
    found = timer.median(8)
    assert len(taken) == (2 if steady else timing._MOST_SAMPLES)
    assert found.forward == pytest.approx(0.1 if steady else 0.8), "the first is no sample where it differs"


@pytest.mark.parametrize("longer", [False, True])
def test_on_a_gpu_rounds_follow_each_other_without_a_pause(longer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward and rerun, each behind a start and the work of a longer run, whose time is nobody's."""
    done: list[str] = []

    def laps(runs: Sequence[Callable[[], object]], _: object) -> list[float]:
        for run in runs:
            run()
        return [float(10 * (number % 6) + number // 6) / 1000 for number in range(len(runs))]

    monkeypatch.setattr(stopwatch, "laps", laps)
    profile = memo.profile(tower(2), (torch.randn(1, 16, 8, dtype=torch.float64),)).blocks[0]
    block = Block().double()

    def forward(x: torch.Tensor) -> torch.Tensor:
        done.append("forward")
        return block(x)

    start = SimpleNamespace(set=lambda look=True: done.append("look" if look else "start"))
    call = BlockCall.of((torch.randn(1, 16, 32, dtype=torch.float64, requires_grad=True),), {})
    timer = timing._Timer(block, forward, call, profile, start, torch.device("cpu"))  # type: ignore[arg-type]
    timer.beside = Beside(17 if longer else 16, lambda: done.append("beside"))
    like = timing._Sample(16, 0.1, 0.1, 0.1, write=7.0)
    with torch.enable_grad():
        timer._captured(timer.crop(16), 16)
        done.clear()
        found = timer._without_pause(16, like)
    assert (found.forward, found.backward, found.rerun, found.write) == (0.011, 0.031, 0.051, 7.0)
    begin = ["beside", "start"] if longer else ["start"]
    # Backward runs no forward, and the rerun does.
    assert done == [*begin, "forward", *begin, *begin, "forward"] * (len(done) // (3 * len(begin) + 2))


def test_attention_is_timed_beside_as_much_of_its_block_as_a_step_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the heads of one row of two: an eighth of the tokens."""
    done: list[str] = []
    monkeypatch.setattr(stopwatch, "laps", lambda runs, _: [(run(), 2.0)[1] for run in runs])
    run = mixers._result

    def watched(record: OperatorRecord, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        done.append("attention")
        return run(record, tensors)

    monkeypatch.setattr(mixers, "_result", watched)
    beside = Beside(20, lambda: done.append("beside"))
    time_attention([attention()], [480], beside)
    assert done == ["beside"] * 3 + ["attention"] + ["beside"] * 3 + ["attention"]
    done.clear()
    time_attention([attention()], [24], beside)
    assert done[:2] == ["beside", "attention"], "less than one is one"


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.head = nn.Linear(16, 100, bias=False)


def test_head_and_loss_by_tiles_are_timed() -> None:
    model = Headed()
    blocks = [
        BlockProfile(
            name=f"layers.{number}", kind="Linear", stack=0, tokens=64, token_dim=1, input_leaf=0, timed_tokens=64,
            forward_seconds=Growth(linear=1.0), forward_flops=Growth(linear=1.0),
        )
        for number in range(2)
    ]  # fmt: skip
    hidden = torch.randn(2, 64, 16)
    guessed = outside_seconds(model, blocks, 2, hidden, tiled_loss=False).exact(64)
    assert guessed == 6 * 2 * 64 * 1600
    measured = outside_seconds(model, blocks, 2, hidden, tiled_loss=True).exact(64)
    assert 0 < measured < 1
    assert all(parameter.grad is None for parameter in model.parameters())
    assert outside_seconds(model, blocks, 2, hidden[..., :8], tiled_loss=True).exact(64) == guessed, "of another model"


@pytest.mark.parametrize(
    ("tokens", "longest"),
    [(1, 1), (4096, 4096), (8192, 8192), (9000, 8192), (16384, 8192), (24000, 12000), (32768, 16384), (65536, 16384),
     (131072, 32768), (1 << 18, 65536), (1 << 21, 65536)],
)  # fmt: skip
def test_a_gpu_is_timed_at_a_quarter_of_the_length_or_half_where_that_is_short(tokens: int, longest: int) -> None:
    lengths = lengths_to_time(tokens, "cuda")
    assert lengths[-1] == longest
    assert lengths == tuple(sorted(lengths))
    assert set(lengths) == {max(1, longest // 4), max(1, longest // 2), longest}


def test_a_cpu_is_timed_at_a_length_that_is_soon_over() -> None:
    assert lengths_to_time(1 << 20, "cpu") == (128, 256, 512)
