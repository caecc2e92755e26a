"""Exactness on a GPU with streams running freely, by attention backend, dtype and policy."""

from __future__ import annotations

import copy
import statistics

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import memo_runtime as memo
from tests.gpu.models import batch, error, gpt2, llama, step

pytestmark = pytest.mark.gpu

BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
POLICIES = [("swap", None), ("recompute", None), ("memo", 0.37)]


def takes_groups(backend: SDPBackend) -> bool:
    """Whether a backend takes fewer key heads than query heads."""
    return backend != SDPBackend.EFFICIENT_ATTENTION


@pytest.fixture(autouse=True)
def _repeatable():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize(("rows", "tokens"), [(1, 2048), (3, 1111)])
def test_swap_is_bit_identical_in_bfloat16(backend, rows, tokens):
    # cuDNN refuses to run in this mode; without it, it repeats its bits or the test has nothing to compare with.
    torch.use_deterministic_algorithms(backend != SDPBackend.CUDNN_ATTENTION)
    model, data = llama(torch.bfloat16, grouped=takes_groups(backend)), batch(rows, tokens)
    with sdpa_kernel(backend):
        loss, plain = step(model, data)
        repeats = [step(model, data)[1] for _ in range(6)]
        if not all(torch.equal(again[n], plain[n]) for again in repeats for n in plain):
            pytest.skip(f"{backend.name} does not give the same bits twice by itself")
        memo.wrap(model, policy="swap", keep_last=0, loss="native")
        swapped = [step(model, data) for _ in range(3)]
        totals = memo.report(model).totals
        memo.unwrap(model)
        # A kernel that differs once in some dozens of runs is caught neither by the runs before nor by chance.
        repeats = [step(model, data)[1] for _ in range(20)] if backend == SDPBackend.CUDNN_ATTENTION else []
        if not all(torch.equal(again[n], plain[n]) for again in repeats for n in plain):
            pytest.skip(f"{backend.name} does not give the same bits twice by itself")
    for swapped_loss, gradients in swapped:
        assert torch.equal(swapped_loss, loss)
        assert [n for n in plain if not torch.equal(gradients[n], plain[n])] == []
    assert totals.bytes_to_host > 0


@pytest.mark.parametrize(("policy", "alpha"), POLICIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_float64(policy, alpha, attention):
    model, data = llama(torch.float64, blocks=3, hidden=256, attention=attention), batch(2, 333)
    _, plain = step(model, data)
    memo.wrap(model, policy=policy, alpha=alpha, keep_last=0, loss="native")
    for _ in range(2):
        _, gradients = step(model, data)
        assert error(gradients, plain) <= 1e-12
    totals = memo.report(model).totals
    assert totals.bytes_to_host > 0
    assert (totals.recomputed_flops > 0) == (policy != "swap")


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize(("policy", "alpha"), POLICIES[1:])
def test_bfloat16_error_is_that_of_the_unwrapped_model(backend, policy, alpha):
    ratios = []
    for seed in range(5):
        model, data = llama(torch.bfloat16, blocks=3, grouped=takes_groups(backend)), batch(2, 1500, seed)
        reference = copy.deepcopy(model).double()
        with sdpa_kernel(SDPBackend.MATH):
            _, exact = step(reference, data)
        with sdpa_kernel(backend):
            _, plain = step(model, data)
            memo.wrap(model, policy=policy, alpha=alpha, keep_last=0)
            _, gradients = step(model, data)
        ratios.append(error(gradients, exact) / error(plain, exact))
    assert statistics.median(ratios) <= 1.1


@pytest.mark.parametrize(("policy", "alpha"), POLICIES)
def test_fused_dropout(policy, alpha):
    model, data = gpt2(torch.float32, dropout=0.1), batch(2, 700)
    _, plain = step(model, data)
    memo.wrap(model, policy=policy, alpha=alpha, keep_last=0, loss="native")
    for _ in range(2):
        _, gradients = step(model, data)
        assert error(gradients, plain) <= 1e-5


@pytest.mark.parametrize(("policy", "alpha"), POLICIES)
def test_autocast(policy, alpha):
    model, data = llama(torch.float32, blocks=3), batch(2, 900)
    with torch.autocast("cuda", torch.bfloat16):
        _, plain = step(model, data)
        memo.wrap(model, policy=policy, alpha=alpha, keep_last=0, loss="native")
        _, gradients = step(model, data)
    assert error(gradients, plain) <= (1e-6 if policy == "swap" else 2e-2)
