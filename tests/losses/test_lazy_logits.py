"""``LazyLogits`` without Hugging Face: what is recorded, and that everything else is as with real logits."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from memo_runtime.losses.lazy_logits import LazyLogits, LogitsUnavailableError, Notice, lazy_linear

VOCABULARY = 7


@pytest.fixture
def operands() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 4), (VOCABULARY, 4), (VOCABULARY,))
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return made[0].requires_grad_(), made[1].requires_grad_(), made[2].requires_grad_()


def same_gradients(one: Tensor, other: Tensor, inputs: tuple[Tensor, ...]) -> bool:
    pairs = zip(torch.autograd.grad(one, inputs), torch.autograd.grad(other, inputs), strict=True)
    return all(torch.allclose(got, want, rtol=1e-12, atol=1e-14) for got, want in pairs)


RECORDED: dict[str, Callable[[Tensor], Tensor]] = {
    "granite": lambda x: x / 8.0,
    "cohere": lambda x: x * 0.0625,
    "from the left": lambda x: 3 * x,
    "gemma": lambda x: torch.tanh(x / 30.0) * 30.0,
    "scaled cap": lambda x: torch.tanh(x * 0.3) * 7.0,
    "float": lambda x: x.float(),
    "to": lambda x: x.to(torch.bfloat16),
    "last tokens": lambda x: x[:, -2:, :],
    "all but the last": lambda x: x[..., :-1, :].contiguous(),
    "one token": lambda x: x[:, -1],
    "flat": lambda x: x.view(-1, VOCABULARY),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "all of it": lambda x: (torch.tanh(x[:, 1:].double() / 2.0) * 2.0).reshape(-1, VOCABULARY),
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_operators_stay_lazy_and_have_the_right_values(name: str, operands: Any) -> None:
    lazy, real = RECORDED[name](lazy_linear(*operands)), RECORDED[name](functional.linear(*operands))
    assert isinstance(lazy, LazyLogits)
    assert lazy._real is None
    assert (lazy.shape, lazy.dtype, lazy.device) == (real.shape, real.dtype, real.device)
    assert lazy.requires_grad == real.requires_grad
    assert lazy.is_leaf == real.is_leaf
    assert lazy.untyped_storage().nbytes() == 0
    torch.testing.assert_close(lazy + 0, real + 0, rtol=1e-6, atol=1e-6)
    if real.requires_grad:
        inputs = operands
        lazy, real = lazy.double().square().sum(), real.double().square().sum()
        pairs = zip(torch.autograd.grad(lazy, inputs), torch.autograd.grad(real, inputs), strict=True)
        for got, want in pairs:
            torch.testing.assert_close(got, want, rtol=1e-2 if name in ("to", "float") else 1e-12, atol=1e-6)


COMPUTED: dict[str, Callable[[Tensor], Any]] = {
    "argmax": lambda x: x.argmax(-1),
    "add": lambda x: x + 1,
    "tensor factor": lambda x: x * torch.tensor(2.0, dtype=torch.float64),
    "two caps": lambda x: torch.tanh(torch.tanh(x)),
    "part of the vocabulary": lambda x: x[..., :3],
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "gather": lambda x: x.gather(-1, torch.zeros(2, 5, 1, dtype=torch.int64)),
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "list": lambda x: torch.tensor(x.detach().tolist(), dtype=torch.float64),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "dlpack": lambda x: torch.from_dlpack(x.detach()),
    "deepcopy": lambda x: copy.deepcopy(x.detach()),
    "pickle": lambda x: pickle.loads(pickle.dumps(x.detach())),
    "item": lambda x: torch.tensor(x[0, 0, 0].item(), dtype=torch.float64),
    "numpy function": lambda x: torch.as_tensor(x.detach().numpy(force=True).copy()),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_any_other_use_computes_the_real_logits(name: str, operands: Any) -> None:
    got, want = COMPUTED[name](lazy_linear(*operands)), COMPUTED[name](functional.linear(*operands))
    assert type(got) is Tensor
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    if want.requires_grad:
        assert same_gradients(got.sum(), want.sum(), operands)


def test_numpy_of_logits_with_gradient_is_refused_as_always(operands: Any) -> None:
    with pytest.raises(RuntimeError, match="detach"):
        lazy_linear(*operands).numpy()


def test_torch_save(operands: Any) -> None:
    buffer = io.BytesIO()
    torch.save({"logits": lazy_linear(*operands).detach()}, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer)["logits"], functional.linear(*operands).detach())


def _write_token(x: Tensor) -> None:
    x[:, -1] = 3.0


def _write_vocabulary(x: Tensor) -> None:
    x[..., 3] = -5.0


def _write_slice(x: Tensor) -> None:
    x[:, 1:].mul_(2.0)


def _write_all(x: Tensor) -> None:
    x.div_(2.0)


@pytest.mark.parametrize("write", [_write_token, _write_vocabulary, _write_slice, _write_all])
def test_writes_reach_the_logits_their_views_and_the_gradients(write: Any, operands: Any) -> None:
    lazy, real = lazy_linear(*operands), functional.linear(*operands).clone()
    before = lazy[:, 1:], real[:, 1:]
    write(lazy)
    write(real)
    assert lazy.changed
    assert torch.equal(lazy.detach() + 0, real.detach() + 0)
    assert torch.equal(before[0].detach() + 0, before[1].detach() + 0)
    assert same_gradients(lazy.square().sum(), real.square().sum(), operands)


def test_writes_in_inference_mode_are_noticed(operands: Any) -> None:
    with torch.inference_mode():
        lazy = lazy_linear(*operands)
        assert not lazy.changed
        _write_vocabulary(lazy)
        assert lazy.changed
        assert bool((lazy + 0)[..., 3].eq(-5.0).all())


class _Square(torch.autograd.Function):
    """Stands for a fused loss of another library, which sees its input below autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        assert x.data_ptr() != 0
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad_output


def test_other_autograd_functions_get_values_and_give_gradients(operands: Any) -> None:
    got = _Square.apply(lazy_linear(*operands))
    want = functional.linear(*operands).square().sum()
    assert torch.allclose(got, want)
    assert same_gradients(got, want, operands)


def test_hooks_on_the_logits_see_their_gradient(operands: Any) -> None:
    lazy, seen = lazy_linear(*operands), []
    lazy.register_hook(seen.append)
    (lazy * 2.0 + 1.0).sum().backward()
    assert torch.equal(seen[0], torch.full((2, 5, VOCABULARY), 2.0, dtype=torch.float64))


def test_autocast_gives_the_dtype_and_the_values_of_a_linear(operands: Any) -> None:
    single = [part.detach().float() for part in operands]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lazy, real = lazy_linear(*single), functional.linear(*single)
    assert lazy.dtype is torch.bfloat16
    assert torch.equal(lazy + 0, real)


def test_reading_after_the_weight_changed_is_an_error(operands: Any) -> None:
    lazy = lazy_linear(*operands)
    with torch.no_grad():
        operands[1].add_(1.0)
    with pytest.raises(LogitsUnavailableError, match=r"before the optimizer step, or wrap with loss='native'"):
        lazy.argmax(-1)


def test_one_warning_with_the_size(operands: Any, caplog: Any) -> None:
    notice = Notice()
    with caplog.at_level(logging.WARNING, logger="memo_runtime"):
        for _ in range(3):
            lazy_linear(*operands, notice=notice).argmax(-1)
    assert len(caplog.records) == 1
    assert "logits (2, 5, 7) were read, so 560 B of float64" in caplog.text


def test_repr_computes_nothing(operands: Any) -> None:
    lazy = lazy_linear(*operands)
    assert repr(lazy) == "LazyLogits(shape=(2, 5, 7), dtype=torch.float64, not computed)"
    assert lazy._real is None
