"""Races and budgets on a GPU: delayed copies with poisoned memory, leaks, and limits that hold."""

from __future__ import annotations

import gc

import pytest
import torch

import memo_runtime as memo
from memo_runtime.execution import transfer
from tests.gpu.models import batch, error, llama, step

pytestmark = pytest.mark.gpu


def _poison() -> None:
    """Fill the allocator's free memory with a pattern, so that what is read too early or freed too early shows."""
    blocks = [torch.full((n,), float("nan"), device="cuda") for n in (2**26, 2**24, 2**22, 2**20) for _ in range(4)]
    del blocks


@pytest.mark.parametrize(("policy", "alpha"), [("swap", None), ("recompute", None), ("memo", 0.5)])
@pytest.mark.parametrize("slow", ["to_host", "to_device"])
def test_delayed_copies_change_nothing(monkeypatch, policy, alpha, slow):
    model, data = llama(torch.float32, blocks=5), batch(1, 2048)
    _, plain = step(model, data)
    original = getattr(transfer.CudaTransfer, slow)

    def delayed(self, source, target):
        stream = self._out if slow == "to_host" else self._in
        with torch.cuda.stream(stream):
            torch.cuda._sleep(4_000_000)
        return original(self, source, target)

    monkeypatch.setattr(transfer.CudaTransfer, slow, delayed)
    memo.wrap(model, policy=policy, alpha=alpha, keep_last=0, loss="native")
    for _ in range(3):
        _poison()
        _, gradients = step(model, data)
        assert error(gradients, plain) <= 1e-5


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
