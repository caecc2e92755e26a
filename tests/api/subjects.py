"""What the front door is tried on beside towers: a tiny Llama; and one step of either, with what must hold."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import memo_runtime as memo
from memo_runtime.reports import Report, Totals
from tests.api.towers import BOUND, POLICIES
from tests.integrations.models import batch, make

Gradients = dict[str, Tensor]


def llama(**how: Any) -> Any:
    """A Llama as it comes."""
    return make("llama", **how)


def wrapped_llama(**settings: Any) -> Any:
    """A Llama as it comes, wrapped: its head and loss run by tiles."""
    return memo.wrap(make("llama"), **(settings or POLICIES["memo"]))


def loss_of(model: nn.Module, inputs: Any = None) -> Tensor:
    """Loss of a tower (mean square) or of a Hugging Face model (its own)."""
    if isinstance(inputs, Tensor):
        output = model(inputs)
        return (output.double() if output.dtype is torch.float64 else output.float()).square().mean()
    loss: Tensor = model(**(batch(tokens=24) if inputs is None else inputs)).loss
    return loss


def step(model: nn.Module, inputs: Any = None) -> Gradients:
    """Forward and backward; the gradients by name, taken away from the model."""
    model.zero_grad(set_to_none=True)
    loss_of(model, inputs).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_close(got: Gradients, want: Gradients, bound: float = BOUND) -> None:
    """Every gradient is there, and all together are within ``bound`` relative L2 error."""
    assert list(got) == list(want)
    for name, value in want.items():
        gap = torch.linalg.vector_norm((got[name] - value).double())
        assert gap <= bound * torch.linalg.vector_norm(value.double()), name


def assert_trains_as(model: nn.Module, plain: nn.Module, inputs: Any = None, *, bound: float = BOUND) -> None:
    """Both models have the same gradients, whatever is around ``model``'s parameter names."""
    got, want = step(model, inputs), step(plain, inputs)
    assert len(got) == len(want)
    assert_close(dict(zip(want, got.values(), strict=True)), want, bound)


def totals(model: nn.Module) -> Totals:
    return memo.report(model).totals


def acted(model: nn.Module) -> Report:
    """The report, after seeing that the last step moved bytes by the plan."""
    report = memo.report(model)
    assert report.totals.bytes_to_host == report.totals.forecast.bytes_to_host > 0
    assert report.totals.bytes_to_device == report.totals.forecast.bytes_to_device > 0
    assert report.totals.recomputed_flops == report.totals.forecast.recomputed_flops
    return report


def assert_nothing_held(model: nn.Module) -> None:
    """No host bytes in use, nothing of a stash alive, no copy open."""
    gc.collect()
    left = totals(model)
    assert (left.host_bytes_in_use, left.stash_bytes, left.open_copies) == (0, 0, 0)


def refused(error: type[Exception], call: Callable[..., Any], *args: Any, **how: Any) -> str:
    """The message of the ``error`` that ``call`` raises; its traceback, and what that holds, is let go."""
    message = None
    try:
        call(*args, **how)
    except error as caught:
        message = str(caught) if type(caught) is error else None
    if message is None:
        raise AssertionError(f"{error.__name__} was not raised")
    return message
