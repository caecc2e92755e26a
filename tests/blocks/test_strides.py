"""Cuts lie in memory as a tensor of their length would."""

from __future__ import annotations

import pytest
import torch

from memo_runtime.blocks.region import as_made, copied_as_it_is, resized

WHOLE, PART = 12, 5


def made(kind: str, tokens: int) -> torch.Tensor:
    if kind == "packed":
        return torch.randn(3, tokens, 4)
    if kind == "other order":
        return torch.randn(tokens, 3, 4).transpose(0, 1)
    if kind == "without the first token":
        return torch.randn(3, tokens + 1, 4)[:, 1:]
    if kind == "one of three":
        return torch.randn(3, tokens, 3, 4)[:, :, 1]
    if kind == "one of three layers":
        return torch.randn(3, 3, tokens, 4)[:, 1]
    assert kind == "expanded"
    return torch.randn(1, tokens, 4).expand(3, -1, -1)


@pytest.mark.parametrize(
    "kind",
    ["packed", "other order", "without the first token", "one of three", "one of three layers", "expanded"],
)
def test_a_cut_has_the_strides_of_one_as_long(kind: str) -> None:
    whole = made(kind, WHOLE)
    assert resized(whole.shape, whole.stride(), 1, PART) == made(kind, PART).stride()
    part = as_made(whole[:, :PART], whole.shape, whole.stride(), 1)
    assert part.stride() == made(kind, PART).stride()
    assert torch.equal(part, whole[:, :PART])
    copied = copied_as_it_is(whole.requires_grad_())
    assert copied.stride() == whole.stride()
    assert torch.equal(copied, whole)
    assert not copied.is_leaf


def test_what_has_no_elements_is_cut_as_it_is() -> None:
    whole = torch.empty(2, WHOLE, 3)[..., :0]
    assert resized(whole.shape, whole.stride(), 1, PART) == whole.stride()
    assert as_made(whole[:, :PART], whole.shape, whole.stride(), 1).shape == (2, PART, 0)
