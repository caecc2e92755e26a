"""What only a GPU can show of the head's loss: its own matmul path, no synchronisation, memory, Liger."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from memo_runtime.losses import linear_cross_entropy, tiles

pytestmark = pytest.mark.gpu

needs_liger = pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="no liger-kernel")


def operands(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    generator = torch.Generator("cuda").manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, hidden, generator=generator, device="cuda") / hidden**0.5
    target = torch.randint(0, vocabulary, (tokens,), generator=generator, device="cuda")
    target[::5] = -100
    return states, weight.to(dtype).requires_grad_(), target


def exact(hidden: Tensor, weight: Tensor, target: Tensor, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float64."""
    inputs = [part.detach().double().requires_grad_() for part in (hidden, weight)]
    loss = linear_cross_entropy(*inputs, target, backend="native", **how)
    return loss.detach(), *torch.autograd.grad(loss.sum(), inputs)


def errors(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]


def step(hidden: Tensor, weight: Tensor, target: Tensor, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss = linear_cross_entropy(hidden, weight, target, **how)
    return loss.detach(), *torch.autograd.grad(loss.sum(), [hidden, weight])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"num_items": 1000}, {"reduction": "none"}], ids=str)
def test_tiles_are_as_exact_as_full_logits(dtype: torch.dtype, options: dict[str, Any]) -> None:
    inputs = operands(3001, 256, 5003, dtype)
    want = exact(*inputs, **options)
    tiled = errors(step(*inputs, backend="tiled", tile=256, **options), want)
    native = errors(step(*inputs, backend="native", **options), want)
    assert tiled[0] <= max(1.1 * native[0], 1e-6)
    assert all(one <= 1.1 * other + 1e-7 for one, other in zip(tiled[1:], native[1:], strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_synchronisation(reduction: str) -> None:
    hidden, weight, target = operands(2000, 128, 3000)
    count = torch.tensor(77, device="cuda")
    step(hidden, weight, target, backend="tiled", reduction=reduction)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(hidden, weight, target, backend="tiled", tile=300, reduction=reduction)
        if reduction != "none":
            step(hidden, weight, target, backend="tiled", num_items=count)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_that_of_one_tile(monkeypatch: Any) -> None:
    monkeypatch.setitem(tiles.TILE_BYTES, "cuda", 1 << 26)
    monkeypatch.setitem(tiles.ROWS_BYTES, "cuda", 1 << 23)
    tokens, width, vocabulary = 32768, 256, 32000
    hidden, weight, target = operands(tokens, width, vocabulary)
    step(hidden, weight, target, backend="tiled")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(hidden, weight, target, backend="tiled")
    extra = torch.cuda.max_memory_allocated() - before
    gradients = 2 * tokens * width + (4 + 2) * vocabulary * width
    assert extra <= gradients + (1 << 26) + 4 * (1 << 23) + 32 * tokens + (1 << 22)
    assert extra < tokens * vocabulary * 2 / 8


@needs_liger
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sum"}, {"num_items": 1000}, {"softcap": 5.0}, {"label_smoothing": 0.1}],
    ids=str,
)
def test_liger_is_as_exact_as_full_logits(dtype: torch.dtype, options: dict[str, Any]) -> None:
    inputs = operands(3001, 256, 5003, dtype)
    want = exact(*inputs, **options)
    fused = errors(step(*inputs, backend="liger", **options), want)
    native = errors(step(*inputs, backend="native", **options), want)
    assert fused[0] <= max(2 * native[0], 1e-6)
    # Parts of its dX are added in half precision at this size, and num_items rounds its gradients once more.
    assert all(one <= 1.8 * other + 1e-6 for one, other in zip(fused[1:], native[1:], strict=True))


@needs_liger
def test_liger_twice_ignored_frozen_and_autocast() -> None:
    hidden, weight, target = operands(500, 128, 3000)
    loss = linear_cross_entropy(hidden, weight, target, backend="liger", num_items=123)
    first = torch.autograd.grad(loss * 3, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss * 3, [hidden, weight])
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))

    nothing = torch.full_like(target, -100)
    loss, *gradients = step(hidden, weight, nothing, backend="liger")
    assert loss.isnan()
    assert all(not gradient.any() for gradient in gradients)

    with pytest.raises(RuntimeError, match="it would make none for the weight either"):
        linear_cross_entropy(hidden.detach(), weight, target, backend="liger")
    linear_cross_entropy(hidden.detach(), weight, target).backward()  # auto: by tiles
    assert weight.grad is not None

    single = [part.detach().float().requires_grad_() for part in (hidden, weight)]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        made = step(single[0], single[1], target, backend="liger")
    assert [part.dtype for part in made] == [torch.float32] * 3
    assert max(errors(made, exact(*single, target))) <= 2e-2


def test_scaled_float16_does_not_lose_small_gradients() -> None:
    hidden, weight, target = operands(4096, 128, 8000, torch.float16)
    loss = linear_cross_entropy(hidden, weight, target, backend="tiled")
    made = torch.autograd.grad(loss * 65536.0, [hidden, weight])
    want = exact(hidden, weight, target)[1:]
    assert max(errors(tuple(part.double() / 65536.0 for part in made), want)) <= 5e-3


def test_lazy_logits_on_cuda() -> None:
    from memo_runtime.losses.lazy_logits import LazyLogits, lazy_linear

    hidden, weight, _ = operands(64, 32, 100)
    lazy = torch.tanh(lazy_linear(hidden, weight, None)[-10:] / 30.0) * 30.0
    assert isinstance(lazy, LazyLogits)
    assert lazy.is_cuda
    want = torch.tanh(functional.linear(hidden, weight)[-10:] / 30.0) * 30.0
    torch.testing.assert_close(lazy + 0, want, rtol=2e-2, atol=2e-2)
