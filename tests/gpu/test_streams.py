"""Races, waits and budgets on a GPU: every wait is needed, nothing waits on the host, nothing leaks, limits hold."""

from __future__ import annotations

import gc
import math
import random

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import memo_runtime as memo
from memo_runtime.execution.piece import Piece
from memo_runtime.native.library import native_status
from tests.exactness.hand_written import WIDTH, Attention, Stack
from tests.gpu.models import batch, error, llama, step

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
POLICIES = [("swap", None), ("recompute", None), ("memo", 0.5)]
needs_core = pytest.mark.skipif(not native_status().available, reason="the native core is not built")


def _poison() -> None:
    """Fill the allocator's free memory with NaN, so that what is read too early or freed too early shows."""
    blocks = [torch.full((n,), float("nan"), device="cuda") for n in (2**24, 2**22, 2**20, 2**18) for _ in range(4)]
    del blocks


class Delays:
    """Random delays on every stream at every submission and wait of the engine of a wrapped model.

    Landing buffers hold NaN before anything is copied into them. ``leave_out``: one kind of wait that is not made, of
    ``ready out``, ``ready in`` (a copy for compute) and ``done out``, ``done in`` (compute for a copy).
    """

    def __init__(self, model, monkeypatch, *, most=400_000):
        self.engine = model._memo.session.tools.engine
        self.draw = random.Random(7)
        self.most = most
        self.leave_out = ""
        self.directions = {}
        self.idle = torch.cuda.Stream(CUDA)
        handles = {out: self.engine.stream_handle(to_host=out) for out in (True, False)}
        self.copying = {out: torch.cuda.ExternalStream(handle, device=CUDA) for out, handle in handles.items()}
        self.submit, self.wait = self.engine._submit, self.engine._wait
        monkeypatch.setattr(self.engine, "_submit", self._submit)
        monkeypatch.setattr(self.engine, "_wait", self._wait)
        land = Piece.land

        def land_on_nan(piece, device):
            pair = land(piece, device)
            if pair is not None and pair[1].is_floating_point():
                pair[1].fill_(math.nan)
            return pair

        monkeypatch.setattr(Piece, "land", land_on_nan)

    def sleep(self, stream):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(self.draw.randrange(self.most))

    def from_idle(self, call):
        """``call`` with a compute stream that nothing runs on: the wait is made by, or for, nobody."""
        own = self.engine._stream
        self.engine._stream = lambda: int(self.idle.cuda_stream)
        try:
            return call()
        finally:
            self.engine._stream = own

    def _submit(self, out, pairs, name):
        self.sleep(torch.cuda.current_stream(CUDA))
        # A copy that does not wait for compute shows where compute is late, and not the copy.
        if not self.leave_out.startswith("ready"):
            self.sleep(self.copying[out])
        make = lambda: self.submit(out, pairs, name)  # noqa: E731
        left_out = self.leave_out == f"ready {'out' if out else 'in'}"
        ticket = self.from_idle(make) if left_out else make()
        self.directions[ticket.number] = "out" if out else "in"
        return ticket

    def _wait(self, number):
        direction = self.directions.pop(number)
        make = lambda: self.wait(number)  # noqa: E731
        if self.leave_out == f"done {direction}":
            self.from_idle(make)
        else:
            make()


@pytest.mark.parametrize(("policy", "alpha"), POLICIES)
@pytest.mark.parametrize("mode", [pytest.param("on", marks=needs_core), "off"])
def test_two_hundred_steps_with_delays_on_every_stream(monkeypatch, mode, policy, alpha):
    monkeypatch.setenv("MEMO_NATIVE", mode)
    model, data = llama(torch.float32, blocks=4, hidden=256), batch(1, 512)
    _, plain = step(model, data)
    memo.wrap(model, policy=policy, alpha=alpha, keep_last=0, loss="native")
    step(model, data)
    Delays(model, monkeypatch)
    scale = {name: value.abs().max() for name, value in plain.items()}
    worst = torch.zeros((), device=CUDA)
    for index in range(200 if policy == "memo" else 50):
        if index % 4 == 0:
            _poison()
        _, gradients = step(model, data)
        for name, value in plain.items():
            gap = (gradients[name] - value).abs().max() / scale[name]
            worst = torch.maximum(worst, gap.nan_to_num(math.inf, math.inf))
    assert worst.item() <= 1e-4
    assert memo.report(model).totals.open_copies == 0


@needs_core
@pytest.mark.parametrize("left_out", ["ready out", "ready in", "done out", "done in"])
def test_without_any_one_wait_gradients_are_wrong(monkeypatch, left_out):
    """What the test before relies on: each wait that a step makes is needed, and leaving it out shows."""
    monkeypatch.setenv("MEMO_NATIVE", "on")
    model, data = llama(torch.float32, blocks=5, hidden=512), batch(1, 2048)
    _, plain = step(model, data)
    memo.wrap(model, policy="memo", alpha=0.5, keep_last=0, loss="native")
    _, whole = step(model, data)
    assert error(whole, plain) <= 1e-5
    delays = Delays(model, monkeypatch, most=20_000_000)
    _, delayed = step(model, data)
    assert error(delayed, plain) <= 1e-5
    delays.leave_out = left_out
    wrong = 0
    for _ in range(5):
        _poison()
        _, gradients = step(model, data)
        found = error(gradients, plain)
        wrong += math.isnan(found) or found > 1e-3
    torch.cuda.synchronize()
    assert wrong > 0


@pytest.mark.parametrize("mode", [pytest.param("on", marks=needs_core), "off"])
@pytest.mark.parametrize(("policy", "alpha"), POLICIES)
def test_nothing_in_a_steady_step_waits_for_the_device(monkeypatch, mode, policy, alpha):
    monkeypatch.setenv("MEMO_NATIVE", mode)
    # Blocks alone: whether a library's loss or masks wait for the device is not the question.
    model = Stack(*(Attention() for _ in range(4))).cuda().bfloat16()
    x = torch.randn(2, 4096, WIDTH, device=CUDA, dtype=torch.bfloat16)
    memo.wrap(model, policy=policy, alpha=alpha, keep_last=0)

    def run():
        model(x)[0].sum().backward()

    for _ in range(2):  # the first profiles, plans, pins and compares reruns with their forward
        run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert memo.report(model).totals.bytes_to_host > 0


@pytest.mark.parametrize(("policy", "alpha"), POLICIES)
def test_every_phase_is_a_range_for_profilers(policy, alpha):
    model, data = llama(torch.bfloat16, blocks=3, hidden=256), batch(1, 1024)
    memo.wrap(model, policy=policy, alpha=alpha, keep_last=0, loss="native")
    step(model, data)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(model, data)
    seen = {event.name.split()[0] for event in profile.events() if event.name.startswith("memo::")}
    rebuilds = {"memo::rebuild"} if policy != "swap" else set()
    assert seen == {"memo::forward", "memo::offload", "memo::fetch"} | rebuilds


@pytest.mark.parametrize(("policy", "alpha"), POLICIES)
def test_ten_runs_give_the_same_result(policy, alpha):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            model, data = llama(torch.bfloat16, blocks=4, hidden=256), batch(1, 512)
            memo.wrap(model, policy=policy, alpha=alpha, keep_last=0, loss="native")
            step(model, data)
            runs = [step(model, data) for _ in range(10)]
    finally:
        torch.use_deterministic_algorithms(False)
    loss, gradients = runs[0]
    for other_loss, others in runs[1:]:
        assert torch.equal(other_loss, loss)
        assert [name for name in gradients if not torch.equal(others[name], gradients[name])] == []


def test_prefetched_bytes_take_the_room_of_what_is_freed():
    """With a prefix of 0, one block's tensors and no landing buffers are the peak of backward: the forecast says so."""
    model, data = llama(torch.bfloat16, blocks=6, hidden=1024), batch(1, 16384)
    memo.wrap(model, policy="recompute", keep_last=0)
    step(model, data)
    model.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    model(**data).loss.backward()
    totals = memo.report(model).totals
    assert totals.stash_peak_bytes <= totals.forecast.stash_peak_bytes
    # What head and loss take is an estimate here, and the highest.
    assert totals.peak_bytes <= totals.forecast.peak_bytes
    assert totals.open_copies == 0


class Careless(torch.nn.Module):
    """Adds to a block's input in place while that is still on its way to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 1024))
            for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            h = x * 1.0
            x = x + layer(h)
            with torch.no_grad():
                h.add_(1.0)
        return x


def test_an_input_that_is_modified_under_its_copy_is_an_error():
    model = Careless().cuda()
    memo.wrap(model, policy="swap", keep_last=0)
    x = torch.randn(1, 4096, 1024, device="cuda")
    with pytest.raises(RuntimeError, match=r"in-place|inplace"):
        model(x).sum().backward()


def test_nothing_leaks():
    model, data = llama(torch.bfloat16, blocks=3, hidden=256), batch(1, 1024)
    memo.wrap(model, policy="memo", alpha=0.5, keep_last=0)
    seen = []
    for index in range(60):
        model.zero_grad(set_to_none=True)
        model(**data).loss.backward()
        if index in (1, 59):
            torch.cuda.synchronize()
            gc.collect()
            totals = memo.report(model).totals
            seen.append((totals.host_bytes, totals.host_bytes_in_use, totals.stash_bytes, totals.open_copies,
                         torch.cuda.memory_allocated()))  # fmt: skip
    assert seen[0] == seen[1]
    assert seen[0][1:4] == (0, 0, 0)


def test_budgets_hold():
    torch.cuda.empty_cache()
    model, data = llama(torch.bfloat16, blocks=6, hidden=1024), batch(1, 16384)
    torch.cuda.reset_peak_memory_stats()
    step(model, data)
    free = torch.cuda.max_memory_allocated()
    states = sum(p.numel() * p.element_size() for p in model.parameters())
    budget = int(states * 4 + (free - states) * 0.6)
    torch.cuda.reset_peak_memory_stats()
    memo.wrap(model, budget=budget, host_budget="2GiB")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        model(**data).loss.backward()
        optimizer.step()
    totals = memo.report(model).totals
    assert torch.cuda.max_memory_allocated() <= budget
    assert totals.host_bytes <= 2 * 2**30
    assert totals.bytes_to_host > 0 or totals.recomputed_flops > 0
